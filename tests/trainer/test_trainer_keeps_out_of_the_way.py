"""What a user's own Trainer, callbacks, optimizers and data may do to a population, and still be right."""

import gc
import weakref

import pytest
import torch
from small_population import TEST, TRAIN, StopAt, accuracy, digest, options, population, started, vit
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from hf_wash import WashConfig, WashTrainer
from hf_wash.soup.ensemble import mean_prediction
from hf_wash.trainer import evaluation


def members_of(trainer):
    return [digest(member) for member in trainer.population.members]


def test_the_exchange_is_not_a_callback_that_a_user_could_remove(tmp_path):
    settings = {"size": 2, "max_steps": 4, "eval_strategy": "no"}
    whole = population(tmp_path / "whole", **settings)
    whole.train()
    assert whole.values_moved > 0
    popped = population(tmp_path / "popped", **settings)
    assert not any("Mix" in type(callback).__name__ for callback in popped.callback_handler.callbacks)
    popped.callback_handler.callbacks.clear()
    popped.add_callback(StopAt(4))  # the loop's flow was a callback, too
    popped.train()
    assert popped.values_moved == whole.values_moved


def test_a_getter_does_not_change_the_run(tmp_path):
    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            asked.get_train_dataloader()
            asked.get_eval_dataloader()

    settings = {"size": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    undisturbed = population(tmp_path / "undisturbed", **settings)
    undisturbed.train()
    asked = population(tmp_path / "asked", trainer={"callbacks": [Ask()]}, **settings)
    asked.train()
    assert members_of(asked) == members_of(undisturbed)
    resumed = population(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "asked" / "checkpoint-3"))
    assert members_of(resumed) == members_of(asked)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "adafactor"},
        {"optim": "adafactor", "optim_args": "scale_parameter=True,relative_step=True,warmup_init=True"},
        {"lr_scheduler_type": "greedy", "metric_for_best_model": "loss"},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss"},
    ],
    ids=["adafactor", "adafactor relative", "greedy", "plateau"],
)
def test_any_optimizer_and_schedule_is_saved_and_resumed(tmp_path, size, settings):
    settings = {"size": size, "max_steps": 6, "eval_steps": 3, "save_strategy": "steps", "save_steps": 3, **settings}
    whole = population(tmp_path / "whole", **settings)
    whole.train()
    resumed = population(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert members_of(resumed) == members_of(whole)


def test_an_optimizer_of_the_users_own_serves_one_member(tmp_path):
    model = started()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = population(
        tmp_path, model, size=1, max_steps=4, save_strategy="steps", save_steps=2,
        trainer={"optimizers": (optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))},
    )  # fmt: skip
    trainer.train()
    assert (tmp_path / "checkpoint-4" / "member_0" / "optimizer.pt").is_file()


def test_a_loader_of_the_users_own_is_asked_once_for_each_member(tmp_path):
    calls = []

    class Own(WashTrainer):
        def get_train_dataloader(self):
            calls.append(self.args.seed)
            return DataLoader(self.train_dataset, batch_size=16, shuffle=True)

    args = WashConfig(**options(tmp_path, population_size=2, max_steps=4, eval_strategy="no"))
    Own(started(), args, train_dataset=TRAIN).train()
    assert calls == [7, 8]


