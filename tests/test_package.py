"""What `import hf_wash` offers, what it does not load, and what is built of it."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import hf_wash
from hf_wash.methods import WASH


ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_public_names():
    for name in hf_wash.__all__:
        assert getattr(hf_wash, name).__name__ == name
    assert set(hf_wash.__all__) <= set(dir(hf_wash))
    assert not hasattr(hf_wash, "NoSuchMixer")


def test_a_loop_of_ones_own_needs_no_transformers():
    code = "import sys; from hf_wash import WashMixer, uniform_soup; print('transformers' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert printed.stdout.strip() == "False"


def test_help_needs_no_torch():
    code = "import sys, hf_wash.cli; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert printed.stdout.strip() == "False"


# What builds a package calls, in a process of its own and without fetching anything.
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
EVERYTHING = """
import hf_wash
from importlib.metadata import version
from pathlib import Path
for name in hf_wash.__all__:
    getattr(hf_wash, name)
assert version("hf-wash") == hf_wash.__version__
print(Path(hf_wash.__file__).parent)
"""


def run(*command, cwd, **environment):
    environment = {**os.environ, "PYTHONPATH": "", **environment}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1]


def build(kind, source, into):
    return into / run(sys.executable, "-c", BUILD, f"build_{kind}", str(into), cwd=source)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """A copy of the sources, their sdist, and the wheel that is built from the sdist, as `python -m build` makes them."""
    tmp_path = tmp_path_factory.mktemp("distributions")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "hf_wash", source / "hf_wash", ignore=shutil.ignore_patterns("__pycache__"))
    sdist = build("sdist", source, tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    return sdist, build("wheel", tmp_path / "unpacked" / sdist.name.removesuffix(".tar.gz"), tmp_path)


def test_the_wheel_of_the_sdist_has_every_file_of_the_package(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        packed = {name for name in wheel.namelist() if name.startswith("hf_wash/")}
    files = (path for path in (ROOT / "hf_wash").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert packed == {path.relative_to(ROOT).as_posix() for path in files}


def test_the_wheel_installs_and_runs(distributions, tmp_path):
    """Of the sources nothing is in reach: only what the wheel brought, beside the dependencies."""
    installed = tmp_path / "installed"
    with zipfile.ZipFile(distributions[1]) as wheel:
        wheel.extractall(installed)  # which is all that installing a pure wheel does, beside the command's script
    where = run(sys.executable, "-c", EVERYTHING, cwd=tmp_path, PYTHONPATH=str(installed))
    assert Path(where) == installed / "hf_wash"
    entry = (installed / f"hf_wash-{hf_wash.__version__}.dist-info" / "entry_points.txt").read_text()
    module, function = re.search(r"hf-wash = ([\w.]+):(\w+)", entry).groups()
    command = f"import sys; from {module} import {function}; sys.argv[1:] = ['--help']; {function}()"
    run(sys.executable, "-c", command, cwd=tmp_path, PYTHONPATH=str(installed))


def test_versions_and_licenses_agree():
    project = PYPROJECT["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert project["version"] == hf_wash.__version__
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == hf_wash.__version__
    assert re.search(r"^license: (.+)$", citation, re.MULTILINE)[1] == project["license"]
    assert hf_wash.__version__ in (ROOT / "CHANGELOG.md").read_text()
    assert WASH.title in citation and WASH.eprint in citation


def test_the_docs_list_the_extras_that_there_are():
    table = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert set(table) == set(PYPROJECT["project"]["optional-dependencies"])
