"""Two members of any Trainer on one process and on two are the same run, bit for bit."""

import json
from pathlib import Path

import pytest


pytest.importorskip("trl")
pytest.importorskip("sentence_transformers")

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(400)]

SCRIPT = Path(__file__).parent / "any_trainer_run.py"


def test_two_processes_give_what_one_gives(launch, tmp_path):
    from any_trainer import SCENARIOS

    for processes in (1, 2):
        launch(SCRIPT, tmp_path, *SCENARIOS, processes=processes, timeout=180)
    outcomes = {
        name: [json.loads((tmp_path / f"{name}-on-{processes}.json").read_text()) for processes in (1, 2)]
        for name in SCENARIOS
    }
    for name, (alone, spread) in outcomes.items():
        assert alone["members"][0] == alone["first local member"], name
        assert len({*alone["members"], alone["soup"]}) == 3, name
        assert spread == alone, name
