"""Draws the picture at the head of each part's page: `python docs/images/draw.py` writes them beside itself.

Colours of middle brightness on no background: they read on light and on dark pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

INK, WORK, KEPT, WRONG = "#808080", "#1f77b4", "#5fa55a", "#d0603a"


class Picture:
    """A drawing that grows part by part.

    Args:
        width: In pixels.
        height: In pixels.
        says: What it shows, for those who do not see it.
    """

    def __init__(self, width: int, height: int, says: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'font-family="sans-serif" font-size="13"><title>{escape(says)}</title>'
        ]

    def text(self, x: float, y: float, text: str, color: str = INK, anchor: str = "start", bold: bool = False) -> None:
        """Text that begins, ends or has its middle (`anchor`) at a place."""
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" fill="{color}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
        )

    def box(
        self, x: float, y: float, width: float, height: float, color: str, text: str = "", filled: bool = True
    ) -> None:
        """A box with a word in it, filled or as an outline."""
        look = f'fill="{color}"' if filled else f'fill="none" stroke="{color}" stroke-width="1.2"'
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" {look}/>')
        if text:
            self.text(x + width / 2, y + height / 2 + 4.5, text, "white" if filled else color, "middle")

    def line(self, x0: float, y0: float, x1: float, y1: float, color: str = INK) -> None:
        """A line from one place to another."""
        self.parts.append(f'<path d="M{x0:g} {y0:g}L{x1:g} {y1:g}" stroke="{color}" stroke-width="1.2"/>')

    def legend(self, y: float, entries: Sequence[tuple[str, bool, str]]) -> None:
        """What colours mean, in one line: colour, filled or not, meaning."""
        x = 10.0
        for color, filled, meaning in entries:
            self.box(x, y - 11, 14, 13, color, filled=filled)
            self.text(x + 20, y, meaning)
            x += 40 + 7 * len(meaning)

    def __str__(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


def kv_cache() -> Picture:
    """Steps of decoding, without a cache and with one."""
    picture = Picture(760, 200, "Without a cache each step computes all tokens, with one only the last")
    words = ["the", "cat", "sat", "on", "the"]
    picture.text(10, 20, "without a cache", bold=True)
    picture.text(400, 20, "with a cache", bold=True)
    for step, answer in enumerate(("on", "the", "mat")):
        y = 34 + 42 * step
        for left, cached in ((10, False), (400, True)):
            for place, word in enumerate(words[: 3 + step]):
                fresh = not cached or step == 0 or place == 2 + step
                picture.box(left + 52 * place, y, 46, 30, WORK if fresh else KEPT, word, filled=fresh)
            picture.text(left + 52 * (3 + step) + 6, y + 20, f"→ {answer}")
    picture.legend(
        188, [(WORK, True, "computed in this step, in all layers"), (KEPT, False, "its keys and values are read")]
    )
    return picture


def prompt_cache() -> Picture:
    """Turns of a conversation, and what of them is found."""
    picture = Picture(760, 190, "Each turn of a conversation begins with all turns before it, which are found")
    pieces = [
        ("system prompt", 130),
        ("question", 80),
        ("answer", 80),
        ("question 2", 80),
        ("answer 2", 80),
        ("q. 3", 60),
    ]
    for turn in range(3):
        y, x = 14 + 44 * turn, 70.0
        picture.text(10, y + 20, f"turn {turn + 1}")
        for place, (name, width) in enumerate(pieces[: 2 + 2 * turn]):
            fresh = place >= 2 * turn if turn == 0 else place == 1 + 2 * turn
            picture.box(x, y, width - 5, 30, WORK if fresh else KEPT, name, filled=fresh)
            x += width
        picture.text(x + 6, y + 20, f"→ answer {turn + 1}" if turn else "→ answer")
    picture.legend(178, [(WORK, True, "computed"), (KEPT, False, "found: computed in the turns before")])
    return picture


def quantization() -> Picture:
    """Weights on a line, the grid they are rounded to, and how long a step reads."""
    picture = Picture(
        760, 230, "Weights are rounded to a grid of sixteen steps, and a step reads a quarter of the bytes"
    )
    weights = [-0.71, -0.53, -0.31, -0.17, -0.02, 0.06, 0.12, 0.31, 0.44, 0.77]
    step = 0.11

    def x(weight: float) -> float:
        return 380 + 380 * weight

    picture.text(10, 20, "weights of a group, 16 bits each", bold=True)
    picture.text(10, 112, "codes of 4 bits, and one scale for the group", bold=True)
    picture.line(x(-0.93), 90, x(0.82), 90)
    for code in range(16):
        at = x(step * (code - 8))
        picture.line(at, 84, at, 96)
        picture.text(at, 134, str(code), anchor="middle")
    for weight in weights:
        code = round(weight / step)
        picture.line(x(weight), 44, x(step * code), 84, WORK)
        picture.parts.append(f'<circle cx="{x(weight):g}" cy="40" r="5" fill="{WORK}"/>')
        picture.parts.append(f'<circle cx="{x(step * code):g}" cy="90" r="5" fill="{KEPT}"/>')
    picture.text(10, 168, "what a step reads", bold=True)
    picture.box(150, 155, 560, 18, WORK, "bfloat16: 16 bits a weight")
    picture.box(150, 180, 560 * 4.125 / 16, 18, KEPT, "int4: 4.125 bits")
    picture.text(
        10,
        222,
        "Each weight is multiplied once for each token: reading takes the time, and fewer bits are fewer milliseconds.",
    )
    return picture


def flash_attention() -> Picture:
    """The matrix of scores, and a tile of it."""
    picture = Picture(
        760, 270, "Attention as defined writes a matrix of scores, flash attention keeps one tile in registers"
    )
    for left, title in ((60, "as it is defined"), (440, "flash attention")):
        picture.text(left, 20, title, bold=True)
        picture.text(left + 80, 44, "keys →", anchor="middle")
        picture.text(left - 8, 66, "queries", anchor="end")
        for row in range(8):
            for column in range(row + 1):
                whole = left == 60
                here = row == 5 and column == 3
                passed = row < 5 or (row == 5 and column < 3)
                color = WRONG if whole else WORK if here else INK
                if whole or here or not passed:
                    picture.box(left + 20 * column, 52 + 20 * row, 17, 17, color, filled=whole or here)
    picture.text(250, 100, "n × n scores:", WRONG)
    picture.text(250, 118, "written, read,", WRONG)
    picture.text(250, 136, "written, read", WRONG)
    picture.text(520, 84, "one tile of scores, in registers", WORK)
    picture.text(520, 102, "(tiles that have passed are gone)")
    picture.line(510, 170, 510, 224)
    for place, name in enumerate(("m  largest score so far", "l  sum of weights so far", "o  output so far")):
        picture.box(60 + 380 * 0.45 + 220 * place - 161, 230, 210, 26, KEPT, name)
    return picture


def speculative() -> Picture:
    """A draft, the pass over it, and what is kept."""
    picture = Picture(760, 240, "Guessed tokens are computed in one pass and kept up to the first wrong one")
    rows = [
        ("text", [("def", INK, False), ("read", INK, False), ("(path)", INK, False), (":", INK, False)], 0),
        ("guessed", [("↵", WORK, False), ("with", WORK, False), ("open", WORK, False)], 4),
        ("one pass", [(":", WORK, True), ("↵", WORK, True), ("with", WORK, True), ("open", WORK, True)], 3),
        ("it chose", [("↵", KEPT, True), ("with", KEPT, True), ("file", KEPT, True), ("–", WRONG, False)], 4),
    ]
    for number, (name, words, first) in enumerate(rows):
        y = 12 + 44 * number
        picture.text(10, y + 20, name)
        for place, (word, color, filled) in enumerate(words):
            picture.box(90 + 70 * (first + place), y, 62, 30, color, word, filled=filled)
    for place in range(4):
        picture.line(90 + 70 * (3 + place) + 40, 130, 90 + 70 * (4 + place) + 22, 144)
    picture.text(
        10,
        212,
        "Each place of the pass says what comes behind it. Two guesses were right, and a token of the model's own",
    )
    picture.text(10, 230, "comes on top: three tokens for reading the weights once.")
    return picture


def continuous_batching() -> Picture:
    """Two padded batches, and the same requests as they come and go."""
    picture = Picture(
        760, 210, "Padded batches wait for their longest row, continuous batching fills each place at once"
    )
    lengths = [(2, 7), (1, 2), (3, 4), (1, 2), (1, 5), (1, 1)]  # tokens of the prompt, new ones
    unit, ends = 19.0, [0, 0, 0]
    picture.text(60, 18, "padded batches of three", bold=True)
    picture.text(460, 18, "three places, planned step by step", bold=True)
    start = 0
    for batch in (lengths[:3], lengths[3:]):
        wide, longest = max(p for p, _ in batch), max(n for _, n in batch)
        for row, (prompt, new) in enumerate(batch):
            x, y = 60 + unit * start, 30 + 40 * row
            picture.box(x, y, unit * (wide + longest) - 3, 30, INK, filled=False)
            picture.box(x + unit * (wide - prompt), y, unit * prompt - 2, 30, KEPT)
            picture.box(x + unit * wide, y, unit * new - 3, 30, WORK, str(row + 1 + (3 if start else 0)))
        start += wide + longest
    for number, (prompt, new) in enumerate(lengths):
        row = min(range(3), key=lambda place: ends[place])
        x, y = 460 + unit * ends[row], 30 + 40 * row
        picture.box(x, y, unit * prompt - 2, 30, KEPT)
        picture.box(x + unit * prompt, y, unit * new - 3, 30, WORK, str(number + 1))
        ends[row] += prompt + new
    for row in range(3):
        picture.text(10, 50 + 40 * row, f"place {row + 1}")
    for left, last in ((60, start), (460, max(ends))):
        picture.line(left + unit * last, 26, left + unit * last, 150)
        picture.text(left + unit * last, 166, f"{last} steps", anchor="end")
    picture.legend(
        198,
        [
            (KEPT, True, "prompt"),
            (WORK, True, "new tokens"),
            (INK, False, "nothing useful: padding, or waiting for the longest"),
        ],
    )
    return picture


PICTURES: tuple[Callable[[], Picture], ...] = (
    kv_cache,
    prompt_cache,
    quantization,
    flash_attention,
    speculative,
    continuous_batching,
)

if __name__ == "__main__":
    for draw in PICTURES:
        (Path(__file__).parent / f"{draw.__name__}.svg").write_text(str(draw()), "utf-8")
