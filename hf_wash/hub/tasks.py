"""
What a model does, told from the name of its class and its configuration.

The names are those of transformers' own mappings (`transformers.modelcard.TASK_MAPPING`), the classes are known by how
they end: so no class has to be imported, and one that a user wrote is known, too.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Task(NamedTuple):
    """What a model does: the Hub's `pipeline_tag`, the auto class that loads it, what to call it, what it is fed."""

    tag: str | None = None
    loader: str | None = None
    kind: str = "a model"
    modality: str | None = None


_TASKS = {
    "ForImageClassification": Task("image-classification", None, "an image classifier", "image"),
    "ForSemanticSegmentation": Task("image-segmentation", None, "an image segmentation model", "image"),
    "ForObjectDetection": Task("object-detection", None, "an object detector", "image"),
    "ForDepthEstimation": Task("depth-estimation", None, "a depth estimator", "image"),
    "ForVideoClassification": Task("video-classification", None, "a video classifier", "video"),
    "ForAudioClassification": Task("audio-classification", None, "an audio classifier", "audio"),
    "ForCTC": Task("automatic-speech-recognition", None, "a speech recognizer", "audio"),
    "ForSequenceClassification": Task("text-classification", None, "a text classifier", "text"),
    "ForTokenClassification": Task("token-classification", None, "a token classifier", "text"),
    "ForQuestionAnswering": Task("question-answering", None, "a model that finds answers in a text", "text"),
    "ForMultipleChoice": Task("multiple-choice", None, "a multiple choice model", "text"),
    "ForMaskedLM": Task("fill-mask", None, "a masked language model", "text"),
    "ForCausalLM": Task("text-generation", None, "a language model", "text"),
    "LMHeadModel": Task("text-generation", "AutoModelForCausalLM", "a language model", "text"),
    "ForConditionalGeneration": Task(
        "text2text-generation", "AutoModelForSeq2SeqLM", "a sequence-to-sequence model", "text"
    ),
    "Model": Task("feature-extraction", "AutoModel", "an encoder", "text"),
}
_READS_IMAGES = Task("image-text-to-text", "AutoModelForImageTextToText", "a vision-language model")
_READS_SOUND = Task("automatic-speech-recognition", "AutoModelForSpeechSeq2Seq", "a speech recognizer", "audio")
_SEES_FEATURES = Task("image-feature-extraction", "AutoModel", "an image encoder", "image")


def task_of(class_name: str, config: Mapping[str, Any]) -> Task:
    """
    What a model does.

    Args:
        class_name (`str`):
            The name of its class.
        config (`Mapping[str, Any]`):
            Its configuration, which tells models that also read images or sound from those that read text.
    """
    ending = next((ending for ending in _TASKS if class_name.endswith(ending)), None)
    if ending is None or (class_name.startswith("PeftModel") and ending == "Model"):
        return Task()
    task = _TASKS[ending]
    if task.loader is None:
        task = task._replace(loader=f"AutoModel{ending}")
    if task.modality != "text":
        return task
    sees = any(name in config for name in ("vision_config", "image_size", "max_2d_position_embeddings"))
    if ending == "ForConditionalGeneration":
        hears = any(name in config for name in ("audio_config", "num_mel_bins"))
        return _READS_IMAGES if sees else _READS_SOUND if hears else task
    if ending == "Model":
        return task if "vocab_size" in config and not sees else _SEES_FEATURES if "image_size" in config else Task()
    # Of text and images together: a document, a picture that is asked about. Too many kinds to be told from a name.
    return Task() if sees else task
