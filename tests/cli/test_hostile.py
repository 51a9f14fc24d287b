"""
What others may have left in a folder, and what a user may type: `hf-wash` refuses it in one clean line. No traceback, no
waiting, nothing of the user's changed.
"""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from cli.hostile_folders import (
    ADAPTERS,
    DEEP,
    ESCAPES,
    SOUP,
    SOUP_EVAL,
    TIMM,
    both,
    cased,
    content,
    device,
    each,
    everything_in,
    fields,
    fifo,
    folder,
    header,
    index,
    is_clean,
    link,
    removed,
    run_command,
    weights,
)


# Who opens a FIFO waits for ever.
pytestmark = pytest.mark.timeout(30)

# A name, the command, what is done to the folders before, and what the line must hold.
REFUSED = [
    # Files that are none, and wait or never end when they are opened.
    *(
        (f"{what.__name__} as {file}", SOUP, what("a", file), [file])
        for what in (fifo, folder, device)
        for file in ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "merges.txt")
    ),
    ("fifo as index", SOUP, each(removed("a", "model.safetensors"), fifo("a", "model.safetensors.index.json")), ["index.json"]),
    ("fifo as shard", SOUP, each(index(lambda _: {"x": "s.safetensors"}), fifo("a", "s.safetensors")), ["s.safetensors"]),
    ("fifo as only weights", SOUP, each(removed("a", "model.safetensors"), fifo("a", "x.safetensors")), ["x.safetensors"]),
    ("fifo as adapter_config", ADAPTERS, fifo("adapter_a", "adapter_config.json"), ["adapter_config.json"]),
    ("fifo as backbone_config", ADAPTERS, fifo("adapter_a", "backbone_config.json"), ["backbone_config.json"]),
    ("device as adapter", ADAPTERS, device("adapter_a", "adapter_model.safetensors"), ["adapter_model.safetensors"]),
    ("fifo as second config", SOUP, fifo("b", "config.json"), ["config.json"]),
    ("link to nowhere as config", SOUP, link("nowhere", "a", "config.json"), ["config.json"]),
    ("link to itself as config", SOUP, link("config.json", "a", "config.json"), ["config.json"]),
    ("link to itself as weights", SOUP, link("model.safetensors", "a", "model.safetensors"), ["model.safetensors"]),
    ("fifo among templates", SOUP, each(lambda p: (p / "a/additional_chat_templates").mkdir(), fifo("a", "additional_chat_templates", "x.jinja")), ["x.jinja"]),
    # Weights.
    ("no weights", SOUP, removed("a", "model.safetensors"), ["weights", "{a}"]),
    ("no config", SOUP, removed("a", "config.json"), ["config.json"]),
    ("shard outside", SOUP, index(lambda _: {"x": "../weights.safetensors"}), ["outside", "../weights.safetensors"]),
    ("shard by absolute path", SOUP, index(lambda p: {"x": str(p / "weights.safetensors")}), ["outside", "weights.safetensors"]),
    ("shard with a NUL", SOUP, index(lambda _: {"x": "a\0b"}), ["index.json"]),
    ("shard is a number", SOUP, index(lambda _: {"x": 3}), ["index.json"]),
    ("shards of several types", SOUP, index(lambda _: {"x": 3, "y": "a", "z": None}), ["index.json"]),
    ("shard is a list", SOUP, index(lambda _: {"x": ["a"]}), ["index.json"]),
    ("shard is empty", SOUP, index(lambda _: {"x": ""}), ["index.json"]),
    ("shard is the folder", SOUP, index(lambda _: {"x": "."}), ["index.json"]),
    ("no shards", SOUP, index(lambda _: {}), ["index.json"]),
    ("map of shards is a list", SOUP, index(lambda _: ["a"]), ["index.json"]),
    ("index is a list", SOUP, each(removed("a", "model.safetensors"), content("[]", "a", "model.safetensors.index.json")), ["index.json"]),
    ("index is deep", SOUP, each(removed("a", "model.safetensors"), content(DEEP, "a", "model.safetensors.index.json")), ["index.json"]),
    ("index is no text", SOUP, each(removed("a", "model.safetensors"), content(b"\xff\xfe", "a", "model.safetensors.index.json")), ["index.json"]),
    ("weights are empty", SOUP, content(b"", "a", "model.safetensors"), ["model.safetensors"]),
    ("weights are text", SOUP, content("not weights at all", "a", "model.safetensors"), ["model.safetensors"]),
    ("weights are a pickle", SOUP, content(b"\x80\x02}q\x00.", "a", "model.safetensors"), ["model.safetensors"]),
    ("weights end early", SOUP, lambda p: os.truncate(p / "a/model.safetensors", 2000), ["model.safetensors"]),
    ("header of 2^63 bytes", SOUP, header("{}", 2**63), ["model.safetensors"]),
    ("header is a list", SOUP, header("[1]"), ["model.safetensors"]),
    ("header is deep", SOUP, header(DEEP), ["model.safetensors"]),
    ("header has holes", SOUP, header('{"x":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'), ["model.safetensors"]),
    ("header has a negative shape", SOUP, header('{"x":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}'), ["model.safetensors"]),
    ("header has a huge shape", SOUP, header('{"x":{"dtype":"F32","shape":[4611686018427387904,8],"data_offsets":[0,0]}}'), ["model.safetensors"]),
    ("header has another dtype", SOUP, header('{"x":{"dtype":"Q9","shape":[0],"data_offsets":[0,0]}}'), ["model.safetensors"]),
    ("header has nothing", SOUP, header("{}"), ["model.safetensors"]),
    ("both have nothing", "soup {a} --out {out}", header("{}"), ["{a}"]),
    ("tensor has no dimension", SOUP, weights(lambda t: t.update({"classifier.bias": torch.tensor(1.0)})), ["classifier.bias"]),
    ("tensor is empty", SOUP, weights(lambda t: t.update({"classifier.bias": torch.zeros(0)})), ["classifier.bias"]),
    ("tensor is missing", SOUP, weights(lambda t: t.pop("classifier.bias")), ["classifier.bias"]),
    ("tensor has escapes for a name", SOUP, weights(lambda t: t.update({ESCAPES: torch.zeros(1)})), ["unexpected"]),
    # Configurations.
    ("config is a list", SOUP, content("[]", "a", "config.json"), ["config.json"]),
    ("config is a number", SOUP, content("1", "a", "config.json"), ["config.json"]),
    ("config is empty", SOUP, content("", "a", "config.json"), ["config.json"]),
    ("config holds nothing", SOUP, both(lambda n, f: content("{}", n, f), "config.json"), ["config.json"]),
    ("config is no text", SOUP, content(b"\xff\xfe\0", "a", "config.json"), ["config.json"]),
    ("config is deep", SOUP, content(DEEP, "a", "config.json"), ["config.json"]),
    ("config is deep inside", SOUP, content('{"x":' * 50_000 + "1" + "}" * 50_000, "a", "config.json"), ["config.json"]),
    ("config has a number of 5000 digits", SOUP, content('{"image_size": ' + "9" * 5000 + "}", "a", "config.json"), ["config.json"]),
    *(
        (f"architectures {value!r}", SOUP, both(fields, "config.json", architectures=value), ["config.json", "architectures"])
        for value in (5, "ViTForImageClassification", {"a": 1}, [3], [None], [["ViTForImageClassification"]], True, 0)
    ),
    ("architecture unknown, escapes", SOUP, both(fields, "config.json", architectures=[ESCAPES], model_type="nothing"), ["nothing"]),
    ("architecture of another model", SOUP, both(fields, "config.json", architectures=["BertForMaskedLM"]), ["BertForMaskedLM"]),
    *(
        (f"model_type {value!r}", SOUP, both(fields, "config.json", model_type=value), ["config.json", "model_type"])
        for value in (5, ["vit"], {}, None)
    ),
    *(
        (f"id2label {value!r}", SOUP, both(fields, "config.json", id2label=None) if value is None else each(fields("a", "config.json", id2label=None), both(fields, "config.json", id2label=value)), ["config.json", "id2label"])
        for value in (5, "blue", ["blue", "red"], [[["blue"]]], {"x": "blue"}, {"0": ["blue"], "1": "red"}, {"0": None, "1": "red"}, {"0": 3, "1": 4}, {"1.5": "blue"}, True)
    ),
    ("labels on one side", SOUP, each(fields("b", "config.json", id2label=None), fields("b", "config.json", id2label={"0": "red", "1": "blue"})), ["{b}", "classes"]),
    ("model_type of escapes", SOUP, both(fields, "config.json", model_type=ESCAPES), ["config.json", "\\x1b[31mred"]),
    ("hidden_size is text", SOUP, both(fields, "config.json", hidden_size="wide"), ["{a}"]),
    ("hidden_size is null", SOUP, both(fields, "config.json", hidden_size=None), ["{a}"]),
    ("hidden_size is 0", SOUP, both(fields, "config.json", hidden_size=0), ["soup"]),
    ("heads are 0", SOUP, both(fields, "config.json", num_attention_heads=0), ["soup"]),
    ("layers are many", SOUP, both(fields, "config.json", num_hidden_layers="many"), ["{a}"]),
    ("hidden_act unknown", SOUP, both(fields, "config.json", hidden_act=ESCAPES), ["soup"]),
    ("image_size is a list", SOUP, both(fields, "config.json", image_size=[[1]]), ["{a}"]),
    ("patch_size is 0", SOUP, both(fields, "config.json", patch_size=0), ["soup"]),
    ("dtype unknown", SOUP, both(fields, "config.json", dtype="float7"), ["float7"]),
    ("code of its own", SOUP, both(fields, "config.json", auto_map={"AutoConfig": "x.C", "AutoModelForImageClassification": "x.M"}, model_type="mine"), ["config.json", "custom code"]),
    # What no shape shows.
    *(
        (f"other {name}", SOUP, fields("b", "config.json", **{name: value}), ["{b}", name, repr(value)])
        for name, value in (("hidden_act", "relu"), ("num_attention_heads", 4), ("layer_norm_eps", 1e-3), ("pooler_act", "relu"))
    ),
    ("other normalisation of images", SOUP, fields("b", "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3]), ["{b}", "image_mean"]),
    ("other scale of images", SOUP, fields("b", "preprocessor_config.json", rescale_factor=1.0), ["{b}", "rescale_factor"]),
    ("other model_args of timm", TIMM, fields("timm_b", "config.json", model_args={"act_layer": "relu"}), ["{timm_b}", "act_layer"]),
    ("other pooling of timm", TIMM, fields("timm_b", "config.json", global_pool="max"), ["{timm_b}", "global_pool"]),
    ("other mean of timm", TIMM, fields("timm_b", "config.json", pretrained_cfg={"mean": [0.1, 0.1, 0.1]}), ["{timm_b}", "mean"]),
    *(
        (f"other {name} of an adapter", ADAPTERS, fields("adapter_b", "adapter_config.json", **{name: value}), ["{adapter_b}", name])
        for name, value in (("lora_alpha", 99), ("use_rslora", True), ("use_dora", True), ("alpha_pattern", {"query": 9}), ("rank_pattern", {"query": 1}), ("peft_type", "IA3"), ("peft_type", 5))
    ),
    ("other backbone of an adapter", ADAPTERS, fields("adapter_b", "backbone_config.json", hidden_act="relu"), ["{adapter_b}", "hidden_act"]),
    # timm and adapters.
    ("pretrained_cfg is a number", TIMM, each(fields("timm_a", "config.json", pretrained_cfg=5), fields("timm_b", "config.json", pretrained_cfg=5)), ["config.json", "pretrained_cfg"]),
    ("architecture of timm is a list", TIMM, each(*(fields(n, "config.json", architecture=["x"]) for n in ("timm_a", "timm_b"))), ["config.json", "architecture"]),
    ("architecture of timm unknown", TIMM, each(*(fields(n, "config.json", architecture="no_such_net") for n in ("timm_a", "timm_b"))), ["no_such_net"]),
    ("label_names are a number", TIMM, each(*(fields(n, "config.json", label_names=7) for n in ("timm_a", "timm_b"))), ["config.json", "label_names"]),
    ("model_args are a list", TIMM, each(*(fields(n, "config.json", model_args=[7]) for n in ("timm_a", "timm_b"))), ["config.json", "model_args"]),
    ("model_args are unknown", TIMM, each(*(fields(n, "config.json", model_args={"none_such": 7}) for n in ("timm_a", "timm_b"))), ["none_such"]),
    ("adapter config is a list", ADAPTERS, content("[]", "adapter_a", "adapter_config.json"), ["adapter_config.json"]),
    ("adapter's backbone is a number", ADAPTERS, each(*(fields(n, "adapter_config.json", base_model_name_or_path=5) for n in ("adapter_a", "adapter_b"))), ["base_model_name_or_path"]),
    ("adapter's backbone is nowhere", ADAPTERS, each(*(fields(n, "adapter_config.json", base_model_name_or_path="/nowhere/at/all") for n in ("adapter_a", "adapter_b"))), ["/nowhere/at/all"]),
    ("adapter and model", "soup {adapter_a} {a} --out {out}", None, ["{a}"]),
    ("model and adapter", "soup {a} {adapter_a} --out {out}", None, ["{adapter_a}"]),
    ("transformers and timm", "soup {a} {timm_a} --out {out}", None, ["{timm_a}"]),
    # Tokenizers.
    ("tokenizer is a list", SOUP, content("[]", "a", "tokenizer.json"), ["tokenizer.json"]),
    ("tokenizer is deep", SOUP, content(DEEP, "a", "tokenizer.json"), ["tokenizer.json"]),
    ("tokenizer's model is a list", SOUP, each(*(content('{"model": []}', n, "tokenizer.json") for n in "ab")), ["tokenizer.json"]),
    ("tokenizers differ in a file", SOUP, each(content("a\nb", "a", "vocab.txt"), content("b\na", "b", "vocab.txt")), ["vocab.txt"]),
    # What is typed.
    ("a file", "soup {a}/model.safetensors {b} --out {out}", None, ["model.safetensors", "folder"]),
    ("a file of JSON", "soup {a}/config.json --out {out}", None, ["config.json", "folder"]),
    ("a fifo", "soup {place}/pipe --out {out}", fifo("pipe"), ["pipe", "folder"]),
    ("a device", "soup /dev/zero --out {out}", None, ["/dev/zero", "folder"]),
    ("nothing at all", ["soup", "", "--out", "{out}"], None, ["name"]),
    ("a path that is not there", "soup {place}/none/at/all --out {out}", None, ["{place}/none/at/all"]),
    ("escapes", ["soup", ESCAPES, "--out", "{out}"], None, ["\\x1b[31mred"]),
    ("a name that is no UTF-8", ["soup", "\udcff\udcfe", "--out", "{out}"], None, ["\\udcff"]),
    ("a name of 5000 letters", ["soup", "x" * 5000, "--out", "{out}"], None, ["xxx"]),
    ("a name of spaces", ["soup", "  ", "--out", "{out}"], None, ["name"]),
    ("a name that climbs", ["soup", "../../..", "--out", "{out}"], None, [""]),
    ("a URL", ["soup", "https://huggingface.co/user/model", "--out", "{out}"], None, ["https://huggingface.co/user/model"]),
    ("out is a file", "soup {a} {b} --out {a}/config.json", None, ["config.json", "already"]),
    ("out is a fifo", "soup {a} {b} --out {place}/pipe", fifo("pipe"), ["pipe", "already"]),
    ("out is below a file", "soup {a} {b} --out {a}/config.json/out", None, ["config.json"]),
    ("out is a link to nowhere", "soup {a} {b} --out {place}/hole/out", link("hole", "hole"), ["hole"]),
    ("out is a link to itself", "soup {a} {b} --out {place}/hole", link("hole", "hole"), ["hole"]),
    ("out is a model", "soup {a} {b} --out {a}", None, ["already"]),
    ("out is a link to a model", "soup {a} {b} --out {place}/other", link("a", "other"), ["already"]),
    ("out has a long name", ["soup", "{a}", "--out", "{place}/" + "x" * 300], None, ["xxx"]),
    ("batch size of 0", SOUP_EVAL + " --batch-size 0", None, ["batch-size"]),
    ("batch size of letters", SOUP_EVAL + " --batch-size many", None, ["batch-size"]),
    # Images.
    ("images are a file", "soup {a} --eval-data {a}/config.json --out {out}", None, ["--eval-data", "folder"]),
    ("no images", "soup {a} --eval-data {place}/empty --out {out}", lambda p: (p / "empty").mkdir(), ["{place}/empty"]),
    ("one image is a fifo", SOUP_EVAL, fifo("photos", "blue", "9.png"), ["9.png"]),
    ("one image is a device", SOUP_EVAL, device("photos", "blue", "9.png"), ["9.png"]),
    ("one image is empty", SOUP_EVAL, content(b"", "photos", "blue", "0.png"), ["0.png"]),
    ("one image is text", SOUP_EVAL, content("hello", "photos", "blue", "0.png"), ["0.png"]),
    ("one image ends early", SOUP_EVAL, lambda p: os.truncate(p / "photos/blue/0.png", 60), ["0.png"]),
    ("one image is a bomb", SOUP_EVAL, content(b"P5 30000 30000 255\n", "photos", "blue", "9.pgm"), ["9.pgm"]),
    ("a label of another kind", SOUP_EVAL, content('{"file_name": "blue/0.png", "label": [1.5]}\n', "photos", "metadata.jsonl"), ["{photos}"]),
    ("a table of labels is no table", SOUP_EVAL, content(b"\xff\0\xff", "photos", "metadata.csv"), ["{photos}"]),
    ("a table of labels names a file outside", SOUP_EVAL, content('{"file_name": "../a/config.json"}\n', "photos", "metadata.jsonl"), ["{photos}"]),
    ("processor is a list", SOUP_EVAL, both(lambda n, f: content("[]", n, f), "preprocessor_config.json"), ["preprocessor_config.json"]),
    ("processor unknown", SOUP_EVAL, both(fields, "preprocessor_config.json", image_processor_type="NoneSuch"), ["{a}"]),
    ("processor's type is a number", SOUP_EVAL, both(fields, "preprocessor_config.json", image_processor_type=5), ["{a}"]),
    ("processor's size is negative", SOUP_EVAL, both(fields, "preprocessor_config.json", size={"height": -1, "width": -1}), ["{a}"]),
    ("processor's size is text", SOUP_EVAL, both(fields, "preprocessor_config.json", size="large"), ["{a}"]),
    ("processor makes other sizes", SOUP_EVAL, both(fields, "preprocessor_config.json", size={"height": 8, "width": 8}), ["{a}"]),
    ("no processor", SOUP_EVAL, both(removed, "preprocessor_config.json"), ["{a}", "prepared"]),
    # card, inspect and push of what others have written.
    *(
        (f"{command.split()[0]}: {name}", command, change, expected)
        for command in ("card {run}", "inspect {run}", "push {run} user/run")
        for name, change, expected in (
            ("record is a list", content("[]", "run", "wash_run.json"), ["wash_run.json"]),
            ("record is deep", content(DEEP, "run", "wash_run.json"), ["wash_run.json"]),
            ("record is a fifo", fifo("run", "wash_run.json"), ["wash_run.json"]),
            ("record is a device", device("run", "wash_run.json"), ["wash_run.json"]),
            ("config is a fifo", fifo("run", "config.json"), ["config.json"]),
            ("population is a list", fields("run", "wash_run.json", population=[1]), ["wash_run.json", "population"]),
            ("size is text", fields("run", "wash_run.json", population={"size": "many"}), ["wash_run.json", "size"]),
            ("size is 0", fields("run", "wash_run.json", population={"size": 0}), ["wash_run.json", "size"]),
            ("size is -1", fields("run", "wash_run.json", population={"size": -1}), ["wash_run.json", "size"]),
        )
    ),
    *(
        (f"{command.split()[0]}: {name}", command, change, expected)
        for command in ("card {run}", "inspect {run}")
        for name, change, expected in (
            ("architectures are a number", fields("run", "config.json", architectures=5), ["config.json", "architectures"]),
            ("labels are a number", fields("run", "config.json", id2label=5), ["config.json", "id2label"]),
            ("labels are nested", fields("run", "config.json", id2label={"0": [["x"]]}), ["config.json", "id2label"]),
            ("state is a fifo", fifo("run", "trainer_state.json"), ["trainer_state.json"]),
            ("log is a number", fields("run", "trainer_state.json", log_history=7), ["trainer_state.json", "log_history"]),
            ("log holds numbers", fields("run", "trainer_state.json", log_history=[7]), ["trainer_state.json", "log_history"]),
            ("results are a list", content("[1]", "run", "all_results.json"), ["all_results.json"]),
            ("results are a folder", folder("run", "all_results.json"), ["all_results.json"]),
            ("weights are a fifo", fifo("run", "model.safetensors"), ["model.safetensors"]),
            ("overrides are numbers", fields("run", "wash_run.json", population={"overrides": [1, 2]}), ["wash_run.json", "overrides"]),
            ("mixing is null text", fields("run", "wash_run.json", mixing="wash"), ["wash_run.json", "mixing"]),
            ("method is a list", fields("run", "wash_run.json", mixing={"method": ["wash"]}), ["wash_run.json", "method"]),
            ("p is text", fields("run", "wash_run.json", mixing={"shuffle_probability": "half"}), ["wash_run.json", "shuffle_probability"]),
            ("rate is text", fields("run", "wash_run.json", training={"learning_rate": "fast"}), ["wash_run.json", "learning_rate"]),
            ("steps are a list", fields("run", "wash_run.json", training={"steps": [4]}), ["wash_run.json", "steps"]),
            ("seed is text", fields("run", "wash_run.json", training={"seed": "x"}), ["wash_run.json", "seed"]),
            ("versions are a list", fields("run", "wash_run.json", versions=["x"]), ["wash_run.json", "versions"]),
            ("ingredients are a number", fields("run", "wash_run.json", soup={"ingredients": 5}), ["wash_run.json", "ingredients"]),
            ("ingredients are numbers", fields("run", "wash_run.json", soup={"ingredients": [5]}), ["wash_run.json", "ingredients"]),
            ("dataset is a number", fields("run", "wash_run.json", card={"dataset": 5}), ["wash_run.json", "dataset"]),
            ("name is a number", fields("run", "wash_run.json", card={"model_name": 5}), ["wash_run.json", "model_name"]),
            ("tags are numbers", fields("run", "wash_run.json", card={"tags": [1]}), ["wash_run.json", "tags"]),
            ("base model is a list", fields("run", "wash_run.json", card={"finetuned_from": [[1]]}), ["wash_run.json", "finetuned_from"]),
        )
    ),
    *(
        (f"{command} nowhere", f"{command} {{place}}/nowhere{' user/x' * (command == 'push')}", None, ["{place}/nowhere"])
        for command in ("card", "inspect", "push")
    ),
    *(
        (f"{command} a file", f"{command} {{a}}/config.json{' user/x' * (command == 'push')}", None, ["config.json"])
        for command in ("card", "inspect", "push")
    ),
    *(
        (f"{command} escapes", [command, ESCAPES, *["user/x"] * (command == "push")], None, ["\\x1b[31mred"])
        for command in ("card", "inspect", "push")
    ),
    ("inspect a checkpoint without a manifest", "inspect {run}/checkpoint-7", lambda p: (p / "run/checkpoint-7").mkdir(), ["checkpoint-7"]),
    ("inspect a manifest that is a fifo", "inspect {run}/checkpoint-2", fifo("run", "checkpoint-2", "population.json"), ["population.json"]),
    ("inspect a member that is a fifo", "inspect {run}", fifo("run", "checkpoint-2", "member_0", "model.safetensors"), ["model.safetensors"]),
    ("card: card is a fifo", "card {run}", fifo("run", "README.md"), ["README.md"]),
    ("card: card is a folder", "card {run}", folder("run", "README.md"), ["README.md"]),
    ("pictures are a file", "card {run}", each(lambda p: shutil.rmtree(p / "run/pictures"), content("", "run", "pictures")), ["pictures"]),
    ("picture is a fifo", "card {run}", fifo("run", "pictures", "accuracy.png"), ["accuracy.png"]),
    ("push a size of 10^9", "push {run} user/run --members", fields("run", "wash_run.json", population={"size": 10**9}), ["member_2"]),
    ("push a member that is a fifo", "push {run} user/run --members", fifo("run", "_members", "member_0", "model.safetensors"), ["model.safetensors"]),
    ("card for escapes", ["card", "{run}", "--repo", ESCAPES], None, ["\\x1b[31mred"]),
    ("card for a path", ["card", "{run}", "--repo", "../../etc"], None, ["../../etc"]),
    ("card for code", ["card", "{run}", "--repo", 'a/b"); import os'], None, ["import os"]),
    ("push nothing", ["push", "{run}", ""], None, ["repository"]),
    ("push to a path", ["push", "{run}", "../../etc"], None, ["../../etc"]),
    ("push to escapes", ["push", "{run}", ESCAPES], None, ["\\x1b[31mred"]),
    ("push offline", "push {run} user/run", None, ["offline"]),
]  # fmt: skip


@cased(REFUSED)
def test_it_is_refused_in_one_line_and_nothing_is_changed(command, change, expected, place, capfd, monkeypatch):
    monkeypatch.chdir(place)
    if change is not None:
        change(place)
    before = everything_in(place)
    code = run_command(command, place)
    out, err = capfd.readouterr()
    *remarks, line = err.rstrip("\n").split("\n")
    assert code == 2, (out, err)
    assert line.startswith("hf-wash: error: ") and all(remark.startswith("hf-wash: ") for remark in remarks), err
    assert len(line) < 2500 and is_clean(err) and is_clean(out), (out, err)
    for text in expected:
        assert text.format(place=place, out=place / "out", photos=place / "photos", run=place / "run", **{
            name: place / name for name in ("a", "b", "timm_b", "adapter_a", "adapter_b", "timm_a")
        }) in line, line  # fmt: skip
    assert everything_in(place) == before


def test_two_soups_of_one_name_do_not_get_into_each_others_way(place, monkeypatch, capfd):
    from hf_wash.cli import soup

    write, codes = soup._write, []

    def write_while_another_does(*arguments):
        monkeypatch.setattr(soup, "_write", write)
        codes.append(run_command("soup {b} --out {out}", place))
        return write(*arguments)

    monkeypatch.setattr(soup, "_write", write_while_another_does)
    codes.append(run_command("soup {a} --out {out}", place))
    err = capfd.readouterr().err
    assert codes == [0, 2] and "meanwhile" in err
    # That of the first to be ready, whole.
    assert (place / "out/model.safetensors").read_bytes() == (place / "b/model.safetensors").read_bytes()
    assert not list(place.glob("_hf-wash-*"))


@pytest.mark.parametrize("command", ["inspect nowhere", "card nowhere", "push nowhere user/it"])
def test_a_folder_that_is_not_there_is_told_at_once(command, tmp_path):
    code = (
        "import sys; from hf_wash.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *command.split()], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (2, "[]"), done.stderr
    assert done.stderr == "hf-wash: error: There is no folder nowhere.\n"


def test_a_defect_of_ours_is_one_line_too_and_says_where_it_is(place, monkeypatch, capfd):
    from hf_wash.hub import card

    monkeypatch.setattr(card, "count_values", lambda folder: {}["no such\x1b[31m"])
    assert run_command("card {a}", place) == 1
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and is_clean(err)
    assert "KeyError" in err and "hub/card.py, line " in err


def test_what_the_average_refuses_is_one_line(place, monkeypatch, capfd):
    from hf_wash import soup

    def refuse(members):
        raise ValueError(f"Member 1 ({members[1]}) holds NaN,\nand so would the soup: {ESCAPES}")

    monkeypatch.setattr(soup, "uniform_soup", refuse)
    before = everything_in(place)
    assert run_command(SOUP, place) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and is_clean(err) and "holds NaN, and so would the soup" in err
    assert everything_in(place) == before


@pytest.mark.timeout(120)  # it starts a process, which has 100 s
def test_warnings_of_libraries_do_not_stand_beside_the_line(place):
    fields("adapter_b", "adapter_config.json", peft_type="IA3")(place)
    models = [str(place / name) for name in ("adapter_a", "adapter_b")]
    command = [sys.executable, "-m", "hf_wash.cli", "soup", *models, "--out", str(place / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "peft_type" in done.stderr, done.stderr
