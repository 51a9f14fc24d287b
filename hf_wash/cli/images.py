"""Folders of images, as `hf-wash soup` measures with them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .terminal import shortened


class ImageFolder:
    """A folder of images, prepared as a model's folder says, in batches: `pixel_values` and `labels`."""

    def __init__(self, folder: Path, model_folder: Path, batch_size: int, shuffled: bool = False):
        import datasets
        from transformers import AutoImageProcessor

        datasets.disable_progress_bars()
        try:
            splits = datasets.load_dataset("imagefolder", data_dir=str(folder))
        except Exception as error:  # whatever it is about: say which folder
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{folder} cannot be read as a folder of images: {reason}") from error
        wanted = ("train", "validation", "test") if shuffled else ("validation", "test", "train")
        name = next(name for name in (*wanted, *splits) if name in splits)
        self.dataset = splits[name]
        if "label" not in self.dataset.features and not shuffled:
            raise ValueError(f"{folder} has images but no classes: expected one folder of images for each class.")
        if shuffled:
            # They come class by class, and the statistics of a batch should be those of all of them.
            self.dataset = self.dataset.shuffle(seed=0)
        try:
            self.processor = AutoImageProcessor.from_pretrained(model_folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"{model_folder} does not say how images are prepared for the model.") from error
        self.batch_size, self.folder = batch_size, folder

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self.dataset), self.batch_size):
            batch = self.dataset[start : start + self.batch_size]
            images = [image.convert("RGB") for image in batch["image"]]
            prepared = {"pixel_values": self.processor(images=images, return_tensors="pt")["pixel_values"]}
            if "label" in batch:
                prepared["classes"] = batch["label"]
            yield prepared

    def labels_for(self, model: Any) -> list[int]:
        """The model's label for each class of the folder, by name; by position where the model has no names."""
        names = self.dataset.features["label"].names
        own = {str(name): int(index) for index, name in model.config.id2label.items()}
        if all(name in own for name in names):
            return [own[name] for name in names]
        generic = all(name == f"LABEL_{index}" for name, index in own.items())
        if generic and len(names) == len(own):
            return list(range(len(names)))
        unknown = next(name for name in names if name not in own)
        raise ValueError(
            f"{self.folder} has a class {unknown!r} that the model does not know; it knows {shortened(list(own))}."
        )
