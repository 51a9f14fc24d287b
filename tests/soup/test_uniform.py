"""What `uniform_soup` promises: exact means, whatever the members come as, and one clear sentence when they differ."""

import json
import shutil
import subprocess
import sys
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import hf_wash.soup
from hf_wash.soup import uniform_soup


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))


def make_models(count: int) -> list[nn.Module]:
    models = [make_model(seed) for seed in range(count)]
    for model in models:
        for _ in range(1 + count):
            model(torch.randn(4, 3, 8, 8))
    return models


def save(folder, state_dict, name="model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in state_dict.items()}, folder / name)
    return folder


def same(first, second):
    return list(first) == list(second) and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first
    )


class Tied(nn.Module):
    def __init__(self, seed, tied=True):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


floats = st.floats(min_value=-1e4, max_value=1e4, width=32)


@given(st.lists(st.lists(floats, min_size=3, max_size=3), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_mean_is_the_exact_mean_rounded_once(rows):
    members = [{"weight": torch.tensor(row, dtype=torch.float32)} for row in rows]
    soup = uniform_soup(members)["weight"]
    for column in range(3):
        exact = sum(Fraction(float(member["weight"][column])) for member in members) / len(members)
        # float64 keeps 29 more bits than the result has, so that only the last rounding shows.
        assert abs(Fraction(float(soup[column])) - exact) <= Fraction(2) ** -24 * abs(exact) * (
            1 + Fraction(2) ** -20
        ) + (Fraction(2) ** -36)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sum_is_kept_in_float64_in_the_order_given_and_the_dtype_restored(dtype):
    torch.manual_seed(0)
    members = [{"weight": torch.randn(1000).to(dtype)} for _ in range(7)]
    total = members[0]["weight"].double()
    for member in members[1:]:
        total = total + member["weight"].double()
    soup = uniform_soup(members)["weight"]
    assert soup.dtype == dtype
    assert torch.equal(soup, (total / 7).to(dtype))


def test_complex_weights_keep_their_imaginary_part():
    soup = uniform_soup([{"weight": torch.tensor([1 + 4j])}, {"weight": torch.tensor([3 - 2j])}])
    assert torch.equal(soup["weight"], torch.tensor([2 + 1j]))


def test_integer_and_boolean_buffers_are_the_first_members():
    first = {"count": torch.tensor(7), "mask": torch.tensor([True, False])}
    other = {"count": torch.tensor(9), "mask": torch.tensor([True, True])}
    for members in ([first, other], iter([first, other])):
        soup = uniform_soup(members)
        assert soup["count"] == 7 and soup["count"].dtype == torch.int64
        assert soup["mask"].tolist() == [True, False]


def test_modules_state_dicts_files_and_generators_give_the_same_bits(tmp_path):
    models = make_models(5)
    expected = uniform_soup(models)
    paths = [save(tmp_path / f"member_{i}", model.state_dict()) for i, model in enumerate(models)]
    assert same(expected, uniform_soup([model.state_dict() for model in models]))
    assert same(expected, uniform_soup(model for model in models))
    assert same(expected, uniform_soup(nn.ModuleList(models)))
    for members in (paths, [str(path / "model.safetensors") for path in paths], iter(paths), [models[0], *paths[1:]]):
        soup = uniform_soup(members)
        assert soup.keys() == expected.keys()
        assert all(torch.equal(soup[name], expected[name]) for name in expected)


def test_soup_loads_into_the_model_and_shares_no_memory_with_the_members():
    models = make_models(3)
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    for members in (models, models[:1], iter(models)):
        soup = uniform_soup(members)
        make_model(9).load_state_dict(soup)
        for value in soup.values():
            value.zero_()
    assert all(same(model.state_dict(), old) for model, old in zip(models, before, strict=True))


def test_soup_of_one_is_that_member(tmp_path):
    (model,) = make_models(1)
    assert same(uniform_soup([model]), model.state_dict())
    assert same(uniform_soup(iter([model])), model.state_dict())


@pytest.mark.parametrize("as_stream", [False, True])
def test_tied_tensors_are_averaged_once_and_stay_tied(as_stream):
    members = [Tied(0), Tied(1), Tied(2)]
    soup = uniform_soup(iter(members) if as_stream else members)
    assert soup["embedding.weight"] is soup["head.weight"]
    expected = sum(member.head.weight.detach().double() for member in members) / 3
    assert torch.equal(soup["head.weight"], expected.float())


@pytest.mark.parametrize("untied", [0, 1, 2])
@pytest.mark.parametrize("as_stream", [False, True])
def test_tensors_tied_in_some_members_only_are_averaged_apart(untied, as_stream):
    members = [Tied(seed, tied=seed != untied) for seed in range(3)]
    soup = uniform_soup(iter(members) if as_stream else members)
    assert soup["embedding.weight"].data_ptr() != soup["head.weight"].data_ptr()
    for name in ("embedding.weight", "head.weight"):
        expected = sum(member.state_dict()[name].double() for member in members) / 3
        assert torch.equal(soup[name], expected.float()), name


def test_a_generator_is_never_more_than_one_member_ahead():
    alive = []

    class Watched(OrderedDict):
        def __del__(self):
            alive.remove(id(self))

    def draw():
        for seed in range(6):
            assert len(alive) <= 1, "an earlier member is still held while the next one is drawn"
            member = Watched(weight=torch.full((10,), float(seed)))
            alive.append(id(member))
            yield member
            del member

    assert torch.equal(uniform_soup(draw())["weight"], torch.full((10,), 2.5))


def test_sharded_and_adapter_folders_are_read(tmp_path):
    state = {f"layer.{i}": torch.randn(4) for i in range(6)}
    other = {name: value + 1 for name, value in state.items()}
    sharded = tmp_path / "sharded"
    parts = [dict(list(state.items())[:3]), dict(list(state.items())[3:])]
    index = {}
    for number, part in enumerate(parts, 1):
        name = f"model-0000{number}-of-00002.safetensors"
        save(sharded, part, name)
        index.update(dict.fromkeys(part, name))
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    adapter = save(tmp_path / "adapter", other, "adapter_model.safetensors")
    soup = uniform_soup([sharded, adapter])
    assert all(torch.equal(soup[name], uniform_soup([state, other])[name]) for name in state)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_large_tensors_are_averaged_in_blocks_to_the_same_bits(layout, monkeypatch, tmp_path):
    torch.manual_seed(0)
    members = [{"weight": torch.randn(7, 5, 3, 2).contiguous(memory_format=layout)} for _ in range(3)]
    paths = [save(tmp_path / str(index), member) for index, member in enumerate(members)]
    whole = uniform_soup(members)["weight"]
    monkeypatch.setattr("hf_wash.soup.uniform.BLOCK", 65)  # two rows of 30 at a time, and one at the end
    assert torch.equal(uniform_soup(members)["weight"], whole)
    assert torch.equal(uniform_soup(paths)["weight"], whole)
    monkeypatch.setattr("hf_wash.soup.uniform.BLOCK", 1)
    assert torch.equal(uniform_soup(paths)["weight"], whole)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [[], (), iter(())])
def test_an_empty_list_is_refused(members):
    with pytest.raises(ValueError, match="at least one member"):
        uniform_soup(members)


@pytest.mark.parametrize(
    "member", ["folder", {"weight": torch.zeros(1)}, nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))]
)
def test_one_model_in_place_of_a_list_is_refused(member):
    with pytest.raises(ValueError, match="pass a list of them"):
        uniform_soup(member)


