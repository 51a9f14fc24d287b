"""The plain loop: processes make one soup however they are started, and one that makes none says so."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "accelerate_loop.py"


def test_two_processes_train_two_members_and_average_them(launch):
    run = launch(SCRIPT, "--num_steps", "120")
    members, soup = accuracies(run.stdout)
    assert len(members) == 2
    # Two models, though their accuracies may be the same.
    assert float(re.search(r"distance from their mean: (.*)", run.stdout).group(1)) > 0.1
    # They were kept together: the average of two strangers would be no better than a guess.
    assert min(members) > 60 and float(soup) > min(members) - 5
    moved, sent = re.search(r"received by member 0: ([\d,]+) values .* sent: ([\d,]+) bytes", run.stdout).groups()
    moved, sent = (int(text.replace(",", "")) for text in (moved, sent))
    # Each value has four bytes, and each step a header of 32.
    assert moved > 0 and sent == 4 * moved + 32 * 120


@pytest.mark.parametrize("config", ["two_cpu_processes.yaml"])
def test_the_repositorys_own_configuration_launches_it(config):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", EXAMPLES / "accelerate_configs" / config, SCRIPT, "--num_steps", "20"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert run.returncode == 0, run.stderr
    assert len(accuracies(run.stdout)[0]) == 2


def test_one_process_alone_says_that_it_exchanges_nothing():
    command = [sys.executable, SCRIPT, "--num_steps", "5", "--use_cpu"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "one member, which has nobody to exchange weights with" in run.stdout
    assert "torchrun --nproc-per-node 2 examples/accelerate_loop.py" in run.stdout
    members, soup = accuracies(run.stdout)
    assert members == [soup]
    assert "received by member 0: 0 values" in run.stdout


def accuracies(printed):
    """The members' and the soup's, in percent."""
    members, soup = re.search(r"^members: (.*); soup: (.*) %$", printed, re.MULTILINE).groups()
    return [float(value.removesuffix(" %")) for value in members.split(", ")], float(soup)
