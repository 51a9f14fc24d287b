"""
Glyphs: a labelled image data set that is made, not downloaded. Letters, digits and symbols from the fonts that ship
with matplotlib, in thirteen faces, turned, sheared, bent, thinned or thickened, among pieces of others, coloured and
noisy, 32×32 RGB.

    load_glyphs("glyphs-short")                                          # a preset
    load_glyphs(GlyphOptions(num_classes=60, train_size=2_000), seed=3)  # your own

`--dataset_name glyphs-short` (or `glyphs-long`, or `glyphs`) names them on the command line of the image examples, and
`--dataset_config_name train_size=1000,seed=3` changes single options.

An image is drawn from `(seed, split, index)` alone: train and test never share a draw, a larger set begins with the
images of the smaller one, and neither threads nor batches matter. Outlines are read from the font files, in whole
numbers, and filled by this file: no renderer, whose versions differ, has a part in it. On one machine the bytes are
always the same; elsewhere sines and cosines may differ in their last bit, and with them a rare byte by one.

A single model with the preset's recipe reaches, in percent of the training and of the test set, as measured by
`OMP_NUM_THREADS=1 python examples/benchmarks/glyph_baseline.py --preset glyphs-short --seeds 0 1 2` (and `glyphs-long`,
`--seeds 0`), in 20 and 80 seconds of one core of an AMD EPYC (torch 2.14, transformers 5.23):

    glyphs-short    82.26 ± 1.91 and 74.57 ± 1.80    limited by its steps
    glyphs-long     100.00 and 80.37                 limited by its images

docs/glyphs.md says more of them.
"""

import dataclasses
import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, pairwise, zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PilImage


# Drawing needs neither, and starts seconds earlier without them.
if TYPE_CHECKING:
    import torch
    from transformers import ResNetForImageClassification


# Goes into the name of what is cached: to be raised with every change of what is drawn.
VERSION = 1

SIDE = 32
SPLITS = ("train", "test")

# A glyph that is mistaken for another, turned a little and seen through noise, is not among the classes: O, for 0; I, l
# and |; c, o, s, v, w, x and z, which differ from their capitals in size alone, and k, p, u, y, φ, ψ and π, in little
# more; Λ, for A; Γ, for F; Π, for H; θ, for 0; γ, for Y; square brackets, for J and L.
KINDS = (
    "ABCDEFGHJKLMNPQRSTUVWXYZ",
    "abdefghijmnqrt",
    "0123456789",
    "&@#%?!+=<>{}*/$§¶€£",
    "ΔΞΣΦΨΩβδλμξσω",
)
# In turns, so that the first classes are of every kind.
CHARACTERS = "".join(filter(None, chain.from_iterable(zip_longest(*KINDS))))

FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
)


@dataclass(frozen=True)
class GlyphOptions:
    """
    What is drawn.

    Args:
        num_classes (`int`, *optional*, defaults to 40):
            The first so many of `CHARACTERS`.
        train_size, test_size (`int`, *optional*, default to 4000 and 2000):
            Images in the two splits, at least one of each class.
        difficulty (`float`, *optional*, defaults to 0.5):
            From 0, a clean glyph nearly upright, to 1. Everything that disturbs grows with it.
    """

    num_classes: int = 40
    train_size: int = 4000
    test_size: int = 2000
    difficulty: float = 0.5

    def __post_init__(self):
        for name in ("num_classes", "train_size", "test_size"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} must be a whole number, found {getattr(self, name)!r}.")
        if not 2 <= self.num_classes <= len(CHARACTERS):
            raise ValueError(f"num_classes must be from 2 to {len(CHARACTERS)}, found {self.num_classes}.")
        for name in ("train_size", "test_size"):
            if getattr(self, name) < self.num_classes:
                raise ValueError(
                    f"{name} must be at least one image for each of the {self.num_classes} classes, "
                    f"found {getattr(self, name)}."
                )
        if not 0 <= self.difficulty <= 1:
            raise ValueError(f"difficulty must be from 0 to 1, found {self.difficulty}.")

    @property
    def class_names(self) -> list[str]:
        """`"capital a"`, `"digit two"`, `"ampersand"`, `"greek small beta"`: as Unicode calls them, a little shorter."""
        names = (unicodedata.name(character).lower() for character in CHARACTERS[: self.num_classes])
        return [name.removeprefix("latin ").replace(" letter", "") for name in names]


