"""Reports that were cut, changed, or are something else: told in one line, by every command that reads one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from hf_llmopt.bench import comparison, pages
from hf_llmopt.cli import app
from hf_llmopt.errors import InvalidOption

RESULTS = Path(__file__).parent.parent / "docs" / "results"
COMMANDS = {"all": "all", "flash_attention": "flash_attention-cpu", "hops": "hops", "quantization": "quantization"}
COMMANDS |= {"serve": "serve"}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def told(done: Result) -> str:
    """The one line, instead of a traceback."""
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_report_is_told(command: str, tmp_path: Path) -> None:
    saved, whole = tmp_path / "saved.json", (RESULTS / f"{COMMANDS[command]}.json").read_text("utf-8")
    other = next(name for name in pages.TABLES if name != json.loads(whole)["bench"])
    for text, message in (
        (whole[: len(whole) // 2], "is no JSON"),
        ("[]", 'no "bench"'),
        ("null", 'no "bench"'),
        ('{"bench": ["all"]}', "does not exist"),
        (json.dumps({"bench": other}), "does not exist"),
        (json.dumps({"bench": json.loads(whole)["bench"]}), "another version wrote it|whether it .passed"),
        (json.dumps({**json.loads(whole), "passed": None}), "whether it .passed"),
    ):
        saved.write_text(text, "utf-8")
        assert re.search(message, told(run(command, "--report", saved))), text[:80]
    assert run(command, "--report", RESULTS / f"{COMMANDS[command]}.json").exit_code == 0


def test_a_cut_report_is_not_gone_on_with_nor_lost(tmp_path: Path) -> None:
    begun = tmp_path / "all.json"
    for text in ('{"bench": "all", "cases": [', "null"):
        begun.write_text(text)
        assert "no report" in told(run("all", "--quick", "--resume", "--output", begun))
        assert begun.read_text() == text


def test_nothing_is_measured_for_a_folder(tmp_path: Path) -> None:
    assert "is a folder; name a file" in told(run("all", "--quick", "--output", tmp_path))


def test_pages_and_their_reports_may_be_anything(tmp_path: Path) -> None:
    page, report = tmp_path / "page.md", tmp_path / "report.json"
    page.write_text("<!-- figures: report.json -->\n<!-- end of figures -->\n")
    for stored, message in (
        (b"{", "is no JSON"),
        (b"\xff", "is no text"),
        (b'{"bench": "all"}', "another version"),
    ):
        report.write_bytes(stored)
        assert message in told(run("figures", page))
    report.unlink()
    assert "report.json" in told(run("figures", page))
    page.write_bytes(b"\xff")
    assert "is no text" in told(run("figures", page))


def test_what_is_no_number_is_no_figure() -> None:
    one = {"bench": "all", "cases": [{"name": "x", "ms": {"samples": [1.0]}, "a": {"samples": 3}}]}
    one["cases"][0] |= {"b": {"samples": ["1"]}, "c": {"ratio": None, "low": 1, "high": 2}, "d": {"samples": []}}
    one["cases"][0] |= {"e": {"ratio": 0, "low": 0, "high": 0}, "f": {"ratio": 2.0, "low": 0, "high": 3.0}}
    found = comparison.compare(one, {**one, "environment": None})
    assert [entry["what"] for entry in found["figures"]] == ["cases, x, ms"]
    assert [(entry["times"], entry["low"]) for entry in found["ratios"]] == [(1.0, None)]
    with pytest.raises(InvalidOption, match="another version"):
        pages.readable('{"bench": "kv_cache"}', Path("saved.json"))
