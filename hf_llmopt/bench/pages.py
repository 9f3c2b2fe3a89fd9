"""Figures of Markdown pages: tables between two marks, made from the report that the first mark names.

```
<!-- figures: results/kv_cache.json -->
what stands here is replaced by the report's tables
<!-- end of figures -->
```

The file is named from the page's folder. `results/serve.json, overhead` takes one table only: the one whose title
contains "overhead". A picture `results/kv_cache.svg` is drawn from the report beside it, `results/kv_cache.json`.
`hf-llmopt bench figures` writes all of it again; a test holds that nothing would change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import InvalidOption, unknown
from . import (
    all_tables,
    continuous_batching_tables,
    cpu_tables,
    eviction,
    flash_attention,
    flash_attention_cpu,
    gpu_tables,
    hops_tables,
    kv_cache_long,
    models,
    offload,
    peers,
    plots,
    prompt_cache,
    quantization,
    report,
    serve_tables,
    slide,
    speculative,
    speculative_oracle,
)
from .report import Table, markdown

Report = dict[str, Any]

# By `"bench"` of a report.
TABLES: Mapping[str, Callable[[Report], list[Table]]] = {
    "all": all_tables.tables,
    "continuous_batching": continuous_batching_tables.tables,
    "cpu": cpu_tables.tables,
    "decode on a GPU": gpu_tables.decoding,
    "eviction": lambda found: [eviction.table(found)],
    "flash attention": flash_attention.tables,
    "flash attention on a CPU": flash_attention_cpu.tables,
    "hops": hops_tables.tables,
    "kv_cache": lambda found: [report.table(found)],
    "kv_cache --long": kv_cache_long.tables,
    "kv_cache --offload": offload.tables,
    "models": models.tables,
    "peers": peers.tables,
    "prompt_cache": lambda found: [prompt_cache.table(found)],
    "quantization": quantization.tables,
    "products of a layer on a GPU": gpu_tables.layers,
    "quantized kernels": gpu_tables.products,
    "serve": serve_tables.tables,
    "speculative": lambda found: [speculative.table(found)],
    "speculative_oracle": speculative_oracle.tables,
}
PICTURES: Mapping[str, Callable[[Report], str]] = {
    "all": slide.slide,
    "continuous_batching": lambda found: plots.schedule(found["timeline"]),
    "flash attention on a CPU": lambda found: plots.prompts(found["prompts"]),
    "kv_cache --long": plots.page_formats,
    "serve": lambda found: plots.served(found["points"]),
    "speculative": plots.speculation,
}
DARK: Mapping[str, Callable[[Report], str]] = {"all": partial(slide.slide, theme="dark")}  # `results/NAME-dark.svg`
FIGURES = re.compile(
    r"^<!-- figures: (?P<file>[^,\n]+?)(?:, (?P<title>.+?))? -->\n(?P<shown>.*?)^<!-- end of figures -->$",
    re.MULTILINE | re.DOTALL,
)


def readable(text: str, path: Path, benches: Iterable[str] = TABLES) -> Report:
    """A report from its text, whose tables can be made.

    Args:
        text: JSON.
        path: Where it stood, for messages.
        benches: The benchmarks whose reports are wanted.

    Raises:
        InvalidOption: It is no report, one of another benchmark, or one that lacks what the tables show.
    """
    found, wanted = report.parsed(text, path), list(benches)
    name = found["bench"]
    if name not in wanted:
        raise unknown(f"{path}: the benchmark", name, wanted)
    try:
        for view in TABLES[name](found):
            markdown(view)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InvalidOption(
            f"{path} has not what a report of {name!r} has ({type(error).__name__}: {error}): another version wrote "
            "it, or it was changed. Measure again."
        ) from error
    return found


def load(path: Path) -> Report:
    """A report that was saved and passed.

    Raises:
        InvalidOption: It did not pass, or as `readable`.
    """
    text = _text(path)
    if not report.parsed(text, path).get("passed", True):
        raise InvalidOption(f"{path}: its results were wrong, so its figures are not shown; measure it again")
    return readable(text, path)


def tables(found: Report, title: str | None = None) -> list[Table]:
    """The tables of a report.

    Args:
        found: As `load` returned it.
        title: Only the table whose title contains this.

    Raises:
        InvalidOption: There is no such table, or more than one.
    """
    made = TABLES[found["bench"]](found)
    chosen = [table for table in made if title is None or title in table.title]
    if title is not None and len(chosen) != 1:
        raise unknown("one table whose title contains", title, [table.title for table in made])
    return chosen


def filled(page: str, folder: Path) -> str:
    """A page with the figures that its marks ask for.

    Args:
        page: Markdown.
        folder: Where the page stands; its marks name files from there.

    Raises:
        InvalidOption: A mark asks for what is not there, or for a report that did not pass.

    Example:
        >>> from pathlib import Path
        >>> from hf_llmopt.bench.pages import filled
        >>> filled("No marks.", Path())
        'No marks.'
    """

    def fill(mark: re.Match[str]) -> str:
        shown = "\n\n".join(markdown(table).strip() for table in tables(load(folder / mark["file"]), mark["title"]))
        first = mark[0].partition("\n")[0]
        return f"{first}\n\n{shown}\n\n<!-- end of figures -->"

    return FIGURES.sub(fill, page)


def refresh(path: Path) -> Iterator[Path]:
    """Write a page, or all pages of a folder and the pictures in its `results`, with the figures of their reports.

    Yields:
        Files that have changed.

    Raises:
        InvalidOption: As `filled`.
    """
    pages = [path] if path.is_file() else sorted(path.rglob("*.md"))
    for page in pages:
        yield from _write(page, filled(_text(page), page.parent))
    for picture in sorted(path.glob("results/*.svg")):
        yield from _write(picture, drawn(picture))


def drawn(picture: Path) -> str:
    """What a picture should look like, from the report of its name.

    Raises:
        InvalidOption: There are no pictures of such reports.
    """
    dark = picture.stem.endswith("-dark")
    found = load(picture.with_name(picture.stem.removesuffix("-dark") + ".json"))
    drawings = DARK if dark else PICTURES
    if found["bench"] not in drawings:
        raise unknown(f"{picture}: a picture of", found["bench"], drawings)
    return drawings[found["bench"]](found)


def _write(path: Path, text: str) -> Iterator[Path]:
    if _text(path) != text:
        path.write_text(text, "utf-8")
        yield path


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidOption(f"{path} is no text: {error}.") from error
