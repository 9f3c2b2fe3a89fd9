"""The command `hf-llmopt`: one command per file. What needs torch is imported inside the commands.

Exit codes: 0 ok, 1 an error the user can mend (one line, no traceback) or a check that failed, 2 usage.
"""

from __future__ import annotations

from typing import Annotated

import typer

from . import batch, bench, chat, check, demo, env, eval, generate, quantize, serve
from .command import Command, ModelCommand

app = typer.Typer(
    name="hf-llmopt",
    help="Hugging Face transformers, generating as a serving engine does, with the same tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command("demo", cls=ModelCommand)(demo.demo)
app.command("generate", cls=ModelCommand)(generate.generate)
app.command("chat", cls=ModelCommand)(chat.chat)
app.command("quantize", cls=ModelCommand)(quantize.quantize)
app.command("serve", cls=ModelCommand)(serve.serve)
app.command("batch", cls=ModelCommand)(batch.batch)
app.command("env", cls=Command)(env.env)
app.command("check", cls=ModelCommand)(check.check)
app.add_typer(bench.app, name="bench")
app.add_typer(eval.app, name="eval")


def _version(wanted: bool) -> None:
    if wanted:
        from hf_llmopt import __version__

        typer.echo(f"hf_llmopt {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Hugging Face transformers, generating as a serving engine does, with the same tokens."""


def main() -> None:
    """Run the command line; the console script's entry."""
    app()
