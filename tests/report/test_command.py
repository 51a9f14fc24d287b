"""`hf-wash report`: of a run's folder, and of images that its saved members are measured on."""

import json

import pytest
import torch
from hub import tiny_runs
from PIL import Image

from hf_wash.cli import main


@pytest.fixture(scope="module", params=["vit", "timm"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / request.param
    trainer = tiny_runs.finished_run(folder, request.param)
    return folder, trainer


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for name in tiny_runs.NAMES:
        (folder / name).mkdir()
        for index in range(3):
            pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{index}.png")
    return folder


def command(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["report", *map(str, arguments)])
    return stopped.value.code


def test_a_folder_is_reported_on_and_measured_where_images_are_named(run, photos, capsys):
    folder, trainer = run
    assert command(folder) == 0
    assert str(folder / "report/index.html") in capsys.readouterr().out
    assert "have not been looked at" in (folder / "report/index.html").read_text()

    has_batch_norm = any("running_mean" in name for name, _ in trainer.model.named_buffers())
    training = ["--train-data", photos] if has_batch_norm else []
    assert command(folder, "--eval-data", photos, "--batch-size", 4, *training) == 0
    found = json.loads((folder / "report/measurements.json").read_text())
    assert found["examples"] == 9 and found["data"] == f"{photos.name}, evenly spaced"
    assert set(found["calibration"]) == {"member 0", "member 1", "ensemble", "soup"}
    assert (found["batch_norm"] is not None) == has_batch_norm
    line = found["lines"][0]
    assert (line["from"], line["to"]) == ("member 0", "member 1") and len(line["loss"]) == 9
    if not has_batch_norm:
        assert line["loss"][0] == pytest.approx(found["answers"]["member 0"]["loss"], rel=1e-5)
        # The uniform soup of two lies in the middle of the line between them.
        assert line["loss"][4] == pytest.approx(found["answers"]["soup"]["loss"], rel=1e-4)
    page = (folder / "report/index.html").read_text()
    assert 'id="lines"' in page and "have not been looked at" not in page
    # What was measured is kept for the next time.
    assert command(folder) == 0 and 'id="lines"' in (folder / "report/index.html").read_text()


@pytest.mark.parametrize("kind", ["vit", "timm"])
def test_the_plane_through_three_saved_members_is_looked_at(kind, photos, tmp_path):
    tiny_runs.finished_run(tmp_path / "run", kind, population_size=3)
    training = ["--train-data", photos] if kind == "timm" else []  # it has BatchNorm
    assert command(tmp_path / "run", "--eval-data", photos, "--plane", *training) == 0
    found = json.loads((tmp_path / "run/report/measurements.json").read_text())
    plane = found["plane"]
    assert [len(row) for row in plane["loss"]] == [9] * 9
    assert all(isinstance(loss, float) for row in plane["loss"] for loss in row)
    corners = [plane["places"][f"member {i}"] for i in range(3)]
    assert plane["places"]["soup"] == pytest.approx([sum(axis) / 3 for axis in zip(*corners, strict=True)], rel=1e-3)
    assert plane["soup_away"] == pytest.approx(0, abs=1e-3)
    page = (tmp_path / "run/report/index.html").read_text()
    assert 'id="plane"' in page and (tmp_path / "run/report/plane-dark.png").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "There is no folder nowhere."),
        (["."], "holds nothing of a run"),
        ([".", "--train-data", "."], "--train-data is for measuring on --eval-data"),
        ([".", "--plane"], "--plane is measured on --eval-data"),
        ([".", "--eval-data", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_mistakes_are_a_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert command(*arguments) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
