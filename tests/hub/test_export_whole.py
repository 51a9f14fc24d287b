"""An export appears whole or not at all, and leaves nothing of the one before that would be taken for a part of it."""

from pathlib import Path

import pytest
import torch
from small_population import vit as made

from hf_wash.hub import export_model


def vit(seed=0):
    torch.manual_seed(seed)
    return made()


class Failing:
    """A processor that fails when half of it is written."""

    def __init__(self, error):
        self.error = error

    def save_pretrained(self, folder):
        (Path(folder) / "preprocessor_config.json").write_text("{")
        raise self.error("the disk is full")


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("before", ["nothing", "a folder of others", "an export"])
def test_an_export_that_does_not_end_leaves_what_was_there(before, error, tmp_path):
    folder = tmp_path / "runs" / "soup"
    if before != "nothing":
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "README.md").write_text("mine")
    if before == "an export":
        export_model(vit(0), folder, check=False)
    contents = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(error, match="the disk is full"):
        export_model(vit(1), folder, processing_class=Failing(error), check=False)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == contents


def test_weights_of_an_export_before_are_not_left_beside_the_new_ones(tmp_path):
    for name in (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ):
        (tmp_path / name).write_text("old")
    (tmp_path / "model-of-mine.safetensors").write_text("mine")
    export_model(vit(), tmp_path, check=False)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"config.json", "model.safetensors", "model-of-mine.safetensors"}


def test_what_is_no_file_is_not_replaced(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"config.json is no ordinary file"):
        export_model(vit(), tmp_path, check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
