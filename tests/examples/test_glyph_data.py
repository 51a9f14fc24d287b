"""`examples/glyph_data.py`: glyphs drawn from a seed alone, balanced classes that can be told apart, presets."""

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import datasets
import glyph_data
import numpy as np
import pytest
import torch
from glyph_data import CHARACTERS, FACES, PRESETS, GlyphOptions, images_of, load_glyphs, parse_glyphs
from image_data import DataArguments, TrainingView, load_data
from transformers import ViTImageProcessor


EXAMPLES = Path(__file__).parents[2] / "examples"

SMALL = GlyphOptions(num_classes=5, train_size=40, test_size=20)

# Of five images of `SMALL`, one of each class: the mean over colours and patches of 8×8 pixels, row by row.
EXPECTED = [
    [146.3, 149.9, 146.6, 160.4, 149.8, 125.0, 121.4, 115.5, 152.6, 98.0, 122.3, 75.0, 154.2, 154.6, 150.8, 123.0],
    [158.9, 150.3, 153.7, 168.5, 146.9, 108.5, 138.8, 161.1, 145.4, 114.9, 107.3, 155.9, 154.1, 153.5, 153.9, 154.0],
    [106.2, 113.0, 118.6, 117.7, 104.4, 137.5, 163.0, 170.6, 123.3, 175.6, 184.3, 149.1, 163.1, 186.6, 184.6, 125.5],
    [139.6, 117.2, 139.8, 133.9, 160.7, 165.2, 206.3, 134.8, 150.4, 166.5, 219.2, 140.9, 138.4, 150.8, 151.9, 139.3],
    [88.3, 91.4, 86.8, 100.8, 87.7, 69.0, 70.3, 98.0, 87.5, 66.6, 65.8, 100.2, 86.8, 66.5, 34.1, 69.4],
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of `datasets` of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))


