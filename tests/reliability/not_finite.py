"""A member that becomes NaN or infinite: at several steps, with and without an exchange after it, with and without saves."""

import math

import torch
from reliability.harness import Act, Expected, Situation, stopped, unharmed, warned
from reliability.tiny import SAVING, STEPS, On, Points, accuracy, outcome, resumed, trained, trainer, vit


MIXINGS = {
    "shuffled at every step": {},
    "mixing off": {"mixing": "independent"},
    "after the last shuffle": {"shuffle_stop": 0.5},
    "between two shuffles": {"shuffle_interval": 4},
    "before the first shuffle": {"shuffle_start": 0.7},
}
VALUES = {"NaN": math.nan, "infinite": math.inf}


def shuffles(options: dict, step: int) -> bool:
    if options.get("mixing") == "independent" or step % options.get("shuffle_interval", 1):
        return False
    return options.get("shuffle_start", 0.0) * STEPS < step <= options.get("shuffle_stop", 1.0) * STEPS


def poison(place, members: dict[int, float], step: int, given=None, **changes):
    """A Trainer whose `members` get a value into all their weights at the end of a step."""

    def do(state, control):
        for index, member in run.population:
            if index in members:
                with torch.no_grad():
                    for parameter in member.parameters():
                        parameter.fill_(members[index])

    given = {**(given or {}), "callbacks": [On("step_end", do, step=step)]}
    run = trainer(place, given=given, **changes)
    return run


def poisoned(members, step, **changes):
    def do(place):
        run = poison(place, members, step, **changes)
        run.train()
        if not all(bool(torch.isfinite(value).all()) for value in run.model.state_dict().values()):
            return "the soup is not finite"
        return [line.get("member_1_loss") for line in run.state.log_history]

    return do


def finite_soup(place, result) -> str | None:
    return result if isinstance(result, str) else None


def whole_checkpoints(place, result) -> str | None:
    """Every checkpoint that is there is whole and finite."""
    from safetensors.torch import load_file

    from hf_wash.trainer import checkpoint

    for folder in (place / "run").glob("checkpoint-*"):
        checkpoint.verify(folder)
        for file in folder.rglob("*.safetensors"):
            for name, value in load_file(file).items():
                if not bool(torch.isfinite(value).all()):
                    return f"{file} holds {name}, which is not finite"
    return None


def first_event(options: dict, step: int, saving: bool) -> Expected:
    """What comes first after a member has diverged at the end of `step`: a save, a shuffle or the end."""
    if saving and step % 2 == 0:
        return stopped("member 1", f"step {step}", error="RuntimeError", check=whole_checkpoints)
    for later in range(step + 1, STEPS + 1):
        if shuffles(options, later):
            return stopped("Member 1", f"step {later}", error="ContagionError", check=whole_checkpoints)
        if saving and later % 2 == 0:
            return stopped("member 1", f"step {later}", error="RuntimeError", check=whole_checkpoints)
    return warned("member 1", "left out", check=finite_soup)


def situations():
    for what, options in MIXINGS.items():
        for step in (1, 3, 4, 5, 6):
            for saving in (False, True):
                expected = first_event(options, step, saving)
                changes = {**options, **(SAVING if saving else {})}
                acts = [Act(poisoned({1: math.nan}, step, **changes), expected)]
                if saving and what == "shuffled at every step":
                    # From the last good checkpoint, without the poison, as if nothing had been.
                    acts.append(Act(resumed, unharmed(like="undisturbed")))
                name = f"NaN after step {step}, {what}, {'with' if saving else 'without'} checkpoints"
                yield Situation(KIND, name, tuple(acts))
    for step in (2, 5):
        yield Situation(
            KIND, f"infinite after step {step}, mixing off",
            (Act(poisoned({1: math.inf}, step, mixing="independent"), warned("member 1", "left out", check=finite_soup)),),
        )  # fmt: skip
        yield Situation(
            KIND, f"infinite after step {step}, shuffled",
            (Act(poisoned({0: -math.inf}, step), stopped("Member 0", f"step {step + 1}", error="ContagionError")),),
        )  # fmt: skip


def nan_pixels(index):
    return {"pixel_values": torch.full((3, 8, 8), math.nan), "labels": 0}


def momentum(place):
    """NaN in the optimizer's state, which reaches the weights at the next step."""

    def do(state, control):
        group = run.optimizer.param_groups[-1]
        run.optimizer.state[group["params"][0]]["exp_avg"].fill_(math.nan)

    run = trainer(place, given={"callbacks": [On("step_end", do, step=2)]})
    run.train()


def logged(place):
    """The log does not call a diverged member's loss 0, nor leave it out of the mean in silence."""
    run = poison(place, {1: math.nan}, 1, mixing="independent", logging_steps=1, logging_nan_inf_filter=False)
    run.train()
    return [line.get("member_1_loss") for line in run.state.log_history if "loss" in line]


def evaluated(place):
    run = poison(place, {1: math.nan}, 1, mixing="independent", given={"compute_metrics": accuracy})
    run.train()
    return run.evaluate()


def not_zero(place, losses) -> str | None:
    return f"logged losses of a member that is NaN: {losses}" if 0.0 in losses else None


