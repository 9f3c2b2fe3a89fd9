"""What `/openapi.json` says of the routes: their bodies, answers and errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from .schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

Schema = dict[str, Any]
PREFIX = "#/components/schemas/"
BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
EXAMPLES: dict[str, list[Schema]] = {
    "/v1/completions": [
        {"prompt": "import os\n", "max_tokens": 8, "temperature": 0},
        {"prompt": [[1, 2, 3]], "max_tokens": 2, "n": 2, "seed": 7, "logprobs": 2, "echo": True},
        {
            "prompt": ["def main(", "class A"],
            "max_tokens": 4,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ],
    "/v1/chat/completions": [
        {"messages": [{"role": "user", "content": "def main("}], "max_tokens": 8, "stop": ["\n"]},
        {"messages": [{"role": "user", "content": "def"}], "max_tokens": 2, "logprobs": True, "top_logprobs": 2},
    ],
    "/tokenize": [{"prompt": "import os"}, {"messages": [{"role": "user", "content": "import os"}]}],
    "/detokenize": [{"tokens": [1, 2, 3]}],
}
TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
IDS: Schema = {"type": "array", "items": COUNT}
ERRORS = {
    400: "The request is not understood, or asks for what is not allowed.",
    401: "There is no valid key.",
    404: "There is no such model.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    421: "The server does not go by this name.",
    429: "The line is full; `Retry-After` says when to come again.",
    500: "The server failed.",
    503: "The server is about to stop.",
    504: "The answer was not whole before its deadline.",
}
POSTED = (400, 404, 408, 413, 415, 429, 500, 504)  # beside those that every route has, where one asks for something


def _object(**fields: Schema) -> Schema:
    """An object that has these fields, and maybe others."""
    return {"type": "object", "properties": fields, "required": list(fields)}


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


ERROR = _object(error=_object(message=TEXT, type=TEXT, param=_nullable(TEXT), code=_nullable(TEXT)))
USAGE = _object(
    prompt_tokens=COUNT,
    completion_tokens=COUNT,
    total_tokens=COUNT,
    prompt_tokens_details=_object(cached_tokens=COUNT),
)
MODEL = _object(id=TEXT, object={"const": "model"}, created=COUNT, owned_by=TEXT, max_model_len=COUNT)
LOGPROB: Schema = {"type": "number", "maximum": 1e-3}  # rounding may lift 0
TOKEN = _object(token=TEXT, logprob=LOGPROB, bytes=_list({"type": "integer", "minimum": 0, "maximum": 255}))
COMPLETION = _object(
    id=TEXT,
    object={"const": "text_completion"},
    created=COUNT,
    model=TEXT,
    choices=_list(
        _object(
            index=COUNT,
            text=TEXT,
            logprobs=_nullable(
                _object(
                    tokens=_list(TEXT),
                    token_logprobs=_list(_nullable(LOGPROB)),
                    top_logprobs=_list(_nullable({"type": "object", "additionalProperties": LOGPROB})),
                    text_offset=IDS,
                )
            ),
            finish_reason={"enum": ["stop", "length"]},
        )
    ),
    usage=USAGE,
)
CALL = _object(id=TEXT, type={"const": "function"}, function=_object(name=TEXT, arguments=TEXT))
MESSAGE = _object(role={"const": "assistant"}, content=_nullable(TEXT))
MESSAGE["properties"]["tool_calls"] = _list(CALL)
CHAT = _object(
    id=TEXT,
    object={"const": "chat.completion"},
    created=COUNT,
    model=TEXT,
    choices=_list(
        _object(
            index=COUNT,
            message=MESSAGE,
            logprobs=_nullable(_object(content=_list({"allOf": [TOKEN, _object(top_logprobs=_list(TOKEN))]}))),
            finish_reason={"enum": ["stop", "length", "tool_calls"]},
        )
    ),
    usage=USAGE,
)
ANSWERS: dict[str, Schema] = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
    "/tokenize": _object(count=COUNT, max_model_len=COUNT, tokens=IDS),
    "/detokenize": _object(prompt=TEXT),
    "/v1/models": _object(object={"const": "list"}, data=_list(MODEL)),
    "/v1/models/{name}": MODEL,
    "/health": _object(status={"const": "ok"}),
}


def describe(app: FastAPI, keys: bool) -> None:
    """Complete what the framework writes: it does not see what the routes read and answer.

    Args:
        app: With all routes.
        keys: Whether a key is asked for.
    """
    schema = app.openapi()  # kept by the app, which serves this very object
    schemas: Schema = {"Error": ERROR}
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            operation |= _operation(path, method, keys, schemas)
    schema["components"] = {"schemas": schemas}
    if keys:
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}


def _operation(path: str, method: str, keys: bool, schemas: Schema) -> Schema:
    watched = path == "/health"
    statuses = (401,) * keys * (not watched) + (POSTED if method == "post" else ()) + (421, 503)
    if path == "/v1/models/{name}":
        statuses += (404,)
    said: Schema = {"responses": {"200": _answer(path)}}
    for status in sorted(statuses):
        drains = watched and status == 503
        content = _object(status={"const": "draining"}) if drains else {"$ref": PREFIX + "Error"}
        said["responses"][str(status)] = {
            "description": ERRORS[status],
            "content": {"application/json": {"schema": content}},
        }
    if keys and not watched:
        said["security"] = [{"key": []}]
    if path == "/v1/models/{name}":
        said["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": TEXT}]
    if path in BODIES:
        body = BODIES[path].model_json_schema(ref_template=PREFIX + "{model}")
        schemas.update(body.pop("$defs", {}))
        schemas[BODIES[path].__name__] = body
        examples = {f"{number}": {"value": value} for number, value in enumerate(EXAMPLES[path], 1)}
        described = {"schema": {"$ref": PREFIX + BODIES[path].__name__}, "examples": examples}
        said["requestBody"] = {"required": True, "content": {"application/json": described}}
    return said


def _answer(path: str) -> Schema:
    content: Schema = {"application/json": {"schema": ANSWERS.get(path, {})}}
    if path == "/metrics":
        content = {"text/plain": {"schema": TEXT}}
    if ANSWERS.get(path) in (COMPLETION, CHAT):
        content["text/event-stream"] = {}  # there are no schemas of events before OpenAPI 3.2
    return {"description": "The answer.", "content": content}
