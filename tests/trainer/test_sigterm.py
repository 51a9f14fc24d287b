"""With `enable_jit_checkpoint` SIGTERM is a request of the run's, and the user's again after it."""

import os
import signal

import pytest
from small_population import TEST, TRAIN, options, population, started
from transformers import TrainerCallback

from hf_wash import WashConfig, WashTrainer
from hf_wash.trainer.requests import StopSignal


@pytest.mark.parametrize("when", ["before the loop", "in the loop", "in the constructor"])
def test_after_an_exception_sigterm_is_the_users_again(tmp_path, when):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise OSError("in the loop")

    class FailsEarly(WashTrainer):
        def create_optimizer(self, *args, **kwargs):
            raise OSError("before the loop")

    def of_the_user(number, frame):
        raise AssertionError

    before = signal.signal(signal.SIGTERM, of_the_user)
    try:
        args = WashConfig(**options(tmp_path, population_size=2, enable_jit_checkpoint=True))
        given = {"train_dataset": TRAIN, "eval_dataset": TEST}
        if when == "in the constructor":
            with pytest.raises(OSError):
                WashTrainer(model_init=lambda: (_ for _ in ()).throw(OSError()), args=args, **given)
        else:
            make = FailsEarly if when == "before the loop" else WashTrainer
            trainer = make(started(), args=args, callbacks=[Fails()], **given)
            with pytest.raises(OSError, match=when):
                trainer.train()
        assert signal.getsignal(signal.SIGTERM) is of_the_user
        assert args.enable_jit_checkpoint
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigterm_saves_and_stops_at_the_step_in_which_it_is_heard(tmp_path, monkeypatch):
    monkeypatch.setattr(StopSignal, "WAIT_SECONDS", 0)
    monkeypatch.setattr(StopSignal, "_on_signal", lambda self, number, frame: self._request())

    class Terminate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = population(tmp_path, size=2, enable_jit_checkpoint=True, trainer={"callbacks": [Terminate()]})
    trainer.train()
    assert trainer.state.global_step == 5
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]
