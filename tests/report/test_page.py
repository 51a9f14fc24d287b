"""The report's page and pictures: what they say, that nothing of them lies elsewhere, and how a browser takes them."""

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hf_wash.hub.record import write_record
from hf_wash.report import figures
from hf_wash.report.gather import Run, gather
from hf_wash.report.page import render, write_report


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZE = 3


def calibrated(ece):
    return {
        "ece": ece, "accuracy_overall": 0.8, "confidence": [0.4, 0.9], "accuracy": [0.5, 0.8], "count": [20, 30],
    }  # fmt: skip


def line(start, end, losses, barrier):
    fractions = [0.0, 0.5, 1.0] if end != "soup" else [0.0, 1.0, 1.5]
    accuracy = [1 - loss / 4 for loss in losses]
    return {"from": start, "to": end, "fractions": fractions, "loss": losses, "accuracy": accuracy, "barrier": barrier}


SURVEY = {
    "format": 1,
    "step": 40,
    "examples": 50,
    "data": "the evaluation data, evenly spaced",
    "batch_norm": "re-estimated at every point of a line on the same 8 training batches of 16 examples",
    "layers": {"names": ["embed", "block", "head"], "weights": [10, 20, 5], "spread": [0.01, 0.02, 0.005]},
    "lines": [
        line("member 0", "member 1", [0.5, 2.25, 0.5], 1.75),
        line("member 1", "member 2", [0.5, 1.0, 0.5], 0.5),
        line("member 0", "soup", [0.5, 1.5, 2.0], 0.0),
    ],
    "barrier": 1.75,
    "plane": {
        "x": [-1.0, 1.5, 4.0, 6.5],
        "y": [-1.0, 2.0, 5.0],
        "loss": [[4.0, 2.0, 2.5, 9.0], [3.0, 0.5, 0.75, 4.0], [2.0, 0.5, 1.0, None]],
        "accuracy": None,
        "places": {"member 0": [0.0, 0.0], "member 1": [5.0, 0.0], "member 2": [3.0, 4.0], "soup": [2.5, 1.5]},
        "soup_away": 0.75,
    },
    "disagreement": [[0.0, 0.25, 0.5], [0.25, 0.0, 0.125], [0.5, 0.125, 0.0]],
    "calibration": {name: calibrated(0.0625) for name in ("member 0", "member 1", "member 2", "soup", "ensemble")},
    "answers": {"soup": {"loss": 1.5, "accuracy": 0.625}, "ensemble": {"loss": 0.4, "accuracy": 0.9}},
}
RECORD = {
    "model": {"class": "Tiny", "trainable_parameters": 1000, "trainable_bytes": 4000},
    "population": {"size": SIZE, "same_init": True},
    "mixing": {"method": "wash", "shuffle_probability": 0.25, "shuffle_schedule": "decreasing"},
    "exchange": {"bytes_exchanged": 24_000, "values_moved": 6000},
    "training": {"steps": 40, "batch_size": 16, "optimizer": "adamw_torch"},
    "card": {"model_name": "a <b>bold</b> name"},
}


def history(layers=True):
    log = []
    for step in (10, 20, 30, 40):
        log.append({"step": step, "loss": 2 / step, "consensus_distance": step / 100})
        if layers:
            log.append({"step": step, **{f"layer_spread/layer {i}": step * (i + 1) / 1e4 for i in range(12)}})
        metrics = {"eval_loss": 3 / step, "eval_accuracy": 0.6 + step / 200}
        for name in ("ensemble", *(f"member_{i}" for i in range(SIZE))):
            metrics |= {f"eval_{name}_loss": 4 / step, f"eval_{name}_accuracy": 0.5 + step / 200}
        log.append({"step": step, **metrics})
    return log


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_record(folder, RECORD)
    # By the alphabet, as the Trainer saves it.
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history()}, sort_keys=True))
    write_report(folder, surveyed=SURVEY)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report/index.html").read_text(encoding="utf-8")


def test_nothing_of_the_page_lies_elsewhere(page):
    without_pictures = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"https?:|//[a-z]|<script|<link|<iframe|@import|url\(", without_pictures)
    sources = re.findall(r'(?:src|srcset)="([^"]+)"', page)
    assert len(sources) == 18 and all(source.startswith("data:image/png;base64,") for source in sources)


def test_pictures_on_the_page_are_those_beside_it_in_two_looks(folder, page):
    embedded = {base64.b64decode(data) for data in re.findall(r"base64,([A-Za-z0-9+/=]+)", page)}
    beside = {path.name: path.read_bytes() for path in (folder / "report").glob("*.png")}
    assert set(beside.values()) == embedded
    names = {"accuracy", "loss", "consensus", "layers", "bytes", "lines", "plane", "disagreement", "reliability"}
    assert set(beside) == {f"{name}{suffix}.png" for name in names for suffix in ("", "-dark")}
    for name, content in beside.items():
        with Image.open(io.BytesIO(content)) as image:
            assert image.convert("RGB").getpixel((0, 0)) == ((22, 25, 29) if "-dark" in name else (255, 255, 255))
    assert page.count('media="(prefers-color-scheme: dark)"') == 9


