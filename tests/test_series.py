"""The six parts of the series have one form: a page that teaches and a notebook."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import hf_llmopt

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PARTS = ("kv_cache", "prompt_cache", "quantization", "flash_attention", "speculative", "continuous_batching")
HEADINGS = [
    "The problem in one picture",
    "Theory",
    "Worked numbers",
    "How it is used",
    "How it is built here",
    "When it helps, and when it does not",
    "Measured",
    "Exercises",
    "References",
]


def sections(page: str) -> dict[str, str]:
    """What stands below each heading of the second level."""
    parts = re.split(r"^## (.+)$", page, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture(params=enumerate(PARTS, 1), ids=PARTS)
def part(request: pytest.FixtureRequest) -> tuple[int, str]:
    """Number and text of a part's page."""
    number, name = request.param
    return number, (DOCS / f"{name}.md").read_text("utf-8")


def test_pages_have_one_form(part: tuple[int, str]) -> None:
    number, page = part
    assert page.startswith(f"# Part {number}: ")
    assert list(sections(page)) == HEADINGS


def test_pages_hold_what_their_headings_promise(part: tuple[int, str]) -> None:
    found = sections(part[1])
    assert "Llama-3-8B" in found["Worked numbers"]
    assert "Qwen3-8B" in found["Worked numbers"]
    assert "```output\n" in found["Worked numbers"], "numbers are computed from the configs"
    assert "](../hf_llmopt/" in found["How it is built here"]
    assert "It helps" in found["When it helps, and when it does not"]
    assert "It does not help" in found["When it helps, and when it does not"]
    assert len(re.findall(r"^- .*(?:\n  .*)*\b(?:19|20)\d\d\b", found["References"], re.MULTILINE)) >= 3


def test_pictures_are_as_drawn(part: tuple[int, str]) -> None:
    drawn = runpy.run_path(str(DOCS / "images" / "draw.py"))["PICTURES"]
    assert [draw.__name__ for draw in drawn] == list(PARTS)
    number, page = part
    draw = drawn[number - 1]
    assert (DOCS / "images" / f"{draw.__name__}.svg").read_text("utf-8") == str(draw()), "run docs/images/draw.py"
    assert f"](images/{draw.__name__}.svg)" in sections(page)["The problem in one picture"]


def test_exercises_have_solutions(part: tuple[int, str]) -> None:
    exercises = sections(part[1])["Exercises"]
    numbers = [int(number) for number in re.findall(r"^(\d+)\. \*\*", exercises, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert 3 <= len(numbers) <= 5
    solutions = re.findall(
        r'<details markdown="1"><summary>Solution</summary>\n\n.+?\n\n</details>', exercises, re.DOTALL
    )
    assert len(solutions) == len(numbers)
    assert all("```python" in solution for solution in solutions)


# ----------------------------------------------------------------------------------------------------------- notebooks

NOTEBOOKS = [ROOT / "examples" / "notebooks" / f"{number:02}_{name}.ipynb" for number, name in enumerate(PARTS, 1)]
# Runs a notebook in a kernel of its own, and says what its last cell shows.
RUN = """
import json, sys
import nbformat
from nbclient import NotebookClient

book = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(book, timeout=300, kernel_name="python3").execute()
print(json.dumps([kind for output in book.cells[-1].outputs for kind in output.get("data", ())]))
"""


def called(path: Path) -> str:
    return path.name


def test_every_notebook_is_a_parts() -> None:
    assert sorted((ROOT / "examples" / "notebooks").iterdir()) == NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=called)
def test_notebooks_are_clean(path: Path) -> None:
    """As they are committed: they teach in few cells, parse, hold no outputs, and end in a plot."""
    book = json.loads(path.read_text("utf-8"))
    assert (book["nbformat"], book["metadata"]["kernelspec"]["name"]) == (4, "python3")
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in book["cells"]]
    assert 8 <= len(cells) <= 15
    assert [cell for cell in book["cells"] if cell.get("outputs") or cell.get("execution_count")] == []
    assert cells[0][0] == "markdown"
    assert cells[-1][0] == "code"
    assert "plt.subplots(" in cells[-1][1]
    assert cells[-1][1].endswith("plt.show()")
    for kind, text in cells:
        if kind == "code":
            compile(text, path.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        else:
            links = re.findall(r"\]\(([^)#\s]+)", text)
            assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=called)
def test_notebooks_run(path: Path, tmp_path: Path) -> None:
    for package in ("ipykernel", "matplotlib", "nbclient"):  # `make test-all` installs them
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    own = dict.fromkeys(("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"), str(tmp_path))
    own |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # on a busy machine threads wait for one another
    path_of_ours = os.pathsep.join([str(Path(hf_llmopt.__file__).parent.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path)],
        env={**os.environ, **own, "PYTHONPATH": path_of_ours},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert "image/png" in json.loads(done.stdout.splitlines()[-1])
