"""MkDocs asks this file while it builds: links that leave docs/ lead to pages with the text of what they name.

So the Markdown stays as a code host shows it, and the site needs no address of a repository.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
# Code, which is left alone, or the end of a link that is relative: path and anchor.
LINK = re.compile(r"^```.*?^```|`[^`\n]*`|\]\((?!\w+:|#)([^)#\s]+)((?:#[^)\s]*)?)\)", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".c": "c", ".h": "c", ".json": "json", ".toml": "toml", ".yml": "yaml", "": "text"}
COPIED = "source/"  # where such pages stand on the site


def origin(uri: str) -> str:
    """The file of the repository that a page of the site shows."""
    return uri.removeprefix(COPIED).removesuffix(".page.md") if uri.startswith(COPIED) else f"docs/{uri}"


def target(uri: str, link: str) -> str:
    """The file of the repository that a link of a page names."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin(uri)), link))


def place(path: str) -> str:
    """Where the site has a file of the repository."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{COPIED}{path}.page.md"


def text(path: str) -> str:
    """What the page of a file outside docs/ says: code in a block, a folder as a list, the rest as it reads."""
    file = ROOT / path
    if file.suffix == ".md":
        return file.read_text("utf-8")
    if file.suffix == ".ipynb":
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(file.read_text("utf-8"))["cells"]]
        return "\n\n".join(cell if kind == "markdown" else f"```python\n{cell}\n```" for kind, cell in cells) + "\n"
    if file.is_dir():
        names = sorted(entry.name for entry in file.iterdir() if entry.is_file() and not entry.name.startswith("_"))
        return f"# {path}\n\n" + "".join(f"- [{name}]({posixpath.basename(path)}/{name})\n" for name in names)
    language = LANGUAGES.get(file.suffix, "text")
    return f"# {path}\n\n````{language}\n{file.read_text('utf-8')}\n````\n"


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each file outside docs/ that a page names, and for those that these name."""
    waiting = [file.src_uri for file in files.documentation_pages()]
    while waiting:
        uri = waiting.pop()
        page = text(origin(uri)) if uri.startswith(COPIED) else (ROOT / origin(uri)).read_text("utf-8")
        for path in (target(uri, link) for link, _ in LINK.findall(page) if link):
            if not path.startswith("docs/") and (ROOT / path).exists() and place(path) not in files.src_uris:
                files.append(File.generated(config, place(path), content=text(path)))
                waiting.append(place(path))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to where the site has what they name."""
    uri = page.file.src_uri

    def lead(link: re.Match[str]) -> str:
        if link[1] is None:
            return link[0]
        there = place(target(uri, link[1]))
        return f"]({posixpath.relpath(there, posixpath.dirname(uri) or '.')}{link[2]})"

    return LINK.sub(lead, markdown)


class Examples(griffe.Extension):
    """Docstrings call one example "Example", and griffe makes code of "Examples"."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
