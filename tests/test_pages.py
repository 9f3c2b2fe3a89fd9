"""What the Markdown pages say is there, is there: links, anchors, code, options, and every figure in a report."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import hf_llmopt
from hf_llmopt import errors
from hf_llmopt.bench import pages
from hf_llmopt.cli import app
from hf_llmopt.config.llmopt import SECTIONS as SECTIONS_OF_KEYWORD
from hf_llmopt.errors import InvalidOption

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SECTIONS = [name for name in hf_llmopt.__all__ if name.endswith("Config")]


def called(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its blocks of code, line by line as in the file."""
    return CODE.sub(lambda block: "\n" * block[0].count("\n"), page.read_text("utf-8"))


def ticked(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


# --------------------------------------------------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """As code hosts and the site make them of headings: lower case, no punctuation, a hyphen for each space."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ (.+?)\s*$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.replace("`", ""))
        name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        count = found[name] = found.get(name, -1) + 1
        names.add(f"{name}_{count}" if count else name)
    return names


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Relative ones: path, which is empty on the page itself, and anchor."""
    for link in re.findall(r"\]\(([^)\s]+)[^)]*\)", prose(page)):
        if not re.match(r"[a-z]+:", link):
            path, _, anchor = link.partition("#")
            yield path, anchor


def test_anchors_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Pages, and `code`\n```\n# comment\n```\n## Same\n## Same\n## [A link](x.md)\n")
    assert anchors(page) == {"pages-and-code", "same", "same_1", "a-link"}


@pytest.mark.parametrize("page", PAGES, ids=called)
def test_links_lead_somewhere(page: Path) -> None:
    lost = []
    for path, anchor in links(page):
        target = page.parent / path if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            lost.append(f"{path}#{anchor}")
    assert lost == []


@pytest.mark.parametrize("page", PAGES, ids=called)
def test_code_hosts_and_the_site_read_alike(page: Path) -> None:
    """The site's Markdown wants an empty line before a list or table, and 4 spaces where an item goes on."""
    odd, before = [], ""
    for number, line in enumerate(prose(page).splitlines(), 1):
        begins = re.match(r"([-*]|\d+\.) |\|", line)
        if (begins and before.strip() and not re.match(r"([-*]|\d+\.) |\||\s", before)) or (
            re.match(r" {1,3}\S", line) and (not before.strip() or re.match(r" +([-*]|\d+\.) ", line))
        ):
            odd.append(f"{number}: {line}")
        before = line
    assert odd == []


MKDOCS = ROOT / ".venv-docs" / "bin" / "mkdocs"


@pytest.mark.slow
@pytest.mark.skipif(not MKDOCS.exists(), reason="`make docs` makes the environment")
def test_the_site_builds(tmp_path: Path) -> None:
    """Without a warning, with every public name, and a page for each linked file of the repository."""
    command = [MKDOCS, "build", "--strict", "--quiet", "--site-dir", tmp_path]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "api" / "index.html").read_text("utf-8")
    assert [name for name in hf_llmopt.__all__ if f'id="hf_llmopt.{name}"' not in reference] == []
    outside = {
        (page.parent / path).resolve().relative_to(ROOT)
        for page in DOCS.rglob("*.md")
        for path, _ in links(page)
        if path
    }
    outside = {path for path in outside if path.parts[0] != "docs"}
    assert outside
    assert [path for path in outside if not (tmp_path / "source" / f"{path}.page" / "index.html").exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=called)
def test_papers_are_linked_under_their_number(page: Path) -> None:
    named = re.findall(r"\[arXiv:([^\]]+)\]\(https://arxiv\.org/abs/([^)]+)\)", page.read_text("utf-8"))
    assert [pair for pair in named if pair[0] != pair[1] or not re.fullmatch(r"\d{4}\.\d{5}", pair[0])] == []


def test_every_page_is_reached() -> None:
    """From the site's index and from its navigation."""
    every = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8").partition("nav:")[2].partition("theme:")[0]
    assert set(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)) == every
    assert {path for path, _ in links(DOCS / "index.md") if not path.startswith("..")} == every - {"index.md"}


# ---------------------------------------------------------------------------------------------------------------- code


