"""The plain loop: two processes make one soup, and one that would not is told so."""

import re
from pathlib import Path


SCRIPT = Path(__file__).parents[2] / "examples" / "accelerate_loop.py"


def test_two_processes_train_two_members_and_average_them(launch):
    run = launch(SCRIPT, "--num_steps", "120", env={"ACCELERATE_USE_CPU": "1"})
    members, soup = re.fullmatch(r"members: (.*); soup: (.*) %", run.stdout.splitlines()[0]).groups()
    members = [float(value.removesuffix(" %")) for value in members.split(", ")]
    assert len(members) == 2 and members[0] != members[1]
    # They were kept together: the average of two strangers would be no better than a guess.
    assert min(members) > 60 and float(soup) > min(members) - 5
    moved, sent = re.search(r"received by member 0: ([\d,]+) values .* sent: ([\d,]+) bytes", run.stdout).groups()
    moved, sent = (int(text.replace(",", "")) for text in (moved, sent))
    # Each value has four bytes, and each step a header of 32.
    assert moved > 0 and sent == 4 * moved + 32 * 120


def test_processes_that_accelerate_does_not_see_are_no_population(launch):
    run = launch(SCRIPT, "--num_steps", "5", env={"ACCELERATE_USE_CPU": "0"}, check=False)
    assert run.returncode != 0 and "soup" not in run.stdout
    assert "accelerate does not see the other processes; on CPUs set ACCELERATE_USE_CPU=1." in run.stderr
