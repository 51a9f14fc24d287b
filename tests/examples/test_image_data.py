"""`examples/image_data.py`: images that cannot be opened, labels that cannot be read, folders that make no classes."""

import os
import sys
from pathlib import Path

import datasets
import image_data
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from image_data import DataArguments, EvaluationView, TrainingView, load_data
from PIL import Image as PilImage
from transformers import ViTImageProcessor


def photo(path, size=(40, 30)):
    """A JPEG or PNG of noise, which no decoder can guess."""
    noise = np.random.default_rng(size).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    PilImage.fromarray(noise).save(path)


def cut_off(path):
    """The first two thirds of a file: its header is whole."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


@pytest.fixture
def photos(tmp_path):
    """Two classes of ten images, JPEGs and PNGs."""
    for name, ending in (("ant", "jpg"), ("bee", "png")):
        for index in range(10):
            photo(tmp_path / "photos" / name / f"{index}.{ending}", (40 + index, 30))
    return tmp_path / "photos"


DAMAGES = {
    "a JPEG that breaks off": (lambda photos: cut_off(photos / "ant/3.jpg"), "ant/3.jpg", "truncated"),
    "a PNG that breaks off": (lambda photos: cut_off(photos / "bee/3.png"), "bee/3.png", ""),
    "an empty file": (lambda photos: (photos / "ant/4.jpg").write_bytes(b""), "ant/4.jpg", "cannot identify"),
    "a text": (lambda photos: (photos / "bee/5.png").write_text("<html>"), "bee/5.png", "cannot identify"),
    "a link to nothing": (lambda photos: (photos / "bee/x.png").symlink_to(photos / "no.png"), "bee/x.png", "nothing"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_an_image_that_cannot_be_opened_is_named_before_training(photos, kind):
    damage, name, reason = DAMAGES[kind]
    damage(photos)
    total = 21 if "link" in kind else 20
    with pytest.raises(
        ValueError, match=f"1 of the {total} images cannot be opened; the first is .*{name} "
    ) as caught:
        load_data(DataArguments(data_dir=str(photos)))
    message = str(caught.value)
    assert reason in message and message.endswith("or leave them out with --skip_bad_images.") and "\n" not in message


def test_a_file_that_a_table_names_and_is_missing_is_named(photos):
    names = [f"{folder}/{path.name}" for folder in ("ant", "bee") for path in sorted((photos / folder).iterdir())]
    lines = [f"{name},{name[:3]}" for name in [*names, "ant/gone.jpg"]]
    (photos / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    with pytest.raises(ValueError, match=r"1 of the 21 images .* first is .*gone\.jpg \(there is no such file\)"):
        load_data(DataArguments(data_dir=str(photos), label_column="label"))


def test_bad_images_are_left_out_on_demand_with_a_warning_that_counts(photos, monkeypatch):
    for damage, _, _ in DAMAGES.values():
        damage(photos)
    said = []
    monkeypatch.setattr(image_data.logger, "warning", said.append)
    data = load_data(DataArguments(data_dir=str(photos), skip_bad_images=True))
    assert len(data.train) + len(data.eval) == 16
    assert [image.size for image in data.train["image"][:]] and [image.size for image in data.eval["image"][:]]
    assert len(said) == 1 and said[0].startswith("5 of the 21 images cannot be opened; the first is ")


def test_what_was_found_is_not_remembered_once_it_is_mended(photos):
    """As after a mount that came late: neither names nor times change."""
    load_data(DataArguments(data_dir=str(photos)))
    path = photos / "ant/3.jpg"
    whole, time = path.read_bytes(), path.stat().st_mtime
    cut_off(path)
    with pytest.raises(ValueError, match="1 of the 20"):
        load_data(DataArguments(data_dir=str(photos)))
    damaged = path.stat().st_mtime_ns
    path.write_bytes(whole)
    os.utime(path, ns=(damaged, damaged))
    load_data(DataArguments(data_dir=str(photos)))
    assert time <= damaged


def test_nothing_is_left_is_said(photos):
    for path in photos.rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="Nothing is left"):
        load_data(DataArguments(data_dir=str(photos), skip_bad_images=True))


def test_images_of_the_hub_are_opened_only_where_bad_ones_are_to_be_left_out(monkeypatch):
    good = {"bytes": image_bytes(), "path": None}
    bad = {"bytes": good["bytes"][:40], "path": "far/away.png"}
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    data = Dataset.from_dict({"image": [good, bad] * 10, "label": [0, 1, 1, 0] * 5}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: DatasetDict({"train": data}))
    assert len(load_data(DataArguments(dataset_name="x")).train) == 16
    said = []
    monkeypatch.setattr(image_data.logger, "warning", said.append)
    kept = load_data(DataArguments(dataset_name="x", skip_bad_images=True))
    assert len(kept.train) + len(kept.eval) == 10 and "10 of the 20 images" in said[0]


def image_bytes():
    import io

    file = io.BytesIO()
    PilImage.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


# Labels


def test_a_sample_without_a_label_is_named_or_left_out(photos, monkeypatch):
    names = [f"{folder}/{path.name}" for folder in ("ant", "bee") for path in sorted((photos / folder).iterdir())]
    lines = [f"{name},{'' if '7' in name else name[:3]}" for name in names]
    (photos / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    arguments = {"data_dir": str(photos), "label_column": "label"}
    with pytest.raises(ValueError, match=r"2 of the 20 samples of the split 'train' have no label .*ant/7\.jpg"):
        load_data(DataArguments(**arguments))
    said = []
    monkeypatch.setattr(image_data.logger, "warning", said.append)
    data = load_data(DataArguments(**arguments, skip_bad_images=True))
    assert len(data.train) + len(data.eval) == 18 and data.label_names == ["ant", "bee"]
    assert said[0].startswith("2 of the 20 samples")


def test_a_table_of_labels_that_is_no_text_is_one_sentence(photos):
    (photos / "metadata.csv").write_bytes(b"file_name,label\nant/1.jpg,\xff\xfe\n")
    with pytest.raises(ValueError, match=r"Could not load .*: UnicodeDecodeError: ") as caught:
        load_data(DataArguments(data_dir=str(photos)))
    assert "\n" not in str(caught.value)


# Classes


def test_a_folder_with_a_single_class_says_so(tmp_path):
    photo(tmp_path / "one/cat/1.png")
    photo(tmp_path / "one/cat/2.png")
    with pytest.raises(ValueError, match="has images of a single class to train on, 'cat': nothing to tell apart"):
        load_data(DataArguments(data_dir=str(tmp_path / "one")))
    for name in ("train/cat", "test/cat", "test/dog"):
        photo(tmp_path / "split" / name / "1.png")
    with pytest.raises(ValueError, match="images of a single class to train on, 'cat'"):
        load_data(DataArguments(data_dir=str(tmp_path / "split")))


def test_a_folder_without_classes_says_what_it_should_have(tmp_path):
    photo(tmp_path / "flat/1.png")
    photo(tmp_path / "flat/2.png")
    with pytest.raises(
        ValueError, match=r"lie in no class's folder\. It should have one folder of images for each class"
    ):
        load_data(DataArguments(data_dir=str(tmp_path / "flat")))
    photo(tmp_path / "deep/cat/1.png")
    photo(tmp_path / "deep/dog/inside/1.png")
    with pytest.raises(ValueError, match=r"at different depths.*one folder of images for each class"):
        load_data(DataArguments(data_dir=str(tmp_path / "deep")))


def test_a_table_beside_the_images_asks_for_its_column(tmp_path):
    photo(tmp_path / "flat/1.png")
    photo(tmp_path / "flat/2.png")
    (tmp_path / "flat/metadata.csv").write_text("file_name,kind\n1.png,cat\n2.png,dog\n")
    with pytest.raises(ValueError, match="name the one to use with --label_column"):
        load_data(DataArguments(data_dir=str(tmp_path / "flat")))


# In mid-run


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_an_image_that_goes_bad_later_is_named_by_the_error(photos, kind):
    data = load_data(DataArguments(data_dir=str(photos)))
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    view = EvaluationView(processor, "image", "label")
    if kind == "train":
        view = TrainingView(processor, "image", "label", "crop")
    seen = view.of(data.train)
    assert seen[3]["pixel_values"].shape == (3, 16, 16)
    path = Path(image_data.name_of(data.train, "image", 3))
    cut_off(path)
    with pytest.raises(ValueError, match=f"The image {path} cannot be opened: "):
        seen[3]
    path.unlink()
    with pytest.raises(ValueError, match=f"The image {path} cannot be opened: "):
        seen[3]


def test_a_bad_image_ends_the_script_in_one_line(train_vit, photos, monkeypatch, tmp_path):
    cut_off(photos / "ant/3.jpg")
    flags = ["--data_dir", str(photos), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    monkeypatch.setattr(sys, "argv", ["train_vit.py", *flags])
    with pytest.raises(SystemExit) as ended:
        train_vit.main()
    assert ended.value.code.startswith("train_vit.py: error: 1 of the 20 images") and "\n" not in ended.value.code
    assert not (tmp_path / "out").exists()