def pixels_of(options, seed=0, split="train"):
    """All images of a split, and their labels."""
    images, labels = zip(*images_of(options, seed, split), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def digest(options, seed=0, split="train"):
    """Of the bytes of a split."""
    return hashlib.sha256(pixels_of(options, seed, split)[0].tobytes()).hexdigest()


def test_another_process_with_other_threads_draws_the_same_bytes():
    script = "\n".join(
        (
            "import hashlib, numpy as np",
            "from glyph_data import GlyphOptions, images_of",
            "images = [i for i, _ in images_of(GlyphOptions(num_classes=5, train_size=40, test_size=20), 0, 'train')]",
            "print(hashlib.sha256(np.concatenate(images).tobytes()).hexdigest())",
        )
    )
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES), "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "7"}
    environment |= {"OPENBLAS_NUM_THREADS": "2"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == digest(SMALL)


def test_images_are_those_that_presets_were_tuned_on():
    """
    A change of what is drawn has to raise `VERSION`, or caches keep what was, and to measure the presets anew. Sines that
    differ in their last bit may move a byte by one here and there, no more.
    """
    images, _ = pixels_of(SMALL)
    seen = images[::8].reshape(5, 4, 8, 4, 8, 3).mean(axis=(2, 4, 5)).reshape(5, 16)
    assert np.abs(seen - EXPECTED).max() < 0.2


def test_an_image_depends_on_its_number_alone():
    """Not on the batch it is drawn in, nor on how many there are."""
    few, _ = pixels_of(dataclasses.replace(SMALL, train_size=7))
    many, _ = pixels_of(dataclasses.replace(SMALL, train_size=glyph_data.BATCH + 9))
    assert np.array_equal(few, many[:7])


def test_seeds_and_splits_share_no_image():
    options = dataclasses.replace(SMALL, train_size=100, test_size=100)
    drawn = [pixels_of(options, seed, split)[0] for seed in (0, 1) for split in ("train", "test")]
    assert len({image.tobytes() for images in drawn for image in images}) == 400


@pytest.mark.parametrize("split", ["train", "test"])
def test_classes_are_balanced_in_every_beginning(split):
    options = GlyphOptions(num_classes=7, train_size=52, test_size=38)
    images, labels = pixels_of(options, split=split)
    assert images.shape == (len(labels), 32, 32, 3) and images.dtype == np.uint8
    for end in range(7, len(labels) + 1):
        counts = np.bincount(labels[:end], minlength=7)
        assert counts.max() - counts.min() <= 1


def test_every_face_has_every_character():
    """A character that a font lacks would be an error in the midst of drawing."""
    matplotlib = pytest.importorskip("matplotlib")
    from fontTools.ttLib import TTFont

    for face in FACES:
        font = TTFont(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf"), lazy=True)
        assert set(map(ord, CHARACTERS)) <= set(font.getBestCmap())


def overlap(face, one, other):
    """Of the ink of two glyphs, both at the same size, the part that they share."""
    cells = glyph_data.GRID / glyph_data.EXTENT
    first, second = (np.clip(glyph_data.distances(face, glyph) * cells + 0.5, 0, 1) for glyph in (one, other))
    return np.minimum(first, second).sum() / np.maximum(first, second).sum()


def test_no_two_classes_look_alike():
    assert len(set(CHARACTERS)) == len(CHARACTERS)
    for alike in ("O0oθ", "Il1|", "cC", "oO", "sS", "vV", "wW", "xX", "zZ", "kK", "pP", "uU", "yYγ", "AΛ", "HΠ", "FΓ"):
        assert len(set(alike) & set(CHARACTERS)) <= 1, alike
    # The measure sees such pairs ...
    assert all(overlap("DejaVuSans-Bold", *pair) > 0.86 for pair in ("lI", "AΛ", "θ0"))
    # ... and none among the classes, in a face with serifs and one without.
    for face in ("DejaVuSans-Bold", "STIXGeneralBol"):
        for index, one in enumerate(CHARACTERS):
            assert all(overlap(face, one, other) < 0.86 for other in CHARACTERS[:index]), one


def test_an_outline_is_filled_where_there_is_ink():
    middle = glyph_data.GRID // 2
    assert glyph_data.distances("DejaVuSans", "+")[middle, middle] > 0
    assert glyph_data.distances("DejaVuSans", "0")[middle, middle] < 0  # a hole
    assert (glyph_data.distances("DejaVuSans", "0") > 0).any()
    # Half a unit above and below the middle is where the glyph ends: the longer side is 1.
    ink = np.nonzero((glyph_data.distances("DejaVuSans-Bold", "H") > 0).any(axis=1))[0]
    assert (ink[-1] - ink[0] + 1) * glyph_data.EXTENT / glyph_data.GRID == pytest.approx(1, abs=0.07)


def test_difficulty_disturbs():
    """At 0 the upper rim of an image is paper, nearly without grain; at 1 there is more on it."""
    clean, _ = pixels_of(dataclasses.replace(SMALL, difficulty=0.0))
    hard, _ = pixels_of(dataclasses.replace(SMALL, difficulty=1.0))
    noise = [np.abs(np.diff(images[:, :3].astype(int), axis=2)).mean() for images in (clean, hard)]
    assert noise[0] < 5 < noise[1]


def test_a_data_set_of_images_and_named_classes(cache):
    glyphs = load_glyphs(SMALL, seed=3)
    assert {name: len(part) for name, part in glyphs.items()} == {"train": 40, "test": 20}
    names = ["capital a", "small a", "digit zero", "ampersand", "greek capital delta"]
    assert glyphs["train"].features["label"].names == names
    images, labels = pixels_of(SMALL, seed=3, split="test")
    stored = np.stack([np.asarray(image) for image in glyphs["test"]["image"]])
    assert np.array_equal(stored, images) and glyphs["test"]["label"][:] == labels.tolist()


def test_glyphs_are_drawn_once(cache, monkeypatch):
    load_glyphs(SMALL)
    monkeypatch.setattr(glyph_data, "draw", None)
    assert len(load_glyphs(SMALL)["train"]) == 40
    # What differs is not taken from the cache.
    for options, seed in ((SMALL, 1), (dataclasses.replace(SMALL, difficulty=0.4), 0)):
        with pytest.raises(Exception, match=r"NoneType|generating"):
            load_glyphs(options, seed)
    monkeypatch.setattr(glyph_data, "VERSION", 1_000)
    with pytest.raises(Exception, match=r"NoneType|generating"):
        load_glyphs(SMALL)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_classes": 1}, "num_classes must be from 2 to 80, found 1."),
        ({"num_classes": 500}, "num_classes must be from 2 to 80, found 500."),
        ({"num_classes": 4.0}, "num_classes must be a whole number, found 4.0."),
        ({"train_size": 39}, "train_size must be at least one image for each of the 40 classes, found 39."),
        ({"test_size": 0}, "test_size must be at least one image for each of the 40 classes, found 0."),
        ({"difficulty": 1.5}, "difficulty must be from 0 to 1, found 1.5."),
        ({"difficulty": float("nan")}, "difficulty must be from 0 to 1, found nan."),
    ],
)
def test_options_that_are_refused(options, reason):
    with pytest.raises(ValueError) as caught:
        GlyphOptions(**options)
    assert str(caught.value) == reason


def test_presets_and_seeds_that_are_refused():
    with pytest.raises(ValueError, match=r"no glyphs 'short'; there are glyphs-short and glyphs-long\.$"):
        load_glyphs("short")
    for seed in (-1, 0.5):
        with pytest.raises(ValueError, match=f"seed must be a whole number, at least 0, found {seed}"):
            load_glyphs(SMALL, seed)


