"""A member that diverges while nothing is shuffled: nothing good is lost for it, and everything says which one it was."""

import json
import logging
import math
import shutil

import pytest
import torch
from small_population import StopAt, history, population, resnet, started
from transformers import TrainerCallback

from hf_wash import Ensemble
from hf_wash.hub.push import member_files
from hf_wash.hub.record import read_record
from hf_wash.mixing import ContagionError
from hf_wash.trainer import checkpoint
from hf_wash.trainer.served_soup import NonFiniteMemberError


class Poison(TrainerCallback):
    """Makes a weight (or a buffer) of members not finite after a step, as a division by zero would."""

    def __init__(self, *members, at, value=math.nan, name="classifier.bias"):
        self.members, self.at, self.value, self.name = members, at, value, name

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            for index in self.members:
                dict(self.trainer.population.members[index].state_dict())[self.name][0] = self.value


def poisoned(folder, *members, at, value=math.nan, name="classifier.bias", trainer=None, **settings):
    poison = Poison(*members, at=at, value=value, name=name)
    trainer = population(folder, trainer={"callbacks": [poison], **(trainer or {})}, **settings)
    poison.trainer = trainer
    return trainer


SAVING = {"save_strategy": "steps", "save_steps": 4, "size": 3}
WITHOUT_A_SHUFFLE = {
    "after shuffle_stop": {"shuffle_stop": 0.5},
    "mixing off": {"mixing": "independent"},
    "between two shuffles": {"shuffle_interval": 5, "save_steps": 7, "at": 6},
    "one member": {"size": 1},
}


# ---- Checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITHOUT_A_SHUFFLE)
def test_training_ends_with_the_name_of_the_member_instead_of_a_checkpoint(tmp_path, name):
    settings = {**SAVING, "at": 7, "eval_strategy": "no", "save_total_limit": 1, **WITHOUT_A_SHUFFLE[name]}
    member, step = (0 if settings["size"] == 1 else 1), (7 if name == "between two shuffles" else 8)
    trainer = poisoned(tmp_path, member, **settings)
    with pytest.raises(NonFiniteMemberError, match=rf"[Mm]ember {member} .*`.+`.* step {step}\b.*lower") as caught:
        trainer.train()
    assert caught.value.members == (member,) and caught.value.step == step
    # The good one was not rotated away, and nothing lies about.
    kept = [] if name == "between two shuffles" else ["checkpoint-4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_a_buffer_that_is_not_finite_counts_as_a_weight_does(tmp_path):
    name = "resnet.embedder.embedder.normalization.running_var"
    trainer = poisoned(
        tmp_path, 1, at=4, value=math.inf, name=name, **{**SAVING, "size": 2, "shuffle_stop": 0.1}, model=resnet()
    )
    with pytest.raises(NonFiniteMemberError, match=f"{name}"):
        trainer.train()


def test_a_shuffle_still_finds_it_first(tmp_path):
    with pytest.raises(ContagionError):
        poisoned(tmp_path, 1, at=7, **SAVING, shuffle_probability=0.5).train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    population(folder, **{**SAVING, "size": 2}).train()
    return folder


def as_of_an_older_version(folder, *, poison):
    """A checkpoint whose manifest says nothing of what is finite, with a member that is not."""
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    # Format 1: neither that, nor a digest of itself, nor whose run it is.
    for name in ("finite", "digest", "run"):
        del manifest[name]
    manifest["format"] = 1
    if poison is not None:
        path = folder / f"member_{poison}" / checkpoint.MEMBER_WEIGHTS
        tensors = checkpoint.load_file(path)
        tensors["classifier.bias"][3] = math.nan
        checkpoint.save_file(tensors, path)
        manifest["files"][path.relative_to(folder).as_posix()] = checkpoint.file_record(path)
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def test_a_checkpoint_says_that_it_is_finite(run_folder):
    assert json.loads((run_folder / "checkpoint-12" / checkpoint.MANIFEST).read_text())["finite"] is True


@pytest.mark.parametrize("request_", ["auto", True])
def test_resuming_passes_over_a_checkpoint_of_an_older_version_that_is_not_finite(
    tmp_path, run_folder, request_, caplog
):
    folder = tmp_path / "copy"
    shutil.copytree(run_folder, folder)
    for path in folder.glob("checkpoint-*"):
        as_of_an_older_version(path, poison=1 if path.name == "checkpoint-12" else None)
    trainer = population(folder, **{**SAVING, "size": 2})
    started_at = []

    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            started_at.append(state.global_step)

    trainer.add_callback(Begin())
    with caplog.at_level(logging.WARNING, "hf_wash"):
        trainer.train(resume_from_checkpoint=request_)
    assert started_at == [8]
    assert any(
        "checkpoint-12" in text and "member 1" in text and "classifier.bias" in text for text in caplog.messages
    )
    assert json.loads((folder / "checkpoint-12" / checkpoint.MANIFEST).read_text())["finite"] is True


def test_a_checkpoint_that_is_not_finite_is_refused_when_it_is_asked_for(tmp_path, run_folder):
    folder = tmp_path / "copy"
    shutil.copytree(run_folder, folder)
    as_of_an_older_version(folder / "checkpoint-12", poison=0)
    with pytest.raises(ValueError, match=r"Cannot resume: .*checkpoint-12.*classifier.bias.* of member 0"):
        population(folder, **{**SAVING, "size": 2}).train(resume_from_checkpoint=str(folder / "checkpoint-12"))


def test_the_best_checkpoint_is_loaded_also_where_no_member_is_left_at_the_end(tmp_path):
    """As a callback that stops a run which diverges would have it."""
    settings = {"save_strategy": "best", "metric_for_best_model": "eval_loss", "load_best_model_at_end": True}
    trainer = poisoned(tmp_path, 0, 1, at=7, size=2, mixing="independent", eval_steps=5, **settings)
    trainer.add_callback(StopAt(7))
    trainer.train()
    assert trainer.state.best_global_step == 5 and trainer.soup.left_out == {}
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())