def test_the_reference_has_every_public_name() -> None:
    named = re.findall(r"^::: hf_llmopt\.(\w+)$", (DOCS / "api.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(set(hf_llmopt.__all__))


def files() -> Iterator[Path]:
    """All files of the repository, without what was installed or built."""
    for folder, inner, names in os.walk(ROOT):
        inner[:] = [name for name in inner if not name.startswith(".") and name not in ("build", "dist", "__pycache__")]
        yield from ((Path(folder) / name).relative_to(ROOT) for name in names)


@pytest.fixture(scope="module")
def endings() -> set[str]:
    """Every file, named by its path from any folder above it: `pool.py`, `kv_cache/pool.py`, and so on."""
    parts = [path.parts for path in files()]
    return {"/".join(path[start:]) for path in parts for start in range(len(path))}


@pytest.mark.parametrize("page", PAGES, ids=called)
def test_files_exist(page: Path, endings: set[str]) -> None:
    named = {name for text in ticked(page) for name in re.findall(r"^[\w./-]+\.(?:py|c|h|md|svg|toml|cfg)$", text)}
    assert sorted(name for name in named - OTHERS if name not in endings) == []


# Of other projects, and one whose absence is what the page tells.
OTHERS = {"benchmark/align.md", "docs/paper_acc.md", "verify.py"}


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    words = name.split(".")
    for length in range(len(words), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(words[:length]))
        except ModuleNotFoundError:
            continue
        return attribute(found, words[length:])
    return False


def attribute(found: Any, words: list[str]) -> bool:
    for word in words:
        fields = getattr(found, "__dataclass_fields__", {})
        if not hasattr(found, word) and word not in fields:
            return False
        found = getattr(found, word, None)
    return True


def test_names_that_do_not_exist_are_found() -> None:
    assert resolves("hf_llmopt.kv_cache.pool.PagePool")
    assert resolves("hf_llmopt.KVCacheConfig.page_size")
    assert not resolves("hf_llmopt.engine.motor")
    assert not resolves("hf_llmopt.KVCacheConfig.page_sise")


@pytest.mark.parametrize("page", PAGES, ids=called)
def test_code_exists(page: Path) -> None:
    """Dotted names of the package and of its public names, options of its configs, and figures of a call."""
    text = page.read_text("utf-8")
    lost = []
    for ticks in ticked(page):
        for name in re.findall(r"^hf_llmopt(?:\.\w+)+", ticks):
            if not resolves(name):
                lost.append(name)
        for owner, member in re.findall(r"^([A-Z]\w+)\.(\w+)", ticks):
            if owner in hf_llmopt.__all__ and not attribute(getattr(hf_llmopt, owner), [member]):
                lost.append(f"{owner}.{member}")
    for section, options in re.findall(rf"\b({'|'.join(SECTIONS)})\(([^()]*)", text):
        known = {field.name for field in dataclasses.fields(getattr(hf_llmopt, section))}
        lost += [f"{section}({name}=)" for name in re.findall(r"\b(\w+)=", options) if name not in known]
    stats = hf_llmopt.Stats
    lost += [
        f"stats.{name}"
        for name in re.findall(r"(?<!cache\.)\bstats\.(?!py\b)(\w+)", text)
        if not attribute(stats, [name])
    ]
    assert lost == []


def test_the_page_on_errors_has_every_error() -> None:
    """Its rows name the class, and the class of ours or built in that it is a kind of."""
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (.+) \| (.+) \|$", prose(DOCS / "errors.md"), re.MULTILINE)
    tree = {
        name: next(base for base in member.__bases__ if base is not errors.LLMOptError).__name__
        for name, member in vars(errors).items()
        if inspect.isclass(member) and issubclass(member, errors.LLMOptError) and member is not errors.LLMOptError
    }
    assert {name: base for name, base, *_ in rows} == tree
    assert len(rows) == len(tree)


# ------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("page", PAGES, ids=called)
def test_figures_are_those_of_their_reports(page: Path) -> None:
    text = page.read_text("utf-8")
    begun, ended = (len(re.findall(rf"^<!-- {mark}", text, re.MULTILINE)) for mark in ("figures:", "end of figures"))
    assert begun == ended == len(pages.FIGURES.findall(text))
    assert text == pages.filled(text, page.parent), "`make figures` writes the figures of all pages"


@pytest.mark.parametrize("picture", sorted(DOCS.glob("results/*.svg")), ids=called)
def test_pictures_are_those_of_their_reports(picture: Path) -> None:
    assert picture.read_text("utf-8") == pages.drawn(picture), "`make figures` draws all pictures"


def typed(text: str) -> list[str]:
    """Figures that stand outside of the marks: intervals, and tables that do not say where else they come from."""
    text = CODE.sub("", pages.FIGURES.sub("", text))
    tables = re.findall(r"^(.*)\n\n(\|.*)\n\|[-:|]*---:", text, re.MULTILINE)
    unmarked = [head for before, head in tables if before not in ELSEWHERE]
    return unmarked + re.findall(r"\d[\d.]* \[\d[\d.]*, \d[\d.]*\]", text)


# What is computed on the page, by a block that runs; and what others have measured, with its source.
ELSEWHERE = ("<!-- worked figures -->", "<!-- published figures -->")


@pytest.mark.parametrize("page", PAGES, ids=called)
def test_measured_figures_are_not_typed(page: Path) -> None:
    assert typed(page.read_text("utf-8")) == []


def test_typed_figures_are_found() -> None:
    table = "| a | ms |\n|---|---:|\n| b | 1.0 |\n"
    assert typed(f"Text\n\n{table}") == ["| a | ms |"]
    assert typed(f"<!-- worked figures -->\n\n{table}") == []
    assert typed(f"<!-- figures: results/x.json -->\n\n{table}\n<!-- end of figures -->\n") == []
    assert typed("It is 2.0 [1.9, 2.1] times as fast.") == ["2.0 [1.9, 2.1]"]


def test_every_report_has_tables() -> None:
    for path in sorted(DOCS.glob("results/*.json")):
        assert pages.tables(pages.load(path)), path.name


def test_marks_ask_for_what_is_there(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    mark = "<!-- figures: hops.json, engine -->\nold\n<!-- end of figures -->"
    (tmp_path / "hops.json").write_text((DOCS / "results/hops.json").read_text("utf-8"), "utf-8")
    page.write_text(mark, "utf-8")
    shown = CliRunner().invoke(app, ["bench", "figures", str(tmp_path)])
    assert (shown.exit_code, shown.stdout.split()) == (0, [str(page)])
    assert list(pages.refresh(page)) == []
    assert "the way to an engine" in page.read_text("utf-8")
    assert "all-reduce" not in page.read_text("utf-8")
    with pytest.raises(InvalidOption, match="'the way to an engine'"):
        pages.filled(mark.replace("engine", "motor"), tmp_path)
    (tmp_path / "hops.json").write_text('{"bench": "hops", "passed": false}', "utf-8")
    with pytest.raises(InvalidOption, match="measure it again"):
        pages.filled(mark, tmp_path)
    (tmp_path / "hops.json").write_text('{"bench": "hopps"}', "utf-8")
    with pytest.raises(InvalidOption, match="Did you mean 'hops'"):
        pages.filled(mark, tmp_path)


# -------------------------------------------------------------------------------------------------- what options exist


def test_the_quickstart_lists_all_options_and_backends() -> None:
    """Options of calibration and of files stand on the page of their part, to which the quickstart points."""
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (DOCS / "quickstart.md").read_text("utf-8").splitlines()
        if line.startswith("|")
    ]
    listed: dict[str, set[str]] = {}
    section = ""
    for row in rows:
        if len(row) == 4:
            section = row[0].strip("`") or section
            listed.setdefault(section, set()).update(re.findall(r"`(\w+)`", row[1]))
    for section, kind in SECTIONS_OF_KEYWORD.items():
        names = {field.name for field in dataclasses.fields(kind)}
        if section == "quantization":
            assert listed[section] < names
        else:
            assert listed[section] == names, section
    top = {field.name for field in dataclasses.fields(hf_llmopt.LLMOptConfig)} - set(SECTIONS_OF_KEYWORD)
    assert listed["top level"] == top
    backends = {row[0].strip('`"') for row in rows if len(row) == 2 and row[0].startswith('`"')}
    assert backends == set(hf_llmopt.AttentionConfig.__dataclass_fields__["backend"].metadata["choices"])
