"""The only file that knows rich: tables, panels, progress. Plain text when piped or when NO_COLOR is set."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

SIDE_BY_SIDE = 110  # columns of a terminal on which two panels of code fit beside one another


def console(stderr: bool = False) -> Console:
    """A console on stdout or stderr as they are now."""
    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def is_plain(stderr: bool = False) -> bool:
    """Whether to write plain text: the stream is no terminal, or NO_COLOR is set."""
    return not console(stderr).is_terminal or bool(os.environ.get("NO_COLOR"))


def talks() -> bool:
    """Whether somebody watches stderr."""
    return console(stderr=True).is_terminal


# ------------------------------------------------------------------------------------------------------------ one line


def write(text: str) -> None:
    """Write a piece of generated text to stdout, at once and as it is."""
    print(text, end="", flush=True)


def say(text: str = "") -> None:
    """Write a line to stdout."""
    print(text, flush=True)


def talk(text: str) -> None:
    """Write a line to stderr: what is not the command's result."""
    if is_plain(stderr=True):
        print(text, file=sys.stderr, flush=True)
    else:
        console(stderr=True).print(Text(text, "dim"))


def warn(text: str) -> None:
    """Write a warning to stderr."""
    _label("warning", "yellow", text)


def fail(text: str) -> None:
    """Write an error to stderr, on one line."""
    _label("error", "bold red", " ".join(text.split()))


def _label(label: str, style: str, text: str) -> None:
    if is_plain(stderr=True):
        print(f"{label}: {text}", file=sys.stderr, flush=True)
    else:
        console(stderr=True).print(Text(f"{label}: ", style).append(text, "default"))


def first_line(error: BaseException) -> str:
    """The first sentence of a long message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def emit(report: Any) -> None:
    """Write JSON to stdout."""
    print(json.dumps(report, indent=2, ensure_ascii=False), flush=True)


def emit_line(report: Any) -> None:
    """Write JSON to stdout on one line."""
    print(json.dumps(report, ensure_ascii=False), flush=True)


def save(path: Path, report: Any) -> None:
    """Write JSON to a file, which holds what it held before or all that is new, whenever the process ends.

    Raises:
        OSError: It cannot be written.
    """
    plain = path.is_file() or not path.exists()  # no pipe or device
    target = path.with_name(path.name + ".tmp") if plain else path
    try:
        target.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if plain:
            os.replace(target, path)
    except OSError:
        if plain:
            target.unlink(missing_ok=True)
        raise


def verdict(good: bool, text: str) -> None:
    """Write the outcome of a check to stdout."""
    if is_plain():
        say(text)
    else:
        console().print(Text(("✓ " if good else "✗ ") + text, "bold green" if good else "bold red"))


# ------------------------------------------------------------------------------------------------------------- figures


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1, caption: str = "") -> None:
    """Write a table to stdout.

    Args:
        title: One line above; may be empty.
        columns: Headings.
        rows: Cells as text.
        names: How many of the first columns are names, which stand on the left; figures stand on the right.
        caption: Below; may be empty.
    """
    if is_plain():
        _plain_table(title, columns, rows, names, caption)
        return
    view = Table(title=title or None, title_justify="left", title_style="bold", header_style="bold", box=box.ROUNDED)
    for index, column in enumerate(columns):
        view.add_column(Text(column), justify="left" if index < names else "right", overflow="fold")
    for row in rows:
        view.add_row(*map(Text, row))
    target = console()
    target.print(view, soft_wrap=False)
    if caption:
        target.print(Text(caption, "dim"), soft_wrap=False)


def _plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], names: int, caption: str) -> None:
    lines = [columns, *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    if title:
        say(title)
    for line in lines:
        cells = [
            cell.ljust(width) if index < names else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        say("  ".join(cells).rstrip())
    if caption:
        say(caption)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar on stderr while something runs.

    Gives a function to call after each of `total` steps with what it was, or after several with their number too.
    """
    if is_plain(stderr=True):
        yield lambda name, steps=1: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn after each step only: a thread that draws meanwhile would take its time from what is measured.
    with Progress(*columns, console=console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task(what, total=total)
        bar.refresh()
        yield lambda name, steps=1: bar.update(task, advance=steps, description=f"{what}: {name}", refresh=True)


# ---------------------------------------------------------------------------------------------------------- live texts


class Texts:
    """Texts that grow: panels of highlighted Python on a terminal, else each text under its name as it comes.

    Args:
        names: The texts' names, in the order in which they will grow.
        beginning: What every text begins with.
        quiet: Show nothing.
    """

    def __init__(self, names: Sequence[str], beginning: str, quiet: bool = False) -> None:
        self.texts = dict.fromkeys(names, beginning)
        self.beginning = beginning
        self.quiet = quiet
        self.plain = is_plain()
        self._written: str | None = None
        self._live: Live | None = None

    def __enter__(self) -> Texts:
        if not self.quiet and not self.plain:
            # The view is drawn by a thread of rich some times a second, not for every token.
            self._live = Live(get_renderable=self._view, console=console(), refresh_per_second=12)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._written is not None:
            say("\n")

    def writer(self, name: str) -> Callable[[str], None]:
        """The function that makes one text grow."""

        def write_piece(piece: str) -> None:
            self.texts[name] += piece
            if self._live is None and not self.quiet:
                if self._written != name:
                    write(("\n\n" if self._written else "") + f"--- {name}\n{self.beginning}")
                    self._written = name
                write(piece)

        return write_piece

    def _view(self) -> RenderableType:
        panels = [
            Panel(
                Syntax(text.rstrip("\n"), "python", theme="ansi_dark", background_color="default", word_wrap=True),
                title=name,
                title_align="left",
                border_style="green" if name != next(iter(self.texts)) else "blue",
            )
            for name, text in self.texts.items()
        ]
        width = console().width
        if width < SIDE_BY_SIDE:
            return Group(*panels)
        return Columns(panels, width=width // len(panels) - 1, expand=False)
