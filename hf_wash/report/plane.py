"""
The plane in weight space that goes through three members: its axes, its grid, and what is measured on it.

How a model answers is passed in, as to `survey`; how the plane is drawn is `figures`' business.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..population import Population


# The grid is as narrow and as high as this many points, and goes beyond the members by this part of their extent.
POINTS = 9
MARGIN = 0.25
# Three members of which one lies so close to the line through the others, in parts of its length, span no plane.
_FLAT = 1e-6

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Plane:
    """
    The plane through three points of weight space, with orthonormal axes after Gram and Schmidt: the first goes from the
    first point to the second, the third lies above it ([Garipov et al., 2018](https://hf.co/papers/1802.10026),
    section 3, and [Izmailov et al., 2018](https://hf.co/papers/1803.05407), section 3.3).

    Args:
        length (`float`): From the first point to the second; the second one's place is `(length, 0)`.
        along, height (`float`): The third one's place. All in units of a weight.
    """

    length: float
    along: float
    height: float

    @classmethod
    def through(cls, first: Weights, second: Weights, third: Weights, names: Collection[str]) -> "Plane | None":
        """
        The plane through three models.

        Args:
            first, second, third (`Mapping[str, torch.Tensor]`): Their state dicts.
            names (`Collection[str]`): Of the weights that distances are measured over.

        Returns:
            [`Plane`]: `None` if they lie on one line, or are not finite.
        """
        to_second, to_third, both = _products(first, second, third, names)
        length = math.sqrt(to_second)
        if not (math.isfinite(to_second) and math.isfinite(to_third)) or not length or not to_third:
            return None
        along = both / length
        height = math.sqrt(max(0.0, to_third - along**2))
        if height <= _FLAT * math.sqrt(to_third):
            return None
        return cls(length, along, height)

    @property
    def places(self) -> list[tuple[float, float]]:
        """Where the three points lie."""
        return [(0.0, 0.0), (self.length, 0.0), (self.along, self.height)]

    def grid(self, points: int = POINTS) -> tuple[list[float], list[float]]:
        """The columns and the rows of a grid around the three points."""
        axes = []
        for values in zip(*self.places, strict=True):
            low, high = min(values), max(values)
            low, high = low - MARGIN * (high - low), high + MARGIN * (high - low)
            axes.append([low + (high - low) * number / (points - 1) for number in range(points)])
        return axes[0], axes[1]

    def parts(self, x: float, y: float) -> tuple[float, float]:
        """a and b of the point first + a·(second − first) + b·(third − first) that lies at `(x, y)`."""
        of_third = y / self.height
        return (x - of_third * self.along) / self.length, of_third

    def place_of(
        self, weights: Weights, first: Weights, second: Weights, third: Weights, names: Collection[str]
    ) -> tuple[float, float, float]:
        """Where a model's projection lies, and how far from the plane the model itself is."""
        _, squared, on_second = _products(first, second, weights, names)
        _, _, on_third = _products(first, third, weights, names)
        x = on_second / self.length
        y = (on_third - x * self.along) / self.height
        return x, y, math.sqrt(max(0.0, squared - x**2 - y**2))


def _products(origin: Weights, first: Weights, second: Weights, names: Collection[str]) -> tuple[float, float, float]:
    """|first − origin|², |second − origin|² and the product of the two differences, in float64."""
    found = [0.0, 0.0, 0.0]
    for name in names:
        start = origin[name].detach().double()
        one, other = (weights[name].detach().to(start) - start for weights in (first, second))
        for place, value in enumerate((one.square().sum(), other.square().sum(), (one * other).sum())):
            found[place] += float(value)
    return found[0], found[1], found[2]


def point_of_plane(
    first: Weights, second: Weights, third: Weights, parts: tuple[float, float]
) -> dict[str, torch.Tensor]:
    """
    The point first + a·(second − first) + b·(third − first), as `weights_between` has one of a line.

    Args:
        first, second, third (`Mapping[str, torch.Tensor]`): State dicts with the same names and shapes.
        parts (`tuple[float, float]`): a and b.

    Returns:
        `dict[str, torch.Tensor]`: in the first one's dtypes, computed in at least float32; what is no floating-point
        tensor is the first one's.
    """
    a, b = parts
    point = {}
    for name, value in first.items():
        if value.is_floating_point():
            wide = torch.float64 if value.dtype == torch.float64 else torch.float32
            start = value.detach().to(wide)
            one, other = (weights[name].to(device=value.device, dtype=wide) for weights in (second, third))
            point[name] = (start + a * (one - start) + b * (other - start)).to(value.dtype)
        else:
            point[name] = value
    return point


def survey_plane(
    population: Population,
    members: Sequence[int],
    soup_weights: Weights | None,
    answer_at: Callable[[Weights], Any],
    attempt: Callable[[Callable[[], Any]], Any],
    exclude: Collection[str] = (),
) -> Callable[[], dict[str, Any] | None]:
    """
    *Collective.* Look at the plane through three members. Its points are dealt to the processes one by one; each holds a
    copy of the three members meanwhile.

    Args:
        population ([`Population`]): The members.
        members (`Sequence[int]`): The three.
        soup_weights (`Mapping[str, torch.Tensor]`, *optional*): The soup's, to be marked.
        answer_at (`Callable`): From weights to what a model with them answers.
        attempt (`Callable`): Calls what may fail on one process alone.
        exclude (`Collection[str]`, *optional*): Names of weights that all members share.

    Returns:
        `Callable`: *Collective.* What was measured, once it is known that nothing failed; `None` where the three lie on
        one line.
    """
    corners = []
    for weights in population.state_dicts(exclude, members):
        # A copy: what one step of the iterator yields belongs to it.
        corners.append(attempt(functools.partial(_copied, weights)))
    if None in corners:
        return lambda: None
    first, second, third = corners
    names = [name for name, p in population.wholes[0].named_parameters() if p.requires_grad and name in first]
    plane = Plane.through(first, second, third, names)
    if plane is None:
        return lambda: None
    columns, rows = plane.grid()
    own = {}
    for number in range(population.rank, len(columns) * len(rows), population.world_size):
        parts = plane.parts(columns[number % len(columns)], rows[number // len(columns)])
        own[number] = attempt(functools.partial(_answer, answer_at, first, second, third, parts))
    places: dict[str, Any] = {
        f"member {index}": list(place) for index, place in zip(members, plane.places, strict=True)
    }
    away = None
    if soup_weights is not None:
        x, y, distance = plane.place_of(soup_weights, first, second, third, names)
        if math.isfinite(x) and math.isfinite(y):
            places["soup"], away = [x, y], distance

    def told() -> dict[str, Any]:
        answers = {number: (each.loss, each.accuracy) for number, each in own.items()}
        everyone = {number: each for part in population.gather_processes(answers) for number, each in part.items()}
        losses, accuracies = zip(*(everyone[number] for number in sorted(everyone)), strict=True)
        in_rows = range(0, len(losses), len(columns))
        finite = [loss if math.isfinite(loss) else None for loss in losses]
        return {
            "x": columns,
            "y": rows,
            "loss": [finite[start : start + len(columns)] for start in in_rows],
            "accuracy": None
            if None in accuracies
            else [list(accuracies[start : start + len(columns)]) for start in in_rows],
            "places": places,
            "soup_away": away,
        }

    return told


def _copied(weights: Weights) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in weights.items()}


def _answer(
    answer_at: Callable[[Weights], Any], first: Weights, second: Weights, third: Weights, parts: tuple[float, float]
) -> Any:
    return answer_at(point_of_plane(first, second, third, parts))
