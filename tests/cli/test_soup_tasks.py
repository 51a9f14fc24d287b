"""`hf-wash soup` for models of any task: what they come with is kept, from a folder and from the Hub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub import tiny_models
from hub.loopback_hub import LoopbackHub, Repository
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_wash.cli import main
from hf_wash.hub import export_model, load_model


WORDS = ["<pad>", "<s>", "</s>", "<unk>", "many", "models", "make", "one", "soup"]
# As tokenizers of older checkpoints come; a soup only has to hand them on.
OLDER_FILES = ("vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "chat_template.jinja")


def tokenizer(words=WORDS):
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def exported(folder: Path, name: str, seed: int, words=WORDS) -> Path:
    return export_model(tiny_models.tiny(name, seed), folder, processing_class=tokenizer(words), check=False)


@pytest.fixture
def refused(capsys):
    """Runs a command that is a mistake; returns its one line."""

    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        lines = capsys.readouterr().err.strip().splitlines()
        assert ended.value.code == 2 and len(lines) == 1, lines
        return lines[0]

    return run


@pytest.mark.parametrize(
    "name",
    [
        *(
            "BertForQuestionAnswering",
            "BertForSequenceClassification",
            "GPT2LMHeadModel",
            "T5ForConditionalGeneration",
        ),
        *("BartForSequenceClassification", "WhisperForConditionalGeneration", "Wav2Vec2ForSequenceClassification"),
        *("YolosForObjectDetection", "ViTMAEForPreTraining", "PvtV2ForImageClassification"),
    ],
)
def test_a_soup_of_any_task_is_the_mean_and_loads_with_its_tokenizer(name, tmp_path):
    folders = [exported(tmp_path / str(seed), name, seed) for seed in range(2)]
    for file in OLDER_FILES:
        (folders[0] / file).write_text(file)
    with pytest.raises(SystemExit) as ended:
        main(["soup", *map(str, folders), "--out", str(tmp_path / "soup")])
    assert ended.value.code == 0
    first, second, soup = (load_file(folder / "model.safetensors") for folder in (*folders, tmp_path / "soup"))
    for key, value in soup.items():
        torch.testing.assert_close(value, ((first[key].double() + second[key].double()) / 2).to(value.dtype))
    loaded = load_model(tmp_path / "soup")
    assert type(loaded).__name__ == name
    names = {path.name for path in (tmp_path / "soup").iterdir()}
    assert names >= {path.name for path in folders[0].iterdir()}
    for file in OLDER_FILES:
        (tmp_path / "soup" / file).unlink()
    words = AutoTokenizer.from_pretrained(tmp_path / "soup")("many models make one soup")
    assert words["input_ids"] == [4, 5, 6, 7, 8]


def test_a_soup_from_the_hub_keeps_the_tokenizer_and_no_pickle_is_downloaded(tmp_path):
    with LoopbackHub() as hub:
        for seed in range(2):
            folder = exported(tmp_path / str(seed), "GPT2LMHeadModel", seed)
            files = {path.name: path.read_bytes() for path in folder.iterdir()}
            files |= {name: name.encode() for name in OLDER_FILES}
            files |= {"pytorch_model.bin": b"a pickle", "training_args.bin": b"a pickle", "runs/events.out": b"log"}
            files["additional_chat_templates/rag.jinja"] = b"{{ rag }}"
            repository = hub.repositories[f"user/{seed}"] = Repository(private=False)
            repository.commit("main", {name: hub.keep(content) for name, content in files.items()}, "made")
        command = [sys.executable, "-m", "hf_wash.cli", "soup", "user/0", "user/1", "--out", str(tmp_path / "soup")]
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        completed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert (completed.returncode, completed.stderr) == (0, "")
    soup = {path.relative_to(tmp_path / "soup").as_posix() for path in (tmp_path / "soup").rglob("*")}
    assert soup >= {*OLDER_FILES, "tokenizer.json", "generation_config.json", "additional_chat_templates/rag.jinja"}
    downloaded = {path.name for path in (tmp_path / "home").rglob("*")}
    assert not {"pytorch_model.bin", "training_args.bin", "events.out"} & downloaded
    assert type(load_model(tmp_path / "soup")).__name__ == "GPT2LMHeadModel"


def test_a_soup_chosen_by_accuracy_is_for_image_classifiers(refused, tmp_path):
    folders = [exported(tmp_path / str(seed), "BertForQuestionAnswering", seed) for seed in range(2)]
    (tmp_path / "photos").mkdir()
    data = ("--eval-data", tmp_path / "photos", "--out", tmp_path / "soup")
    for options in (("--greedy", *data), data):
        line = refused("soup", *folders, *options)
        assert "accuracy of image classifiers" in line and "BertForQuestionAnswering" in line, line
        assert "hf_wash.soup.greedy_soup" in line
    assert not (tmp_path / "soup").exists()


def test_models_whose_tokens_mean_other_words_are_not_averaged(refused, tmp_path):
    first = exported(tmp_path / "first", "BertForQuestionAnswering", 0)
    other = exported(tmp_path / "other", "BertForQuestionAnswering", 1, [*WORDS[:-2], *reversed(WORDS[-2:])])
    line = refused("soup", first, other, "--out", tmp_path / "soup")
    assert "tokenizer.json" in line and "other" in line, line
    # Nothing is asked of a model that comes without one.
    (other / "tokenizer.json").unlink()
    with pytest.raises(SystemExit) as ended:
        main(["soup", str(first), str(other), "--out", str(tmp_path / "soup")])
    assert ended.value.code == 0


def test_a_soup_of_adapters_of_another_task_is_an_adapter_on_their_backbone(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import BertForQuestionAnswering

    backbone = exported(tmp_path / "backbone", "BertForQuestionAnswering", 0)
    for seed in range(2):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["query"], task_type="QUESTION_ANS", init_lora_weights=False)
        model = get_peft_model(BertForQuestionAnswering.from_pretrained(backbone), config)
        export_model(model, tmp_path / str(seed), processing_class=tokenizer())
    with pytest.raises(SystemExit) as ended:
        main(["soup", str(tmp_path / "0"), str(tmp_path / "1"), "--out", str(tmp_path / "soup")])
    assert ended.value.code == 0
    assert type(load_model(tmp_path / "soup").get_base_model()) is BertForQuestionAnswering
    assert (tmp_path / "soup" / "tokenizer.json").is_file()
