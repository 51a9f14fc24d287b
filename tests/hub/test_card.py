"""The model card: what it says, what it leaves alone, and that its code runs."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from PIL import Image

from hf_wash.hub.card import WashCard, write_card
from hf_wash.hub.card_merge import merge_card
from hf_wash.hub.record import inherited_license, read_json, read_record
from hf_wash.hub.tasks import task_of


BEGIN = "<!-- hf-wash:begin "


def front_matter(text):
    return yaml.safe_load(re.match(r"\A---\n(.*?)^---\n", text, re.DOTALL | re.MULTILINE).group(1))


def a_copy(run, tmp_path, **metadata):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "README.md").unlink()
    return folder


def code_in(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


# What it says


def test_the_metadata_are_what_the_hub_needs(vit_run, timm_run):
    data = front_matter((vit_run / "README.md").read_text())
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-classification"
    assert {"wash", "model-soup"} <= set(data["tags"])
    assert data["metrics"] == ["accuracy"]
    assert "base_model" not in data and "license" not in data and "datasets" not in data
    result = data["model-index"][0]["results"][0]
    assert result["task"]["type"] == "image-classification" and result["dataset"]["name"] == "noise"
    accuracy = json.loads((vit_run / "all_results.json").read_text())["eval_accuracy"]
    assert {"type": "accuracy", "name": "Accuracy", "value": accuracy} in result["metrics"]
    timm_data = front_matter((timm_run / "README.md").read_text())
    assert timm_data["library_name"] == "timm" and {"timm", "transformers"} <= set(timm_data["tags"])


def test_huggingface_hub_reads_it(vit_run):
    from huggingface_hub import ModelCard

    card = ModelCard.load(vit_run / "README.md")
    assert card.data.eval_results[0].metric_type == "accuracy"
    assert card.data.model_name == "vits"


def test_the_table_has_members_their_mean_the_ensemble_and_the_soup(vit_run):
    accuracies = {"": 0.91, "member_0_": 0.81, "member_1_": 0.83, "members_": 0.82, "ensemble_": 0.92}
    metrics = {f"eval_{who}accuracy{'_mean' * (who == 'members_')}": value for who, value in accuracies.items()}
    metrics |= {"eval_loss": 0.5, "eval_member_0_loss": 0.75, "eval_runtime": 1.0, "eval_consensus_distance": 2.0}
    text = WashCard.from_folder(vit_run, metrics=metrics, pictures=False).render()
    # In Markdown a table's head, its rule and its rows follow one another without an empty line.
    table = [
        *("| | Accuracy | Loss |", "|---|---:|---:|", "| member 0 | 81.00% | 0.7500 |", "| member 1 | 83.00% |  |"),
        *("| members' mean | 82.00% |  |", "| ensemble | 92.00% |  |", "| **soup** | 91.00% | 0.5000 |"),
    ]
    assert "\n".join(table) in text
    assert "| **soup** |" in (vit_run / "README.md").read_text()


def test_a_soup_that_failed_is_not_praised_and_one_that_was_not_shuffled_is_not_called_wash(vit_run):
    metrics = {"eval_accuracy": 0.10, "eval_members_accuracy_mean": 0.97}
    card = WashCard.from_folder(vit_run, metrics=metrics, pictures=False)
    assert "**The soup is 87.0 points behind the mean of its members**" in card.render()
    card.record["mixing"]["method"] = "independent"
    text = card.render()
    assert "exchanged nothing while training" in text and "Citation" not in text
    assert "wash" not in card.metadata()["tags"]
    card.metrics = {"eval_accuracy": 0.965, "eval_members_accuracy_mean": 0.97}
    assert "points behind" not in card.render()


def test_the_table_of_ingredients_is_one_table(vit_run):
    card = WashCard.from_folder(vit_run, pictures=False)
    card.record["soup"] = {"method": "greedy", "ingredients": ["a", "b"], "scores": [0.5, 0.25], "chosen": [0]}
    table = [
        *("| | model | held-out accuracy | in the soup |", "|---:|---|---:|---|"),
        *("| 0 | a | 50.00% | yes |", "| 1 | b | 25.00% | no |"),
    ]
    assert "\n".join(table) in card.render()


def test_an_adapter_on_a_local_backbone_says_where_its_lines_run(vit_run):
    card = WashCard.from_folder(vit_run, pictures=False)
    assert "These lines run in the folder of this card." in card.render()
    card.library, card.adapter_base = "peft", "outputs/finetune/backbone"
    assert "These lines run where the backbone is found as `outputs/finetune/backbone`" in card.render()


def test_the_recipe_names_what_made_the_run(vit_run):
    text = (vit_run / "README.md").read_text()
    for expected in (
        *("| population | 2 members |", "| probability p | 0.5 |", "| schedule over depth | decreasing |"),
        *("| seeds | 42 to 43, one for each member |", "| data | noise, 16 training samples |", "| length | 4 "),
        *("| batch size of a member | 8 |", "| hardware | 1 process on cpu", "torch 2", "| mixing | WASH |"),
    ):
        assert expected in text, expected


def test_options_that_an_old_record_lacks_are_said_to_be_unknown(vit_run):
    card = WashCard.from_folder(vit_run, pictures=False)
    card.record["mixing"] = {**dict.fromkeys(card.record["mixing"]), "method": "wash"}
    text = card.render()
    assert "| probability p | not recorded |" in text and "| shuffled | after every optimizer step |" in text
    assert "None" not in text


def test_bytes_are_those_counted_and_those_of_one_gradient_a_step_and_one_model_in_ten(vit_run):
    record = read_record(vit_run)
    card = WashCard.from_folder(vit_run, pictures=False)
    card.record["training"]["steps"] = 40
    model = record["model"]["trainable_bytes"]
    assert model == 4 * record["model"]["trainable_parameters"]
    card.record["exchange"]["bytes_exchanged"] = model
    assert [row[0] for row in card.exchange()] == ["WASH", "SPARTA", "PAPA", "DDP"]
    assert [row[2] for row in card.exchange()] == ["1", "0.4 ×", "8 ×", "80 ×"]
    assert record["exchange"]["bytes_exchanged"] == 4 * record["exchange"]["values_moved"] > 0
    card.record["population"]["size"] = 1
    assert card.exchange() == []


def test_pictures_are_drawn_and_shown(vit_run):
    text = (vit_run / "README.md").read_text()
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert shown == ["pictures/accuracy.png", "pictures/consensus.png"]
    for path in shown:
        with Image.open(vit_run / path) as image:
            assert image.width > 600 and len(image.convert("L").getcolors()) > 10


def test_without_matplotlib_the_card_has_no_pictures_and_does_not_speak_of_them(vit_run, tmp_path, monkeypatch):
    folder = a_copy(vit_run, tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_card(folder)
    text = (folder / "README.md").read_text()
    assert "![" not in text and "pictures/" not in text and "| ensemble |" in text


def test_one_evaluation_gives_a_picture_too(vit_run, tmp_path):
    from hf_wash.hub.pictures import draw_pictures

    metrics = json.loads((vit_run / "all_results.json").read_text())
    assert list(draw_pictures(tmp_path, [], metrics).values()) == ["pictures/accuracy.png"]
    assert draw_pictures(tmp_path, [], {}) == {}


def test_the_card_of_a_folder_is_the_card_of_its_run(vit_run, tmp_path):
    folder = tmp_path / "vits"
    shutil.copytree(vit_run, folder)
    (folder / "README.md").unlink()
    write_card(folder)
    # `eval_samples` and the like are in the files, and not in what a run has in memory.
    assert (folder / "README.md").read_text() == (vit_run / "README.md").read_text()


def test_a_folder_without_a_record_says_what_it_knows(vit_run, tmp_path):
    folder = a_copy(vit_run, tmp_path)
    for name in ("wash_run.json", "trainer_state.json", "all_results.json"):
        (folder / name).unlink()
    write_card(folder)
    text = (folder / "README.md").read_text()
    assert "`ViTForImageClassification`" in text and "3 classes" in text and "no record" in text
    assert "WASH" not in text and "## Results" not in text


def test_a_population_that_exchanged_nothing_is_not_called_wash(vit_run):
    card = WashCard.from_folder(vit_run, pictures=False)
    card.record["mixing"]["method"] = "independent"
    card.record["exchange"]["bytes_exchanged"] = 0
    assert "wash" not in card.metadata()["tags"]
    assert "exchanged nothing" in card.render() and "swapping" not in card.render()


def test_a_fine_tuned_model_names_its_base_and_inherits_its_license(tmp_path, vit_run):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert inherited_license(str(base)) == "apache-2.0"
    assert inherited_license("nobody/nothing") is None  # this process is offline
    assert inherited_license(None) is None
    card = WashCard.from_folder(vit_run, pictures=False)
    card.base_model, card.license, card.dataset_names = "google/some-vit", "apache-2.0", ["user/flowers"]
    data = card.metadata()
    assert data["base_model"] == "google/some-vit" and data["base_model_relation"] == "finetune"
    assert data["license"] == "apache-2.0" and data["datasets"] == ["user/flowers"]
    assert "fine-tuned from [google/some-vit](https://hf.co/google/some-vit)" in card.render()
    card.base_model = "just-a-folder"
    assert "base_model" not in card.metadata() and "fine-tuned from just-a-folder" in card.render()


def test_paths_of_this_machine_stay_here(vit_run):
    for name in ("README.md", "wash_run.json"):
        assert str(vit_run.parent) not in (vit_run / name).read_text()


# Its code


@pytest.mark.parametrize("run", ["vit_run", "timm_run"])
def test_the_code_in_the_card_runs_as_it_stands(run, request):
    folder = request.getfixturevalue(run)
    snippets = code_in((folder / "README.md").read_text())
    assert len(snippets) == 3
    # One process for the three, each with names of its own.
    code = "\n".join(f"exec({snippet!r}, {{}})" for snippet in snippets)
    completed = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=os.environ, capture_output=True, text=True, timeout=120
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert completed.stdout.count("'ant'") >= 1 and "tensor(" in completed.stdout


TEXT_MODELS = {
    "text-generation": ("GPT2LMHeadModel", "AutoModelForCausalLM", 2, "a language model"),
    "question-answering": ("BertForQuestionAnswering", "AutoModelForQuestionAnswering", 1, "finds answers in a text"),
    "token-classification": ("BertForTokenClassification", "AutoModelForTokenClassification", 3, "a token classifier"),
    "text2text-generation": ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM", 1, "sequence-to-sequence"),
    "feature-extraction": ("BertModel", "AutoModel", 1, "an encoder"),
}


@pytest.mark.parametrize("tag", TEXT_MODELS)
def test_a_model_of_text_is_said_to_be_one_and_its_code_runs(tmp_path, monkeypatch, capsys, tag):
    import tokenizers
    import transformers

    class_name, loader, count, kind = TEXT_MODELS[tag]
    model_class = getattr(transformers, class_name)
    words = [
        "[PAD]",
        "[UNK]",
        "[MASK]",
        "</s>",
        "who",
        "wrote",
        "it",
        "was",
        "written",
        "by",
        "a",
        "sentence",
        "once",
        "upon",
        "time",
    ]
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    if class_name.startswith("T5"):
        sizes = {"d_model": 8, "num_layers": 1, "num_heads": 2, "d_kv": 4, "d_ff": 8, "decoder_start_token_id": 0}
    elif class_name.startswith("GPT2"):
        sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2}
    ends = {"pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 3}
    model_class(model_class.config_class(vocab_size=len(words), **sizes, **ends)).save_pretrained(tmp_path)
    vocabulary = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    backend = tokenizers.Tokenizer(vocabulary)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]", "eos_token": "</s>"}
    names = ["input_ids", "attention_mask"]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **special)
    tokenizer.save_pretrained(tmp_path)
    if tag == "token-classification":
        for index in range(2):
            model_class.from_pretrained(tmp_path).save_pretrained(tmp_path / "_members" / f"member_{index}")

    card = WashCard.from_folder(tmp_path)
    assert card.metadata()["pipeline_tag"] == tag
    text = card.render()
    assert kind in text and "image" not in text
    snippets = code_in(text)
    assert len(snippets) == count and f"import {loader}, AutoTokenizer" in "".join(snippets)
    monkeypatch.chdir(tmp_path)
    for code in snippets:
        exec(code, {})
        assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("class_name", "config", "tag", "loader"),
    [
        ("LlamaForCausalLM", {}, "text-generation", "AutoModelForCausalLM"),
        ("BertForSequenceClassification", {}, "text-classification", "AutoModelForSequenceClassification"),
        ("PeftModelForSequenceClassification", {}, "text-classification", "AutoModelForSequenceClassification"),
        ("RobertaForMaskedLM", {}, "fill-mask", "AutoModelForMaskedLM"),
        ("WhisperForConditionalGeneration", {"num_mel_bins": 80}, *("automatic-speech-recognition", "AutoModelForSpeechSeq2Seq")),
        ("LlavaForConditionalGeneration", {"vision_config": {}}, "image-text-to-text", "AutoModelForImageTextToText"),
        ("ViTModel", {"image_size": 224}, "image-feature-extraction", "AutoModel"),
        # What cannot be told is not guessed.
        ("ViltForQuestionAnswering", {"image_size": 384}, None, None),
        ("PeftModel", {}, None, None),
        ("Perceptron", {}, None, None),
    ],
)  # fmt: skip
def test_what_a_model_does_is_told_by_its_class(class_name, config, tag, loader):
    import transformers

    task = task_of(class_name, config)
    assert (task.tag, task.loader) == (tag, loader)
    assert loader is None or hasattr(transformers, loader)


def test_a_folder_of_sentence_transformers_is_loaded_with_it(vit_run):
    card = WashCard.from_folder(vit_run, pictures=False)
    card.library = "sentence-transformers"
    assert card.metadata()["pipeline_tag"] == "sentence-similarity"
    assert 'SentenceTransformer(".")' in code_in(card.render())[0] and "a sentence embedding model" in card.render()


def test_an_adapter_names_its_backbone_and_its_code_runs(tmp_path, monkeypatch):
    from hub import tiny_runs
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageClassification

    from hf_wash.hub import export_model

    monkeypatch.chdir(tmp_path)
    tiny_runs.vit()[0].save_pretrained("org/backbone")
    backbone = AutoModelForImageClassification.from_pretrained("org/backbone")
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"], r=2)
    export_model(get_peft_model(backbone, lora), tmp_path, check=False)
    card = WashCard.from_folder(tmp_path)
    snippets = code_in(card.render())
    assert len(snippets) == 2
    for code in snippets:
        exec(code, {})
    shutil.rmtree("org")
    data = card.metadata()
    assert (data["library_name"], data["base_model"], data["base_model_relation"]) == (
        "peft",
        "org/backbone",
        "adapter",
    )


def test_on_the_hub_the_code_names_the_repository_and_the_branch(timm_run):
    card = WashCard.from_folder(timm_run, repo_id="user/it", revision="dev", pictures=False, members=False)
    codes = code_in(card.render())
    assert 'model="user/it", revision="dev"' in codes[0]
    assert '"hf_hub:user/it@dev"' in codes[1]
    assert len(codes) == 2  # no members there, no ensemble
    assert "its name takes the place" not in card.render()


# What it leaves alone

METADATA = {"library_name": "transformers", "tags": ["wash"], "license": "mit"}


def test_text_and_metadata_of_others_are_kept_to_the_letter():
    existing = "---\n# a comment\nlicense:   other   # mine\ntags: [a,\n  b]\n---\n\n# Title\n\nMine.\n"
    merged, problems = merge_card(existing, METADATA, "GENERATED\n")
    assert problems == []
    for line in existing.splitlines():
        assert line in merged.splitlines()
    assert merged.startswith(
        "---\n# a comment\nlicense:   other   # mine\ntags: [a,\n  b]\nlibrary_name: transformers\n---\n"
    )
    assert merged.index("Mine.") < merged.index("GENERATED")
    assert front_matter(merged) == {"license": "other", "tags": ["a", "b"], "library_name": "transformers"}


def test_only_the_generated_part_is_replaced_when_the_card_is_written_again():
    first, _ = merge_card("# Title\n\nAbove.\n", METADATA, "ONE\n")
    edited = first + "\nBelow, with a \\1 and a \\g<0>.\n"
    second, problems = merge_card(edited, METADATA, "TWO \\1\n")
    assert problems == []
    assert "ONE" not in second and "TWO \\1" in second
    assert "Above." in second and "Below, with a \\1 and a \\g<0>." in second
    assert merge_card(second, METADATA, "TWO \\1\n")[0] == second
    assert second.count(BEGIN) == 1


def test_own_metadata_are_brought_up_to_date_until_somebody_changes_them():
    first, _ = merge_card(None, METADATA, "x\n")
    second, _ = merge_card(first, {**METADATA, "license": "apache-2.0", "tags": ["wash", "new"]}, "x\n")
    assert front_matter(second)["license"] == "apache-2.0" and front_matter(second)["tags"] == ["wash", "new"]
    changed = second.replace("license: apache-2.0", "license: cc0-1.0")
    third, _ = merge_card(changed, {**METADATA, "license": "bsd"}, "x\n")
    assert front_matter(third)["license"] == "cc0-1.0" and front_matter(third)["tags"] == ["wash"]
    fourth, _ = merge_card(third, {**METADATA, "license": "bsd"}, "x\n")
    assert front_matter(fourth)["license"] == "cc0-1.0"


@pytest.mark.parametrize(
    ("front", "reason"),
    [
        ("---\nlicense: [mit\n---\n", "not valid YAML in line"),
        ("---\n- a\n- b\n---\n", "is a list where"),
        ("---\nlicense: mit\n\nno end\n", "never ends"),
        ("---\nkey: 'open\n---\n", "not valid YAML"),
        # Valid, but with nowhere to put a line.
        ("---\n{license: other}\n---\n", "a name in each line"),
        ("---\nlicense: other\n...\n---\n", "a name in each line"),
    ],
)
def test_front_matter_that_is_broken_or_cannot_be_completed_is_kept_and_reported(front, reason):
    existing = f"{front}\n# Mine\n"
    merged, problems = merge_card(existing, METADATA, "GENERATED\n")
    assert merged.startswith(existing) and "GENERATED" in merged
    assert len(problems) == 1 and reason in problems[0] and "kept" in problems[0]
    again, _ = merge_card(merged, METADATA, "AGAIN\n")
    assert again.startswith(existing) and "AGAIN" in again and "GENERATED" not in again


def test_a_card_whose_end_mark_is_gone_is_left_alone():
    first, _ = merge_card(None, METADATA, "x\n")
    damaged = first.replace("<!-- hf-wash:end -->", "my own ending")
    merged, problems = merge_card(damaged, METADATA, "y\n")
    assert merged == damaged and "end" in problems[0]


def test_line_ends_and_a_title_are_respected(vit_run, tmp_path):
    folder = a_copy(vit_run, tmp_path)
    mine = b"---\r\nlicense: mit\r\n---\r\n# My model\r\n\r\nWords: caf\xc3\xa9.\r\n"
    (folder / "README.md").write_bytes(mine)
    write_card(folder)
    written = (folder / "README.md").read_bytes()
    assert b"Words: caf\xc3\xa9.\r\n" in written and written.count(b"\n") == written.count(b"\r\n")
    assert written.count(b"\r\n# ") == 1 and b"\r\n## How this model was made" in written
    write_card(folder)
    assert (folder / "README.md").read_bytes() == written


def test_what_is_not_text_is_left_as_it_is(vit_run, tmp_path, caplog):
    folder = a_copy(vit_run, tmp_path)
    (folder / "README.md").write_bytes(b"\xff\xfe\x00words")
    write_card(folder)
    assert (folder / "README.md").read_bytes() == b"\xff\xfe\x00words"
    assert "not UTF-8" in caplog.text


def test_the_trainer_keeps_what_a_user_wrote(vit_run, tmp_path):
    from hub import tiny_runs

    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n\nWords.\n")
    trainer = tiny_runs.trainer(tmp_path)
    trainer.create_model_card(license="apache-2.0", tags="extra")
    text = (tmp_path / "README.md").read_text()
    assert front_matter(text)["license"] == "mit" and "extra" in front_matter(text)["tags"]
    assert text.index("Words.") < text.index("`ViTForImageClassification`")
    # What it was told once it remembers.
    trainer.create_model_card(dataset="noise")
    assert "extra" in front_matter((tmp_path / "README.md").read_text())["tags"]


@pytest.mark.parametrize("missing", ["folder", "model"])
def test_a_folder_that_holds_no_model_is_refused(tmp_path, missing):
    folder = tmp_path / "nothing" if missing == "folder" else tmp_path
    with pytest.raises(ValueError, match=r"no folder" if missing == "folder" else r"holds no model"):
        write_card(folder)


def test_a_file_that_is_no_json_object_is_named_and_one_that_is_not_there_is_empty(tmp_path):
    assert read_json(tmp_path / "config.json") == {}
    for content, reason in (("{", "not valid JSON"), ("[]", "holds a list"), ("\xff", "not valid JSON")):
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(ValueError, match=rf"config\.json.*{reason}"):
            read_json(tmp_path / "config.json")
