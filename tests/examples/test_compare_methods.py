"""`examples/compare_methods.py` and what it is made of: cells that resume, tables and picture, choices, the page."""

import collections
import json
import re
import shutil
import time
from pathlib import Path

import compare_methods
import numpy as np
import psutil
import pytest
import results_page
import study
import tune_methods
from comparison import tables
from comparison.cell import Cell, run
from comparison.data import Collator, held_out_indices, prepare
from comparison.measure import hits
from comparison.methods import BUDGETS, for_budget, free_trials, rows, trials
from comparison.models import make_model
from comparison.page import page
from comparison.record import RESULTS, commit, run_of
from comparison.runner import Runner, processes
from comparison.setting import PRESETS, Setting
from comparison.studies import STUDIES, cells_of_study, conclusion, tables_of
from PIL import Image as PilImage


TIMES = ("seconds_per_step", "mixing_seconds_per_step")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Images of two classes, told apart by their colours, among noise."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    draw = np.random.default_rng(0)
    for split, count in (("train", 80), ("test", 11)):
        for index, name in enumerate(("red", "green")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 200, (32, 32, 3), dtype=np.uint8)
                pixels[..., index] += 50
                PilImage.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


def setting_of(photos: Path, **changes) -> Setting:
    settings = {"steps": 6, "batch_size": 8, "hold_out": 0.1, "batch_norm_batches": 2, "population_size": 2}
    return Setting("photos", data_dir=str(photos), model="small", view="crop_flip", **{**settings, **changes})


def wash(**options):
    return {"mixing": "wash", "shuffle_probability": 0.2, **options}


PLAIN = {"mixing": "independent", "population_size": 1}


def without_times(result: dict) -> dict:
    return {name: value for name, value in result.items() if name not in TIMES}


# ---- End to end --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def small_preset():
    """The preset of the command lines below, with batches and BatchNorm estimates of a test's size."""
    with pytest.MonkeyPatch.context() as patch:
        changed = PRESETS["glyphs-short"].but(batch_size=8, batch_norm_batches=2)
        patch.setitem(PRESETS, "glyphs-short", changed)
        yield


@pytest.fixture(scope="module")
def compared(photos, tmp_path_factory):
    """A comparison of three rows, as the command line makes it."""
    folder = tmp_path_factory.mktemp("compared")
    arguments = ["--data_dir", str(photos), "--methods", "wash", "plain", "--kinds", "budgets", "--budgets", "0.02"]
    arguments += ["--seeds", "2", "--max_steps", "3", "--population_size", "2", "--output_dir", str(folder)]
    arguments += ["--record", str(folder / "records" / "short.json"), "--jobs", "2"]
    assert compare_methods.main(arguments) == 0
    return folder, arguments


def test_a_comparison_has_a_row_for_each_method_and_a_cell_for_each_seed(compared):
    folder, _ = compared
    kept = json.loads((folder / "results.json").read_text())
    assert [(cell["label"], cell["seed"]) for cell in kept["cells"]] == [
        (label, seed) for seed in (0, 1) for label in ("wash@0.02", "plain-N-times", "plain-once")
    ]
    assert [cell["steps"] for cell in kept["cells"][:3]] == [3, 6, 3]
    assert kept["command"].startswith("python examples/") and str(folder) not in kept["command"]
    assert kept == json.loads((folder / "records" / "short.json").read_text())


def test_every_model_of_a_cell_is_measured_and_the_bytes_are_those_of_the_budget(compared):
    kept = json.loads((compared[0] / "results.json").read_text())
    population, plain = kept["cells"][:2]
    assert set(population["accuracy"]) == {"members", "ensemble", "soup", "greedy"}
    assert len(population["accuracy"]["members"]) == 2 and population["greedy_members"]
    assert set(plain["accuracy"]) == {"members", "soup", "ema"} and plain["ema_span"] in (0.01, 0.05, 0.2)
    assert population["test_size"] == 22
    # Shuffled at the first two of three steps.
    assert population["copies_per_step"] == pytest.approx(0.02 * (2 / 3) / 0.75, rel=0.1)
    assert population["bytes_per_step"] == pytest.approx(
        population["copies_per_step"] * population["parameters"] * 4, rel=1e-3
    )
    assert plain["bytes_per_step"] == 0


