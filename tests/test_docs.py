"""README, docs, docstrings and examples do what they say: every one of them is executed."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import inspect
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import fresh
import pytest
import torch
from typer.testing import CliRunner

import hf_llmopt
from hf_llmopt.cli import app

ROOT = Path(__file__).parent.parent
PACKAGE = Path(hf_llmopt.__file__).parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
OPTIONAL = {"fastapi", "llguidance", "matplotlib", "prometheus_client", "ray", "triton", "uvicorn"}  # may be absent


class Block(NamedTuple):
    """A fenced block of a page: its language, its text, and the line on which the text starts."""

    language: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a Markdown page, in order."""
    found, lines, opened = [], page.splitlines(), None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened = number
        else:
            language = lines[opened][3:].split(" ")[0]
            found.append(Block(language, "\n".join(lines[opened + 1 : number]) + "\n", opened + 1))
            opened = None
    assert opened is None, f"the block that starts on line {opened} is not closed"
    return found


def called(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(autouse=True)
def undisturbed() -> Iterator[None]:
    """What an example sets or uninstalls ends with it."""
    threads, mode = torch.get_num_threads(), torch.is_grad_enabled()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(mode)
    hf_llmopt.install()


# --------------------------------------------------------------------------------------------------------------- pages


def test_blocks_are_found() -> None:
    page = "a\n```python\nx = 1\n```\n```console\n$ y\n```\n"
    assert blocks(page) == [Block("python", "x = 1\n", 2), Block("console", "$ y\n", 5)]


@pytest.mark.usefixtures("cheap_guesses")
@pytest.mark.parametrize("page", PAGES, ids=called)
def test_python_blocks_run(page: Path) -> None:
    """The blocks of a page share one namespace, as if typed one after the other; a failure shows the page's line.

    An `output` block holds what the block before it prints.
    """
    names = {"__name__": "__main__"}
    for block in blocks(page.read_text("utf-8")):
        if block.language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
        elif block.language == "output":
            assert block.text == printed.getvalue(), f"{called(page)}, line {block.line + 1}"


def shell_lines(page: Path) -> Iterator[tuple[str, int]]:
    for block in blocks(page.read_text("utf-8")):
        if block.language in ("bash", "console", "sh"):
            for number, line in enumerate(block.text.splitlines(), block.line + 1):
                yield line.removeprefix("$ "), number


COMMANDS = [
    pytest.param(line, id=f"{called(page)}:{number}")
    for page in PAGES
    for line, number in shell_lines(page)
    if line.startswith("hf-llmopt ")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_exist(line: str) -> None:
    """`--help` after the whole line: the subcommand and each of its options must exist."""
    words = shlex.split(line, comments=True)[1:]
    words = words[: next((n for n, word in enumerate(words) if word in ("|", ">", "&&")), len(words))]
    done = CliRunner().invoke(app, [*words, "--help"])
    assert done.exit_code == 0, done.output


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    asked = {
        word
        for page in PAGES
        for word in re.findall(r"`make ([a-z-]+)", page.read_text("utf-8"))
        + [line.split()[1] for line, _ in shell_lines(page) if line.startswith("make ")]
    }
    assert {"demo", "test"} <= asked <= targets


# ---------------------------------------------------------------------------------------------------------- docstrings


def modules_with_examples() -> Iterator[str]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "__main__.py" and ">>> " in path.read_text("utf-8"):
            yield ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("name", list(modules_with_examples()))
def test_docstring_examples_run(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        runner.run(test, out=report.append)
    assert runner.tries
    assert not runner.failures, "".join(report)


def test_docstrings_hold_no_other_examples() -> None:
    """Examples stand after `>>>`, so that the test above runs them all."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            described = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            if described and "```python" in (ast.get_docstring(node) or ""):
                found.append(f"{path.relative_to(ROOT)}: {getattr(node, 'name', 'module')}")
    assert found == []


def test_public_names_have_an_example() -> None:
    def wants_one(member: object) -> bool:
        if inspect.isclass(member):
            return not issubclass(member, BaseException)
        return inspect.isfunction(member)

    public = {name: getattr(hf_llmopt, name) for name in hf_llmopt.__all__}
    without = [n for n, member in public.items() if wants_one(member) and ">>> " not in (inspect.getdoc(member) or "")]
    assert without == []


# ------------------------------------------------------------------------------------------------------------ examples


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("example", EXAMPLES, ids=called)
def test_example_runs(example: Path, tmp_path: Path) -> None:
    done = fresh.run(str(example), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip(), "an example shows something"
    assert list(tmp_path.iterdir()) == [], "an example leaves no files behind"