def test_what_is_no_model_is_refused_with_its_place():
    with pytest.raises(ValueError, match="Member 1 is a int"):
        uniform_soup([{"weight": torch.zeros(1)}, 3])


REFERENCE = {"first": torch.zeros(2, 3), "second": torch.zeros(4), "third": torch.zeros(5)}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"second": None}, r"'second' is missing in member 2"),
        ({"fourth": torch.zeros(1)}, r"'fourth' is missing in member 0"),
        (
            {"second": torch.zeros(5), "third": torch.zeros(6)},
            r"'second' has shape \(5,\) in member 2 and \(4,\) in member 0",
        ),
        (
            {"second": torch.zeros(4, dtype=torch.float64)},
            r"'second' has dtype torch.float64 in member 2 and torch.float32 in member 0",
        ),
    ],
)
@pytest.mark.parametrize("form", ["state dicts", "generator", "files"])
def test_members_that_differ_are_refused_and_the_first_difference_named(change, message, form, tmp_path):
    odd = {name: value for name, value in {**REFERENCE, **change}.items() if value is not None}
    members = [REFERENCE, dict(REFERENCE), odd]
    if form == "files":
        members = [save(tmp_path / str(index), member) for index, member in enumerate(members)]
        message = message.replace("in member 2", r"in member 2 \(.*\)").replace("in member 0", r"in member 0 \(.*\)")
    with pytest.raises(ValueError, match=message):
        uniform_soup(iter(members) if form == "generator" else members)