@pytest.mark.parametrize("module", ["matplotlib", "fontTools.ttLib"])
def test_without_matplotlib_it_says_what_to_install(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match="pip install"):
        load_glyphs(SMALL)


def test_options_on_the_command_line():
    assert parse_glyphs("glyphs-short") == (PRESETS["glyphs-short"].options, 0)
    options, seed = parse_glyphs("glyphs-long", "train_size=1000, difficulty=0.7,seed=3")
    assert (options, seed) == (
        dataclasses.replace(PRESETS["glyphs-long"].options, train_size=1000, difficulty=0.7),
        3,
    )
    assert parse_glyphs("glyphs", "num_classes=5")[0] == GlyphOptions(num_classes=5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ("colour=red", "glyphs have no option 'colour'; they have num_classes, "),
        ("train_size=many", "train_size must be a whole number, found 'many'."),
        ("difficulty", "difficulty must be a number, found ''."),
        ("difficulty=2", "difficulty must be from 0 to 1, found 2.0."),
        ("seed=-1", "seed must be a whole number, at least 0, found -1."),
    ],
)
def test_options_on_the_command_line_that_are_refused(changes, reason):
    with pytest.raises(ValueError) as caught:
        load_data(DataArguments(dataset_name="glyphs", dataset_config_name=changes))
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_examples_load_glyphs_by_name(cache):
    changes = "num_classes=5,train_size=40,test_size=20"
    data = load_data(DataArguments(dataset_name="glyphs-short", dataset_config_name=changes))
    assert (data.name, data.hub_id, len(data.train), len(data.eval)) == ("glyphs-short", None, 40, 20)
    assert (data.image_column, data.label_column, data.augmentation) == ("image", "label", "pad")
    assert load_data(DataArguments()).augmentation == "shift"


def test_the_picture_of_the_docs_is_that_of_these_glyphs(tmp_path):
    glyph_data.contact_sheet(str(tmp_path / "glyphs.png"))
    made, shipped = (
        np.asarray(glyph_data.PilImage.open(path).convert("RGB")).astype(float)
        for path in (tmp_path / "glyphs.png", EXAMPLES.parent / "docs" / "glyphs.png")
    )
    assert made.shape == shipped.shape == (6 * 32, 20 * 32, 3)
    # How colours are quantized is the matter of Pillow's version.
    assert np.abs(made - shipped).mean() < 2
    assert (EXAMPLES.parent / "docs" / "glyphs.png").stat().st_size < 100_000


def test_padding_moves_a_training_image_and_does_not_mirror_it():
    """A white square on black, an eighth of the side away at most, and still left of the middle."""
    view = TrainingView(ViTImageProcessor(size={"height": 32, "width": 32}), "image", "label", "pad")
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    image[14:18, 6:10] = 255
    torch.manual_seed(0)
    changed = view.pixels([glyph_data.PilImage.fromarray(image)] * 200)[:, 0] > 0
    columns = [picture.any(dim=0).nonzero().min().item() for picture in changed]
    rows = [picture.any(dim=1).nonzero().min().item() for picture in changed]
    assert set(columns) == set(range(2, 11)) and set(rows) == set(range(10, 19))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_page_says(name):
    preset = PRESETS[name]
    sizes = {"glyphs-short": (40, 4000, 2000, 700), "glyphs-long": (60, 2000, 3000, 3000)}
    options, recipe = preset.options, preset.recipe
    assert (options.num_classes, options.train_size, options.test_size, recipe.steps) == sizes[name]
    model = recipe.build_model(options.class_names)
    assert 170_000 < sum(parameter.numel() for parameter in model.parameters()) < 190_000
    images = torch.zeros(2, 3, 32, 32)
    assert model(images).logits.shape == (2, options.num_classes)
    assert model.config.id2label[0] == "capital a"


def test_the_recipe_crops_each_image_by_its_own_draw():
    recipe = PRESETS["glyphs-short"].recipe
    images = torch.arange(1, 32 * 32 + 1, dtype=torch.int16).view(1, 1, 32, 32).expand(64, 3, 32, 32)
    torch.manual_seed(0)
    cropped = recipe.crop(images)
    assert cropped.shape == images.shape and cropped.dtype == images.dtype
    padded = torch.nn.functional.pad(images[0], (4, 4, 4, 4))
    places = []
    for picture in cropped:
        found = [
            (top, left)
            for top in range(9)
            for left in range(9)
            if torch.equal(picture, padded[:, top : top + 32, left : left + 32])
        ]
        assert len(found) == 1
        places += found
    assert len(set(places)) > 20
