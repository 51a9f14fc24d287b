"""The ensemble of a population, as one module."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from .weights import check_modules_finite


def mean_prediction(logits: Iterable[torch.Tensor], kind: str = "single_label_classification") -> torch.Tensor:
    """
    What an ensemble answers: the mean of the members' predictions, summed in the order given. Finite for finite logits,
    however confident.

    Args:
        logits (iterable of `torch.Tensor`):
            Each member's logits, all of one shape `(..., num_labels)`, in at least float32.
        kind (`str`, *optional*, defaults to `"single_label_classification"`):
            transformers' name of the task. `"single_label_classification"`: the logarithm of the mean of the softmax.
            `"multi_label_classification"`: the log-odds of the mean of each label's probability. `"regression"` and
            `"logits"`: the mean of the outputs themselves.

    Returns:
        `torch.Tensor` of the members' shape and dtype.
    """
    totals: list[torch.Tensor] = []
    count = 0
    for value in logits:
        # Added as logarithms: a probability too small for a float would make the answer minus infinity.
        if kind == "single_label_classification":
            parts = [functional.log_softmax(value, dim=-1)]
        elif kind == "multi_label_classification":
            parts = [functional.logsigmoid(value), functional.logsigmoid(-value)]
        else:
            parts = [value]
        if not totals:
            totals = [part.clone() for part in parts]
        elif kind in ("regression", "logits"):
            totals = [total + part for total, part in zip(totals, parts, strict=True)]
        else:
            totals = [torch.logaddexp(total, part) for total, part in zip(totals, parts, strict=True)]
        count += 1
    if kind == "multi_label_classification":
        return totals[0] - totals[1]
    if kind == "single_label_classification":
        return totals[0] - torch.log(torch.tensor(count, dtype=totals[0].dtype, device=totals[0].device))
    return totals[0] / count


class Ensemble(nn.Module):
    """
    Several classifiers that answer as one: N forward passes, the mean of the predictions. With logits z_n of the
    members, the answer is log((1/N) Σ_n softmax(z_n)), or (1/N) Σ_n z_n with `average="logits"`.

    Args:
        members (iterable of `torch.nn.Module`):
            The members, each taking the same inputs. They are held, not copied, and keep their training mode.
        average (`"probabilities"` or `"logits"`, *optional*, defaults to `"probabilities"`):
            What is averaged. `"probabilities"`: the answer is the logarithm of the members' mean probabilities, so
            that a softmax over it gives that mean. `"logits"`: the answer is the mean of the logits, as PAPA has it.

    Raises:
        ValueError: for no members, members that are not modules or hold NaN or infinite values (all are named), or an
            unknown `average`.

    Example:

    ```python
    >>> from hf_wash.soup import Ensemble

    >>> ensemble = Ensemble.from_pretrained("user/population")
    >>> probabilities = ensemble(pixel_values=images).logits.softmax(-1)
    ```
    """

    def __init__(self, members: Iterable[nn.Module], *, average: Literal["probabilities", "logits"] = "probabilities"):
        super().__init__()
        if average not in ("probabilities", "logits"):
            raise ValueError(f"An ensemble averages 'probabilities' or 'logits', not {average!r}.")
        members = list(members)
        if not members:
            raise ValueError("An ensemble needs at least one member, and the list of members is empty.")
        for index, member in enumerate(members):
            if not isinstance(member, nn.Module):
                raise ValueError(
                    f"Member {index} of the ensemble is a {type(member).__name__}; expected a torch.nn.Module. "
                    "`Ensemble.from_pretrained` loads members from a folder or the Hub."
                )
        check_modules_finite(members)
        self.members = nn.ModuleList(members)
        self.average = average

    def forward(self, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """
        Answers as one member would.

        Args:
            labels (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_classes)`, *optional*):
                Classes, or their probabilities. With them the answer has the cross-entropy of the ensemble as loss.
                The members do not see them.
            *args, **kwargs:
                Passed to each member.

        Returns:
            What members return: a tensor of shape `(batch_size, num_classes)`, or an output of the members' class with
            `logits` (and `loss`) and nothing else, or a tuple of these. At least float32.
        """
        first: Any = None

        def answers() -> Iterator[torch.Tensor]:
            nonlocal first
            for member in self.members:
                output = member(*args, **kwargs)
                first = output if first is None else first
                logits = _logits(output)
                # Half precision is too coarse to be summed or exponentiated in.
                yield logits.to(torch.promote_types(logits.dtype, torch.float32))

        kind = "single_label_classification" if self.average == "probabilities" else "logits"
        mean = mean_prediction(answers(), kind)
        loss = None if labels is None else functional.cross_entropy(mean, labels.to(mean.device))
        if isinstance(first, torch.Tensor):
            return mean if loss is None else (loss, mean)
        if isinstance(first, tuple):
            return (mean,) if loss is None else (loss, mean)
        return type(first)(logits=mean) if loss is None else type(first)(loss=loss, logits=mean)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo: str | Path,
        *,
        average: Literal["probabilities", "logits"] = "probabilities",
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "Ensemble":
        """
        Rebuilds the ensemble of a population that was saved or pushed with its members.

        Args:
            folder_or_repo (`str` or `Path`):
                The folder of a run, or a repository of the Hub. The members are in `members/member_<i>/` (as they are
                pushed) or `_members/member_<i>/` (as a run keeps them).
            average (`"probabilities"` or `"logits"`, *optional*, defaults to `"probabilities"`):
                What is averaged.
            revision (`str`, *optional*):
                Branch, tag or commit of the repository.
            token (`str` or `bool`, *optional*):
                Access token for the Hub.

        Returns:
            [`Ensemble`]: the members in evaluation mode, on the CPU.

        Raises:
            ValueError: if there is no such folder or repository, it holds no members, or one is missing that the run does
                not say it has left out.
        """
        # The one place where a soup needs to know how models are stored, and so transformers and timm.
        from ..hub.loading import load_members

        return cls(load_members(folder_or_repo, revision=revision, token=token), average=average)


def _logits(output: Any) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, tuple):
        return output[0]
    return output.logits
