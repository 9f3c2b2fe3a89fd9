"""What clients may ask for: the bodies of requests. Wrong types are refused; nothing is converted.

Fields that no class names are ignored, as other servers of this API do, and named in the log. Those that would change
the answer and are not supported are refused.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    RootModel,
    Tag,
    field_validator,
    model_validator,
)

from .errors import FieldError

MOST_CHOICES = 128
MOST_STOPS, LONGEST_STOP = 16, 256
MOST_LOGPROBS = 20
MOST_TOOLS = 128
MOST_PROMPTS, MOST_MESSAGES, MOST_PARTS = 2048, 4096, 4096
MOST_BIASES = 300  # as OpenAI has it
TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
UNSUPPORTED = {
    "audio": "sound is not generated",
    "best_of": "only n choices are generated; leave it away",
    "function_call": "use tools",
    "functions": "use tools",
    "guided_choice": "use response_format",
    "guided_grammar": "use response_format",
    "guided_json": "use response_format",
    "guided_regex": "use response_format",
    "prompt_embeds": "give text or token ids",
    "structured_outputs": "use response_format",
    "suffix": "text is only continued, not inserted",
    "use_beam_search": "beams are not searched",
}

Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Token = Annotated[int, Field(ge=0)]
# All lists end with their first wrong item: an error for each of a million items would take seconds and much memory.
FIRST = Field(fail_fast=True)
Tokens = Annotated[list[Token], FIRST]
Name = Annotated[str, Field(min_length=1, max_length=512)]


class Body(BaseModel):
    """A JSON object; `null` means that a field was not given."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class StreamOptions(Body):
    """How to stream."""

    include_usage: bool | None = None


class JSONSchema(Body):
    """What JSON is wanted; `strict` or not, the answer obeys it."""

    name: Name | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class ResponseFormat(Body):
    """What an answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @model_validator(mode="after")
    def _told(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise FieldError(
                "'json_schema' needs the schema, as in {'type': 'json_schema', 'json_schema': {'name': 'point', "
                "'schema': {'type': 'object'}}}",
                "missing_required_parameter",
            )
        return self


class Generation(Body):
    """What completions and chats have in common."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Probability | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], FIRST] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] | None = None
    user: Name | None = None
    cache_salt: Name | None = None
    deadline: Annotated[float, Field(gt=0)] | None = None
    response_format: ResponseFormat | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > MOST_STOPS or not all(0 < len(text) <= LONGEST_STOP for text in stops):
            raise ValueError(f"give at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters")
        return stop

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _few_biases(cls, bias: Any) -> Any:
        if isinstance(bias, dict) and len(bias) > MOST_BIASES:
            raise ValueError(f"give at most {MOST_BIASES} token ids")
        return bias

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        # int() takes signs, underscores and digits of other scripts.
        if bias and not all(t.isascii() and t.isdigit() and len(t) < 10 for t in bias):
            raise ValueError('give token ids, as in {"50": -100}')
        return bias

    @model_validator(mode="after")
    def _supported(self) -> Generation:
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED and value not in (None, False, "none") and not (name == "best_of" and value == 1):
                raise FieldError(f"not supported: {UNSUPPORTED[name]}", param=name)
        if self.stream_options is not None and not self.stream:
            raise FieldError("only allowed with stream=true", "invalid_value", "stream_options")
        if self.min_tokens and self.json_schema is not None:
            raise FieldError("response_format alone says when an answer ends", "invalid_value", "min_tokens")
        return self

    @property
    def stops(self) -> list[str]:
        """The texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def biases(self) -> dict[int, float]:
        """What is added to the scores of tokens."""
        return {int(token): bias for token, bias in (self.logit_bias or {}).items()}

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """The schema of the JSON that an answer has to be, or `None`."""
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        own = wanted.json_schema.schema_ if wanted.type == "json_schema" and wanted.json_schema is not None else None
        return {"type": "object"} if own is None else own

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def _prompt_kind(prompt: Any) -> str:
    """What a prompt is meant to be, so that an error is about that, and the other kinds are not tried."""
    if not isinstance(prompt, list):
        return "text"
    first = prompt[0] if prompt else 0
    return "texts" if isinstance(first, str) else "lists of ids" if isinstance(first, list) else "ids"


class CompletionRequest(Generation):
    """Body of `/v1/completions`."""

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[str], Field(fail_fast=True, max_length=MOST_PROMPTS), Tag("texts")]
        | Annotated[Tokens, Tag("ids")]
        | Annotated[list[Tokens], Field(fail_fast=True, max_length=MOST_PROMPTS), Tag("lists of ids")],
        Discriminator(_prompt_kind),
    ]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    add_special_tokens: bool | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one by one."""
        given: Any = self.prompt
        alone = isinstance(given, str) or not given or isinstance(given[0], int)
        return [given] if alone else list(given)