def test_every_picture_has_words_in_its_place(page):
    captions = re.findall(r'<img [^>]*alt="([^"]*)"', page)
    assert len(captions) == 9 and all(len(caption) > 20 for caption in captions)


def test_the_page_says_the_numbers(page):
    words = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    for said in (
        "soup 80.00 %", "ensemble 70.00 %",  # at the last evaluation
        "member 0 to member 1 1.75 0.5 and 0.5",
        "the loss rises 1.75 nats above the straight line",
        "WASH 600 B 24 kB 1",
        "SPARTA 60 B 2.4 kB 0.1 ×",  # 0.5 % of 4000 bytes, 3 members, 40 steps
        "PAPA 1.2 kB 48 kB 2 ×",
        "DDP 12 kB 480 kB 20 ×",
        "BatchNorm statistics were re-estimated at every point",
        "soup 6.25 % 80.00 %",
        "The soup is 0.75 away from it",
    ):  # fmt: skip
        assert said in words, said


def test_names_are_text_and_no_markup(page):
    assert "<b>bold" not in page and "a &lt;b&gt;bold&lt;/b&gt; name" in page


def test_an_unchanged_run_gives_an_unchanged_report(tmp_path):
    write_record(tmp_path, {"model": RECORD["model"]})
    seen = {"format": 1, "plane": SURVEY["plane"]}  # the picture with most in it
    first, second = (write_report(tmp_path, surveyed=seen).read_bytes() for _ in range(2))
    assert first == second and b'id="basin"' in first and len(list((tmp_path / "report").glob("*.png"))) == 2


def test_members_in_one_basin_are_said_to_be():
    flat = {**SURVEY, "barrier": 0.0, "lines": [line("member 0", "member 1", [0.5, 0.5, 0.5], 0.0)]}
    text = render(Run("a run", surveyed=flat), {})
    assert "the members lie in one basin" in text and "in different basins" not in text


def test_a_loss_that_is_not_finite_is_no_barrier_of_zero(tmp_path):
    write_record(tmp_path, RECORD)
    lost = {"format": 1, "barrier": None, "lines": [line("member 0", "member 1", [0.5, 0.5, 0.5], None)]}
    lost["lines"][0]["loss"][1] = None
    text = write_report(tmp_path, surveyed=lost).read_text()
    assert "not finite somewhere" in text and "one basin:" not in text


def test_of_a_folder_without_measurements_the_rest_is_shown(tmp_path):
    write_record(tmp_path, RECORD)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history(layers=False)}))
    text = write_report(tmp_path).read_text()
    assert 'id="accuracy"' in text and 'id="lines"' not in text and 'id="layers"' not in text
    assert "have not been looked at" in text and "hf-wash report DIR --eval-data FOLDER" in text
    assert "The distance of each layer is not known" in text


def test_layers_at_the_end_come_from_the_members_that_were_saved(tmp_path):
    for index, shift in enumerate((-1.0, 1.0)):
        place = tmp_path / f"_members/member_{index}"
        place.mkdir(parents=True)
        weights = {"encoder.layer.10.weight": torch.full((4,), 3.0), "encoder.layer.9.weight": torch.full((4,), shift)}
        save_file(
            weights | {"classifier.weight": torch.zeros(2), "embeddings.weight": torch.full((2,), 2 * shift)},
            place / "model.safetensors",
        )
    run = gather(tmp_path)
    assert run.layer_names == ["embeddings", "encoder.layer.9", "encoder.layer.10", "classifier"]
    assert run.layer_spreads == [[2.0, 1.0, 0.0, 0.0]]


def test_a_heat_map_has_a_column_for_each_step(folder):
    run = gather(folder)
    assert run.layer_steps == [10, 20, 30, 40] and len(run.layer_spreads[0]) == 12
    assert run.layer_names == [f"layer {i}" for i in range(12)]
    assert run.layer_spreads[3][11] == pytest.approx(40 * 12 / 1e4)


def test_its_layers_are_in_the_order_of_the_model(tmp_path):
    names = ["tokens", "middle", "answer"]
    log = [{"step": step, **{f"layer_spread/{name}": 0.5 for name in names}} for step in (1, 2)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}, sort_keys=True))
    surveyed = {"layers": {"names": names, "spread": [0.0] * 3}}
    assert gather(tmp_path, surveyed=surveyed).layer_names == names


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("report/measurements.json", '{"format": 1, "lines": 3}', "no measurements that this version can read"),
        (
            "report/measurements.json",
            '{"format": 1, "plane": {"x": [0]}}',
            "no measurements that this version can read",
        ),
        ("report/measurements.json", "{", "is not valid JSON"),
        ("trainer_state.json", '{"log_history": 5}', "trainer_state.json has 5 as log_history"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, file, content, said):
    write_record(tmp_path, RECORD)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=said):
        write_report(tmp_path)


