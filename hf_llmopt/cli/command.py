"""What all commands share: errors that a user can mend become one line, and `--llmopt` may stand alone."""

from __future__ import annotations

import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from . import ui


class UserError(Exception):
    """Something the user can mend; the message is the one line that is shown."""


class Command(TyperCommand):
    """A command that ends in one line and exit code 1 where the user can mend what went wrong."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Let `--llmopt` stand without a value, as the keyword may be just `True`."""
        return super().parse_args(ctx, with_value(args))

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        from hf_llmopt.errors import LLMOptError

        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: ui.warn(str(message))
            try:
                return super().invoke(ctx)
            except (UserError, LLMOptError) as error:
                ui.fail(str(error))
                raise typer.Exit(1) from error
            except BrokenPipeError:  # the reader of our output has gone; click knows what to do
                raise
            except OSError as error:  # a file that cannot be read or written
                ui.fail(ui.first_line(error))
                raise typer.Exit(1) from error


def with_value(args: list[str]) -> list[str]:
    """Write every bare `--llmopt` as `--llmopt=true`.

    A word behind it is its value only if it is one: in `generate MODEL --llmopt "def f("` it is the prompt.
    """
    filled: list[str] = []
    for index, word in enumerate(args):
        if word == "--":
            return filled + args[index:]
        bare = word == "--llmopt" and not (index + 1 < len(args) and is_keyword(args[index + 1]))
        filled.append("--llmopt=true" if bare else word)
    return filled


def is_keyword(word: str) -> bool:
    """Whether a word is a form of the keyword."""
    from hf_llmopt.config import PARTS

    return all(name.strip() in {*PARTS, "true", "false"} for name in word.lower().split(","))


def keyword(value: str) -> Any:
    """The value of `llmopt=` that an option's text stands for.

    Raises:
        InvalidOption: It names something that does not exist.
    """
    from hf_llmopt import LLMOptConfig

    known = {"true": True, "false": False}
    wanted = known.get(value.lower(), value)
    LLMOptConfig.parse(wanted)  # before a model is loaded
    return wanted


# Options that several commands have.
Model = Annotated[str, typer.Argument(help="A folder, a name on the hub, or `demo` for the embedded model.")]
Llmopt = Annotated[
    str,
    typer.Option(
        "--llmopt",
        metavar="[true|false|NAMES]",
        help="The keyword: true, false for stock transformers, or names such as kv_cache.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens to generate.")]
Temperature = Annotated[
    float | None, typer.Option(min=0.0, help="0 is greedy. Without it the model's own settings hold.")
]
TopK = Annotated[int | None, typer.Option(min=1, help="Sample from the k most likely tokens.")]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample from the most likely tokens of this mass.")]
Seed = Annotated[int | None, typer.Option(help="Of the noise; the same seed gives the same tokens.")]
Dtype = Annotated[
    str, typer.Option(metavar="auto|float32|bfloat16|float16", help="Type of the weights; auto: as they are stored.")
]
Device = Annotated[str | None, typer.Option(help="As cpu or cuda:0; by default a GPU if there is one.")]
Json = Annotated[bool, typer.Option("--json", help="JSON alone on stdout; talk goes to stderr.")]


def sampling(temperature: float | None, top_k: int | None, top_p: float | None) -> dict[str, Any]:
    """Arguments of `generate` for the options that were given."""
    if temperature == 0:
        return {"do_sample": False}
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    given = {name: value for name, value in given.items() if value is not None}
    return {**given, "do_sample": True} if given else {}
