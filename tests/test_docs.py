"""The documentation's links lead somewhere, and so do the pages that code cites; what pages quote of the code is in it."""

import ast
import re
import tomllib
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = sorted(path for folder in ("hf_wash", "examples") for path in (ROOT / folder).rglob("*.py"))

# [text](target "title"), also of a picture, and [name]: target at the start of a line.
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
CITED = re.compile(r"\bdocs/[\w/.-]*\w\.md(?:#[\w-]+)?")


def without_blocks(text: str) -> str:
    """A page without its blocks of code, where hashes and brackets mean something else."""
    return re.sub(r"^ *(```+|~~~+).*?^ *\1 *$", "", text, flags=re.MULTILINE | re.DOTALL)


def without_code(text: str) -> str:
    """A page without code, also within a line."""
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", without_blocks(text))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", without_blocks(page.read_text()), flags=re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        number = 0
        while (numbered := f"{name}-{number}" if number else name) in found:
            number += 1
        found.add(numbered)
    return found


def problem_with(file: Path, anchor: str) -> str | None:
    """What is wrong with a link to a heading of a file, if anything."""
    if not file.exists():
        return "there is no such file"
    if anchor and file.suffix == ".md" and anchor not in anchors(file):
        return f"there is no heading of that name; there are {', '.join(sorted(anchors(file)))}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    broken = []
    for match in LINK.finditer(without_code(page.read_text())):
        target = match.group(1) or match.group(2)
        if re.match(r"[a-z][a-z+.-]*:", target):
            continue  # another site's
        path, _, anchor = target.partition("#")
        problem = problem_with(page.parent / path if path else page, anchor)
        if problem:
            broken.append(f"{target}: {problem}")
    assert not broken


def test_pages_that_code_cites_are_there():
    broken = []
    for source in SOURCES:
        for cited in CITED.findall(source.read_text()):
            path, _, anchor = cited.partition("#")
            problem = problem_with(ROOT / path, anchor)
            if problem:
                broken.append(f"{source.relative_to(ROOT)} cites {cited}: {problem}")
    assert not broken


def test_every_page_is_linked_from_the_list_of_pages():
    listed = {match.group(1) for match in LINK.finditer((ROOT / "docs/README.md").read_text())}
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= listed


# ---- What pages quote ----------------------------------------------------------------------------------------------

CODE = re.compile(r"(`+) ?(?!`)(.+?)(?<!`) ?\1(?!`)")


def texts_of(source: Path) -> list[str]:
    """The texts in a file, with … for what is filled in."""

    def text_of(node: ast.AST) -> str:
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else ""
        return "".join(text_of(part) if isinstance(part, ast.Constant) else "…" for part in node.values)

    nodes = ast.walk(ast.parse(source.read_text()))
    return [text_of(node) for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr)]


def unknown_quotes(page: str, texts: list[str]) -> list[str]:
    """The sentences among a page's code, those with …, of which a part is in none of the texts."""
    unknown = []
    for match in CODE.finditer(without_blocks(page)):
        if "…" not in match[2] or " " not in match[2]:
            continue
        parts = [part.strip(" .:,()'`") for part in match[2].split("…")]
        if any(len(part) > 3 and not any(part in text for text in texts) for part in parts):
            unknown.append(match[2])
    return unknown


@pytest.mark.parametrize("page", ["troubleshooting.md", "when_the_soup_is_worse.md", "gpus.md"])
def test_errors_are_quoted_as_they_are(page):
    texts = [text for source in SOURCES for text in texts_of(source)]
    assert unknown_quotes((ROOT / "docs" / page).read_text(), texts) == []
    assert unknown_quotes("`Process … was mislaid at …`", texts) == ["Process … was mislaid at …"]


def test_the_quick_start_lists_what_extras_bring():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = re.findall(r"^\| `([\w-]+)` \| (`.+?`) \|", (ROOT / "docs/quick_start.md").read_text(), re.MULTILINE)
    listed = {name: re.findall(r"`(.+?)`", packages) for name, packages in rows}
    assert listed == {name: packages for name, packages in extras.items() if name not in ("docs", "dev")}


def test_the_configuration_for_gpus_is_the_one_of_the_examples():
    (shown,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/gpus.md").read_text(), re.DOTALL)
    file = (ROOT / "examples/accelerate_configs/one_member_per_gpu.yaml").read_text()
    assert shown == re.sub(r"^#.*\n", "", file, flags=re.MULTILINE)


def test_a_broken_link_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `title`, twice\n\n```\n# no heading\n[no link](nowhere)\n```\n# A title, twice\n`[x](y)` [z](w.md)"
    )
    assert anchors(page) == {"a-title-twice", "a-title-twice-1"}
    assert [match.group(1) for match in LINK.finditer(without_code(page.read_text()))] == ["w.md"]
    assert (
        problem_with(tmp_path / "w.md", "")
        and problem_with(page, "nowhere")
        and not problem_with(page, "a-title-twice")
    )
