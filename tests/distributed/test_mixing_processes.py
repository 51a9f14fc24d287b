"""The shuffle between processes, over gloo: the same members on every layout, exact bytes, errors instead of hangs."""

import json
import math
from pathlib import Path

import pytest
from distributed import mixing_scenarios
from torch import nn

from hf_wash.mixing import expected_values_moved
from hf_wash.mixing.plan import Planner
from hf_wash.mixing.schedule import layer_probabilities, shuffled_layers


pytestmark = pytest.mark.distributed
SCRIPT = Path(__file__).with_name("mixing_scenarios.py")


# Starting processes takes far longer than what they do, so all scenarios for a number of them run in one start.
BAD_INPUT = ["shape", "dtype", "number", "probability", "schedule", "seed", "range", "optimizer"]
SCENARIOS: dict[int, list[list]] = {
    2: [
        *(["layout", n, state] for n in (2, 4) for state in ("weights", "state")),
        ["count_bytes", 1000],
        ["headers_only"],
        ["contagion", 2, "weights"],
        ["contagion", 2, "state"],
        ["contagion", 4, "weights"],
        ["disagreement", "step"],
        ["disagreement", "shuffle"],
        *(["bad_input", kind] for kind in BAD_INPUT),
        ["late_refusal"],
        *(["changed", kind] for kind in ("weight", "cleared", "dtype")),
    ],
    3: [
        *(["layout", 3, state] for state in ("weights", "state")),
        ["count_bytes", 1000],
        ["disagreement", "step"],
        ["disagreement", "shuffle"],
    ],
    4: [["subgroup"], ["layout", 4, "state"]],
    5: [["count_bytes", 1000], ["headers_only"]],
}
_ran: dict[int, list[tuple[list, list]]] = {}


@pytest.fixture
def answers(launch):
    def start(scenarios, processes, **options):
        completed = launch(SCRIPT, json.dumps(scenarios), processes=processes, timeout=200, **options)
        lines = [json.loads(line) for line in completed.stdout.splitlines() if line.startswith("[")]
        return [found for _, found in sorted(lines, key=lambda line: line[0])]

    def run(*scenario, processes, alone=False):
        if alone:
            return [found for (found,) in start([list(scenario)], processes, check=False)]
        if processes not in _ran:
            by_process = start(SCENARIOS[processes], processes)
            assert len(by_process) == processes
            _ran[processes] = list(zip(SCENARIOS[processes], zip(*by_process, strict=True), strict=True))
        return next(found for ran, found in _ran[processes] if ran == list(scenario))

    return run


@pytest.mark.parametrize(
    ("num_members", "processes", "with_state"),
    [(2, 2, False), (2, 2, True), (4, 2, False), (4, 2, True), (3, 3, False), (3, 3, True), (4, 4, True)],
)
def test_every_layout_gives_the_same_members_bit_for_bit(answers, num_members, processes, with_state):
    expected, population = mixing_scenarios.reference(num_members, with_state)
    found = answers("layout", num_members, "state" if with_state else "weights", processes=processes)
    assert [member for answer in found for member in answer["members"]] == expected
    for answer in found:
        assert [tuple(counts) for counts in answer["population"]] == population
    own = [sum(counts) for counts in zip(*(answer["own"] for answer in found), strict=True)]
    assert own == [values for values, _ in population]