def not_hidden(place, metrics) -> str | None:
    """The soup's loss is a number; the mean over members does not hide the one that has none."""
    if not math.isfinite(metrics["eval_loss"]):
        return f"the soup's loss is {metrics['eval_loss']}"
    hidden = metrics["eval_members_loss_mean"] == metrics["eval_member_0_loss"]
    return (
        "a member is left out of the mean, and no metric says so"
        if hidden and not metrics.get("eval_member_1_left_out")
        else None
    )


def best_before(place):
    """The best checkpoint is from before the divergence; it is what is loaded."""
    run = poison(
        place, {1: math.nan}, 3, **SAVING, mixing="independent", eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", save_total_limit=1,
    )  # fmt: skip
    run.train()


def own_start(place, **changes):
    model = vit()
    with torch.no_grad():
        model.classifier.weight.fill_(math.nan)
    return trained(place, given={"model": model}, **changes)


OTHERS = {
    "NaN in the momentum": (momentum, stopped("Member 1", "step 3", error="ContagionError")),
    "NaN in an image, shuffled": (
        lambda place: trained(place, given={"train_dataset": Points(fails_at=5, wrong=nan_pixels(5))}),
        stopped("Member", "step", error="ContagionError"),
    ),
    "NaN in an image of member 1, mixing off": (
        lambda place: _own_data(place, mixing="independent"),
        warned("member 1", "left out"),
    ),
    "a learning rate that overflows, shuffled": (
        lambda place: trained(place, learning_rate=1e38, warmup_steps=0, lr_scheduler_type="constant"),
        stopped("NaN or infinite", error="RuntimeError"),
    ),
    "a learning rate that overflows, mixing off": (
        lambda place: trained(place, learning_rate=1e38, mixing="independent", lr_scheduler_type="constant"),
        stopped("NaN or infinite", error="RuntimeError"),
    ),
    "all members, mixing off": (
        poisoned({0: math.nan, 1: math.nan}, 4, mixing="independent"),
        stopped("NaN or infinite", error="RuntimeError"),
    ),
    "all members, shuffled": (
        poisoned({0: math.nan, 1: math.nan}, 4),
        stopped("Members 0, 1", "step 5", error="ContagionError"),
    ),
    "two of four members, mixing off": (
        poisoned({1: math.nan, 2: math.inf}, 4, mixing="independent", population_size=4),
        warned("Member 1", "member 2", "are left out", check=finite_soup),
    ),
    "the only member": (
        poisoned({0: math.nan}, 4, population_size=1),
        stopped("NaN or infinite", error="RuntimeError"),
    ),
    "the only member, with checkpoints": (
        poisoned({0: math.nan}, 3, population_size=1, **SAVING),
        stopped("member 0", "step 4", error="RuntimeError", check=whole_checkpoints),
    ),
    "a start that is NaN, shuffled": (own_start, stopped("NaN or infinite", error="Exception")),
    "a start that is NaN, mixing off": (
        lambda place: own_start(place, mixing="independent"),
        stopped("NaN or infinite", error="Exception"),
    ),
    "a greedy soup": (
        poisoned({1: math.nan}, 4, mixing="independent", soup="greedy", soup_holdout=0.2),
        warned("member 1", "left out", check=finite_soup),
    ),
    "a greedy soup of none": (
        poisoned({0: math.nan, 1: math.nan}, 4, mixing="independent", soup="greedy", soup_holdout=0.2),
        stopped("NaN or infinite", error="RuntimeError"),
    ),
    "a log of every step": (logged, warned("member 1", check=not_zero)),
    "an evaluation": (evaluated, warned("member 1", check=not_hidden)),
    "the best checkpoint, rotated": (
        best_before,
        stopped("member 1", "step 4", error="RuntimeError", check=whole_checkpoints),
    ),
    "rotation of good checkpoints": (
        poisoned({1: math.nan}, 5, mixing="independent", save_strategy="steps", save_steps=1, save_total_limit=1),
        stopped("member 1", "step 5", error="RuntimeError", check=whole_checkpoints),
    ),
}


def _own_data(place, **changes):
    from hf_wash import MemberOverrides

    members = [MemberOverrides(), MemberOverrides(train_dataset=Points(fails_at=5, wrong=nan_pixels(5)))]
    run = trainer(place, given={"members": members}, **changes)
    run.train()
    return outcome(run)


KIND = "NaN"
TWO = "two processes, "
SITUATIONS = [
    *situations(),
    *(Situation(KIND, name, (Act(do, expected),)) for name, (do, expected) in OTHERS.items()),
    *(
        Situation(
            KIND, f"{TWO}{what}, {'with' if saving else 'without'} checkpoints",
            (Act(poisoned({1: math.nan}, 3, **{**options, **(SAVING if saving else {})}), first_event(options, 3, saving)),),
            processes=2,
        )
        for what, options in list(MIXINGS.items())[:3]
        for saving in (False, True)
    ),
]  # fmt: skip
# The logger warns on the main process alone.
SITUATIONS = [
    Situation(s.kind, s.name, tuple(Act(a.do, a.expected, {1: unharmed()} if a.expected.outcome == warned().outcome else {}) for a in s.acts), s.processes)
    if s.processes == 2 else s
    for s in SITUATIONS
]  # fmt: skip
