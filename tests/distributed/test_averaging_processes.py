"""The mixers that average between processes, over gloo: the same members on every layout, errors instead of hangs."""

import json
import math
from pathlib import Path

import pytest
from distributed import averaging_scenarios


pytestmark = pytest.mark.distributed
SCRIPT = Path(__file__).with_name("averaging_scenarios.py")
METHODS = ["local SGD", "pairs", "PAPA", "SPARTA", "DiLoCo"]
SCENARIOS = [
    *(["layout", method, size] for method in METHODS for size in (2, 4)),
    *(["contagion", method] for method in METHODS),
    *(["disagreement", method] for method in METHODS),
    *(["stop", method] for method in METHODS),
    *(["changed", method] for method in METHODS),
    ["other_options"],
    ["other_buffers"],
]


@pytest.fixture(scope="module")
def found():
    return {}


@pytest.fixture
def answers(launch, found):
    def of(*scenario):
        if not found:
            completed = launch(SCRIPT, json.dumps(SCENARIOS), processes=2, timeout=150)
            lines = sorted(json.loads(line) for line in completed.stdout.splitlines() if line.startswith("["))
            assert len(lines) == 2
            for number, ran in enumerate(SCENARIOS):
                found[tuple(ran)] = [each[number] for _, each in lines]
        return found[scenario]

    return of


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_give_the_members_of_one_up_to_rounding(answers, method, size):
    expected, population, _ = averaging_scenarios.train(method, range(size))
    found = answers("layout", method, size)
    assert [tuple(line) for line in found[0]["population"]] == population
    members = [member for answer in found for member in answer["members"]]
    for ours, theirs in zip(members, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def test_what_is_sent_is_one_bucket_for_each_exchange_and_nothing_between(answers):
    model = averaging_scenarios.model(0)
    parameters = sum(p.numel() for p in model.parameters())
    everything = parameters + sum(b.numel() for b in model.buffers() if b.is_floating_point())
    # Of float64, which the last layer is; a ring of two sends a bucket once. Four values are its trailer.
    for answer in answers("layout", "local SGD", 2):
        assert answer["sent"] == [0, 0, 8 * (everything + 4)] * 2 + [0]
    for answer in answers("layout", "DiLoCo", 2):
        assert answer["sent"] == [0, 0, 8 * (parameters + 4)] * 2 + [0]
    for answer in answers("layout", "PAPA", 2):
        assert answer["sent"] == [8 * (everything + 4), 0] * 3 + [8 * (everything + 4)]
    for answer in answers("layout", "SPARTA", 2):
        selected = [values // 2 for values, *_ in answer["population"]]
        room = math.ceil(0.2 * parameters + 6 * math.sqrt(0.2 * parameters) + 6)
        assert all(values <= room for values in selected) and answer["sent"] == [8 * (room + 4)] * 7
    # Of two members each is the other's parent. What all have to know goes ahead.
    for answer in answers("layout", "pairs", 2):
        assert answer["sent"] == [0, 0, 8 * (everything + 4)] * 2 + [0]


@pytest.mark.parametrize("method", METHODS)
def test_all_processes_stop_before_anything_not_finite_is_written(answers, method):
    for answer in answers("contagion", method):
        assert answer["error"].startswith("ContagionError: Member 1 holds NaN or infinite values")
        assert answer["untouched"]


@pytest.mark.parametrize("method", METHODS)
def test_processes_that_come_with_different_steps_all_stop(answers, method):
    for answer in answers("disagreement", method):
        assert answer["error"].startswith(
            "PlanMismatchError: The processes came to this exchange with different steps"
        )
        assert answer["untouched"]


@pytest.mark.parametrize("method", METHODS)
def test_a_stop_that_one_process_asks_for_travels_with_the_next_exchange(answers, method):
    for answer in answers("stop", method):
        first = answer["due"].index(True)
        assert answer["stop"] == [step >= first and due for step, due in enumerate(answer["due"])]


def test_options_and_methods_that_differ_are_named_on_all_processes(answers):
    for answer in answers("other_options"):
        assert "agree on the interval: process 0 has 2 and process 1 3" in answer["interval"]
        assert "agree on the seed: process 0 has 0 and process 1 1" in answer["seed"]
        assert "agree on the method: process 0 has 'SpartaMixer' and process 1 'Periodic" in answer["method"]
        assert "probability must be a number between 0 and 1, and is 2.0" in answer["one is wrong"]


def test_buffers_that_differ_between_processes_are_named_on_all(answers):
    for answer in answers("other_buffers"):
        assert "ValueError" in answer["error"] and "'1.running_mean' has shape (7,) in member 1" in answer["error"]


@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_that_changed_its_shape_on_one_process_is_named_on_all(answers, method):
    for answer in answers("changed", method):
        assert answer["error"].startswith("ValueError: The parameter '2.weight' of member 1 is no longer of the shape")
        assert answer["untouched"]