# ---- The soup ----------------------------------------------------------------------------------------------------------


LATE = {"mixing": "independent", "size": 3}


@pytest.mark.parametrize("soup", ["uniform", "greedy"])
def test_the_final_soup_leaves_the_member_out_and_says_so(tmp_path, caplog, soup):
    trainer = poisoned(tmp_path, 1, at=12, **LATE, soup=soup, soup_holdout=0.1, eval_strategy="no")
    with caplog.at_level(logging.WARNING, "hf_wash"):
        output = trainer.train()
    said = [text for text in caplog.messages if "left out" in text]
    assert len(said) == 1 and "ember 1 " in said[0] and "`classifier.bias`" in said[0] and "step 12" in said[0]
    members = trainer.population.members
    if soup == "uniform":
        for name, value in trainer.model.named_parameters():
            theirs = [dict(members[index].named_parameters())[name] for index in (0, 2)]
            assert torch.equal(value, ((theirs[0].double() + theirs[1].double()) / 2).float())
    else:
        record = trainer.greedy_record
        assert set(record.indices) <= {0, 2} and len(record.member_scores) == 3
        assert math.isnan(record.member_scores[1]) and sorted(record.order) == [0, 1, 2] and record.order[-1] == 1
        assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    assert math.isfinite(trainer.soup.consensus_distance)

    # Members stay as they are.
    assert not torch.isfinite(members[1].classifier.bias).all()
    # Log, record and card repeat it.
    assert output.metrics["member_1_left_out"] == 1 and trainer.state.log_history[-1]["member_1_left_out"] == 1
    trainer.save_model()
    trainer.create_model_card()
    record = json.loads((tmp_path / "wash_run.json").read_text())
    assert record["soup"]["left_out"] == [1]
    card = (tmp_path / "README.md").read_text()
    assert "Member 1 was left out of it" in card
    assert soup == "greedy" or "of the weights of 2 of 3 models" in card


def test_without_a_diverged_member_nothing_is_said_of_one(tmp_path):
    trainer = population(tmp_path, **LATE)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert "left_out" not in (tmp_path / "wash_run.json").read_text() + json.dumps(trainer.state.log_history)
    assert "left out of it" not in (tmp_path / "README.md").read_text()


