"""
What the site of the documentation (mkdocs.yml) needs beside the pages in docs/, which are written for GitHub: pages made of
files outside of docs/, the reference from docstrings, and docstrings of the Hugging Face format as Markdown.
"""

import ast
import json
import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File


ROOT = Path(__file__).parent
# Files outside of docs/ that are pages of the site, and where. Others that a page links to are shown under files/.
PAGES = {"README.md": "README.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(\]\(\s*)([^)\s#:]+)(?=[)\s#])")
CODE = re.compile(r"(^ *(```+|~~~+).*?^ *\2 *$|(`+)(?!`).+?(?<!`)\3(?!`))", re.MULTILINE | re.DOTALL)


def exported(module: str) -> list[str]:
    """The names in `__all__` of a module, which is read and not run."""
    for node in ast.parse((ROOT / module.replace(".", "/") / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError(f"{module} has no __all__")


_TRAINING = [
    "WashTrainer",
    "WashConfig",
    "PopulationMixin",
    "PopulationArguments",
    "MemberOverrides",
    "PopulationDiagnostics",
]
# Page, title, and what it describes.
REFERENCE = {
    "training": ("Training", [f"hf_wash.{name}" for name in _TRAINING]),
    "mixing": (
        "Mixing",
        [f"hf_wash.mixing.{name}" for name in exported("hf_wash.mixing")]
        + ["hf_wash.mixing.averaging.AveragingMixer"]
        + [f"hf_wash.methods.{name}" for name in ("add_method", "Method", "Times")],
    ),
    "soup": ("Soups", [f"hf_wash.soup.{name}" for name in exported("hf_wash.soup")]),
    "hub": ("Folders and the Hub", [f"hf_wash.hub.{name}" for name in exported("hf_wash.hub")]),
}
# Whose public methods are those of the classes that it is put together from.
IN_PARTS = {"hf_wash.PopulationMixin": "\n    options:\n      inherited_members: true"}
DESCRIBED = {path.rpartition(".")[2]: path for _, paths in REFERENCE.values() for path in paths}


# ---- Pages -------------------------------------------------------------------------------------------------------------


def uri_of(path: str) -> str:
    """Where a file of the repository is in the site."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/") and not (ROOT / path).is_dir():
        return path.removeprefix("docs/")
    return f"files/{path}.md"


def source_of(uri: str) -> str:
    """Which file of the repository a page is made of; itself for one that is made of none."""
    return next((path for path, page in PAGES.items() if page == uri and path != "README.md"), f"docs/{uri}")


def with_links(markdown: str, source: str, uri: str, met: set[str] | None = None) -> str:
    """A page whose links to files of the repository lead to them in the site. `met` gets these files."""

    def replaced(match: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        if not (ROOT / path).exists():
            return match[0]  # strict mode names it
        if met is not None:
            met.add(path)
        return match[1] + posixpath.relpath(uri_of(path), posixpath.dirname(uri) or ".")

    parts, end = [], 0
    for code in CODE.finditer(markdown):
        parts += [LINK.sub(replaced, markdown[end : code.start()]), code[0]]
        end = code.end()
    # A link whose text has code in it: what follows the code begins with the rest of the text.
    return "".join([*parts, LINK.sub(replaced, markdown[end:])])


def shown(path: str, uri: str) -> str:
    """A page that shows a file, or what is in a folder."""
    title = f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n"
    if (ROOT / path).is_dir():
        names = sorted(child.name for child in (ROOT / path).iterdir() if not child.name.startswith((".", "__")))
        inside = [posixpath.join(path, name) for name in names]
        here = posixpath.dirname(uri)
        return title + "\n".join(f"- [{posixpath.basename(p)}]({posixpath.relpath(uri_of(p), here)})" for p in inside)
    if path.endswith(".ipynb"):
        cells = json.loads((ROOT / path).read_text())["cells"]
        texts = (("".join(cell["source"]), cell["cell_type"]) for cell in cells)
        told = "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for text, kind in texts)
        return f"---\nsearch:\n  exclude: true\n---\n{told}\n"
    language = {".py": "python", ".md": "markdown", ".yaml": "yaml"}.get(Path(path).suffix, "text")
    return f"{title}~~~~~{language}\n{(ROOT / path).read_text().rstrip()}\n~~~~~\n"


def on_files(files, config):
    """Adds the pages that are made of other files."""
    met: set[str] = set()
    for path, uri in PAGES.items():
        if path != "README.md":
            files.append(File.generated(config, uri, content=(ROOT / path).read_text()))
    for name, (title, paths) in REFERENCE.items():
        content = f"# {title}\n\n" + "\n\n".join(f"::: {path}{IN_PARTS.get(path, '')}" for path in paths)
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    for file in list(files.documentation_pages()):
        if not file.src_uri.startswith("reference/"):
            with_links(file.content_string, source_of(file.src_uri), file.src_uri, met)
    waiting = sorted(met)
    while waiting:
        path = waiting.pop()
        uri = uri_of(path)
        if not uri.startswith("files/") or files.get_file_from_path(uri) is not None:
            continue
        if (ROOT / path).is_dir():
            waiting += [child.relative_to(ROOT).as_posix() for child in (ROOT / path).iterdir() if child.is_file()]
        files.append(File.generated(config, uri, content=shown(path, uri)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Mends the links of a page."""
    uri = page.file.src_uri
    if uri.startswith(("reference/", "files/")):
        return markdown
    return with_links(in_both_looks(markdown, source_of(uri)), source_of(uri), uri)


PICTURE = re.compile(r"(!\[[^\]]*\])\(([^)\s#]+)\.png\)")


def in_both_looks(markdown: str, source: str) -> str:
    """A page whose pictures are the dark ones in its dark look, where `NAME-dark.png` lies beside `NAME.png`."""

    def replaced(match: re.Match) -> str:
        if not (ROOT / posixpath.dirname(source) / f"{match[2]}-dark.png").exists():
            return match[0]
        return f"{match[1]}({match[2]}.png#only-light)\n{match[1]}({match[2]}-dark.png#only-dark)"

    return PICTURE.sub(replaced, markdown)


# ---- Docstrings --------------------------------------------------------------------------------------------------------

SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Example|Examples):$")
REFERS = re.compile(r"\[`~?([\w.]+)`\](?!\(|\[)")
# Names with their types in parentheses, or an error; then a colon.
NAME = re.compile(r"(`[^`]*`|\([^()]*(?:\([^()]*\)[^()]*)*\))|([\w.*]+)")
ITEM = re.compile(r"    (?=\S)((?:`[^`]*`|\([^()]*(?:\([^()]*\)[^()]*)*\)|[^:`()])+):(?:\s+(.*)|)$")


def as_markdown(docstring: str) -> str:
    """A docstring of the Hugging Face format, with its sections as headings and lists."""
    lines, section, fenced = [], "", False
    for line in docstring.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        if fenced or line.lstrip().startswith("```"):
            lines.append(line)
        elif found := SECTION.match(line):
            section = found[1]
            lines += ["", f"**{ {'Args': 'Parameters'}.get(section, section) }**", ""]
        elif line.startswith("> "):
            section = "Args"
            lines += ["", f"*{line[2:].strip()}*", ""]
        elif line and not line.startswith(" "):
            section = ""
            lines.append(line)
        elif section in ("Returns", "Yields"):
            lines.append(line[4:])
        elif section in ("Args", "Attributes", "Raises") and (item := ITEM.match(line)):
            names = NAME.sub(lambda part: part[1] or f"**`{part[2]}`**", item[1])
            lines.append(f"- {names}: {item[2] or ''}".rstrip())
        else:
            lines.append(line)
    return REFERS.sub(_reference, "\n".join(lines))


def _reference(match: re.Match) -> str:
    name = match[1]
    return f"[`{name}`][{DESCRIBED[name]}]" if name in DESCRIBED else f"`{name}`"


class HuggingFaceDocstrings(griffe.Extension):
    """Makes Markdown of every docstring."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
