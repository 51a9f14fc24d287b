"""The Trainer's report: when it is written, what is measured for it, and that it costs no run."""

import json
from pathlib import Path

import pytest
import small_population as small
import torch
from small_population import population

from hf_wash import PopulationDiagnostics, WashConfig
from hf_wash.report.gather import LAYER_KEY


HERE = Path(__file__).parent


def survey_of(folder):
    return json.loads((folder / "report/measurements.json").read_text())


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A run of three members with its report, and the same run without."""
    folder = tmp_path_factory.mktemp("reported")
    with_report = population(
        folder / "with",
        size=3,
        report=True,
        trainer={"callbacks": [PopulationDiagnostics(4, barrier=True, plane=True)]},
    )
    with_report.train()
    without = population(folder / "without", size=3)
    without.train()
    return with_report, without, folder


def test_the_end_of_training_leaves_a_page_its_pictures_and_what_was_measured(reported):
    _, _, folder = reported
    names = {path.name for path in (folder / "with/report").iterdir()}
    assert {"index.html", "measurements.json", "lines.png", "lines-dark.png", "disagreement.png"} <= names
    assert {"accuracy.png", "layers.png", "reliability.png", "consensus.png", "bytes.png"} <= names
    assert not (folder / "without/report").exists()


def test_a_report_and_diagnostics_leave_no_trace_in_the_run(reported):
    with_report, without, _ = reported
    ours, theirs = small.outcome(with_report), small.outcome(without)
    assert ours["members"] == theirs["members"] and ours["soup"] == theirs["soup"]
    added = (LAYER_KEY, "barrier", "eval_members_disagreement")
    histories = []
    for history in (ours["history"], theirs["history"]):
        lines = [{k: v for k, v in entry.items() if not k.startswith(added)} for entry in history]
        histories.append([line for line in lines if set(line) - {"step", "epoch"}])
    assert histories[0] == histories[1]


def test_what_is_measured_of_members_and_soup_is_what_an_evaluation_says(reported):
    trainer, _, folder = reported
    found = survey_of(folder / "with")
    assert found["examples"] == len(small.TEST) == 37
    metrics = trainer.evaluate()
    for name, prefix in (
        ("soup", ""),
        ("ensemble", "ensemble_"),
        *((f"member {i}", f"member_{i}_") for i in range(3)),
    ):
        assert found["answers"][name]["accuracy"] == pytest.approx(metrics[f"eval_{prefix}accuracy"])
        assert found["calibration"][name]["accuracy_overall"] == pytest.approx(metrics[f"eval_{prefix}accuracy"])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert found["disagreement"][i][j] == pytest.approx(metrics[f"eval_members_disagreement_{i}_{j}"])
    assert metrics["eval_members_disagreement_mean"] > 0


def test_lines_begin_and_end_at_members_and_pass_through_the_soup(reported):
    _, _, folder = reported
    found = survey_of(folder / "with")
    pairs = [(line["from"], line["to"]) for line in found["lines"]]
    assert pairs[:3] == [("member 0", "member 1"), ("member 1", "member 2"), ("member 0", "member 2")]
    assert pairs[3:] == [(f"member {i}", "soup") for i in range(3)]
    for line in found["lines"]:
        ends = [line["loss"][line["fractions"].index(end)] for end in (0.0, 1.0)]
        assert ends == pytest.approx([found["answers"][line[end]]["loss"] for end in ("from", "to")], rel=1e-5)
    assert found["barrier"] == max(line["barrier"] for line in found["lines"][:3])


def test_the_plane_through_three_members_is_on_the_report_if_asked_for(reported):
    trainer, _, folder = reported
    plane = survey_of(folder / "with")["plane"]
    distance = sum(
        (p - q).detach().double().square().sum()
        for p, q in zip(*(m.parameters() for m in trainer.population.members[:2]), strict=True)
    )
    assert plane["places"]["member 1"] == pytest.approx([float(distance.sqrt()), 0.0])
    # The uniform soup of three is their centre.
    corners = [plane["places"][f"member {i}"] for i in range(3)]
    assert plane["places"]["soup"] == pytest.approx([sum(axis) / 3 for axis in zip(*corners, strict=True)], rel=1e-4)
    assert [len(row) for row in plane["loss"]] == [9] * 9 == [len(row) for row in plane["accuracy"]]
    assert (folder / "with/report/plane.png").exists()
    page = (folder / "with/report/index.html").read_text()
    assert 'id="plane"' in page and "The soup lies in it." in page


def test_members_of_different_origins_have_a_barrier(tmp_path):
    """Two networks that learned by themselves, whose mean knows nothing; shuffled ones lie in one basin."""
    barriers = {}
    for mixing, start in (("independent", {"same_init": False}), ("wash", {})):
        trainer = population(
            tmp_path / mixing, size=2, report=True, mixing=mixing, max_steps=60, learning_rate=1e-2, eval_strategy="no",
            trainer={"model_init": lambda: small.vit(hidden_dropout_prob=0.0)}, **start,
        )  # fmt: skip
        trainer.train()
        barriers[mixing] = survey_of(tmp_path / mixing)["barrier"]
    assert barriers["independent"] > 0.2 > 0.05 > barriers["wash"]


def test_batch_norm_is_re_estimated_on_the_lines_and_members_keep_theirs(tmp_path):
    diagnostics = PopulationDiagnostics(4, plane=True)
    trainer = population(
        tmp_path, small.started(small.resnet), size=3, report=True, trainer={"callbacks": [diagnostics]}
    )
    trainer.train()
    before = [{k: v.clone() for k, v in member.named_buffers()} for member in trainer.population.members]
    found = survey_of(tmp_path)
    assert found["batch_norm"] == "re-estimated at every point of a line on the same 8 training batches of 16 examples"
    assert "re-estimated at every point" in (tmp_path / "report/index.html").read_text()
    # At every point of the plane, too: beside its corners variances would else be below zero, and the loss no number.
    assert all(isinstance(loss, float) for row in found["plane"]["loss"] for loss in row)
    trainer._survey(plane=True)
    for member, buffers in zip(trainer.population.members, before, strict=True):
        assert all(torch.equal(value, buffers[name]) for name, value in member.named_buffers())


def test_without_evaluation_data_there_is_a_report_of_the_rest(tmp_path):
    trainer = population(tmp_path, size=2, report=True, eval_strategy="no", trainer={"eval_dataset": None})
    trainer.train()
    found = survey_of(tmp_path)
    assert "lines" not in found and len(found["layers"]["names"]) == len(found["layers"]["spread"]) > 5
    assert "have not been looked at" in (tmp_path / "report/index.html").read_text()


def test_without_matplotlib_training_ends_with_a_sentence(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("hf_wash.trainer.reporting.can_draw", lambda: False)
    population(tmp_path, size=2, report=True).train()
    assert f"`hf-wash report {tmp_path}` makes it" in caplog.text and 'hf-wash[report]"' in caplog.text
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("fails", ["survey", "write_report"])
def test_a_report_that_fails_costs_no_run(tmp_path, monkeypatch, caplog, fails):
    def broken(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(f"hf_wash.trainer.reporting.{fails}", broken)
    trainer = population(tmp_path, size=2, report=True)
    trainer.train()
    trainer.save_model()
    assert "No space left on device" in caplog.text and "The run itself is whole" in caplog.text
    assert (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "report/index.html").exists() == (fails == "survey")


def test_saving_the_state_brings_the_page_up_to_date(tmp_path):
    trainer = population(tmp_path, size=2, report=True, eval_strategy="no")
    trainer.train()
    assert not (tmp_path / "report/accuracy.png").exists()
    trainer.evaluate()
    trainer.save_state()
    assert (tmp_path / "report/accuracy.png").exists()


def test_report_must_be_true_or_false(tmp_path):
    with pytest.raises(ValueError, match="`report` must be True or False"):
        WashConfig(str(tmp_path), report="yes")


# Diagnostics


def test_diagnostics_log_each_layer_at_their_interval_and_nothing_on_the_terminal(reported, tmp_path, capsys):
    trainer, _, _ = reported
    lines = [entry for entry in trainer.state.log_history if any(key.startswith(LAYER_KEY) for key in entry)]
    assert [line["step"] for line in lines] == [4, 8, 12]
    layers = {key.removeprefix(LAYER_KEY) for key in lines[0] if key.startswith(LAYER_KEY)}
    assert layers == {name.rpartition(".")[0] for name, _ in trainer.model.named_parameters()}
    capsys.readouterr()
    population(tmp_path, size=2, trainer={"callbacks": [PopulationDiagnostics(4)]}).train()
    printed = capsys.readouterr().out
    assert "consensus_distance" in printed and LAYER_KEY not in printed


def test_a_line_of_diagnostics_does_not_take_the_trainers_own(reported):
    trainer, without, _ = reported
    logged = [[entry["step"] for entry in each.state.log_history if "loss" in entry] for each in (trainer, without)]
    assert logged[0] == logged[1] == [4, 8, 12]


def test_the_barrier_is_measured_at_each_evaluation_if_asked_for(reported):
    trainer, _, folder = reported
    barriers = {entry["step"]: entry["barrier"] for entry in trainer.state.log_history if "barrier" in entry}
    assert set(barriers) == {6, 12}
    assert barriers[12] == survey_of(folder / "with")["barrier"]


def test_the_default_interval_is_a_fiftieth_of_the_run(tmp_path):
    trainer = population(
        tmp_path, size=2, max_steps=100, eval_strategy="no", trainer={"callbacks": [PopulationDiagnostics()]}
    )
    trainer.train()
    lines = [entry for entry in trainer.state.log_history if any(key.startswith(LAYER_KEY) for key in entry)]
    assert len(lines) == 50


@pytest.mark.parametrize("options", [{"interval": 0}, {"interval": True}, {"sample": 0.5}, {"barrier": "no"}])
def test_diagnostics_refuse_what_is_no_number(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be"):
        PopulationDiagnostics(**options)


def test_a_trainer_without_a_population_is_told(tmp_path):
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(**small.options(tmp_path))
    trainer = Trainer(
        small.started(), args, train_dataset=small.TRAIN, eval_dataset=small.TEST, callbacks=[PopulationDiagnostics()]
    )
    with pytest.raises(ValueError, match="this Trainer has none"):
        trainer.train()


@pytest.mark.distributed
def test_two_processes_measure_what_one_does(tmp_path, launch):
    outcomes = []
    for processes in (1, 2):
        completed = launch(
            HERE / "report_run.py", tmp_path / str(processes), "resnet", processes=processes, timeout=120,
            env={"PYTHONPATH": f"{HERE.parent}:{HERE.parents[1]}"},
        )  # fmt: skip
        (line,) = [line for line in completed.stdout.splitlines() if line.startswith("OUTCOME ")]
        outcomes.append(json.loads(line.removeprefix("OUTCOME ")))
        # What one process stumbles over is told to all of them, and none waits.
        said = [line for line in completed.stdout.splitlines() if line.startswith("AFTER A FAILURE")]
        assert sorted(said) == [
            f"AFTER A FAILURE {where} {rank}: process {processes - 1}: OSError: an image that cannot be read"
            for where in ("OF THE LAST PROCESS", "ON A PLANE")
            for rank in range(processes)
        ]
    assert outcomes[0] == outcomes[1]
    assert len(outcomes[0]["log"]) == 4 + 2 + 2