def test_a_soup_of_no_members_fails_in_one_sentence_and_leaves_the_members(tmp_path):
    trainer = poisoned(tmp_path, 0, 1, 2, at=12, **LATE, eval_strategy="no")
    with pytest.raises(NonFiniteMemberError, match=r"no soup") as caught:
        trainer.train()
    assert caught.value.members == (0, 1, 2) and caught.value.step == 12
    assert trainer.population.members[0].classifier.bias.shape == (10,)


def test_save_members_leaves_it_out_and_says_so(tmp_path, caplog):
    trainer = poisoned(tmp_path, 1, at=12, **LATE, eval_strategy="no", push_members=True)
    # An earlier run's would be taken for this one's.
    stale = tmp_path / "_members" / "member_1"
    stale.mkdir(parents=True)
    with caplog.at_level(logging.WARNING, "hf_wash"):
        trainer.train()
    said = [text for text in caplog.messages if "not saved" in text]
    assert len(said) == 1 and said[0].startswith("Member 1 (`classifier.bias`) holds NaN") and "step 12" in said[0]
    assert {path.name for path in stale.parent.iterdir()} == {"member_0", "member_2"}
    trainer.save_model()
    trainer.save_state()
    assert len(Ensemble.from_pretrained(tmp_path).members) == 2
    record = read_record(tmp_path)
    files = member_files(tmp_path, record["population"]["size"], record["soup"]["left_out"])
    assert {name.split("/")[1] for name in files} == {"member_0", "member_2"}


def test_save_members_refuses_a_population_of_which_none_is_left(tmp_path):
    trainer = population(tmp_path, size=2)
    for member in trainer.population.members:
        member.classifier.bias.data[0] = math.nan
    kept = tmp_path / "_members" / "member_7"
    kept.mkdir(parents=True)
    with pytest.raises(NonFiniteMemberError, match=r"Member 0 .*, member 1 .*so none of them is saved"):
        trainer.save_members()
    assert list(kept.parent.iterdir()) == [kept]


def test_what_members_share_is_looked_at(tmp_path):
    model = started()
    for parameter in model.vit.parameters():
        parameter.requires_grad = False
    name = "vit.embeddings.cls_token"
    trainer = poisoned(tmp_path, 0, at=8, name=name, **SAVING, model=model, eval_strategy="no")
    with pytest.raises(NonFiniteMemberError, match=rf"ember 0 \(`{name}`\), member 1 \(`{name}`\).* at step 8\b"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_recalibrated_soup_is_of_the_others(tmp_path):
    name = "resnet.embedder.embedder.normalization.weight"
    trainer = poisoned(tmp_path, 0, at=11, name=name, **LATE, eval_strategy="no", model=resnet())
    trainer.train()
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())


# ---- What is reported --------------------------------------------------------------------------------------------------


def test_a_diverged_member_is_seen_in_an_evaluation_and_spoils_no_figure_of_the_others(tmp_path, caplog):
    trainer = poisoned(tmp_path, 0, at=5, **LATE)
    with caplog.at_level(logging.WARNING, "hf_wash"):
        trainer.train()
    metrics = trainer.evaluate()
    assert math.isnan(metrics["eval_member_0_loss"]) and metrics["eval_member_0_left_out"] == 1
    others = [metrics["eval_member_1_loss"], metrics["eval_member_2_loss"]]
    assert metrics["eval_members_loss_mean"] == sum(others) / 2
    assert (metrics["eval_members_loss_min"], metrics["eval_members_loss_max"]) == (min(others), max(others))
    assert metrics["eval_members_accuracy_mean"] == pytest.approx(
        (metrics["eval_member_1_accuracy"] + metrics["eval_member_2_accuracy"]) / 2
    )
    for key in ("eval_loss", "eval_ensemble_loss", "eval_consensus_distance"):
        assert math.isfinite(metrics[key])
    # Once when it is found, once for the final soup.
    assert [text.partition(" at ")[2][:7] for text in caplog.messages if "left out" in text] == ["step 6,", "step 12"]


def test_a_loss_that_is_not_finite_is_not_averaged_away_in_the_members_summary():
    from hf_wash.trainer.evaluation import population_metrics

    for order in ([math.nan, 1.0, 2.0], [1.0, math.nan, 2.0], [1.0, 2.0, math.nan]):
        metrics = population_metrics([{"loss": loss} for loss in order], None)
        assert all(math.isnan(metrics[f"members_loss_{what}"]) for what in ("mean", "min", "max"))


