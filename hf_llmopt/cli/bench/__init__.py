"""`hf-llmopt bench`: one command for each part, all against stock transformers."""

from __future__ import annotations

import typer

from ..command import Command, ModelCommand
from .all import every
from .compare import compare
from .continuous_batching import continuous_batching
from .cpu import cpu
from .figures import figures
from .flash_attention import flash_attention
from .hops import hops
from .kv_cache import kv_cache
from .peers import peers
from .prompt_cache import prompt_cache
from .quantization import quantization
from .serve import serve
from .speculative import speculative

app = typer.Typer(help="Measure a part against stock transformers, with the tokens compared.", no_args_is_help=True)
app.command("all", cls=ModelCommand)(every)
app.command("kv_cache", cls=ModelCommand)(kv_cache)
app.command("prompt_cache", cls=ModelCommand)(prompt_cache)
app.command("continuous_batching", cls=ModelCommand)(continuous_batching)
app.command("quantization", cls=ModelCommand)(quantization)
app.command("flash_attention", cls=ModelCommand)(flash_attention)
app.command("speculative", cls=ModelCommand)(speculative)
app.command("serve", cls=ModelCommand)(serve)
app.command("hops", cls=ModelCommand)(hops)
app.command("cpu", cls=ModelCommand)(cpu)
app.command("peers", cls=ModelCommand)(peers)
app.command("compare", cls=Command)(compare)
app.command("figures", cls=Command)(figures)


@app.callback()
def parts() -> None:
    """Measure a part against stock transformers, with the tokens compared."""
