"""`examples/sft_population.py`: a population of language models, and of adapters over one of its soups."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("trl")

SCRIPT = Path(__file__).parents[2] / "examples" / "sft_population.py"
A_FEW_STEPS = (
    *("--population_size", "2", "--max_steps", "4", "--per_device_train_batch_size", "4"),
    *("--max_train_samples", "64", "--max_eval_samples", "16", "--use_cpu", "--disable_tqdm", "True"),
)


@pytest.fixture(scope="module")
def sft():
    """The script, imported."""
    spec = importlib.util.spec_from_file_location("sft_population", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # Before it runs: its dataclasses look their module up by name.
    sys.modules["sft_population"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run_here(sft, tmp_path_factory):
    """Runs the script in this process; returns its output folder and what it printed."""

    def run(*flags):
        folder = tmp_path_factory.mktemp("run")
        printed = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [SCRIPT.name, "--output_dir", str(folder), *A_FEW_STEPS, *flags])
            patch.setattr("builtins.print", lambda *parts, **_: printed.append(" ".join(map(str, parts))))
            sft.main()
        return folder, "\n".join(printed)

    return run


@pytest.fixture(scope="module")
def small_run(run_here):
    return run_here()


def check_run(folder, printed):
    results = json.loads((folder / "all_results.json").read_text())
    assert f"soup          {results['eval_loss']:>10.4f}" in printed
    assert f"members' mean {results['eval_members_loss_mean']:>10.4f}" in printed
    assert "Loaded with AutoModelForCausalLM, it says:\n\n  In winter" in printed
    assert sorted(path.name for path in (folder / "_members").iterdir()) == ["member_0", "member_1"]


def test_small_models_learn_the_scripts_own_sentences(small_run):
    folder, printed = small_run
    check_run(folder, printed)
    assert (folder / "tokenizer.json").is_file() and (folder / "model.safetensors").is_file()


def test_adapters_over_one_model(small_run, run_here):
    folder, printed = run_here("--model_name_or_path", str(small_run[0]), "--lora_rank", "2")
    check_run(folder, printed)
    assert (folder / "adapter_config.json").is_file() and not (folder / "model.safetensors").exists()


def test_a_folder_of_texts(run_here, tmp_path):
    lines = [json.dumps({"text": f"{name} is here"}) for name in ("Ann", "Bo", "Cy", "Di", "Ed", "Flo")]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    check_run(*run_here("--dataset_name", str(tmp_path)))


def test_the_sentences_are_the_same_each_time_and_few(sft):
    sentences = sft.write_sentences()
    assert sentences == sft.write_sentences() and len(set(sentences)) == len(sentences) == 720
    assert all(len(sentence.split()) < 20 for sentence in sentences)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_rank", "2"], "--lora_rank needs --model_name_or_path"),
        (["--lora_rank", "0", "--model_name_or_path", "x"], "--lora_rank must be at least 1, found 0."),
        (["--dataset_config_name", "x"], "--dataset_config_name goes with --dataset_name"),
        (["--max_eval_samples", "0"], "--max_eval_samples must be at least 1"),
        (["--eval_split", "test"], "--eval_split test: there is no such split. There are: train."),
        (["--dataset_name", "nowhere/to/be/found"], "Could not load 'nowhere/to/be/found'"),
        (["--model_name_or_path", "nowhere/to/be/found"], "Could not load 'nowhere/to/be/found'"),
        (["--resume_from_checkpoint", "nowhere"], "Cannot resume: there is no folder `nowhere`"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(sft, monkeypatch, tmp_path, flags, message):
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--output_dir", str(tmp_path), *A_FEW_STEPS, *flags])
    with pytest.raises(SystemExit) as ended:
        sft.main()
    assert message in str(ended.value.code) and "\n" not in str(ended.value.code)


def test_it_says_what_to_install_where_trl_is_missing(tmp_path):
    blocked = (
        f"import sys, runpy; sys.modules['trl'] = None; sys.path.insert(0, {str(SCRIPT.parent)!r}); "
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].endswith('TRL, which is missing: pip install "hf-wash[trl]".')


@pytest.mark.distributed
def test_two_processes_train_two_members(launch, small_run, tmp_path):
    run = launch(SCRIPT, "--output_dir", tmp_path / "run", *A_FEW_STEPS)
    check_run(tmp_path / "run", run.stdout)
    assert run.stdout.count("members' mean") == 1
    # However many processes there are.
    table = [line for line in small_run[1].splitlines() if line.startswith(("members' mean", "soup"))]
    assert all(line in run.stdout for line in table)


def test_a_dry_run_says_what_the_run_costs_and_stops(run_here, small_run):
    folder, printed = run_here("--dry_run")
    assert list(folder.iterdir()) == []
    assert "2 members × 4 steps of 4 samples, 1 process" in printed
    assert "loaded back by transformers" in printed
    adapted, printed = run_here("--dry_run", "--model_name_or_path", str(small_run[0]), "--lora_rank", "2")
    assert list(adapted.iterdir()) == []
    assert "loaded back by peft" in printed and "Nothing was trained" in printed
