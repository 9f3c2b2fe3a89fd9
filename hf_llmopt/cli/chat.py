"""`hf-llmopt chat`: a conversation in the terminal, or driven through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import ui
from .command import (
    Device,
    Dtype,
    Json,
    Llmopt,
    MaxNewTokens,
    Model,
    Seed,
    Temperature,
    TopK,
    TopP,
    UserError,
    keyword,
    sampling,
)

if TYPE_CHECKING:
    from hf_llmopt.bench import Run

HELP = "/exit ends, /reset forgets the conversation, /stats shows the last reply's figures, Ctrl-C ends a reply"


def chat(
    model: Model,
    llmopt: Llmopt = "true",
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    device: Device = None,
    json: Json = False,
) -> None:
    """Talk with a model; replies are streamed. Reads lines from stdin, so a conversation can be piped in.

    Uses the tokenizer's chat template; without one the messages follow one another as plain text. With --json every
    reply is one line of JSON.

    Lines that begin with / are commands: /exit ends, /reset forgets the conversation, /stats shows the last reply's
    figures. Ctrl-C ends a reply.
    """
    wanted = keyword(llmopt)

    import torch

    from .figures import figures, line
    from .models import load

    conversation = Conversation(
        *load(model, dtype, device, wanted),
        system,
        {"llmopt": wanted, "max_new_tokens": max_new_tokens, **sampling(temperature, top_k, top_p)},
    )
    if seed is not None:
        torch.manual_seed(seed)
    if sys.stdin.isatty():
        ui.talk(HELP)
    last: Run | None = None
    for said in lines():
        command = said.strip()
        if command == "/exit":
            break
        if command == "/reset":
            conversation.reset()
            ui.talk("the conversation is forgotten")
        elif command == "/stats":
            ui.talk(line(last) if last is not None else "no reply yet")
        elif command.startswith("/"):
            ui.talk(f"there is no command {command.split()[0]}; {HELP}")
        else:
            text, run = conversation.reply(said, quiet=json)
            last = run or last
            if json:
                ui.emit_line({"role": "assistant", "content": text, **(figures(run) if run is not None else {})})


def lines() -> Iterator[str]:
    """What the user says, without empty lines, until the input ends."""
    interactive = sys.stdin.isatty()
    if interactive:
        import contextlib

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() a history and editing
    while True:
        try:
            said = input("> " if interactive else "")
        except EOFError:
            return
        if said.strip():
            yield said


class Conversation:
    """The messages so far, and the model that continues them.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        system: The system message, or `None`.
        arguments: Of `generate`.
    """

    def __init__(self, model: Any, tokenizer: Any, system: str | None, arguments: dict[str, Any]) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.system = system
        self.arguments = arguments
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def reply(self, said: str, quiet: bool = False) -> tuple[str, Run | None]:
        """Add what the user said and the model's answer to the messages.

        Args:
            said: The user's message.
            quiet: Write nothing to stdout.

        Returns:
            The answer and its figures, which are `None` if the user interrupted it.

        Raises:
            UserError: The tokenizer's template does not accept the messages.
        """
        from hf_llmopt import bench

        from .streams import Writer

        self.messages.append({"role": "user", "content": said})
        inputs = self.encode()
        room = getattr(self.model.config, "max_position_embeddings", None)
        if room is not None and inputs["input_ids"].shape[1] >= room:
            ui.warn(f"the conversation is longer than the model's {room} positions; /reset begins anew")
        streamer = Writer(self.tokenizer, (lambda piece: None) if quiet else ui.write)
        try:
            run = bench.generate(self.model, inputs, streamer=streamer, **self.arguments)
        except KeyboardInterrupt:
            run = None
        except Exception:
            self.messages.pop()
            raise
        if not quiet:
            ui.say()
        self.messages.append({"role": "assistant", "content": streamer.text})
        return streamer.text, run

    def encode(self) -> Any:
        """The messages as the model's inputs.

        Raises:
            UserError: The tokenizer's template does not accept the messages.
        """
        if getattr(self.tokenizer, "chat_template", None):
            try:
                inputs = self.tokenizer.apply_chat_template(
                    self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
            except Exception as error:  # a template is a program of the model's author and may raise anything
                raise UserError(f"the chat template refuses these messages: {ui.first_line(error)}") from error
        else:
            text = "\n".join(message["content"] for message in self.messages) + "\n"
            inputs = self.tokenizer(text, return_tensors="pt")
        return {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
