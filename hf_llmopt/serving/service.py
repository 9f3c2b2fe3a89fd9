"""What the routes share: one engine, its tokenizer, and who is served at the moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeVar

import torch

from ..batching import Engine
from ..errors import EngineFull, InvalidOption, InvalidRequest, LLMOptError, NotServed, unknown
from .answer import Answer
from .auth import Keys
from .errors import APIError, of_engine
from .grammar import Grammar, Grammars
from .limits import Limits, answer_length
from .metrics import Metrics
from .prompts import Prompts
from .sampling import arguments, end_tokens
from .schema import Generation
from .text import TextStream
from .tool_formats import NAMES, of_template

T = TypeVar("T")
STALL = 1.0  # seconds for which a request's grammar may hold up the processes of a sharded model
COMPILERS = 2  # threads; those who want no grammar never wait for one


@dataclass(frozen=True)
class Caller:
    """Whose request it is.

    Attributes:
        request_id: In the answer's id, its header and the log.
        key: Name of the API key, or `None` where none is needed.
        began: When it came, of `perf_counter`.
    """

    request_id: str
    key: str | None
    began: float


@dataclass(frozen=True)
class Shown:
    """How many of the most likely tokens are reported for each new and each prompt token; `None` for no figures."""

    new: int | None = None
    prompt: int | None = None


def check_parser(name: str | None) -> None:
    """Refuse a `tool_parser` that there is not.

    Args:
        name: As of `Service`.

    Raises:
        InvalidOption: There is no such parser.
    """
    if name not in (None, "none", *NAMES):
        raise unknown("tool parser", name, [*NAMES, "none"])


class Service:
    """An engine that is served.

    Args:
        engine: Serves all requests; `close` closes it.
        tokenizer: The model's.
        name: What clients call the model.
        limits: What is taken on; by default as many tokens as the model has positions.
        keys: Who is let in.
        log_prompts: Whether prompts stand in the log.
        tool_parser: How the model writes calls of tools, one of `tool_formats.NAMES`, or `"none"` to leave them in the
            text; `None` for what its chat template tells.

    Attributes:
        draining: Whether nobody is let in any longer.
        open: HTTP requests that are being answered.
        unused: Fields of a request that the engine's options ignore.
        crowded: Says whether more connections are open than may be; whoever has them sets it.

    Raises:
        InvalidOption: The model does not say how many positions it has, and no limit does; or it has fewer than the
            limit; or there is no such parser.

    Example:
        >>> from hf_llmopt import Engine, demo
        >>> from hf_llmopt.serving import Service
        >>> model, tokenizer = demo.load()
        >>> service = Service(Engine(model), tokenizer, "demo")
        >>> service.limits.max_model_len
        1024
        >>> service.close()
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        name: str,
        limits: Limits | None = None,
        keys: Keys | None = None,
        log_prompts: bool = False,
        tool_parser: str | None = None,
    ) -> None:
        config: Any = engine.model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        if limits is None:
            if positions is None:
                raise InvalidOption("The model does not say how many positions it has; give Limits(max_model_len=...).")
            limits = Limits(positions)
        if positions is not None and limits.max_model_len > positions:
            raise InvalidOption(
                f"max_model_len={limits.max_model_len} is more than the {positions} positions that the model has. "
                f"Ask for {positions} or fewer."
            )
        check_parser(tool_parser)
        self.engine = engine
        self.name = name
        self.limits = limits
        self.keys = keys or Keys()
        self.log_prompts = log_prompts
        self.tool_parser = tool_parser
        self.unused = () if engine.config.batching.policy == "priority" else ("priority",)
        self.metrics = Metrics(engine, name)
        self.prompts = Prompts(tokenizer, config.vocab_size, limits)
        self.draining = False
        self.open = 0
        self.crowded: Callable[[], bool] = lambda: False
        self.created = int(time.time())
        self._preparing = 0
        self._generation: Any = engine.model.generation_config
        self._ends = end_tokens(self._generation)
        self._grammars: Grammars | None = None
        self._making = Lock()
        self._compiling = ThreadPoolExecutor(COMPILERS, "llmopt-grammar")

    @property
    def summary(self) -> dict[str, Any]:
        """What is served, for the log."""
        model = self.engine.model
        form = of_template(getattr(self.prompts.tokenizer, "chat_template", None), self.tool_parser)
        return {
            "model": self.name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "tensor_parallel": 1 if self.engine.loop.ranks is None else self.engine.loop.ranks.size,
            "max_model_len": self.limits.max_model_len,
            "prompt_cache": self.engine.config.prompt_cache is not None,
            "tool_parser": "none" if form is None else form.name,
        }

    def close(self) -> None:
        """Let nobody in any longer, and end what runs."""
        self.draining = True
        self._compiling.shutdown(wait=False)
        self.engine.close()

    def check_model(self, name: str | None) -> None:
        """Refuse other models than the served one.

        Raises:
            APIError: It is another one.
        """
        if name is not None and name != self.name:
            raise APIError(
                404, f"The model {name!r} does not exist; this server has {self.name!r}.", "model_not_found", "model"
            )

    async def in_thread(self, choices: int, work: Callable[[], T], compiles: bool = False) -> T:
        """Tokenize and submit beside the event loop, if there is room in the line.

        Args:
            choices: Requests that it will be.
            work: What to do.
            compiles: Whether that includes a grammar.

        Raises:
            APIError: There is no room, or the work failed.
        """
        most = self.engine.config.batching.max_waiting
        if choices > most:
            raise APIError(400, f"{choices} answers are more than the {most} that may wait.", "invalid_value", "n")
        if self._preparing + self.engine.waiting + choices > most:
            raise of_engine(EngineFull(f"{most} requests wait already; come again later."))
        self._preparing += choices
        try:
            pool = self._compiling if compiles and not self.draining else None
            return await asyncio.get_running_loop().run_in_executor(pool, work)
        except LLMOptError as error:
            raise of_engine(error) from error
        finally:
            self._preparing -= choices

    def deadline(self, ask: Generation) -> float | None:
        """Seconds that an answer may take, `None` for any."""
        return min((one for one in (ask.deadline, self.limits.deadline) if one is not None), default=None)

    def grammar(self, ask: Generation) -> Grammar | None:
        """What an answer has to be, if that was said.

        Raises:
            APIError: It is nothing that output can be constrained to.
        """
        schema = ask.json_schema
        return None if schema is None else self.compiled(lambda known: known.json_schema(schema), "response_format")

    def compiled(self, compile: Callable[[Grammars], Grammar], param: str) -> Grammar:
        """A grammar.

        Args:
            compile: Compiles it.
            param: The field that asks for it.

        Raises:
            APIError: It cannot be compiled.
        """
        try:
            with self._making:
                if self._grammars is None:  # a large vocabulary takes a second
                    self._grammars = Grammars(self.prompts.tokenizer, self._ends, self.engine.loop.ranks is None)
            return compile(self._grammars)
        except NotServed as error:
            raise APIError(400, f"{param}: {error}", "unsupported_parameter", param) from error
        except InvalidRequest as error:
            raise APIError(400, f"{param}: {error}", "invalid_json_schema", param) from error

    def submit(
        self,
        prompts: Sequence[list[int]],
        ask: Generation,
        most: int | None,
        caller: Caller,
        shown: Shown,
        grammar: Grammar | None = None,
        marks: bool = False,
    ) -> list[Answer]:
        """Submit `ask.n` requests for each prompt.

        Args:
            prompts: Their ids.
            ask: What else was asked for.
            most: Tokens of an answer, `None` for as many as there is room for.
            caller: Whose it is.
            shown: Which log-probabilities it wants.
            grammar: What answers have to be, `None` for anything.
            marks: Whether special tokens are shown whatever was asked for: they tell of calls.

        Raises:
            APIError: A prompt is empty or too long.
            LLMOptError: The engine refuses; then none of them runs.
        """
        lengths = [answer_length(self.limits, len(prompt), most) for prompt in prompts]
        if (ask.min_tokens or 0) > min(lengths):
            raise APIError(
                400, f"min_tokens: at most {min(lengths)}, the longest answer.", "invalid_value", "min_tokens"
            )
        more = arguments(ask, self._generation)
        n = ask.n or 1
        if grammar is not None and self.engine.loop.ranks is not None and grammar.seconds * len(prompts) * n > STALL:
            raise APIError(
                400,
                f"The output's grammar took {grammar.seconds:.2f} s to compile, and each process of this sharded model "
                f"compiles it for each of the {len(prompts) * n} answers while all others wait. Simplify it.",
                "invalid_value",
                "response_format",
            )
        # Greedy answers are all the same, and `generate` refuses to give several.
        together = n if more["do_sample"] else 1
        caches = self.engine.config.prompt_cache is not None  # else nobody shares anything
        answers: list[Answer] = []
        try:
            for prompt, length in zip(prompts, lengths, strict=True):
                for _ in range(n // together):
                    first = self.engine.submit(
                        prompt,
                        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),  # else padding tokens are masked
                        max_new_tokens=max(1, length),
                        num_return_sequences=together,
                        logprobs=shown.new,
                        prompt_logprobs=shown.prompt,
                        salt=ask.cache_salt if caches else None,
                        tenant=caller.key or ask.user or "",
                        deadline=self.deadline(ask),
                        constraint=grammar,
                        **more,
                    )
                    for handle in first.choices:
                        text = TextStream(
                            self.prompts.tokenizer,
                            prompt,
                            ask.stops,
                            ask.skip_special_tokens is not False and not marks,
                            bool(ask.include_stop_str_in_output),
                        )
                        answers.append(
                            Answer(len(answers), prompt, handle, text, self._ends, length, self.metrics, caller.began)
                        )
        except BaseException:
            for answer in answers:
                answer.handle.cancel()
            raise
        return answers
