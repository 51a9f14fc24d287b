"""What kind of model it is, as far as writing and loading it differ: transformers, timm or an adapter."""

from typing import Any


def kind_of(model: Any) -> str:
    """
    `"transformers"`, `"timm"` (wrapped for transformers or not) or `"peft"`.

    Raises:
        ValueError: for a model that is none of these.
    """
    from transformers import PreTrainedModel

    if is_peft(model):
        return "peft"
    if wrapped_timm(model) is not None or is_bare_timm(model):
        return "timm"
    if isinstance(model, PreTrainedModel):
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "The model has adapters added with `add_adapter`, which mixes them with its own weights: "
                "use `peft.get_peft_model` instead."
            )
        return "transformers"
    raise ValueError(
        f"A {type(model).__name__} cannot be exported: expected a transformers PreTrainedModel, a timm model or a "
        "PeftModel."
    )


def is_image_classifier(model: Any) -> bool:
    """
    Whether a model classifies images, so that every loader of the ecosystem can be expected to take its export.

    Args:
        model (`torch.nn.Module`):
            Any model. Classes that transformers lists for image classification are meant and those derived from them,
            timm's models, wrapped or not, and adapters on either.
    """
    if is_peft(model):
        return is_image_classifier(model.get_base_model())
    if is_bare_timm(model):
        return True
    return not image_classifier_names().isdisjoint(base.__name__ for base in type(model).__mro__)


def image_classifier_names() -> set[str]:
    """The names of transformers' classes for image classification."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    names: set[str] = set()
    for entry in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values():
        names.update([entry] if isinstance(entry, str) else entry)
    return names


def is_peft(model: Any) -> bool:
    try:
        from peft import PeftModel
    except ImportError:
        return False
    return isinstance(model, PeftModel)


def wrapped_timm(model: Any) -> Any:
    """The bare timm model in a wrapper of transformers; `None` for any other model."""
    from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperPreTrainedModel

    return model.timm_model if isinstance(model, TimmWrapperPreTrainedModel) else None


def is_bare_timm(model: Any) -> bool:
    from transformers import PreTrainedModel

    return isinstance(getattr(model, "pretrained_cfg", None), dict) and not isinstance(model, PreTrainedModel)


def is_timm_processor(processing_class: Any) -> bool:
    return type(processing_class).__name__ == "TimmWrapperImageProcessor"


def loader_class_of(model: Any) -> Any:
    """The class whose `from_pretrained` should take the model's export."""
    from transformers import AutoModelForImageClassification

    if is_bare_timm(model):
        return AutoModelForImageClassification
    mapped = AutoModelForImageClassification._model_mapping.get(type(model.config), None)
    classes = mapped if isinstance(mapped, (tuple, list)) else (mapped,)
    return AutoModelForImageClassification if type(model) in classes else type(model)


def class_names_of(model: Any) -> list[str] | None:
    """Class names by index, or None where the model has none (a bare timm model that was not told)."""
    if is_bare_timm(model):
        names = model.pretrained_cfg.get("label_names")
        return list(names) if names and len(names) == model.num_classes else None
    names = getattr(model.config, "id2label", None)
    return [names[index] for index in sorted(names)] if names else None
