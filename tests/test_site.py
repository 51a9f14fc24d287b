"""The documentation as a site: it builds without a warning, its links lead somewhere, its reference is complete."""

import importlib.util
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import hf_wash


pytest.importorskip("material", reason="the docs extra is not installed")
pytest.importorskip("mkdocstrings")

ROOT = Path(__file__).parents[1]


class Page(HTMLParser):
    """The links of a page, and what can be linked to in it."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[name] for name in ("id", "name") if attrs.get(name)}
        self.links += [attrs[name] for name in ("href", "src") if attrs.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    return {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")}, site


def test_links_lead_somewhere(site):
    pages, folder = site
    broken = []
    for name, page in pages.items():
        # 404.html is shown in any folder, so that its links are from the root.
        for link in page.links if name != "404.html" else ():
            path, _, anchor = unquote(link).partition("#")
            if ":" in path or path.startswith("//"):
                continue
            target = os.path.normpath(os.path.join(os.path.dirname(name), path.partition("?")[0])) if path else name
            target = os.path.join(target, "index.html") if (folder / target).is_dir() else target
            if not (folder / target).exists() or (anchor and target in pages and anchor not in pages[target].anchors):
                broken.append(f"{name}: {link}")
    assert not broken


def test_every_public_name_is_in_the_reference(site):
    described = {anchor for name, page in site[0].items() if name.startswith("reference/") for anchor in page.anchors}
    assert {name for name in hf_wash.__all__ if not any(a.endswith(f".{name}") for a in described)} == set()
    for method in ("train", "check", "verify_checkpoint", "save_members", "push_to_hub", "evaluate"):
        assert f"hf_wash.PopulationMixin.{method}" in described


def test_files_and_folders_of_the_repository_have_pages(site):
    assert "files/hf_wash/mixing/averaging.py.html" in site[0] and "files/docs/results.html" in site[0]
    assert "files/examples/wash_in_ten_minutes.ipynb.html" in site[0]
    assert "contributing.html" in site[0] and "changelog.html" in site[0]


def test_a_docstring_becomes_lists():
    spec = importlib.util.spec_from_file_location("mkdocs_hooks", ROOT / "mkdocs_hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    given = """Averages, see [`WashMixer`] and [`~other.Thing`].

> How often

Args:
    step (`int`), rate (`tuple(float, ...)`, *optional*):
        The step: from 1.
    *rest: Others.

Raises:
    ValueError: for none.

Returns:
    `dict`: what is
    in it.

Example:

```python
Args:
    x: kept
```"""
    told = hooks.as_markdown(given)
    for line in (
        "Averages, see [`WashMixer`][hf_wash.mixing.WashMixer] and `other.Thing`.",
        "- **`step`** (`int`), **`rate`** (`tuple(float, ...)`, *optional*):",
        "        The step: from 1.",
        "- **`*rest`**: Others.",
        "**Parameters**",
        "*How often*",
        "- **`ValueError`**: for none.",
        "`dict`: what is",
        "in it.",
        "    x: kept",
    ):
        assert line in told.splitlines(), line


def test_a_picture_that_comes_in_two_looks_is_shown_in_that_of_the_page(site):
    shown = {link.partition("report")[2] for link in site[0]["report.html"].links if ".png" in link}
    assert {".png#only-light", "-dark.png#only-dark"} <= shown
