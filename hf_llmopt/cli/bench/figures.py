"""`hf-llmopt bench figures`: the tables and pictures of Markdown pages, from the reports that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import ui
from ..command import UserError


def figures(
    pages: Annotated[
        list[Path] | None, typer.Argument(help="Markdown pages, or folders of them; docs by default.")
    ] = None,
) -> None:
    """Write the figures of Markdown pages again, from the reports that they name between `<!-- figures: ... -->`.

    Pictures `results/NAME.svg` beside the pages are drawn from `results/NAME.json`. Prints the files that changed.
    """
    from hf_llmopt.bench.pages import refresh

    for path in pages or [Path("docs")]:
        if not path.exists():
            raise UserError(f"there is no {str(path)!r}: give a Markdown page, or a folder of them")
        for changed in refresh(path):
            ui.say(str(changed))