def test_a_folder_with_nothing_of_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds nothing of a run"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_lines_can_be_told_apart_in_grey():
    """Each line of a picture differs from the others in its dashes or its markers, whatever its colour."""
    series = ([1, 2, 3], [1.0, 2.0, 3.0])
    figure = figures.draw_over_the_run(figures.LIGHT, series, series, [series] * 4, "loss")
    drawn = [(line._unscaled_dash_pattern, line.get_marker()) for line in figure.axes[0].lines]
    assert len(drawn) == 6 == len({str(look) for look in drawn})
    figure = figures.draw_lines(figures.LIGHT, SURVEY["lines"])
    drawn = [(line._unscaled_dash_pattern, line.get_marker()) for line in figure.axes[0].lines[:3]]
    assert len({str(look) for look in drawn}) == 3


def test_a_plane_is_a_map_that_gets_lighter_or_darker_with_its_height_and_marks_who_lies_where():
    figure = figures.draw_plane(figures.DARK, SURVEY["plane"])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == list(SURVEY["plane"]["places"])
    markers = [(mark.get_marker(), *mark.get_xydata()[0]) for mark in axes.lines]
    assert [list(mark[1:]) for mark in markers] == list(SURVEY["plane"]["places"].values())
    assert len({mark[0] for mark in markers}) == 4
    heights = figures._heights(0.5, 9.0)
    assert heights[0] == 0.5 and heights[-1] == 9.0 and heights == sorted(set(heights))
    # A flat one is no map of noise.
    assert figures._heights(1.0, 1.0001)[-1] == pytest.approx(1.05, rel=1e-4)
    assert figures.draw_plane(figures.LIGHT, {**SURVEY["plane"], "loss": [[None] * 4] * 3}) is None


def test_of_members_on_one_line_it_is_said_that_there_is_no_plane():
    text = render(Run("a run", surveyed={**SURVEY, "plane": None}), {})
    assert "lie on one line, so there is no plane" in text and 'id="plane"' not in text


def test_every_axis_is_labelled():
    run_pictures = [
        figures.draw_consensus(figures.LIGHT, ([1, 2], [0.1, 0.2])),
        figures.draw_layers(figures.LIGHT, ["a", "b"], [1, 2], [[0.1, 0.2], [0.3, 0.4]]),
        figures.draw_lines(figures.DARK, SURVEY["lines"]),
        figures.draw_plane(figures.LIGHT, SURVEY["plane"]),
        figures.draw_disagreement(figures.DARK, SURVEY["disagreement"]),
        figures.draw_reliability(figures.LIGHT, SURVEY["calibration"]),
    ]
    for figure in run_pictures:
        for axes in figure.axes:
            if not axes.get_label().startswith("<colorbar"):
                assert axes.get_xlabel() and axes.get_ylabel()


# In a browser


def screenshot(page, target, width, dark):
    scheme = "0" if dark else "1"
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage",
        f"--user-data-dir={target.parent / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}",
        f"--window-size={width},3000", f"--screenshot={target}", Path(page).as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(target) as image:
        return image.convert("RGB")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed to open the page in")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_a_browser_shows_it_narrow_and_wide_light_and_dark(folder, tmp_path, width, dark):
    shown = screenshot(folder / "report/index.html", tmp_path / "shot.png", width, dark)
    assert shown.size == (width, 3000)
    background = (22, 25, 29) if dark else (255, 255, 255)
    # The margin is the page's; in a column of text and pictures there is much else, down to the bottom of the window.
    assert shown.getpixel((3, 1500)) == background == shown.getpixel((width - 3, 1500))
    for top in (0, 1000, 2000):
        assert len(shown.crop((0, top, width, top + 1000)).getcolors(10**7)) > 50
    # The soup's line, and the bars of what WASH sent.
    soup = (255, 154, 86) if dark else (193, 79, 0)
    colors = {color: count for count, color in shown.getcolors(10**7)}
    assert colors.get(soup, 0) > 200


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed to open the page in")
def test_a_browser_finds_every_picture_and_no_page_wider_than_a_phone(folder, tmp_path):
    probe = (
        "<script>addEventListener('load', () => { const all = [...document.images];"
        "document.title = [document.documentElement.scrollWidth <= innerWidth, all.length,"
        "all.every(i => i.complete && i.naturalWidth > 600)].join(' '); });</script></body>"
    )
    page = tmp_path / "page.html"
    page.write_text((folder / "report/index.html").read_text().replace("</body>", probe))
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=400,900", page.as_uri(),
    ]  # fmt: skip
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert re.search("<title>(.*?)</title>", found).group(1) == "true 9 true"