def test_the_table_is_written_as_markdown_csv_and_picture(compared):
    folder, _ = compared
    table = (folder / "table.md").read_text().splitlines()
    assert "averaged model, %" in table[0] and "kB sent a step" in table[0]
    titles = [line.split("|")[1].strip() for line in table[2:]]
    assert titles[0].startswith("WASH, at 0.02 copies") and "±" in table[2]
    assert titles[1:] == ["one model, 2 × the steps", "one model, 2 × the steps, its EMA", "one model",
                          "one model, its EMA"]  # fmt: skip
    lines = (folder / "table.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 5 and lines[0].startswith("label,title,seed,members,ensemble,soup,greedy")
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_cell_is_not_run_again(compared, capsys):
    folder, arguments = compared
    before = {path: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}
    assert compare_methods.main(arguments) == 0
    assert "6 cells, 0 of them to run" in capsys.readouterr().out
    assert len(before) == 6
    assert {path: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")} == before


def test_cells_of_a_record_are_not_run_again_in_another_folder(compared, tmp_path, capsys):
    first, arguments = compared
    kept = json.loads((first / "results.json").read_text())
    # What was recorded elsewhere of another setting of the same row is no answer.
    kept["cells"][0]["options"]["shuffle_stop"] = 0.5
    kept |= {"machine": "another machine", "commit": "0000000"}
    for cell in kept["cells"]:
        del cell["machine"], cell["commit"]
    (tmp_path / "record.json").write_text(json.dumps(kept))
    folder = tmp_path / "elsewhere"
    moved = [str(folder) if word == str(first) else word for word in arguments]
    assert compare_methods.main([*moved, "--record", str(tmp_path / "record.json")]) == 0
    said = capsys.readouterr().out
    assert "5 finished cells are taken from" in said and "6 cells, 1 of them to run" in said
    found = json.loads((tmp_path / "record.json").read_text())
    assert [cell["digest"] for cell in found["cells"] if "digest" in cell] == [
        cell["digest"] for cell in json.loads((first / "results.json").read_text())["cells"] if "digest" in cell
    ]
    assert found["machine"].endswith("and another machine") and found["cells"][1]["machine"] == "another machine"
    assert found["commit"] == f"{commit()}, 0000000"
    # What nobody asks for stays in the record.
    folder = tmp_path / "third"
    few = ["0.03" if word == "0.02" else word for word in arguments]
    few = [str(folder) if word == str(first) else word for word in few]
    assert compare_methods.main([*few, "--record", str(tmp_path / "record.json")]) == 0
    more = json.loads((tmp_path / "record.json").read_text())
    assert [cell["label"] for cell in more["cells"][:4]] == ["wash@0.02", "wash@0.03", "plain-N-times", "plain-once"]
    assert len(more["cells"]) == 8 and more["command"].endswith("# and earlier calls with other rows or seeds")


def test_a_record_of_something_else_is_not_written_over(compared, tmp_path):
    folder, arguments = compared
    kept = json.loads((folder / "results.json").read_text())
    other = {**kept, "setting": {**kept["setting"], "width": 5}}
    for changed, said in (
        (other, "differ in width"),
        ({**kept, "kind": "study"}, "the record of a study"),
        ([], "no record"),
    ):
        path = tmp_path / "record.json"
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=said):
            compare_methods.main([*arguments, "--record", str(path)])
        assert json.loads(path.read_text()) == changed
    # Nor is it taken for a tuning.
    with pytest.raises(ValueError, match="is no record of a tuning"):
        compare_methods.main([*arguments, "--tuning", str(path)])
    with pytest.raises(ValueError, match=r"--tuning nowhere\.json: there is no such file"):
        compare_methods.main([*arguments, "--tuning", "nowhere.json"])


def test_another_call_with_other_methods_adds_to_the_tables(compared, tmp_path, capsys):
    first, arguments = compared
    folder = tmp_path / "copy"
    shutil.copytree(first, folder)
    # A cell of another setting and one that is not finished are none of the comparison's.
    spec = json.loads((folder / "cells" / "plain-once-seed1" / "cell.json").read_text())
    spec["setting"]["width"] += 1
    (folder / "cells" / "plain-once-seed1" / "cell.json").write_text(json.dumps(spec))
    (folder / "cells" / "plain-N-times-seed1.json").unlink()
    earlier = folder / "cells" / "plain-N-times-seed0.json"
    earlier.write_text(json.dumps({**json.loads(earlier.read_text()), "commit": "0000000"}))
    other = [*arguments[:2], "--methods", "wash", *arguments[5:]]
    other[other.index("--output_dir") + 1] = str(folder)
    assert compare_methods.main([*other, "--seeds", "1", "--record", str(tmp_path / "record.json")]) == 0
    kept = json.loads((folder / "results.json").read_text())
    assert [(cell["label"], cell["seed"]) for cell in kept["cells"]] == [
        ("wash@0.02", 0), ("plain-N-times", 0), ("plain-once", 0), ("wash@0.02", 1),
    ]  # fmt: skip
    assert kept["command"].endswith("# and earlier calls with other rows or seeds")
    assert kept["commit"] == f"{commit()}, 0000000"
    assert [cell["commit"] for cell in kept["cells"][:2]] == [commit(), "0000000"]
    assert "one model, 2 × the steps" in (folder / "table.md").read_text()
    said = capsys.readouterr().out
    assert (
        "of all 4 finished cells" in said
        and "3 of them are of earlier calls" in said
        and "Left out: 1 finished" in said
    )


def test_another_call_tunes_another_method_and_what_was_chosen_before_stays(photos, tmp_path):
    arguments = ["--data_dir", str(photos), "--max_steps", "4", "--population_size", "2", "--jobs", "2"]
    path = tmp_path / "record.json"
    kept = []
    for method, budget, seeds in (("diloco", "0.5", "1"), ("sparta", "0.25", "2")):
        # Another folder: what was found before is in the record alone.
        given = ["--methods", method, "--budgets", budget, "--seeds", seeds, "--output_dir", str(tmp_path / method)]
        assert tune_methods.main([*arguments, *given, "--record", str(path)]) == 0
        kept.append(json.loads(path.read_text()))
    assert sorted(kept[0]["chosen"]) == ["diloco-tuned", "diloco@0.5"] and len(kept[0]["cells"]) == 9
    assert sorted(kept[1]["chosen"]) == ["diloco-tuned", "diloco@0.5", "sparta-tuned"] and len(kept[1]["cells"]) == 21
    assert kept[0]["chosen"].items() < kept[1]["chosen"].items()
    assert kept[1]["command"].endswith("# and earlier calls with other rows or seeds")
    # On one's own data it goes to the folder of the outputs, where a comparison can be told to find it.
    folder = tmp_path / "own"
    assert tune_methods.main([*arguments, "--methods", "sparta", "--output_dir", str(folder)]) == 0
    assert list(json.loads((folder / "tuning.json").read_text())["chosen"]) == ["sparta-tuned"]
    compared = ["--kinds", "tuned", "--methods", "sparta", "--seeds", "1", "--output_dir", str(tmp_path / "compared")]
    assert compare_methods.main([*arguments, *compared, "--tuning", str(folder / "tuning.json")]) == 0
    assert "SPARTA, tuned" in (tmp_path / "compared" / "table.md").read_text()


def test_a_cell_of_another_setting_is_not_taken_for_this_one(compared, tmp_path):
    _, arguments = compared
    changed = ["4" if word == "3" and arguments[index - 1] == "--max_steps" else word
               for index, word in enumerate(arguments)]  # fmt: skip
    with pytest.raises(ValueError, match=r"wash@0.02-seed0 .* was run with another setting"):
        compare_methods.main([*changed, "--record", str(tmp_path / "record.json")])


def test_a_page_is_made_of_the_records_and_says_what_they_cannot_tell(compared, tmp_path):
    records = tmp_path / "results"
    records.mkdir()
    shutil.copy(RESULTS / "finetuning.md", records)
    shutil.copy(compared[0] / "results.json", records / "short.json")
    (records / "hurry.md").write_text("Train one model longer ({glyphs-short, 2 members plain-N-times soup} %).\n")
    assert results_page.main([], records) == 0
    made = (tmp_path / "results.md").read_text()
    said = re.search(r"Train one model longer \((\S+ ± \S+) %\)", made)
    (row,) = [line for line in made.splitlines() if line.startswith("| one model, 2 × the steps |")]
    assert said.end() < made.index("## glyphs-short") and f"| {said[1]} |" in row
    assert "| WASH, at 0.02 copies" in made and "pairs of rows" in made and "python examples/" in made
    assert "## Fine-tuning: a population against one long fine-tune" in made
    assert (records / "glyphs-short-2-members.png").exists()
    assert results_page.main(["--check"], records) == 0
    kept = json.loads((records / "short.json").read_text())
    (records / "short.json").write_text(json.dumps({**kept, "steps": 4}))
    assert results_page.main(["--check"], records) == 1


def test_the_page_on_results_is_what_the_records_say():
    assert RESULTS.with_suffix(".md").read_text() == page(RESULTS)


# ---- Killed, failed ----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """In the place of a power cut."""


def test_a_killed_cell_goes_on_from_its_checkpoint_to_the_same_result(photos, tmp_path):
    setting = setting_of(photos, steps=60, checkpoints=5)
    cells = [
        Cell("wash", "wash", wash(), 0, 60, setting),
        Cell("once", "plain", PLAIN, 0, 120, setting),
        Cell("ema", "wash_ema", wash(), 0, 60, setting),
    ]

    def kill_after_checkpoints(*_):
        if all(list((runner.folder / cell.name).glob("checkpoint-*")) for cell in cells):
            raise Killed

    runner = Runner(tmp_path / "killed", 3, 0.01)
    runner._show = kill_after_checkpoints
    with pytest.raises(Killed):
        runner.run(cells)
    assert any(runner.result_of(cell) is None for cell in cells), "all had finished before they were killed"
    resumed, failed = Runner(tmp_path / "killed", 2, 0.01).run(cells)
    undisturbed, _ = Runner(tmp_path / "undisturbed", 2, 0.01).run(cells)
    assert not failed
    assert list(map(without_times, resumed)) == list(map(without_times, undisturbed))
    left = [path.name for path in (tmp_path / "killed" / "cells" / "wash-seed0").iterdir()]
    assert left == ["cell.json"], "checkpoints of a finished cell take space"


def test_cells_end_with_the_script_that_started_them(photos, tmp_path):
    arguments = ["--data_dir", str(photos), "--methods", "wash", "--kinds", "default", "--seeds", "1", "--jobs", "1"]
    script = processes().Process(
        target=compare_methods.main, args=([*arguments, "--max_steps", "9999", "--output_dir", str(tmp_path)],)
    )
    script.start()
    try:
        progress = tmp_path / "cells" / "wash-default-seed0" / "progress"
        while not progress.exists():
            assert script.is_alive()
            time.sleep(0.2)
        begun = psutil.Process(script.pid).children(recursive=True)
    finally:
        script.kill()
    _, alive = psutil.wait_procs(begun, timeout=120)
    assert begun and not alive


def test_a_cell_that_fails_is_reported_and_the_others_go_on(photos, tmp_path):
    setting = setting_of(photos)
    cells = [
        Cell("broken", "papa", {"mixing": "papa", "average_interval": 9}, 0, 6, setting),
        Cell("fine", "wash", wash(), 0, 6, setting),
    ]
    results, failed = Runner(tmp_path, 1, 0.01).run(cells)
    assert [result["label"] for result in results] == ["fine"]
    assert list(failed) == ["broken-seed0"] and "longer than the run" in failed["broken-seed0"]


def test_two_rows_that_are_one_run_are_run_once(photos, tmp_path):
    setting = setting_of(photos)
    cells = [
        Cell(name, method, {"mixing": method, "average_interval": every}, seed, 6, setting)
        for name, method, every, seed in (
            ("tuned", "local_sgd", 2, 0), ("dart-tuned", "dart", 2, 0), ("budget", "local_sgd", 2, 0),
            ("dart-other", "dart", 3, 0), ("dart-tuned", "dart", 2, 1),
        )
    ]  # fmt: skip
    runner, started = Runner(tmp_path / "together", 2, 0.01), []
    start = runner._start
    runner._start = lambda cell: started.append(cell.name) or start(cell)
    results, failed = runner.run(cells)
    assert started == ["tuned-seed0", "dart-other-seed0", "dart-tuned-seed1"] and not failed
    assert [(result["label"], result["method"], result["options"]) for result in results] == [
        (cell.label, cell.method, cell.options) for cell in cells
    ]
    # What was taken over is what the cell itself would have come to, bit for bit.
    alone, _ = Runner(tmp_path / "alone", 1, 0.01).run(cells[1:2])
    assert without_times(alone[0]) == without_times(results[1]) and "digest" in alone[0]
    # A cell that fails has the result of another that is the same run and does not.
    runner = Runner(tmp_path / "failing", 2, 0.01)
    finish = runner._finish
    runner._finish = lambda one: (None, "lost") if one.cell is cells[0] else finish(one)
    results, failed = runner.run(cells[:2])
    assert not failed and [result["label"] for result in results] == ["tuned", "dart-tuned"]
    # Of what is known a cell takes its own before another's, which was run at another time.
    records = [{**results[0], "seconds_per_step": 1.0}, {**results[1], "seconds_per_step": 2.0}]
    for known in (records, records[::-1], records[:1]):
        runner = Runner(tmp_path / f"adopted-{len(known)}-{known[0]['label']}", 1, 0.01)
        assert runner.adopt(known, cells[:2]) == 2
        seconds = [runner.result_of(cell)["seconds_per_step"] for cell in cells[:2]]
        assert seconds == ([1.0, 2.0] if len(known) == 2 else [1.0, 1.0])
    weights, average = (Cell(name, name, wash(), 0, 6, setting).as_dict() for name in ("wash", "wash_ema"))
    assert run_of(weights) != run_of(average)


def test_a_time_limit_leaves_the_rest_for_another_call(photos, tmp_path, capsys):
    cells = [Cell("later", "wash", wash(), 0, 6, setting_of(photos))]
    assert Runner(tmp_path, 1, 0.01).run(cells, time_limit=0.0) == ([], {})
    assert "1 cells are left" in capsys.readouterr().err


# ---- Cells -------------------------------------------------------------------------------------------------------


def test_heterogeneous_members_train_with_their_own_recipes(photos, tmp_path):
    results = []
    for recipes in ("homogeneous", "heterogeneous"):
        setting = setting_of(photos, recipes=recipes)
        folder = tmp_path / recipes
        folder.mkdir()
        results.append(run(Cell("row", "wash", wash(), 0, 6, setting), folder, prepare(setting, tmp_path)))
    assert results[0]["consensus_distance"] != results[1]["consensus_distance"]


def test_a_tuning_cell_never_sees_the_test_set(photos, tmp_path):
    setting = setting_of(photos, evaluate_on="held_out")
    data = prepare(setting, tmp_path)
    data.test = None
    result = run(Cell("row", "wash", wash(), 0, 6, setting), tmp_path, data)
    assert set(result["held_out"]) == {"members", "ensemble", "soup"} and "accuracy" not in result


def test_held_out_images_are_not_trained_on(photos, tmp_path):
    data = prepare(setting_of(photos), tmp_path)
    assert (len(data.train), len(data.held_out), len(data.test)) == (144, 16, 22)
    chosen, held_out = held_out_indices(60, 0.1)
    assert sorted(chosen + held_out) == list(range(60))
    with pytest.raises(ValueError, match="too few to hold out"):
        held_out_indices(1, 0.02)


def test_a_crop_is_a_part_of_the_padded_image(photos, tmp_path):
    data = prepare(setting_of(photos), tmp_path)
    plain, cropped = Collator(*[data.collate.mean.flatten(), data.collate.std.flatten()]), data.collate
    cropped.view = "crop"
    example = data.train[0]
    raw = example["pixel_values"]
    padded = np.pad(raw.numpy(), ((0, 0), (4, 4), (4, 4)))
    parts = [padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    seen = cropped([example] * 5)["pixel_values"] * cropped.std + cropped.mean
    for image in (255 * seen).round().byte().numpy():
        assert any(np.array_equal(image, part) for part in parts)
    restored = plain([example])["pixel_values"] * plain.std + plain.mean
    assert np.array_equal((255 * restored[0]).round().byte().numpy(), raw.numpy())


# ---- Methods and choices -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return make_model(PRESETS["glyphs-short"], ["a", "b"])


def test_settings_of_a_budget_send_that_many_copies(model):
    from hf_wash.methods import times_of
    from hf_wash.mixing.schedule import expected_values_moved

    parameters = sum(p.numel() for p in model.parameters())
    for budget in (0.01, 0.04, 0.1):
        found = for_budget("wash", budget, model, 3, 700, 61)
        moved = expected_values_moved(model, 3, found["shuffle_probability"]) * found["shuffle_stop"]
        assert moved / parameters == pytest.approx(budget)
        assert for_budget("local_sgd", budget, model, 3, 700, 61)["average_interval"] == round(1 / budget)
        assert for_budget("sparta", budget, model, 3, 700, 61) == {"shuffle_probability": budget}
        papa = for_budget("papa", budget, model, 3, 700, 61)
        sent = times_of("papa", papa["average_interval"], 700, 61).count(700) / 700
        assert sent == pytest.approx(max(budget, 12 / 700), rel=0.2)
    # A run that is shorter than an epoch.
    assert for_budget("papa", 0.1, model, 3, 40, 61)["average_interval"] == 10
    with pytest.raises(ValueError, match="WASH sends at most"):
        for_budget("wash", 0.9, model, 3, 700, 61)


def test_every_method_is_tuned_with_equal_effort():
    assert {len(trials(name, 700)) for name in tune_methods.TUNABLE} == {6}
    for name in tune_methods.TUNABLE:
        assert len({str(options) for options in trials(name, 700)}) == 6
    with pytest.raises(ValueError, match="nothing to tune in 'plain'"):
        trials("plain", 700)


def test_the_free_settings_of_each_budget_are_tuned_with_equal_effort(model):
    found, left_out = tune_methods.rows_of_trials(tune_methods.TUNABLE, list(BUDGETS), 3, 700, 61, model)
    tried = collections.Counter(row.rpartition(".")[0] for row, *_ in found)
    assert not left_out and len({row for row, *_ in found}) == len(found)
    assert {row: n for row, n in tried.items() if "@" in row} == {
        f"{name}@{budget:g}": 3 for name in ("wash", "papa", "diloco") for budget in BUDGETS
    }
    assert [free["shuffle_stop"] for free in free_trials("wash", 0.1, model, 3)] == [0.75, 1.0, 0.6]
    # Of two members fewer weights move, so that a shuffle cannot end as early.
    found, left_out = tune_methods.rows_of_trials(["wash"], [0.1], 2, 700, 61, model)
    stops = [options["shuffle_stop"] for row, _, options, _ in found if "@" in row]
    assert len(found) == 9 and not left_out and min(stops) > 0.75 and len(set(stops)) == 3
    assert all(options["shuffle_probability"] <= 1 for _, _, options, _ in found)
    found, left_out = tune_methods.rows_of_trials(["wash"], [0.2], 2, 700, 61, model)
    assert len(found) == 6 and left_out == ["wash@0.2: it sends at most 0.132 of such a model in a step."]


def test_rows_that_cannot_be_are_left_out_with_the_reason(model):
    setting = PRESETS["glyphs-short"]
    found, left_out = rows(["papa_all", "diloco", "wash"], ["published", "tuned"], [], setting, 40, 61, model, None)
    assert [label for label, *_ in found] == ["wash-published"]
    said = {reason.partition(":")[0]: reason for reason in left_out}
    assert "never in this run of 40 steps" in said["papa_all-published"]
    assert "longer than the run" in said["diloco-published"]
    assert "has not been tuned" in said["wash-tuned"]


def test_the_trial_with_the_best_soup_on_held_out_data_is_chosen():
    def cell(number, options):
        return Cell(f"sparta-tuned.{number}", "sparta", {"mixing": "sparta", **options}, 0, 6, PRESETS["glyphs-short"])

    cells = [cell(number, {"shuffle_probability": p}) for number, p in enumerate((0.1, 0.2, 0.3))]
    results = [
        {**cell.as_dict(), "held_out": {"soup": score}} for cell, score in zip(cells, (0.5, 0.7, 0.7), strict=True)
    ]
    assert tune_methods.chosen_of(results, cells) == {"sparta-tuned": {"shuffle_probability": 0.2}}
    assert tune_methods.chosen_of(results[:2], cells) == {}, "a method that had fewer trials than the others"


def result_with(label, seed, right, method="wash"):
    import torch

    right = torch.tensor(right)
    logits = torch.stack([1 - right, right], dim=1).float()
    return {
        "label": label, "method": method, "seed": seed, "test_size": len(right), "options": {"mixing": method},
        "hits": hits(logits, torch.ones(len(right), dtype=torch.long)),
    }  # fmt: skip


def row_of(label, *each):
    return tables.Row(label, label, "wash", [result_with(label, seed, right) for seed, right in enumerate(each)])


def test_a_difference_is_that_of_the_means_with_an_error_over_seeds_and_images():
    one, other = row_of("one", [1, 1, 1, 0], [1, 1, 0, 0]), row_of("other", [1, 0, 0, 0], [1, 0, 1, 0])
    points, error = tables.difference(one, other)
    assert points == pytest.approx(100 * (5 - 3) / 8)
    # Over seeds: 50 and 0; over images: 0, 100, 0, 0.
    assert error == pytest.approx((1250 / 2 + 2500 / 4) ** 0.5)
    assert "too small a setting to tell them apart" in tables.verdict(one, other)
    assert "fewer than two seeds" in tables.verdict(row_of("one", [1, 0]), row_of("other", [1, 0]))
    better, worse = row_of("one", [1] * 50, [1] * 50), row_of("other", [0] * 50, [0] * 50)
    assert tables.verdict(better, worse) == "one is ahead of other: +100.00 ± 0.00 points."


# ---- Wrong input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (compare_methods, ["--methods", "swarm"], "--methods swarm: there is no such thing"),
        (compare_methods, ["--budgets", "2"], "--budgets must be copies of the model between 0 and 1, found 2"),
        (compare_methods, ["--seeds", "0"], "--seeds must be at least 1, found 0"),
        (compare_methods, ["--jobs", "0"], "--jobs must be at least 1, found 0"),
        (compare_methods, ["--time_limit", "-1"], "--time_limit must be a number of minutes above 0"),
        (compare_methods, ["--data_dir", "nowhere"], "--data_dir must be a folder, and 'nowhere' is none"),
        (compare_methods, ["--data_dir", "a", "--dataset_name", "b"], "both name training data"),
        (tune_methods, ["--methods", "plain"], "--methods plain: there is nothing to tune"),
        (study, ["--studies", "moon"], "--studies moon: there is no such study"),
    ],
)
def test_wrong_input_is_refused_in_a_sentence(script, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        script.main([*arguments, "--output_dir", str(tmp_path)])


# ---- Presets and studies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "classes", "millions"),
    [("cifar100", 100, 11.22), ("cifar100-vgg16", 100, 14.77), ("imagenet", 1000, 25.56)],
)
def test_models_of_the_papers_have_the_papers_sizes(preset, classes, millions):
    made = make_model(PRESETS[preset], [str(index) for index in range(classes)])
    assert sum(p.numel() for p in made.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_presets_are_the_papers_set_ups():
    for name in ("cifar10", "cifar10-vgg16", "cifar100", "cifar100-vgg16"):
        preset = PRESETS[name]
        assert (preset.epochs, preset.batch_size, preset.learning_rate, preset.momentum) == (300, 64, 0.1, 0.9)
        assert (preset.weight_decay, preset.min_learning_rate, preset.hold_out) == (1e-4, 1e-4, 0.02)
        assert preset.length(765) == 229_500
    assert (PRESETS["imagenet"].epochs, PRESETS["imagenet"].batch_size) == (90, 256)


def test_the_same_run_has_the_same_name_in_all_studies(model):
    setting = PRESETS["glyphs-short"]
    found = [row for name in STUDIES for row in cells_of_study(name, setting, 700, 61, model)[0]]
    by_label: dict = {}
    for label, method, options, steps in found:
        assert by_label.setdefault(label, (method, options, steps)) == (method, options, steps)
    assert len({str(row[1:]) for row in found}) == len(by_label) < len(found)


def test_a_study_runs_and_says_what_its_numbers_say(photos, tmp_path, capsys):
    arguments = ["--data_dir", str(photos), "--studies", "optimizer_state", "--seeds", "2", "--max_steps", "3"]
    assert study.main([*arguments, "--population_size", "2", "--output_dir", str(tmp_path), "--jobs", "2"]) == 0
    said = capsys.readouterr().out
    assert "Should the optimizer's state be shuffled" in said and "WASH+Opt" in said
    # Another study is added to the record, and what is in it stays.
    record = tmp_path / "record.json"
    record.write_bytes((tmp_path / "results.json").read_bytes())
    before = json.loads(record.read_text())
    arguments[3:6] = ["schedule", "--seeds", "1"]
    added = ["--population_size", "2", "--output_dir", str(tmp_path / "other"), "--record", str(record)]
    assert study.main([*arguments, *added]) == 0
    kept = json.loads(record.read_text())
    assert list(kept["studies"]) == ["schedule", "optimizer_state"] and len(before["cells"]) == 4
    assert {json.dumps(cell) for cell in before["cells"]} <= {json.dumps(cell) for cell in kept["cells"]}
    assert len(kept["cells"]) == 6
    assert "The best averaged model" in said


def test_a_study_takes_what_the_comparison_of_its_preset_has(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "glyphs-short", PRESETS["glyphs-short"].but(batch_size=64, batch_norm_batches=40))
    record = tmp_path / "study.json"
    assert study.main(["--studies", "equal_bytes", "--output_dir", str(tmp_path), "--record", str(record)]) == 0
    said = capsys.readouterr().out
    assert "45 finished cells are taken from the record of a comparison." in said and "0 of them to run" in said
    kept = json.loads(record.read_text())
    assert len(kept["studies"]["equal_bytes"]) == 15 and len(kept["cells"]) == 45
    compared = json.loads((RESULTS / "glyphs-short.json").read_text())["cells"]
    budget = {(cell["seed"], cell["digest"]) for cell in compared if "@" in cell["label"]}
    assert {(cell["seed"], cell["digest"]) for cell in kept["cells"]} == budget


def test_a_study_draws_its_conclusions_among_runs_that_belong_together():
    said = tables_of(json.loads((RESULTS / "study-glyphs-short.json").read_text()))
    lengths = [line for line in said.splitlines() if re.match(r"- \d+ steps\.", line)]
    assert [line.count("WASH") for line in lengths] == [3, 3, 3]
    # The length that all other studies have is not said of a run.
    assert [re.findall(r"(\d+) steps[.;]", line[12:]) for line in lengths] == [["350"] * 3, [], ["1400"] * 3]
    budgets = [line for line in said.splitlines() if " copies a step. " in line]
    assert [line.partition(" copies")[0] for line in budgets] == ["- 0.01", "- 0.04", "- 0.1"]
    assert "every 61, N = 3 (which sends 0.0173)" in budgets[0] and "which sends" not in budgets[2]
    both = [line for line in said.splitlines() if re.match(r"- (WASH|No exchange)\.", line)]
    assert len(both) == 6 and not any("independent" in line for line in both[::2])


def test_two_rows_of_one_run_are_not_told_apart():
    kept = json.loads((RESULTS / "glyphs-short.json").read_text())
    rows = {row.label: row for row in tables.rows_of(kept["cells"], 3)}
    one, other = rows["dart-tuned"], rows["local_sgd-tuned"]
    assert tables.difference(one, other) == (0.0, 0.0)
    assert tables.verdict(one, other).endswith("too small a setting to tell them apart.")
    assert conclusion([one, other]).endswith(f"Not told apart from it (within two standard errors): {other.title}.")


def test_a_budget_that_cannot_be_is_left_out_of_a_study_and_papa_stands_there_once(model):
    setting = PRESETS["glyphs-short"].but(population_size=2)
    found, left_out = cells_of_study("equal_bytes", setting, 700, 61, model, {"wash@0.1": {"shuffle_stop": 0.6}})
    assert len(found) == 14 and len(left_out) == 1 and left_out[0].startswith("wash@0.1: WASH sends at most")
    # In so short epochs PAPA sends more than two of the budgets.
    found, _ = cells_of_study("equal_bytes", PRESETS["glyphs-short"], 700, 30, model)
    assert [method for _, method, _, _ in found].count("papa") == 2