def test_the_loader_of_a_run_tells_its_batch_size(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
            seen.append(train_dataloader.total_batch_size)

    population(tmp_path, size=2, max_steps=2, eval_strategy="no", trainer={"callbacks": [Look()]}).train()
    assert seen == [16]


def test_what_is_frozen_through_the_trainers_model_is_frozen_for_all(tmp_path):
    trainer = population(tmp_path, size=3, max_steps=2, eval_strategy="no")
    for parameter in trainer.model.vit.parameters():
        parameter.requires_grad_(False)
    before = digest(trainer.model.vit)
    trainer.train()
    assert [digest(member.vit) for member in trainer.population.members] == [before] * 3


def test_a_loss_of_the_users_own_needs_no_labels(tmp_path):
    class Unlabelled(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            return {"pixel_values": TRAIN[index]["pixel_values"]}

    class Own(WashTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = outputs.logits.square().mean()
            return (loss, outputs) if return_outputs else loss

    args = WashConfig(**options(tmp_path, population_size=2, max_steps=2, eval_strategy="no"))
    Own(started(), args, train_dataset=Unlabelled()).train()


def test_a_plain_module_trains_is_saved_and_resumes(tmp_path):
    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(64, 10)
            self.register_buffer("seen", torch.zeros(0))

        def forward(self, pixel_values, labels=None):
            self.seen = torch.cat([self.seen, torch.ones(1)])  # a buffer that grows
            logits = self.a(pixel_values.flatten(1))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    settings = {"size": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "no"}
    torch.manual_seed(0)
    first = Line()
    start = {name: value.clone() for name, value in first.state_dict().items()}
    whole = population(tmp_path / "whole", first, **settings)
    whole.train()
    whole.save_model()
    again = Line()
    again.load_state_dict(start)
    resumed = population(tmp_path / "resumed", again, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert [digest(m.a) for m in resumed.population.members] == [digest(m.a) for m in whole.population.members]


def test_a_greedy_soup_of_regressions_is_chosen_by_the_loss(tmp_path):
    from small_population import Digits

    class Values(Digits):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return {"pixel_values": item["pixel_values"], "labels": torch.tensor([float(item["labels"])])}

    from hf_wash import MemberOverrides

    trainer = population(
        tmp_path, vit(num_labels=1), size=2, mixing="independent", soup="greedy", soup_holdout=0.2, max_steps=20,
        eval_strategy="no",
        trainer={
            "train_dataset": Values(0, 330), "eval_dataset": None, "compute_metrics": None,
            "members": [MemberOverrides(learning_rate=1e-7), MemberOverrides(learning_rate=0.01)],
        },
    )  # fmt: skip
    trainer.train()
    assert trainer.greedy_record.order[0] == 1
    assert trainer.greedy_record.member_scores[1] > trainer.greedy_record.member_scores[0]


def test_a_checkpoint_of_another_size_is_adopted_with_model_init_too(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "no"}
    given = {"trainer": {"model_init": lambda: vit()}}
    whole = population(tmp_path / "whole", size=2, **settings, **given)
    whole.train()
    args = WashConfig(**options(tmp_path / "again", shuffle_probability=0.3, **settings))
    again = WashTrainer(
        args=args, train_dataset=TRAIN, eval_dataset=TEST, compute_metrics=accuracy, model_init=lambda: vit()
    )
    assert again.population.size == 4
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert members_of(again) == members_of(whole)


def test_confident_predictions_of_an_ensemble_stay_finite():
    confident = torch.tensor([[[200.0, -200.0]], [[250.0, -300.0]]])
    for kind in ("single_label_classification", "multi_label_classification"):
        mean = mean_prediction(confident.double(), kind).float()
        assert torch.isfinite(mean).all(), kind
    logits = torch.randn(3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(mean_prediction(logits).softmax(-1), logits.softmax(-1).mean(0))
    torch.testing.assert_close(
        mean_prediction(logits, "multi_label_classification").sigmoid(), logits.sigmoid().mean(0)
    )


def test_without_metrics_nobodys_predictions_are_kept(tmp_path, monkeypatch):
    kept = []
    add = evaluation.Predictions.add
    monkeypatch.setattr(
        evaluation.Predictions,
        "add",
        lambda self, index, size, loss=None, logits=None, *rest: (
            kept.append(logits),
            add(self, index, size, loss, logits, *rest),
        ),
    )
    metrics = population(tmp_path, size=2, trainer={"compute_metrics": None}).evaluate()
    assert "eval_ensemble_loss" in metrics and kept and all(value is None for value in kept)


def test_a_token_count_is_one_members(tmp_path):
    from small_population import history

    counted = [
        population(tmp_path / str(size), size=size, max_steps=2, include_num_input_tokens_seen="all", logging_steps=1,
                   eval_strategy="no")
        for size in (1, 3)
    ]  # fmt: skip
    for trainer in counted:
        trainer.train()
    assert history(counted[0])[0]["num_input_tokens_seen"] == history(counted[1])[0]["num_input_tokens_seen"] > 0


def test_a_trainer_that_is_dropped_is_freed_with_all_it_held(tmp_path):
    # Of classes that are made in a function, as in a notebook's cell: what holds a class holds where it was made.
    def train():
        class LocalConfig(WashConfig):
            pass

        args = LocalConfig(**options(tmp_path, population_size=2, max_steps=2, eval_strategy="no"))
        trainer = WashTrainer(started(), args, train_dataset=TRAIN)
        trainer.train()
        return [weakref.ref(held) for held in (LocalConfig, trainer, *trainer.population.members)]

    freed = train()
    gc.collect()
    assert [ref() for ref in freed] == [None] * 4
