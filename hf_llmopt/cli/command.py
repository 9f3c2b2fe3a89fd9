"""What all commands share: errors that a user can mend become one line, and options that several have."""

from __future__ import annotations

import json
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from . import interrupt, ui


class UserError(Exception):
    """Something the user can mend; the message is the one line that is shown."""


class Command(TyperCommand):
    """A command that ends in one line and exit code 1 where the user can mend what went wrong."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        from hf_llmopt.errors import LLMOptError

        with warnings.catch_warnings(), interrupt.heard():
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


class ModelCommand(Command):
    """A command that generates: it needs the keyword, also where `import hf_llmopt` was told not to add it."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command with the keyword installed."""
        import hf_llmopt

        hf_llmopt.install()
        return super().invoke(ctx)


def keyword(value: str) -> Any:
    """The value of `llmopt=` that an option's text stands for: true, false, names, or a dict as JSON.

    Raises:
        InvalidOption: It names something that does not exist.
        UserError: It is no JSON.
    """
    from hf_llmopt.config import PARTS, PRESETS, LLMOptConfig, place_of
    from hf_llmopt.errors import unknown

    if value.lstrip().startswith("{"):
        try:
            sections = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(
                f"--llmopt {value!r} is no JSON ({error}); a dict looks so: "
                '{"quantization": {"method": "int4", "group_size": 64}}'
            ) from error
        LLMOptConfig.parse(sections)
        return sections

    known = {"true": True, "false": False}
    if value.lower() in known:
        return known[value.lower()]
    for name in value.split(","):
        if name.strip().lower() in known:
            raise UserError(
                f"--llmopt {value!r}: {name.strip()!r} stands alone. Names between commas are parts, as "
                f"prompt_cache,int4; allowed: {', '.join([*PARTS, *PRESETS])}"
            )
        if name.strip() not in PARTS and name.strip() not in PRESETS:
            if (place := place_of(name.strip())) is not None:
                place = place.replace("'", '"')
                raise UserError(
                    f"--llmopt {value!r}: {name.strip()!r} is no part's name; it belongs into JSON: {place}"
                )
            raise unknown("--llmopt value", name.strip(), [*known, *PARTS, *PRESETS])
    LLMOptConfig.parse(value)
    return value


# Options that several commands have.
Model = Annotated[str, typer.Argument(help="A folder, a name on the hub, or `demo` for the embedded model.")]
Llmopt = Annotated[
    str,
    typer.Option(
        "--llmopt",
        metavar="true|false|NAMES|JSON",
        help="The keyword: true, false for stock transformers, latency, throughput, memory, names between commas as "
        "int4,speculative, or JSON.",
    ),
]
ServedLlmopt = Annotated[
    str,
    typer.Option(
        "--llmopt",
        metavar="true|NAMES|JSON",
        help="The keyword: true, latency, throughput, memory, names between commas as int4,speculative, or a dict as "
        'JSON. Prompts are cached unless it is kv_cache, memory or a dict with "prompt_cache": false. false, which is '
        "stock transformers, is refused.",
    ),
]
MaxModelLen = Annotated[
    int | None, typer.Option(min=2, help="Most tokens of prompt and answer; by default the model's positions.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens to generate.")]
Temperature = Annotated[
    float | None, typer.Option(min=0.0, help="0 is greedy. Without it the model's own settings hold.")
]
TopK = Annotated[int | None, typer.Option(min=1, help="Sample from the k most likely tokens.")]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample from the most likely tokens of this mass.")]
Seed = Annotated[int | None, typer.Option(help="Of the noise; the same seed gives the same tokens.")]
TensorParallel = Annotated[
    int,
    typer.Option(min=1, help="Shard the model over so many processes of this machine, each on a GPU if it has any."),
]
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
