"""Every hostile situation gets what it should: nothing lost, nothing silent, nothing that hangs."""

import shutil

import pytest
from reliability.everything import SITUATIONS
from reliability.harness import Server


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


def parameters():
    for situation in SITUATIONS:
        marks = [pytest.mark.slow] if situation.slow else []
        marks += [pytest.mark.distributed] if situation.processes > 1 else []
        yield pytest.param(situation.id, marks=marks, id=situation.id)


@pytest.mark.parametrize("name", parameters())
def test_a_situation_gets_what_it_should(server, name, tmp_path):
    short = server.attempt(name, tmp_path)["short"]
    shutil.rmtree(tmp_path, ignore_errors=True)
    if short:
        pytest.fail("\n".join(short), pytrace=False)