@pytest.mark.parametrize("processes", [2, 3, pytest.param(5, marks=pytest.mark.slow)])
def test_exactly_the_moved_values_and_the_headers_are_sent(answers, processes):
    steps = 1000
    found = answers("count_bytes", steps, processes=processes)
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300), nn.Linear(300, 10))
    layers, probabilities = shuffled_layers(model), layer_probabilities(model, 0.05)
    sizes = [p.numel() for owned in layers.values() for p in owned.values()]
    rates = [probabilities[layer] for layer, owned in layers.items() for _ in owned]
    planner = Planner(0, sizes, rates, processes)
    plans = [planner.draw(step) for step in range(steps)]
    headers = 32 * (processes - 1)
    for rank, answer in enumerate(found):
        needed = [4 * int((plan.destinations(rank) != rank).sum()) for plan in plans]
        assert answer["sent"] == answer["reported"] == [values + headers for values in needed]
        assert answer["moved"] == [values // 4 for values in needed]
        floor = 4 * expected_values_moved(model, processes, 0.05)
        assert math.isclose(sum(answer["sent"]) / steps, floor, rel_tol=0.01)


def test_the_headers_travel_even_when_nothing_moves(answers):
    for answer in answers("headers_only", processes=2):
        assert answer["sent"] == [32] * 6
        assert answer["stop"] == [False, False, True, False, False, False]


@pytest.mark.parametrize(("num_members", "kind"), [(2, "weights"), (2, "state"), (4, "weights")])
def test_all_processes_stop_before_anything_not_finite_is_written(answers, num_members, kind):
    for answer in answers("contagion", num_members, kind, processes=2):
        assert answer["error"].startswith("ContagionError: Member 1 holds NaN or infinite values")
        assert "step 1" in answer["error"]
        assert answer["untouched"]


@pytest.mark.parametrize("kind", ["step", "shuffle"])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_that_disagree_all_stop(answers, kind, processes):
    found = answers("disagreement", kind, processes=processes)
    assert len(found) == processes
    for answer in found:
        assert answer["error"].startswith("PlanMismatchError: Process ")
        assert answer["untouched"]
        assert answer["total"] == processes
    assert ("step 6" if kind == "step" else "without a shuffle") in found[0]["error"]


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (
            "shape",
            "Member 1 does not have the architecture of member 0: '1.weight' has shape (4, 3) in member 1",
        ),
        ("dtype", "Member 1 does not have the architecture of member 0: '0.weight' has dtype torch."),
        ("number", "number of members: process 0 has 1 and process 1 2"),
        ("probability", "probability: process 0 has 0.1 and process 1 0.2"),
        ("schedule", "schedule: process 0 has 'increasing' and process 1 'constant'"),
        ("seed", "seed: process 0 has 2 and process 1 3"),
        ("range", "probability must be a number between 0 and 1, and is 2.0"),
        ("optimizer", "No optimizer holds the parameter '0.weight' of member 1"),
    ],
)
def test_bad_input_of_one_process_is_an_error_on_all(answers, kind, named):
    for answer in answers("bad_input", kind, processes=2):
        assert answer["error"].startswith("ValueError: ")
        assert named in answer["error"]


def test_a_state_that_one_process_cannot_move_is_refused_by_all(answers):
    for answer in answers("late_refusal", processes=2):
        assert "SGD keeps 'history' for the parameter '0.weight'" in answer["error"]
        assert answer["untouched"]


def test_a_parameter_that_became_another_tensor_stops_all_processes(answers):
    for answer in answers("changed", "weight", processes=2):
        assert "The parameter 'weight' of member 1 is no longer of the shape, dtype and device" in answer["error"]
        assert answer["weights_same"] and answer["state_same"]


@pytest.mark.parametrize("kind", ["cleared", "dtype"])
def test_a_state_that_one_process_lost_or_changed_rests_and_the_weights_go_on(answers, kind):
    found = answers("changed", kind, processes=2)
    assert found[0]["moved"] == found[1]["moved"] and found[0]["moved"][0] > 300
    for answer in found:
        assert answer["error"] == "nothing was raised" and not answer["weights_same"] and answer["state_same"]


def test_a_population_may_live_in_a_subgroup(answers):
    found = answers("subgroup", processes=4)
    assert len({answer["member"] for answer in found}) == 4
    assert all("not in process_group" in answer["outside"] for answer in found)


OTHER_DEVICES: dict[int, list[list]] = {
    1: [["layout", n, state] for n in (2, 3) for state in ("weights", "state")] + [["contagion", 3, "state"]],
    2: [
        *(["layout", n, state] for n in (2, 4) for state in ("weights", "state")),
        ["contagion", 4, "state"],
        ["disagreement", "step"],
        ["late", "contagion"],
        ["late", "step"],
    ],
    3: [["layout", 3, "state"]],
}


@pytest.mark.parametrize("path", ["torch", "kernels"])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_other_devices_carry_the_same_and_stop_for_the_same(launch, processes, path):
    if path == "kernels":
        pytest.importorskip("triton", reason="the kernels are Triton's")
    scenarios = OTHER_DEVICES[processes]
    completed = launch(
        SCRIPT, json.dumps(scenarios), path, processes=processes, timeout=200, env={"TRITON_INTERPRET": "1"}
    )
    lines = sorted(json.loads(line) for line in completed.stdout.splitlines() if line.startswith("["))
    for number, (name, *arguments) in enumerate(scenarios):
        found = [answers[number] for _, answers in lines]
        assert len(found) == processes
        if name == "layout":
            expected, _ = mixing_scenarios.reference(arguments[0], arguments[1] == "state")
            assert [member for answer in found for member in answer["members"]] == expected
            continue
        for answer in found:
            error = "PlanMismatchError" if "step" in (name, *arguments) else "ContagionError: Member 1 holds"
            assert answer["error"].startswith(error)
            assert answer["untouched"]


def test_a_process_that_dies_leaves_an_error_behind(answers):
    (answer,) = answers("death", processes=2, alone=True)
    assert "Error" in answer["error"]
    assert answer["seconds"] < 40


def test_a_mixer_does_not_keep_a_destroyed_process_group_alive(answers):
    # Its threads would run until the interpreter ends, and now and then abort it there.
    found = answers("destroyed", processes=2, alone=True)
    assert len(found) == 2
    for answer in found:
        assert not answer["outlives"]
        assert "process group of this population has been destroyed" in answer["error"]
