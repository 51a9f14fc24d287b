"""Folders of images, as `hf-wash soup` measures with them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import is_file, require_plain_tree
from ..sentences import first_line, shortened


class ImageFolder:
    """A folder of images, prepared as a model's folder says, in batches: `pixel_values` and `labels`."""

    def __init__(self, folder: Path, model_folder: Path, batch_size: int, shuffled: bool = False):
        import datasets
        from transformers import AutoImageProcessor

        datasets.disable_progress_bars()
        require_plain_tree(folder)
        try:
            splits = datasets.load_dataset("imagefolder", data_dir=str(folder))
        except Exception as error:  # whatever it is about: say which folder
            raise ValueError(f"{folder} cannot be read as a folder of images: {first_line(error)}") from error
        wanted = ("train", "validation", "test") if shuffled else ("validation", "test", "train")
        name = next(name for name in (*wanted, *splits) if name in splits)
        self.dataset = splits[name]
        features = self.dataset.features
        if not isinstance(features.get("image"), datasets.Image):
            raise ValueError(f"{folder} cannot be read as a folder of images: it has none.")
        if not isinstance(features.get("label"), datasets.ClassLabel) and not shuffled:
            raise ValueError(f"{folder} has images but no classes: expected one folder of images for each class.")
        # Opened here, so that one that cannot be can be named.
        self.dataset = self.dataset.cast_column("image", datasets.Image(decode=False))
        if shuffled:
            # They come class by class, and the statistics of a batch should be those of all of them.
            self.dataset = self.dataset.shuffle(seed=0)
        is_file(model_folder / "preprocessor_config.json")
        try:
            self.processor = AutoImageProcessor.from_pretrained(model_folder, trust_remote_code=False)
        except Exception as error:  # of any kind, as the fields of configurations are
            raise ValueError(
                f"{model_folder} does not say how images are prepared for the model: {first_line(error)}"
            ) from error
        self.batch_size, self.folder, self.model_folder = batch_size, folder, model_folder

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self.dataset), self.batch_size):
            batch = self.dataset[start : start + self.batch_size]
            images = [_opened(image) for image in batch["image"]]
            try:
                prepared = {"pixel_values": self.processor(images=images, return_tensors="pt")["pixel_values"]}
            except Exception as error:  # of any kind, where the settings make no sense
                raise ValueError(
                    f"The images of {self.folder} cannot be prepared as {self.model_folder} says: {first_line(error)}"
                ) from error
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


def _opened(image: dict[str, Any]) -> Any:
    import datasets

    try:
        return datasets.Image().decode_example(image).convert("RGB")
    except Exception as error:  # no image, one that ends early, one that would take all memory
        raise ValueError(f"{image['path']} cannot be read as an image: {first_line(error)}") from error