@dataclass(frozen=True)
class GlyphRecipe:
    """
    How a preset's models are trained: SGD, the learning rate rising over `warmup_steps` and falling to 0 on a cosine.

    Args:
        steps (`int`), batch_size (`int`):
            Length of a run, in optimizer steps, and images in each.
        learning_rate, momentum, weight_decay (`float`), nesterov (`bool`), warmup_steps (`int`):
            Of SGD and its schedule.
        padding (`int`):
            A training image is padded by so many pixels on each side, and a random part of its size cut out; it is
            never mirrored.
        widths, depths (`tuple[int, ...]`):
            Channels and blocks in each stage of the ResNet.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    warmup_steps: int = 30
    padding: int = 4
    widths: tuple[int, ...] = (16, 32, 64)
    depths: tuple[int, ...] = (2, 2, 2)

    def build_model(self, class_names: list[str]) -> "ResNetForImageClassification":
        """A new ResNet with weights from torch's global generator; it sees `(batch, 3, 32, 32)`, normalized."""
        from transformers import ResNetConfig, ResNetForImageClassification

        config = ResNetConfig(
            embedding_size=self.widths[0],
            hidden_sizes=list(self.widths),
            depths=list(self.depths),
            layer_type="basic",
            id2label=dict(enumerate(class_names)),
            label2id={name: index for index, name in enumerate(class_names)},
            problem_type="single_label_classification",
        )
        return ResNetForImageClassification(config)

    def crop(self, images: "torch.Tensor") -> "torch.Tensor":
        """
        What a batch of training images undergoes, with draws from torch's global generator.

        Args:
            images (`torch.Tensor`): `(batch, channels, height, width)`, of any type.
        """
        import torch

        count, _, height, width = images.shape
        padded = torch.nn.functional.pad(images, (self.padding,) * 4)
        top, left = torch.randint(0, 2 * self.padding + 1, (2, count, 1))
        rows, columns = top + torch.arange(height), left + torch.arange(width)
        which = torch.arange(count)[:, None, None]
        return padded.movedim(1, -1)[which, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


@dataclass(frozen=True)
class GlyphPreset:
    """Fixed data and a fixed recipe. Choices go by another seed's images, or by a part of the training set."""

    options: GlyphOptions
    recipe: GlyphRecipe


PRESETS = {
    "glyphs-short": GlyphPreset(GlyphOptions(difficulty=0.55), GlyphRecipe(steps=700)),
    "glyphs-long": GlyphPreset(GlyphOptions(num_classes=60, train_size=2000, test_size=3000), GlyphRecipe(steps=3000)),
}


# ---- Outlines ----------------------------------------------------------------------------------------------------

# A glyph is kept as the distance to its outline, on a square grid: of any point, as seen from the glyph, this says
# whether there is ink, and how thick strokes are to be can still be chosen. The longer side of a glyph is 1 long.
GRID = 48
EXTENT = 1.6


def outline(face: str, character: str) -> np.ndarray:
    """The outline of a glyph as straight pieces, of shape `(num_pieces, 2, 2)`, in the font's units."""
    try:
        import matplotlib
        from fontTools.pens.basePen import BasePen
        from fontTools.ttLib import TTFont
    except ImportError as error:
        raise ValueError("The glyphs come with the fonts of matplotlib: pip install matplotlib.") from error

    class Pieces(BasePen):
        """Curves are cut into four."""

        def __init__(self, glyph_set):
            super().__init__(glyph_set)
            self.pieces = []

        def _moveTo(self, point):
            self.start = point

        def _lineTo(self, point):
            self.pieces.append((self._getCurrentPoint(), point))

        def _qCurveToOne(self, control, end):
            corners = np.array([self._getCurrentPoint(), control, end], dtype=np.float64)
            weights = np.linspace(0, 1, 5)[:, None]
            points = (
                (1 - weights) ** 2 * corners[0] + 2 * weights * (1 - weights) * corners[1] + weights**2 * corners[2]
            )
            self.pieces += list(pairwise(points))

        def _closePath(self):
            self._lineTo(self.start)

    font = _font(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf"), TTFont)
    glyphs = font.getGlyphSet()
    pen = Pieces(glyphs)
    glyphs[font.getBestCmap()[ord(character)]].draw(pen)
    pieces = np.array(pen.pieces, dtype=np.float64)
    return pieces[(pieces[:, 0] != pieces[:, 1]).any(axis=1)]


@cache
def _font(path: str, reader: type):
    if not os.path.exists(path):
        raise ValueError(f"The glyphs come with the fonts of matplotlib, and {path} is missing.")
    return reader(path, lazy=True)


@cache
def distances(face: str, character: str) -> np.ndarray:
    """
    How deep in the ink each point of the grid lies: the distance to the outline, negative outside of the glyph.

    Returns:
        `np.ndarray`: `(GRID, GRID)`, `float32`, rows from top to bottom, in units of the glyph's longer side.
    """
    pieces = outline(face, character)
    low, high = pieces.min(axis=(0, 1)), pieces.max(axis=(0, 1))
    pieces = (pieces - (low + high) / 2) / (high - low).max()
    starts, ends = pieces[:, 0].astype(np.float32), pieces[:, 1].astype(np.float32)
    along = ends - starts
    line = ((np.arange(GRID) + 0.5) / GRID - 0.5).astype(np.float32) * np.float32(EXTENT)
    right, up = line[None, :, None] - starts[:, 0], -line[:, None, None] - starts[:, 1]
    part = np.clip((right * along[:, 0] + up * along[:, 1]) / (along**2).sum(axis=1), 0, 1)
    squared = (right - part * along[:, 0]) ** 2 + (up - part * along[:, 1]) ** 2
    # How often the outline goes around a point: pieces that pass on its right, upwards less downwards.
    crosses = (up >= 0) != (up - along[:, 1] >= 0)
    on_the_right = (up * along[:, 0] - right * along[:, 1]) * np.sign(along[:, 1]) > 0
    turns = (crosses & on_the_right) @ np.sign(along[:, 1])
    return np.sqrt(squared.min(axis=-1)) * np.where(turns != 0, np.float32(1), np.float32(-1))


# ---- Drawing -----------------------------------------------------------------------------------------------------

# Other glyphs in a picture, and strokes across it, at most.
NEIGHBOURS = 3
STROKES = 2
# Uniform numbers that an image takes besides its noise; more than are used, so that a new use does not move the others.
DRAWS = 96
BATCH = 256


class Draws:
    """Uniform numbers of many images, of shape `(num_images, DRAWS)`, handed out one column after the other."""

    def __init__(self, values: np.ndarray):
        self.columns = iter(values.T)

    def between(self, low: float | np.ndarray, high: float | np.ndarray) -> np.ndarray:
        """`(num_images,)`, uniform."""
        return (low + (high - low) * next(self.columns)).astype(np.float32)

    def choice(self, number: int) -> np.ndarray:
        """`(num_images,)`, whole numbers from 0 to `number - 1`."""
        return (next(self.columns) * number).astype(np.int64)


def look_up(atlas: np.ndarray, which: np.ndarray, right: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Read the grids `which` of an atlas between their points, at `(num_images, num_pixels)` places; outside: the edge."""
    scale = np.float32(GRID / EXTENT)
    column = np.clip(right * scale + np.float32(GRID / 2 - 0.5), 0, np.float32(GRID - 1.001))
    row = np.clip(down * scale + np.float32(GRID / 2 - 0.5), 0, np.float32(GRID - 1.001))
    left, top = column.astype(np.int32), row.astype(np.int32)
    column -= left
    row -= top
    place = (which * GRID * GRID).astype(np.int32)[:, None] + top * GRID + left
    flat = atlas.reshape(-1)
    upper = flat[place] * (1 - column) + flat[place + 1] * column
    lower = flat[place + GRID] * (1 - column) + flat[place + GRID + 1] * column
    return upper * (1 - row) + lower * row


def draw(
    options: GlyphOptions, atlas: np.ndarray, labels: np.ndarray, values: np.ndarray, noise: np.ndarray
) -> np.ndarray:
    """
    Draw a batch of images.

    Args:
        atlas (`np.ndarray`): `(num_classes * num_faces, GRID, GRID)`, as [`distances`] gives them, faces innermost.
        labels (`np.ndarray`): `(num_images,)`.
        values (`np.ndarray`): `(num_images, DRAWS)`, uniform in [0, 1): they decide everything but the noise.
        noise (`np.ndarray`): `(num_images, SIDE * SIDE, 3)`, uniform in [0, 1).

    Returns:
        `np.ndarray`: `(num_images, SIDE, SIDE, 3)`, `uint8`.
    """
    hard, number = options.difficulty, len(labels)
    draws = Draws(values)
    pixel = np.arange(SIDE, dtype=np.float32) - np.float32((SIDE - 1) / 2)
    x, y = np.tile(pixel, SIDE)[None], np.repeat(pixel, SIDE)[None]

    # The sheet on which all is drawn is bent by a wave in each direction.
    waves = []
    for place in (y, x):
        height, length, phase = draws.between(0, 2 * hard), draws.between(18, 32), draws.between(0, 2 * np.pi)
        waves.append(
            height[:, None] * np.sin(place * (2 * np.pi / length)[:, None] + phase[:, None]).astype(np.float32)
        )
    bent_x, bent_y = x + waves[0], y + waves[1]

    def glyph(which: np.ndarray, centre_x: np.ndarray, centre_y: np.ndarray, size: np.ndarray) -> np.ndarray:
        """How much of each pixel is ink."""
        turn = draws.between(-1, 1) * np.float32(np.deg2rad(6 + 24 * hard))
        shear = draws.between(-1, 1) * np.float32(0.05 + 0.35 * hard)
        stretch = np.exp(draws.between(-1, 1) * np.float32(0.05 + 0.3 * hard))
        # Stretched one way, it still is at most `size` long.
        size = size * np.minimum(stretch, 1 / stretch)
        weight = draws.between(-0.1 - 0.25 * hard, 0.1 + 0.7 * hard)
        softness = draws.between(0.9, 1.0 + 1.6 * hard)
        cosine, sine = np.cos(turn) / size, np.sin(turn) / size
        away_x, away_y = bent_x - centre_x[:, None], bent_y - centre_y[:, None]
        right = (cosine * stretch)[:, None] * away_x + (sine * stretch)[:, None] * away_y
        down = (cosine / stretch)[:, None] * away_y - (sine / stretch)[:, None] * away_x
        right += shear[:, None] * down
        depth = look_up(atlas, which, right, down) * size[:, None]
        return np.clip((depth + weight[:, None]) / softness[:, None] + np.float32(0.5), 0, 1)

    def colour() -> np.ndarray:
        """`(num_images, 3)`, in [0, 1)."""
        return np.stack([draws.between(0, 1) for _ in range(3)], axis=1)

    def lay(ink: np.ndarray, paint: np.ndarray) -> None:
        """Paint over what is there."""
        picture[...] += ink[:, :, None] * (paint[:, None] - picture)

    # Paper whose colour runs into another; ink that is lighter or darker than both, of any hue.
    slant = draws.between(0, 2 * np.pi)
    run = (np.cos(slant)[:, None] * x + np.sin(slant)[:, None] * y) / np.float32(SIDE * 1.42) + np.float32(0.5)
    middle = draws.between(0.25, 0.75)[:, None]
    tint = np.float32(0.15 + 0.3 * hard)
    near, far = (middle + (colour() - np.float32(0.5)) * tint for _ in range(2))
    picture = near[:, None] + run[:, :, None] * (far - near)[:, None]
    contrast = draws.between(0.5 - 0.3 * hard, 0.75 - 0.2 * hard)[:, None]
    # Lighter ink on the darker paper, as a rule.
    sign = np.where(draws.between(0.3, 0.7)[:, None] > middle, np.float32(1), np.float32(-1))
    ink_colour = np.clip(middle + sign * contrast + (colour() - np.float32(0.5)) * tint, 0, 1)

    # Pieces of other glyphs at the rim, behind the one that counts; some of its colour.
    for _ in range(NEIGHBOURS):
        there = draws.between(0, 1) < hard
        where, how_far = draws.between(0, 2 * np.pi), draws.between(15, 19)
        which = draws.choice(len(atlas))
        ink = glyph(which, how_far * np.cos(where), how_far * np.sin(where), draws.between(12, 22))
        own = np.clip(middle + (colour() - np.float32(0.5)), 0, 1)
        alike = draws.between(0, 1)[:, None] < hard
        lay(ink * there[:, None], np.where(alike, ink_colour, own))

    shift = np.float32(1 + 3.5 * hard)
    which = labels * len(FACES) + draws.choice(len(FACES))
    centre_x, centre_y = draws.between(-1, 1) * shift, draws.between(-1, 1) * shift
    lay(glyph(which, centre_x, centre_y, draws.between(23 - 8 * hard, 27 - 2 * hard)), ink_colour)

    for _ in range(STROKES):
        there = draws.between(0, 1) < 0.8 * hard
        slant, offset, width = draws.between(0, np.pi), draws.between(-14, 14), draws.between(0.4, 0.6 + 0.8 * hard)
        off = np.abs(np.cos(slant)[:, None] * bent_x + np.sin(slant)[:, None] * bent_y - offset[:, None])
        lay(
            np.clip(width[:, None] - off + np.float32(0.5), 0, 1) * there[:, None],
            np.clip(middle + (colour() - np.float32(0.5)), 0, 1),
        )

    grain = draws.between(0.02, 0.06 + 0.3 * hard)[:, None, None]
    picture += (noise - np.float32(0.5)) * grain
    return np.clip(np.rint(picture * 255), 0, 255).astype(np.uint8).reshape(number, SIDE, SIDE, 3)


def images_of(options: GlyphOptions, seed: int, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The images of a split, `(num_images, SIDE, SIDE, 3)`, and their labels, `(num_images,)`, some hundreds at a time."""
    size = {"train": options.train_size, "test": options.test_size}[split]
    characters = CHARACTERS[: options.num_classes]
    atlas = np.stack([distances(face, character) for character in characters for face in FACES])
    for start in range(0, size, BATCH):
        numbers = range(start, min(start + BATCH, size))
        streams = [np.random.default_rng([seed, SPLITS.index(split), number]) for number in numbers]
        values = np.stack([stream.random(DRAWS) for stream in streams])
        noise = np.stack([stream.random((SIDE * SIDE, 3), dtype=np.float32) for stream in streams])
        labels = np.array(numbers) % options.num_classes
        yield draw(options, atlas, labels, values, noise), labels


# ---- As a data set -----------------------------------------------------------------------------------------------


def examples_of(options: dict[str, Any], seed: int, split: str, version: int) -> Iterator[dict[str, Any]]:
    """The examples of a split, for `Dataset.from_generator`, which knows by these arguments what it has made before."""
    for pixels, labels in images_of(GlyphOptions(**options), seed, split):
        for image, label in zip(pixels, labels.tolist(), strict=True):
            buffer = io.BytesIO()
            PilImage.fromarray(image).save(buffer, "png", compress_level=1)
            yield {"image": {"bytes": buffer.getvalue(), "path": None}, "label": label}


def load_glyphs(preset: str | GlyphOptions = "glyphs-short", seed: int = 0) -> DatasetDict:
    """
    Draw the glyphs, or take them from the cache of `datasets` if they were drawn before.

    Args:
        preset (`str` or [`GlyphOptions`], *optional*, defaults to `"glyphs-short"`):
            A key of `PRESETS`, or what to draw.
        seed (`int`, *optional*, defaults to 0):
            Of the images, train and test.

    Returns:
        `DatasetDict`: `train` and `test` with the columns `image` (PNG, 32×32, RGB) and `label`, the classes in turns.

    Raises:
        ValueError: for a preset that is not there, a negative seed, and a matplotlib that is missing.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"There are no glyphs {preset!r}; there are {' and '.join(PRESETS)}.")
        preset = PRESETS[preset].options
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be a whole number, at least 0, found {seed!r}.")
    outline(FACES[0], CHARACTERS[0])
    features = Features({"image": Image(), "label": ClassLabel(names=preset.class_names)})
    options = dataclasses.asdict(preset)
    return DatasetDict(
        {
            split: Dataset.from_generator(
                examples_of,
                features=features,
                gen_kwargs={"options": options, "seed": seed, "split": split, "version": VERSION},
                split=split,
            )
            for split in SPLITS
        }
    )


def is_glyphs(dataset_name: str | None) -> bool:
    """Whether a `--dataset_name` means glyphs: `glyphs` or a preset."""
    return dataset_name == "glyphs" or dataset_name in PRESETS


def parse_glyphs(dataset_name: str, changes: str | None = None) -> tuple[GlyphOptions, int]:
    """
    What `--dataset_name` and `--dataset_config_name` say of glyphs.

    Args:
        dataset_name (`str`):
            `glyphs` or a preset.
        changes (`str`, *optional*):
            Options that differ, as in `train_size=1000,difficulty=0.7,seed=3`.

    Returns:
        `tuple[GlyphOptions, int]`: the options and the seed.

    Raises:
        ValueError: for an option that is not there or a value that is none of it.
    """
    options = PRESETS[dataset_name].options if dataset_name in PRESETS else GlyphOptions()
    types = {name: type(value) for name, value in dataclasses.asdict(options).items()} | {"seed": int}
    values: dict[str, Any] = {}
    for change in changes.split(",") if changes else []:
        name, _, value = (part.strip() for part in change.partition("="))
        if name not in types:
            raise ValueError(
                f"--dataset_config_name {changes}: glyphs have no option {name!r}; they have {', '.join(types)}, as in "
                "train_size=1000,seed=3."
            )
        try:
            values[name] = types[name](value)
        except ValueError as error:
            kind = "a whole number" if types[name] is int else "a number"
            raise ValueError(f"--dataset_config_name {changes}: {name} must be {kind}, found {value!r}.") from error
    seed = values.pop("seed", 0)
    return dataclasses.replace(options, **values), seed


def contact_sheet(path: str) -> None:
    """Save a picture of twenty classes: one draw of each at the difficulties 0, 0.25, 0.5 and 1, and two more at 0.5."""
    rows = []
    for difficulty, numbers in ((0.0, [0]), (0.25, [0]), (0.5, [0]), (1.0, [0]), (0.5, [1, 2])):
        options = GlyphOptions(num_classes=20, train_size=60, test_size=20, difficulty=difficulty)
        images = np.concatenate([images for images, _ in images_of(options, 0, "train")])
        rows += [np.hstack(list(images[20 * number : 20 * (number + 1)])) for number in numbers]
    PilImage.fromarray(np.vstack(rows)).quantize(128, dither=PilImage.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("To save a picture of some glyphs: python examples/glyph_data.py PICTURE.png")
    contact_sheet(sys.argv[1])