class Message(Body):
    """One message of a chat; fields that a template may know are handed on to it."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=MOST_PARTS)] | None = None

    @field_validator("content")
    @classmethod
    def _joined(cls, content: str | list[dict[str, Any]] | None) -> str | None:
        if not isinstance(content, list):
            return content
        if not all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in content):
            raise FieldError("only parts of the form {'type': 'text', 'text': '...'} are understood")
        return "\n".join(part["text"] for part in content)


class ChatMessages(Body):
    """What a chat template renders."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MOST_MESSAGES)]
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=MOST_TOOLS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class FunctionName(Body):
    """Which function."""

    name: Name


class NamedTool(Body):
    """The tool that has to be called."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(Generation, ChatMessages):
    """Body of `/v1/chat/completions`."""

    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @field_validator("tools")
    @classmethod
    def _functions(cls, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        names = []
        for tool in tools or ():
            function = tool.get("function") if tool.get("type") == "function" else None
            if not isinstance(function, dict) or not isinstance(function.get("parameters") or {}, dict):
                raise ValueError("a tool is {'type': 'function', 'function': {'name': ..., 'parameters': {...}}}")
            name = function.get("name")
            if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
                raise ValueError("a function's name has 1 to 64 letters, digits, dots, dashes or underscores")
            names.append(name)
        if len(set(names)) < len(names):
            raise ValueError("each function needs a name of its own")
        return tools

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.max_tokens == 0:
            raise FieldError("at least 1", "invalid_value", "max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise FieldError("only allowed with logprobs=true", "invalid_value", "top_logprobs")
        if self.demanded is not None and not (self.functions and set(self.demanded) <= set(self.functions)):
            raise FieldError("needs tools, and names one of them if it names any", "invalid_value", "tool_choice")
        if self.min_tokens and self.demanded is not None:
            raise FieldError("not together with a demanded tool call", "invalid_value", "min_tokens")
        return self

    @property
    def functions(self) -> dict[str, dict[str, Any]]:
        """What may be called: the schema of each function's arguments."""
        if self.tool_choice == "none":
            return {}
        found = [tool["function"] for tool in self.tools or ()]
        return {function["name"]: function.get("parameters") or {} for function in found}

    @property
    def strict(self) -> frozenset[str]:
        """Functions whose arguments are to obey their schemas whoever decides to call them."""
        found = [tool["function"] for tool in self.tools or ()]
        return frozenset(function["name"] for function in found if function.get("strict") is True) & set(self.functions)

    @property
    def demanded(self) -> list[str] | None:
        """Functions of which at least one has to be called, `None` if the model decides."""
        if self.tool_choice == "required":
            return list(self.functions)
        return [self.tool_choice.function.name] if isinstance(self.tool_choice, NamedTool) else None


class TokenizeText(Body):
    """Body of `/tokenize` for a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None


class TokenizeChat(ChatMessages):
    """Body of `/tokenize` for a chat."""

    model: str | None = None


def _kind(body: Any) -> str | None:
    """Which of the two a body of `/tokenize` is meant to be, so that an error is about that one."""
    if not isinstance(body, dict):
        return None
    return "text" if body.get("messages") is None else "chat"


class TokenizeRequest(RootModel[Any]):
    """Body of `/tokenize`."""

    root: Annotated[Annotated[TokenizeChat, Tag("chat")] | Annotated[TokenizeText, Tag("text")], Discriminator(_kind)]

    @model_validator(mode="before")
    @classmethod
    def _one_of_both(cls, body: Any) -> Any:
        if isinstance(body, dict):
            given = [name for name in ("prompt", "messages") if body.get(name) is not None]
            if not given:
                raise FieldError("give `prompt`, or `messages`", "missing_required_parameter", "prompt")
            if len(given) > 1:
                raise FieldError("not together with `messages`", "invalid_value", "prompt")
        return body


class DetokenizeRequest(Body):
    """Body of `/detokenize`."""

    model: str | None = None
    tokens: Tokens
