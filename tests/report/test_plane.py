"""The plane through three members: its axes and its grid by hand, and the loss on it where that is known everywhere."""

import math

import pytest
import small_plane
import torch

from hf_wash.report.plane import Plane, point_of_plane


def models(*values):
    return [{"w": torch.tensor(value), "shared": torch.zeros(2), "n": torch.tensor(3)} for value in values]


def test_axes_are_those_of_gram_and_schmidt():
    first, second, third = models([1.0, 1.0, 1.0], [1.0, 1.0, 6.0], [1.0, 5.0, 4.0])
    plane = Plane.through(first, second, third, ["w"])
    assert plane.places == [(0.0, 0.0), (5.0, 0.0), (3.0, 4.0)]
    columns, rows = plane.grid(3)
    assert columns == [-1.25, 2.5, 6.25] and rows == [-1.0, 2.0, 5.0]
    # The point of the grid's axes is the one in weight space.
    point = point_of_plane(first, second, third, plane.parts(2.0, 3.0))
    torch.testing.assert_close(point["w"], torch.tensor([1.0, 4.0, 3.0]))
    assert point["n"] == 3
    for place, corner in zip(plane.places, (first, second, third), strict=True):
        torch.testing.assert_close(point_of_plane(first, second, third, plane.parts(*place))["w"], corner["w"])
    # What lies 7 above it is seen in its place.
    (above,) = models([8.0, 3.0, 2.0])
    assert plane.place_of(above, first, second, third, ["w"]) == pytest.approx((1.0, 2.0, 7.0))


@pytest.mark.parametrize("third", [[1.0, 1.0, 1.0], [1.0, 1.0, 6.0], [1.0, 1.0, -30.0], [1.0, math.nan, 1.0]], ids=str)
def test_three_on_one_line_span_no_plane(third):
    assert Plane.through(*models([1.0, 1.0, 1.0], [1.0, 1.0, 6.0], third), ["w"]) is None
    assert Plane.through(*models([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], third), ["w"]) is None


def test_half_precision_is_mixed_in_float32_and_rounded_once():
    corners = [{"w": torch.tensor([value], dtype=torch.bfloat16)} for value in (1.0, 2.0, 3.0)]
    point = point_of_plane(*corners, (0.125, 0.25))
    assert point["w"].dtype == torch.bfloat16 and point["w"].item() == 1.625


def test_the_loss_on_it_is_that_of_the_weights_there():
    found = small_plane.surveyed()
    plane = found["plane"]
    assert plane["places"] == {
        "member 0": [0.0, 0.0],
        "member 1": [4.0, 0.0],
        "member 2": [2.0, 3.0],
        "soup": [2.0, 1.0],
    }
    assert plane["soup_away"] == pytest.approx(2.0)
    assert plane["x"] == [-1.0 + 0.75 * i for i in range(9)] and plane["y"][0] == -0.75 and plane["y"][-1] == 3.75
    for y, row in zip(plane["y"], plane["loss"], strict=True):
        assert row == pytest.approx([(x - 2.0) ** 2 + (y - 1.0) ** 2 for x in plane["x"]], abs=1e-5)
    assert plane["accuracy"] is None


def test_members_on_one_line_are_measured_without_it():
    found = small_plane.surveyed(weights=[[1.0, 1.0, 1.0]] * 3)
    assert found["plane"] is None and len(found["lines"]) == 6


def test_two_members_have_none():
    assert "plane" not in small_plane.surveyed(weights=small_plane.WEIGHTS[:2])


def test_a_loss_that_is_not_finite_is_left_out_of_the_grid():
    def answer_at(weights):
        answer = small_plane.answer_at(weights)
        return answer if answer.loss < 5 else small_plane.Answers(math.inf)

    rows = small_plane.surveyed(answer_at=answer_at)["plane"]["loss"]
    assert rows[0][0] is None and rows[4][4] is not None
