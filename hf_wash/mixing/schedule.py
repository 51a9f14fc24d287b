"""
How often a layer's weights are shuffled: from the depth of a layer to its probability.

What is drawn with these probabilities is the business of `plan.py`.
"""

import math
from collections.abc import Iterator, Mapping
from numbers import Real

from torch import nn


SCHEDULES = ("decreasing", "constant", "increasing")


def check_probability(value: object, what: str = "probability") -> float:
    """
    Returns `value` as a float, or says why it is no probability.

    Raises:
        ValueError: when `value` is not a real number in [0, 1]; `what` names it in the message.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(f"{what} must be a number between 0 and 1, and is {value!r}.")
    return float(value)


def plain_name(name: str) -> str:
    """The name that a module or parameter has without `torch.compile`, which inserts `_orig_mod` into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def shuffled_layers(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """
    The layers of a model, in definition order, with the parameters that a shuffle moves.

    A layer is a module that owns such a parameter itself, so that a weight and its bias have the same depth. Frozen
    parameters and those that are not floating-point are left out, and a module that owns nothing else is not counted
    as a layer: where only a head is trained, the head is the first layer. A tied weight belongs to the first module
    that owns it.

    Args:
        model (`torch.nn.Module`):
            The model. It may be compiled, as a whole or in parts: names are those of the model that was compiled.

    Returns:
        `dict[str, dict[str, torch.nn.Parameter]]`: For each layer's module name (the root's is `""`), its parameters
        by their full names.
    """
    layers: dict[str, dict[str, nn.Parameter]] = {}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        layer = plain_name(module_name)
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or not parameter.is_floating_point() or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            full_name = f"{layer}.{name}" if layer else name
            layers.setdefault(layer, {})[full_name] = parameter
    return layers


def schedule_probabilities(num_layers: int, probability: float, schedule: str = "decreasing") -> list[float]:
    """
    The probability of each depth, first layer first (paper, section 3: the layer-wise adaptation of p).

    With `"decreasing"`, the paper's choice, depth l of L gets p·(1 − l/(L − 1)): the first layer p, the last one 0.
    `"increasing"` is its mirror image and `"constant"` gives p to all. A single layer gets p with each of them.

    Args:
        num_layers (`int`):
            The number of layers, L.
        probability (`float`):
            The base probability p, in [0, 1].
        schedule (`str`, *optional*, defaults to `"decreasing"`):
            `"decreasing"`, `"constant"` or `"increasing"`.

    Returns:
        `list[float]`: One probability for each layer, of shape `(num_layers,)`.

    Raises:
        ValueError: for a probability outside [0, 1] or a schedule of another name.
    """
    probability = check_probability(probability)
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)} or a mapping, and is {schedule!r}.")
    if schedule == "constant" or num_layers == 1:
        return [probability] * num_layers
    # Exactly rounded operations only: every process has to get the same double.
    depths = [depth / (num_layers - 1) for depth in range(num_layers)]
    if schedule == "increasing":
        return [probability * depth for depth in depths]
    return [probability * (1 - depth) for depth in depths]


def layer_probabilities(
    model: nn.Module, probability: float = 0.001, schedule: str | Mapping[str, float] = "decreasing"
) -> dict[str, float]:
    """
    The probability with which one step selects a weight of each layer.

    Args:
        model (`torch.nn.Module`):
            Any member of the population.
        probability (`float`, *optional*, defaults to 0.001):
            The base probability p, in [0, 1].
        schedule (`str` or `Mapping[str, float]`, *optional*, defaults to `"decreasing"`):
            A name, see [`schedule_probabilities`], or the probabilities themselves by module name. An entry holds for
            the module it names and all modules inside; the innermost entry decides, `""` is the whole model, and
            `probability` serves layers that no entry covers.

    Returns:
        `dict[str, float]`: The probability of each layer that [`shuffled_layers`] finds, by module name, in
        definition order. Over a run of S shuffles, a weight of the layer is selected S times this often.

    Raises:
        ValueError: for a probability outside [0, 1], an unknown schedule, or a mapping that names no module of the
            model.
    """
    layers = list(shuffled_layers(model))
    if not isinstance(schedule, Mapping):
        return dict(zip(layers, schedule_probabilities(len(layers), probability, schedule), strict=True))
    probability = check_probability(probability)
    modules = {plain_name(name) for name, _ in model.named_modules()}
    for name, value in schedule.items():
        if name not in modules:
            raise ValueError(
                f"The schedule gives a probability to {name!r}, and the model has no module of this name."
            )
        check_probability(value, f"The probability that the schedule gives to {name!r}")
    return {
        layer: next((float(schedule[name]) for name in _enclosing(layer) if name in schedule), probability)
        for layer in layers
    }


def _enclosing(name: str) -> Iterator[str]:
    # The module itself first, the whole model last.
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def expected_values_moved(
    model: nn.Module,
    num_members: int,
    probability: float = 0.001,
    schedule: str | Mapping[str, float] = "decreasing",
) -> float:
    """
    How many weights of one member a shuffle replaces by another member's, on average: (N − 1)/N · Σ_l p_l·d_l, with d_l
    the number of weights of layer l. (A uniform permutation leaves a member its own value with probability 1/N.)

    This is also what a member has to send when each lives in a process of its own, and so the floor of the
    communication. The optimizer's state comes on top where it is shuffled: once more for SGD's momentum, twice for
    Adam's moments.

    Args:
        model (`torch.nn.Module`):
            Any member of the population.
        num_members (`int`):
            The number of members, N.
        probability (`float`, *optional*, defaults to 0.001):
            The base probability p, in [0, 1].
        schedule (`str` or `Mapping[str, float]`, *optional*, defaults to `"decreasing"`):
            As in [`layer_probabilities`].

    Returns:
        `float`: Values per member and shuffle; times the bytes of a value they are bytes, times N those of all members.

    Raises:
        ValueError: as [`layer_probabilities`].
    """
    probabilities = layer_probabilities(model, probability, schedule)
    selected = math.fsum(
        probabilities[layer] * parameter.numel()
        for layer, parameters in shuffled_layers(model).items()
        for parameter in parameters.values()
    )
    return selected * (num_members - 1) / num_members
