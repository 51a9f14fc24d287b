"""
[`PopulationDiagnostics`]: what a population does while it trains, as a callback.

The mathematics is in `measures`. The Trainer hands the callback what it needs of itself, and the callback holds no Trainer.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from ..population import Population
from .gather import LAYER_KEY
from .measures import SAMPLED_OF_A_LAYER, LayerSample
from .survey import number


MEASUREMENTS_OF_A_RUN = 50


class PopulationDiagnostics(TrainerCallback):
    """
    Logs, beside what every population logs, how far the members are apart layer by layer, how often they disagree, and on
    request how high the barrier between them is, and what lies between three of them. For any Trainer made with
    [`PopulationMixin`].

    What it logs goes where the Trainer's own lines go (`report_to`, `trainer_state.json`) but for the terminal, and into the
    report of the run:

    - `layer_spread/<layer>`, every `interval` steps: the root mean square distance of a weight of that layer from the
      members' mean, in units of a weight, estimated on a sample of the layer's weights.
    - `eval_members_disagreement_mean` and `eval_members_disagreement_<i>_<j>`, at each evaluation of a classifier: the
      fraction of examples for which members predict different classes.
    - `barrier`, at each evaluation from the beginning of training on if `barrier=True`: the height of the highest loss barrier on the lines
      between members, in units of the loss, on 256 examples of the evaluation data.

    All of it is measured on every process at the same steps, and is the same on every process. Members, their random
    streams and the result of the run stay as they would be without it.

    Args:
        interval (`int`, *optional*):
            Optimizer steps between two measurements of the layers. Defaults to a fiftieth of the run.
        disagreement (`bool`, *optional*, defaults to `True`):
            Whether evaluations report how often members disagree.
        barrier (`bool`, *optional*, defaults to `False`):
            Whether the barrier is measured at each evaluation: some 40 passes over 256 examples.
        plane (`bool`, *optional*, defaults to `False`):
            Whether the report at the end of training shows the loss on the plane through the first three members: 81 more
            passes over 256 examples, once.
        sample (`int`, *optional*, defaults to 256):
            Weights of each layer that are looked at; all of them where there are fewer.

    Raises:
        ValueError: for a number below 1, and, when training begins, in a Trainer that has no population.

    Example:

    ```python
    >>> from hf_wash import PopulationDiagnostics, WashTrainer

    >>> trainer = WashTrainer(model, args, train_dataset=data, callbacks=[PopulationDiagnostics()])
    ```
    """

    def __init__(
        self,
        interval: int | None = None,
        *,
        disagreement: bool = True,
        barrier: bool = False,
        plane: bool = False,
        sample: int = SAMPLED_OF_A_LAYER,
    ):
        for name, value in (("interval", interval), ("sample", sample)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a whole number of at least 1, found {value!r}.")
        for name, value in (("disagreement", disagreement), ("barrier", barrier), ("plane", plane)):
            if not isinstance(value, bool):
                raise ValueError(f"`{name}` must be True or False, found {value!r}.")
        self.interval, self.sample = interval, sample
        self.disagreement, self.barrier, self.plane = disagreement, barrier, plane
        self._population: Population | None = None
        self._log: Callable[[dict[str, float]], None] | None = None
        self._survey: Callable[[], Mapping[str, Any]] | None = None
        self._layers: LayerSample | None = None

    def attach(
        self,
        population: Population,
        log: Callable[[dict[str, float]], None],
        survey: Callable[[], Mapping[str, Any]],
    ) -> None:
        """
        Called by the Trainer when a run begins.

        Args:
            population ([`Population`]): The members.
            log (`Callable`): Logs a dictionary as the Trainer does, on every process.
            survey (`Callable`): *Collective.* Measures the population, see [`~hf_wash.report.survey.survey`].
        """
        self._population, self._log, self._survey = population, log, survey
        self._layers = LayerSample(population.wholes[0], self.sample)

    def on_train_begin(self, args, state, control, **kwargs):
        """Refuses a Trainer that has no population."""
        if self._population is None:
            raise ValueError(
                "`PopulationDiagnostics` measures the members of a population, and this Trainer has none."
            )

    def on_step_end(self, args, state, control, **kwargs):
        """*Collective* at the steps at which it measures, which are the same on every process."""
        interval = self.interval or max(1, state.max_steps // MEASUREMENTS_OF_A_RUN)
        if state.global_step % interval == 0:
            self._report(control, self._layer_spreads())

    def on_evaluate(self, args, state, control, **kwargs):
        """*Collective* if the barrier is asked for."""
        if self.barrier and self._survey is not None:
            self._report(control, {"barrier": self._survey().get("barrier")})

    def _layer_spreads(self) -> dict[str, float | None]:
        population, layers = self._population, self._layers
        if population is None or layers is None:
            return {}
        values = torch.stack([layers.values(whole) for whole in population.wholes])
        spreads = layers.spread(population.gather_tensors(values))
        return {f"{LAYER_KEY}{name}": number(value) for name, value in zip(layers.names, spreads, strict=True)}

    def _report(self, control, values: Mapping[str, float | None]) -> None:
        known = {name: value for name, value in values.items() if value is not None}
        if not known or self._log is None:
            return
        # A line of its own; the Trainer takes any line for the one that was asked for (5.23).
        wanted = control.should_log
        self._log(known)
        control.should_log = wanted