def test_the_mean_loss_is_that_of_the_members_whose_losses_were_finite(tmp_path, caplog):
    """With Trainer's filter what is not finite counts as the average so far, 0 at the beginning: that is no loss."""
    trainer = poisoned(tmp_path, 1, at=6, **LATE, eval_strategy="no")
    with caplog.at_level(logging.WARNING, "hf_wash"):
        output = trainer.train()
    good = population(tmp_path / "good", **LATE, eval_strategy="no")
    good.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    expected = [line for line in good.state.log_history if "loss" in line]
    assert [line.get("member_1_skipped_losses") for line in lines] == [None, 2, 4]
    for line, other in zip(lines, expected, strict=True):
        assert line["member_0_loss"] == other["member_0_loss"] and line["member_2_loss"] == other["member_2_loss"]
        assert not [key for key in other if "skipped" in key]
    assert lines[0]["loss"] == expected[0]["loss"]
    for line in lines[1:]:
        assert line["loss"] == pytest.approx((line["member_0_loss"] + line["member_2_loss"]) / 2)
        assert math.isfinite(line["consensus_distance"])
    assert lines[2]["member_1_loss"] == 0.0  # as the Trainer has it
    assert output.training_loss == pytest.approx(sum(4 * line["loss"] for line in lines) / 12)
    said = [text for text in caplog.messages if "loss of member" in text]
    assert len(said) == 1 and "member 1 " in said[0] and "step 7" in said[0]


def test_without_the_filter_the_loss_is_what_it_is_and_the_member_is_named(tmp_path, caplog):
    trainer = poisoned(tmp_path, 1, at=6, **LATE, eval_strategy="no", logging_nan_inf_filter=False)
    with caplog.at_level(logging.WARNING, "hf_wash"):
        trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert math.isfinite(lines[0]["loss"])
    assert all(math.isnan(line["loss"]) and math.isnan(line["member_1_loss"]) for line in lines[1:])
    assert all(math.isfinite(line["member_0_loss"]) for line in lines)
    said = [text for text in caplog.messages if "loss of member" in text]
    assert len(said) == 1 and "member 1 " in said[0] and "step 8" in said[0]


def test_a_single_member_is_logged_as_the_trainer_logs_it(tmp_path):
    """Its loss alone is not finite, now and then; weights stay as they are, so that training goes on."""
    from test_plain_trainer import plain

    def strange(model_class):
        class Strange(model_class):
            calls = 0

            def forward(self, pixel_values=None, labels=None, **kwargs):
                output = super().forward(pixel_values=pixel_values, labels=labels, **kwargs)
                type(self).calls += self.training
                if self.training and type(self).calls in (1, 2, 7):
                    # Not finite, without a gradient that is not.
                    output.loss = output.loss + torch.tensor(math.inf if type(self).calls == 2 else math.nan)
                return output

        return Strange

    def make():
        model = started()
        model.__class__ = strange(type(model))
        return model

    settings = {"eval_strategy": "no"}
    expected = plain(tmp_path / "plain", model=make(), **settings)
    trainer = population(tmp_path / "one", make(), size=1, **settings)
    output = trainer.train()
    assert output.training_loss == expected.output.training_loss
    for ours, theirs in zip(history(trainer), history(expected), strict=True):
        assert {key: ours[key] for key in theirs} == theirs
    assert [line.get("member_0_skipped_losses") for line in history(trainer)[:3]] == [2, 1, None]


def test_what_was_skipped_before_an_interruption_is_not_forgotten(tmp_path):
    class Forged(TrainerCallback):
        """A loss that is not finite in step 5, and weights that are."""

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                self.trainer._log.add([torch.tensor(1.0), torch.tensor(math.nan)], 0, True)

    def run(folder, **settings):
        forged = Forged()
        trainer = population(
            folder, size=2, save_strategy="steps", save_steps=6, eval_strategy="no", trainer={"callbacks": [forged]}
        )
        forged.trainer = trainer
        trainer.train(**settings)
        return history(trainer)

    whole = run(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-12")
    assert [line.get("member_1_skipped_losses") for line in whole[:3]] == [None, 1, None]
    assert run(tmp_path, resume_from_checkpoint="auto") == whole
