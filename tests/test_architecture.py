"""How two models differ, in a sentence."""

import pytest
from torch import nn

from hf_wash.architecture import describe_architecture, first_difference, unlike


OURS = [("a", (2, 3), "torch.float32", True), ("b", (3,), "torch.float32", True)]


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (OURS, None),
        (OURS[:1], "'b' is missing in them"),
        ([*OURS, ("c", (1,), "torch.float32", True)], "'c' is missing in us"),
        (OURS[::-1], "'b' of them stands where us has 'a'"),
        ([OURS[0], ("b", (4,), "torch.float16", True)], "'b' has shape (4,) in them and (3,) in us"),
        ([OURS[0], ("b", (3,), "torch.float16", True)], "'b' has dtype torch.float16 in them and torch.float32 in us"),
        ([OURS[0], (*OURS[1][:3], False)], "'b' has requires_grad False in them and True in us"),
    ],
)
def test_the_first_difference_is_named(theirs, said):
    assert first_difference(OURS, theirs, "us", "them") == said


def test_where_the_order_does_not_count_only_what_is_there_does():
    assert first_difference(OURS, OURS[::-1], "us", "them", in_order=False) is None
    renamed = [("c", *OURS[0][1:]), OURS[1]]
    assert first_difference(OURS, renamed, "us", "them", in_order=False) == "'a' is missing in them"


def test_members_are_told_by_their_numbers():
    plain, normed = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert unlike(*map(describe_architecture, (plain, plain)), 0, 3) is None
    said = unlike(*map(describe_architecture, (plain, normed)), 0, 3)
    assert said == "Member 3 does not have the architecture of member 0: '1.weight' is missing in member 0."
    # Buffers count, too.
    normed[1].weight = normed[1].bias = None
    said = unlike(*map(describe_architecture, (plain, normed)), 0, 3)
    assert said == "Member 3 does not have the architecture of member 0: '1.running_mean' is missing in member 0."
