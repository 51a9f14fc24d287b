"""
[`Part`]: what the parts of a population's Trainer know of each other. Each attribute is written in one place; those
that a run sets, and that are asked for before it, say so.
"""

import contextlib
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer

from ..config import WashConfig
from ..population import MemberOverrides, Population
from ..report.diagnostics import PopulationDiagnostics
from ..soup import GreedySoupRecord
from .data import MemberBatches
from .log import MemberLog
from .member import Member
from .mixing_run import Mixer, MixingRun
from .run_folder import MadeFolders
from .served_soup import ServedSoup


class Part(Trainer):
    """A Trainer that holds a population, as far as its parts share it."""

    args: WashConfig  # or another dataclass of `PopulationArguments` and a Trainer's
    model: Any  # a module; a subclass of any Trainer may ask more of it
    optimizer: Any  # accelerate's, whose `step` is replaced
    population: Population
    soup: ServedSoup
    _overrides: list[MemberOverrides]
    _members: list[Member] | None
    _batches: MemberBatches
    _mixing: MixingRun | None
    _member_log: MemberLog | None
    _resume: dict[str, Any] | None
    # A part of a run that is done once more: the checkpoint it is to make, and what was found.
    _replay: dict[str, Any] | None = None
    # The identity of the run: made when it begins, kept when it goes on.
    _run: str | None = None
    # What the training of a run that was finished already came to, as it was written down then.
    _figures_of_before: dict[str, float] | None = None
    _made_folders: MadeFolders
    _trainings: int
    _total_steps: int
    _steps_per_epoch: int

    @property
    def mixing(self) -> MixingRun:
        """The exchange of the run. `RuntimeError` before the first."""
        return _begun(self._mixing)

    @mixing.setter
    def mixing(self, run: MixingRun) -> None:
        self._mixing = run

    @property
    def mixer(self) -> Mixer | None:
        """The run's mixer, a [`WashMixer`] unless `mixing` says otherwise; `None` before training and for one member."""
        return self._mixing.mixer if self._mixing is not None else None

    @property
    def values_moved(self) -> int:
        """Values that changed owner since the run began, of all members."""
        return self._mixing.values_moved if self._mixing is not None else 0

    @property
    def bytes_exchanged(self) -> int:
        """Bytes of these values."""
        return self._mixing.bytes_exchanged if self._mixing is not None else 0

    @property
    def greedy_record(self) -> GreedySoupRecord | None:
        """How a greedy soup was chosen."""
        return self.soup.greedy

    @property
    def _quiet(self) -> bool:
        """Whether this process shows no progress bars."""
        return self.args.disable_tqdm or self.population.rank > 0

    @property
    def _log(self) -> MemberLog:
        return _begun(self._member_log)

    @_log.setter
    def _log(self, log: MemberLog) -> None:
        self._member_log = log

    @property
    def _resuming(self) -> dict[str, Any]:
        """What is known of the checkpoint that the run goes on from."""
        return _begun(self._resume)

    if TYPE_CHECKING:
        # Where they are: in the mixin, `populating`, `agreeing`, `serving` and `reporting`.
        @property
        def members(self) -> list[Member]: ...
        @property
        def _holds_out(self) -> bool: ...
        def _data_of(self, index: int) -> Any: ...
        def _told_to_all(self) -> contextlib.AbstractContextManager[None]: ...
        def _bring_members_up_to_date(self) -> None: ...
        def _empty_population(self, size: int) -> Population: ...
        def _populate(self, make: Any) -> None: ...
        def _place_members(self) -> None: ...
        def _become(self, model: nn.Module, member: Member | None = None) -> None: ...
        def _as_soup(self) -> contextlib.AbstractContextManager[None]: ...
        def _serve_soup(self) -> None: ...
        @property
        def _diagnostics(self) -> list[PopulationDiagnostics]: ...
        def _forward_without_labels(self, model: nn.Module, batch: Any, call: Any = None) -> None: ...
        def save_members(self, output_dir: str | None = None) -> None: ...


def _begun(what: Any) -> Any:
    if what is None:
        raise RuntimeError("This Trainer has not begun a run yet: that is known from `train()` on.")
    return what
