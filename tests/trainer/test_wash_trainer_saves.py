"""Image classifiers whose folder cannot be made loadable by every loader are saved as the Trainer saves them."""

import logging

import pytest
import torch
from small_population import population
from transformers import (
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTImageProcessor,
)

from hf_wash.hub.export import export_model


def timm_vit():
    config = TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args={
            "img_size": 8,
            "in_chans": 1,
            "patch_size": 4,
            "depth": 1,
            "embed_dim": 24,
            "num_heads": 2,
            "global_pool": "avg",
        },
        num_labels=10,
    )
    return TimmWrapperForImageClassification(config)


@pytest.fixture
def warnings_of_saving(caplog):
    log = logging.getLogger("hf_wash.trainer.wash_trainer")
    log.addHandler(caplog.handler)
    yield lambda: [
        record.getMessage() for record in caplog.records if "as the Trainer saves it" in record.getMessage()
    ]
    log.removeHandler(caplog.handler)


def test_preprocessing_that_timm_cannot_express_costs_no_checkpoint(tmp_path, warnings_of_saving):
    # timm always divides by 255, and this processor's images have been divided already.
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, do_rescale=False)
    torch.manual_seed(0)
    trainer = population(
        tmp_path,
        timm_vit(),
        size=2,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="no",
        trainer={"processing_class": processor},
    )
    with pytest.raises(ValueError, match="does not rescale"):
        export_model(trainer.model, tmp_path / "elsewhere", processing_class=processor)
    trainer.train()
    trainer.save_model()
    trainer.save_members()

    assert any(f"`{tmp_path}` is saved" in warning and "1/255" in warning for warning in warnings_of_saving())
    models = {
        tmp_path: trainer.model,
        tmp_path / "checkpoint-2": trainer.model,
        **{tmp_path / "_members" / f"member_{k}": m for k, m in enumerate(trainer.population.members)},
    }
    for folder, model in models.items():
        assert (folder / "preprocessor_config.json").is_file()
        loaded = AutoModelForImageClassification.from_pretrained(folder)
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
    assert (tmp_path / "training_args.bin").is_file()

    # What is saved can be gone on from.
    resumed = population(
        tmp_path, timm_vit(), size=2, max_steps=3, eval_strategy="no", trainer={"processing_class": processor}
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3


def test_preprocessing_that_timm_can_express_is_saved_for_every_loader(tmp_path, warnings_of_saving):
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    trainer = population(tmp_path, timm_vit(), size=2, max_steps=1, trainer={"processing_class": processor})
    trainer.train()
    trainer.save_model()
    assert not warnings_of_saving()
    assert not (tmp_path / "preprocessor_config.json").exists()
