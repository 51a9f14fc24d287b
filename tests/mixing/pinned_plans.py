"""
Plans as literal values. A run that was started with them resumes only with a version that still draws them.

Used by `test_plan.py` in its own process and in one whose NumPy has no vector units.
"""

import hashlib

import numpy as np

from hf_wash.mixing.plan import Planner


def describe(seed, sizes, probabilities, num_members, step):
    """A plan's first coordinates and permutations in the clear, and a hash of all of it."""
    plan = Planner(seed, sizes, probabilities, num_members).draw(step)
    sources = np.stack([plan.sources(member) for member in range(num_members)]).astype("<i8")
    everything = hashlib.sha256(plan.coordinates.astype("<i8").tobytes() + np.ascontiguousarray(sources).tobytes())
    return (
        plan.offsets.tolist(),
        plan.coordinates[:6].tolist(),
        sources[:, :2].T.tolist(),
        everything.hexdigest()[:16],
    )


PINNED = {
    "sparse pair": (
        (0, [1000, 600, 10], [0.02, 0.01, 0.0], 2, 0),
        ([0, 9, 11, 11], [22, 100, 112, 127, 608, 714], [[1, 0], [1, 0]], "3a53ebe5b60985ac"),
    ),
    "sparse trio, a late step": (
        (9223372036854775813, [40000, 300], [0.002, 0.001], 3, 234000),
        ([0, 76, 76], [335, 751, 1653, 2156, 2487, 2603], [[1, 2, 0], [2, 0, 1]], "6fbb58c724d6fbbd"),
    ),
    "dense and sparse": (
        (7, [64, 2000, 500], [0.5, 0.01, 1.0], 3, 1),
        ([0, 23, 42, 439], [3, 5, 7, 9, 10, 11], [[1, 2, 0], [1, 2, 0]], "6ccbc0410d6fb135"),
    ),
    "one line of several tensors": (
        (1, [5000, 5000, 70000], [0.001, 0.001, 0.001], 5, 12),
        ([0, 3, 9, 63], [3347, 3477, 3539, 464, 558, 697], [[0, 4, 1, 2, 3], [0, 1, 3, 2, 4]], "32b2fdbac9ea1aa7"),
    ),
    "ten members": (
        (42, [3000], [0.01], 10, 3),
        (
            [0, 28],
            [221, 241, 248, 342, 346, 396],
            [[4, 6, 9, 1, 7, 5, 0, 3, 2, 8], [5, 2, 9, 6, 0, 7, 1, 3, 8, 4]],
            "cf3ab3520055a409",
        ),
    ),
    "twenty-five members": (
        (42, [300], [0.05], 25, 1099511627776),
        (
            [0, 13],
            [6, 20, 30, 62, 65, 91],
            [
                [3, 20, 1, 8, 16, 2, 5, 17, 14, 12, 4, 21, 10, 24, 23, 15, 13, 19, 0, 6, 18, 7, 11, 22, 9],
                [23, 17, 1, 3, 18, 9, 5, 15, 22, 14, 12, 2, 6, 11, 19, 10, 24, 8, 13, 4, 21, 20, 16, 0, 7],
            ],
            "302db4519f8200f5",
        ),
    ),
}
