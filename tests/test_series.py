"""The six parts of the series have one form: a page that teaches and a notebook."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
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
    assert "```text\n" in found["The problem in one picture"] or "![" in found["The problem in one picture"]
    assert "Llama-3-8B" in found["Worked numbers"]
    assert "Qwen3-8B" in found["Worked numbers"]
    assert "```output\n" in found["Worked numbers"], "numbers are computed from the configs"
    assert "](../hf_llmopt/" in found["How it is built here"]
    assert "It helps" in found["When it helps, and when it does not"]
    assert "It does not help" in found["When it helps, and when it does not"]
    assert len(re.findall(r"^- .*(?:\n  .*)*\b(?:19|20)\d\d\b", found["References"], re.MULTILINE)) >= 3


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
