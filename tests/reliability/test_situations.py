"""Every hostile situation gets what it should: nothing lost, nothing silent, nothing that hangs."""

import csv
import shutil

import pytest
from reliability import table
from reliability.everything import SITUATIONS
from reliability.harness import Server


pytestmark = pytest.mark.reliability


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


def test_the_page_has_the_table_of_these_situations():
    text = table.PAGE.read_text(encoding="utf-8")
    written = text.split(table.BEGIN)[1].split(table.END)[0].strip()
    assert written == table.table(table.expected()), "run `python tests/reliability/table.py --write`"


def test_the_listing_names_these_situations():
    with table.LISTING.open(newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    assert rows == table.listing(table.expected()), "run `python tests/reliability/table.py --write`"


def test_there_are_at_least_600_of_them():
    assert len(SITUATIONS) >= 600