def test_a_folder_with_only_a_pickle_is_refused_with_the_reason(tmp_path):
    torch.save(REFERENCE, tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(ValueError, match=r"pickle only \(pytorch_model.bin\).*can run any code"):
            uniform_soup([path])


def test_paths_that_lead_nowhere_are_told_apart(tmp_path):
    with pytest.raises(ValueError, match="There is no folder or file"):
        uniform_soup([tmp_path / "missing"])
    with pytest.raises(ValueError, match="holds no weights"):
        uniform_soup([tmp_path])
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        uniform_soup([tmp_path])
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(ValueError, match=r"lists model-1.safetensors, which is not there"):
        uniform_soup([tmp_path])


def test_a_member_without_values_is_refused():
    with torch.device("meta"):
        member = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'weight' of member 0 is on the meta device"):
        uniform_soup([member])


# --- what it takes ----------------------------------------------------------------------------------------------------

# Peak of anonymous memory (RssAnon) while the soup is made, sampled every millisecond: what the process itself
# allocated. Pages of a mapped file count for nothing, since the kernel takes them back when it needs them; RSS with
# them is printed beside it.
MEASURE = """
import os, sys, threading, time, types
import torch
package = types.ModuleType("hf_wash"); package.__path__ = [sys.argv[1]]; sys.modules["hf_wash"] = package
from hf_wash.soup import greedy_soup, uniform_soup
torch.set_num_threads(1)
how, paths = sys.argv[2], sys.argv[3:]

def resident():
    fields = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Rss"))
    anonymous = int(fields["RssAnon"].split()[0]); mapped = int(fields["RssFile"].split()[0])
    return anonymous, anonymous + mapped

uniform_soup([{"weight": torch.zeros(4)}])
before, peak, running = resident(), [0, 0], True
def watch():
    while running:
        for place, value in enumerate(resident()):
            peak[place] = max(peak[place], value)
        time.sleep(0.001)
watcher = threading.Thread(target=watch); watcher.start()
if how == "uniform":
    soup = uniform_soup(paths)
else:
    # Rising scores: every member joins, the worst case.
    scores = iter(range(10 ** 6))
    soup, record = greedy_soup(paths, lambda state_dict: float(next(scores)))
    assert len(record.indices) == len(paths), record
running = False; watcher.join()
print((peak[0] - before[0]) * 1024, (peak[1] - before[1]) * 1024)
assert not {"transformers", "timm", "peft", "accelerate"} & sys.modules.keys()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("how", ["uniform", "greedy"])
def test_soup_of_20_members_on_disk_takes_the_memory_of_two(how, tmp_path):
    # Three quarters of the weights in one tensor, as in VGG.
    shapes = {"features.0": (1024, 1024), "features.1": (1024, 1024), "classifier": (1024, 6144)}
    model_bytes = sum(4 * rows * columns for rows, columns in shapes.values())
    count = 20 if how == "uniform" else 5
    paths = [
        save(tmp_path / f"member_{i}", {name: torch.full(shape, float(i)) for name, shape in shapes.items()})
        for i in range(count)
    ]
    package = Path(hf_wash.soup.__file__).parents[1]
    command = [sys.executable, "-c", MEASURE, str(package), how, *map(str, paths)]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    for path in paths:
        shutil.rmtree(path)  # not to be left behind by the hundred megabytes
    assert completed.returncode == 0, completed.stderr
    anonymous, resident = (int(value) / model_bytes for value in completed.stdout.split())
    print(f"{how} soup of {count}: {anonymous:.2f} models, {resident:.2f} with the pages of mapped files")
    # Greedy makes one mean after the other, and the allocator keeps the room of the last a while.
    assert anonymous <= (2 if how == "uniform" else 2.5)
    assert resident <= 3
