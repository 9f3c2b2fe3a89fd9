"""The server, over a socket: OpenAI's own client, and requests that nobody should send."""

from __future__ import annotations

import asyncio
import gc
import inspect
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
import torch
import typer

import hf_llmopt
from hf_llmopt import demo, errors
from hf_llmopt.cli import app as cli_app
from hf_llmopt.cli.command import keyword

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx2")
openai = pytest.importorskip("openai")
ValidationError = pytest.importorskip("pydantic").ValidationError

from served import Running, make, running  # noqa: E402 - needs the extra

from hf_llmopt.serving import Keys, Limits, create_app, garbage, logs  # noqa: E402
from hf_llmopt.serving import server as server_module  # noqa: E402
from hf_llmopt.serving.app import known_origins  # noqa: E402
from hf_llmopt.serving.errors import APIError, of_engine, of_validation  # noqa: E402
from hf_llmopt.serving.hosts import check_host, known_hosts  # noqa: E402
from hf_llmopt.serving.limits import check_parts  # noqa: E402
from hf_llmopt.serving.schema import (  # noqa: E402
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from hf_llmopt.serving.server import Server  # noqa: E402
from hf_llmopt.serving.text import TextStream  # noqa: E402
from hf_llmopt.serving.written import written  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (demo.path() / "config.json").is_file(), reason="the embedded model's weights are not there"
)
PROMPT = "def read_lines(path):\n    with open(path"
SECRET = "sk-secret"


@pytest.fixture(scope="module")
def pair():
    return demo.load()


@pytest.fixture(scope="module")
def log() -> Iterator[io.StringIO]:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logs.JSONFormatter())
    logs.LOGGER.addHandler(handler)
    logs.LOGGER.setLevel(logging.INFO)
    yield written
    logs.LOGGER.removeHandler(handler)


@pytest.fixture(scope="module")
def served(pair, log) -> Iterator[Running]:
    """One server for most of this file."""
    with running(make(pair, Keys(["sk-first", SECRET]), Limits(1024, max_body_bytes=100_000), max_waiting=64)) as it:
        yield it


@pytest.fixture(scope="module")
def client(served: Running):
    with openai.OpenAI(base_url=served.url + "/v1", api_key=SECRET, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def raw(served: Running):
    with httpx.Client(base_url=served.url, headers={"Authorization": f"Bearer {SECRET}"}, timeout=60) as made:
        yield made


def alone(pair, prompt: str, seed: int | None = None, **arguments) -> list[int]:
    """What `generate` of transformers gives."""
    model, tokenizer = pair
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if seed is not None:
        torch.manual_seed(seed)
    output = model.generate(**inputs, **arguments)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def last(log: io.StringIO) -> dict:
    return json.loads(log.getvalue().splitlines()[-1])


# ---------------------------------------------------------------------------------------------------- OpenAI's client


def test_greedy_completion_is_what_generate_gives(pair, client) -> None:
    answer = client.completions.create(model="demo", prompt=PROMPT, max_tokens=24, temperature=0)
    expected = alone(pair, PROMPT, max_new_tokens=24, do_sample=False)
    assert answer.choices[0].text == pair[1].decode(expected)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 24
    assert answer.usage.prompt_tokens == len(pair[1](PROMPT)["input_ids"])


def test_a_padding_token_in_a_prompt_is_a_token(pair, client) -> None:
    prompt = f"import os\n{pair[1].pad_token}def main("
    expected = pair[1].decode(alone(pair, prompt, max_new_tokens=12, do_sample=False))
    for given in (prompt, pair[1](prompt)["input_ids"]):
        answer = client.completions.create(model="demo", prompt=given, max_tokens=12, temperature=0)
        assert answer.choices[0].text == expected
    client.completions.create(model="demo", prompt=[pair[1].pad_token_id], max_tokens=1)


def test_sampled_completions_are_what_generate_gives(pair, client) -> None:
    answer = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=16, temperature=0.8, top_p=0.9, seed=7, n=2, extra_body={"top_k": 40}
    )
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 40}
    for index, choice in enumerate(answer.choices):
        assert choice.text == pair[1].decode(alone(pair, PROMPT, 7 + index, max_new_tokens=16, **sampling))
    assert answer.usage.completion_tokens == 32


def test_without_settings_the_whole_vocabulary_is_sampled_from(pair, client) -> None:
    answer = client.completions.create(model="demo", prompt=PROMPT, seed=3)  # 16 tokens, as OpenAI's
    expected = alone(pair, PROMPT, 3, max_new_tokens=16, do_sample=True, top_k=0)
    assert answer.choices[0].text == pair[1].decode(expected)


def test_several_prompts_of_text_and_ids(pair, client) -> None:
    texts = [PROMPT, "import os\n"]
    one = client.completions.create(model="demo", prompt=texts, max_tokens=4, temperature=0, n=2)
    ids = [pair[1](text)["input_ids"] for text in texts]
    two = client.completions.create(model="demo", prompt=ids, max_tokens=4, temperature=0, n=2)
    assert [choice.text for choice in one.choices] == [choice.text for choice in two.choices]
    assert [choice.index for choice in one.choices] == [0, 1, 2, 3]
    assert one.choices[0].text == one.choices[1].text != one.choices[2].text


def test_stream_is_the_same_text_and_ends_with_usage(client) -> None:
    arguments = {"model": "demo", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**arguments)
    *chunks, end = client.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert len(chunks) > 4
    assert chunks[-1].choices[0].finish_reason == "length"
    assert end.choices == []
    assert end.usage.completion_tokens == 24
    assert end.usage.prompt_tokens_details.cached_tokens > 0  # of the request before


def test_stop_ends_before_the_text(pair, client) -> None:
    text = pair[1].decode(alone(pair, PROMPT, max_new_tokens=24, do_sample=False))
    stop = text[12:15]
    for stream in (False, True):
        answer = client.completions.create(
            model="demo", prompt=PROMPT, max_tokens=24, temperature=0, stop=[stop, "never"], stream=stream
        )
        chunks = list(answer) if stream else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"
    kept = client.completions.create(
        model="demo",
        prompt=PROMPT,
        max_tokens=24,
        temperature=0,
        stop=stop,
        extra_body={"include_stop_str_in_output": True},
    )
    assert kept.choices[0].text == text[: text.index(stop) + len(stop)]
    assert kept.usage.completion_tokens < 24


def test_logprobs_and_echo(pair, client) -> None:
    model, tokenizer = pair
    answer = client.completions.create(model="demo", prompt=PROMPT, max_tokens=3, temperature=0, logprobs=2, echo=True)
    (choice,) = answer.choices
    ids = tokenizer(PROMPT)["input_ids"]
    ids += alone(pair, PROMPT, max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [logprobs[place, token].item() for place, token in enumerate(ids[1:])]
    assert choice.text.startswith(PROMPT)
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert choice.logprobs.text_offset[:2] == [0, len(choice.logprobs.tokens[0])]
    assert all(2 <= len(top) <= 3 for top in choice.logprobs.top_logprobs[1:])

    chunks = list(
        client.completions.create(
            model="demo", prompt=PROMPT, max_tokens=3, temperature=0, logprobs=2, echo=True, stream=True
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    offsets = [offset for chunk in chunks for offset in chunk.choices[0].logprobs.text_offset]
    assert offsets == choice.logprobs.text_offset

    scored = client.completions.create(model="demo", prompt=PROMPT, max_tokens=0, logprobs=0, echo=True)
    assert scored.choices[0].text == PROMPT
    assert scored.choices[0].logprobs.token_logprobs[1:] == pytest.approx(expected[:-3], abs=1e-4)
    assert scored.usage.completion_tokens == 0


def test_offsets_behind_an_echo_of_other_letters(client) -> None:
    prompt = "s = 'é€😀ünd'  # "
    asked = {"model": "demo", "prompt": prompt, "max_tokens": 6, "temperature": 0, "logprobs": 0, "echo": True}
    (whole,) = client.completions.create(**asked).choices
    figures = whole.logprobs
    assert "\ufffd" in figures.tokens, "characters have several tokens"
    for token, offset in zip(figures.tokens, figures.text_offset, strict=True):
        if "\ufffd" not in token:
            assert whole.text[offset:].startswith(token)
    chunks = [chunk.choices[0].logprobs.text_offset for chunk in client.completions.create(**asked, stream=True)]
    assert [offset for offsets in chunks for offset in offsets] == figures.text_offset


def test_logit_bias_and_penalties_reach_the_engine(pair, client, served) -> None:
    first = alone(pair, PROMPT, max_new_tokens=1, do_sample=False)[0]
    common = {"model": "demo", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    banned = client.completions.create(**common, logit_bias={str(first): -100}, logprobs=0)
    assert banned.choices[0].logprobs.tokens[0] != pair[1].decode([first])
    forced = client.completions.create(**common, logit_bias={str(first): 100})
    assert forced.choices[0].text == pair[1].decode([first]) * 8
    varied = client.completions.create(**common, logit_bias={str(first): 3}, frequency_penalty=2, presence_penalty=1)
    handle = served.service.engine.submit(
        pair[1](PROMPT)["input_ids"],
        max_new_tokens=8,
        do_sample=False,
        logit_bias={first: 3},
        frequency_penalty=2,
        presence_penalty=1,
    )
    assert varied.choices[0].text == pair[1].decode(handle.result()) != forced.choices[0].text


def test_chat_with_logprobs(pair, client) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": [{"type": "text", "text": PROMPT}]}],
        max_completion_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == pair[1].decode(alone(pair, PROMPT, max_new_tokens=6, do_sample=False))
    assert len(choice.logprobs.content) == 6
    for entry in choice.logprobs.content:
        assert bytes(entry.bytes).decode() == entry.token
        assert entry.top_logprobs[0].token == entry.token
        assert len(entry.top_logprobs) == 3


def test_streams_of_several_choices_mix(client) -> None:
    arguments = {
        "model": "demo",
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 12,
        "n": 3,
        "seed": 5,
        "temperature": 1.0,
    }
    whole = client.chat.completions.create(**arguments)
    texts, ends = ["", "", ""], {}
    for chunk in client.chat.completions.create(**arguments, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}


def test_async_clients_share_the_engine(pair, served) -> None:
    prompts = [*demo.PROMPTS] * 2

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key=SECRET, max_retries=0) as client:

            async def one(prompt: str) -> str:
                stream = await client.completions.create(
                    model="demo", prompt=prompt, max_tokens=12, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(one, prompts))

    expected = [pair[1].decode(alone(pair, text, max_new_tokens=12, do_sample=False)) for text in demo.PROMPTS]
    assert asyncio.run(ask()) == expected * 2


def test_tools_are_rendered(pair, served, client, monkeypatch) -> None:
    tokenizer = served.service.prompts.tokenizer
    template = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.arguments.path }}{% endfor %}{% endfor %}"
        "{% for t in tools or [] %}# {{ t.function.name }}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    tools = [{"type": "function", "function": {"name": "read", "parameters": {"type": "object", "properties": {}}}}]
    call = {"id": "1", "type": "function", "function": {"name": "read", "arguments": '{"path": "a.py"}'}}
    messages = [{"role": "user", "content": "import os\n"}, {"role": "assistant", "tool_calls": [call]}]
    asked = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 4, "tools": tools}
    given = client.chat.completions.create(**asked)
    expected = alone(pair, "import os\na.py# read", max_new_tokens=4, do_sample=False)
    assert given.choices[0].message.content == tokenizer.decode(expected)
    assert given.choices[0].message.tool_calls is None
    without = client.chat.completions.create(**asked, tool_choice="none")
    assert given.usage.prompt_tokens > without.usage.prompt_tokens


def test_salts_part_cached_prompts(client) -> None:
    def cached(salt: str) -> int:
        answer = client.completions.create(
            model="demo", prompt=PROMPT + " # salts", max_tokens=1, extra_body={"cache_salt": salt}
        )
        return answer.usage.prompt_tokens_details.cached_tokens

    assert cached("one") == 0
    assert cached("one") > 0
    assert cached("two") == 0


def test_models(client) -> None:
    (model,) = client.models.list().data
    assert model.id == "demo"
    assert model.max_model_len == 1024
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError) as failed:
        client.models.retrieve("gpt-5")
    assert failed.value.code == "model_not_found"


def test_tokenize_and_back(pair, raw) -> None:
    tokens = raw.post("/tokenize", json={"prompt": PROMPT}).json()
    assert tokens == {"count": len(tokens["tokens"]), "max_model_len": 1024, "tokens": pair[1](PROMPT)["input_ids"]}
    assert raw.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": PROMPT}
    chat = raw.post("/tokenize", json={"messages": [{"role": "user", "content": PROMPT}]}).json()
    assert chat == tokens


# -------------------------------------------------------------------------------------------------------- bad requests

JSON = {"Content-Type": "application/json"}
COMPLETION = {"prompt": "import os", "max_tokens": 1}
CHAT = {"messages": [{"role": "user", "content": "import os"}], "max_tokens": 1}
BAD = [
    ("/v1/completions", b"{", 400, "invalid_json"),
    ("/v1/completions", b"", 400, "invalid_json"),
    ("/v1/completions", b'{"prompt": "\xff"}', 400, "invalid_json"),
    ("/v1/completions", b'{"prompt": "\\ud800"}', 400, "invalid_json"),
    ("/v1/completions", b"[" * 50_000, 400, "invalid_json"),
    ("/v1/completions", b"[]", 400, "invalid_type"),
    ("/v1/completions", {}, 400, "missing_required_parameter"),
    ("/v1/completions", {**COMPLETION, "model": "gpt-5"}, 404, "model_not_found"),
    ("/v1/completions", {**COMPLETION, "max_tokens": "5"}, 400, "invalid_value"),
    ("/v1/completions", {**COMPLETION, "max_tokens": -1}, 400, "invalid_value"),
    ("/v1/completions", {**COMPLETION, "max_tokens": 10**30}, 400, "context_length_exceeded"),
    ("/v1/completions", {**COMPLETION, "max_tokens": 10**9}, 400, "context_length_exceeded"),
    ("/v1/completions", {**COMPLETION, "max_tokens": 0}, 400, "invalid_value"),
    ("/v1/completions", {**COMPLETION, "n": 10**6}, 400, "invalid_value"),
    ("/v1/completions", {**COMPLETION, "n": 100}, 400, "invalid_value"),  # more than may wait
    ("/v1/completions", {**COMPLETION, "n": True}, 400, "invalid_value"),
    ("/v1/completions", {**COMPLETION, "seed": 2**64}, 400, "invalid_value"),
    ("/v1/completions", {**COMPLETION, "temperature": -1}, 400, "invalid_value"),
    ("/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400, "invalid_value"),
    ("/v1/completions", {**COMPLETION, "logprobs": 1000}, 400, "invalid_value"),
    ("/v1/completions", {**COMPLETION, "logit_bias": {"9999": 1}}, 400, "invalid_value"),
    ("/v1/completions", {**COMPLETION, "logit_bias": {"-1": 1}}, 400, "invalid_value"),
    ("/v1/completions", {**COMPLETION, "stop": [""]}, 400, "invalid_value"),
    ("/v1/completions", {**COMPLETION, "stop": ["a"] * 99}, 400, "invalid_value"),
    ("/v1/completions", {**COMPLETION, "best_of": 3}, 400, "unsupported_parameter"),
    ("/v1/completions", {**COMPLETION, "suffix": "b"}, 400, "unsupported_parameter"),
    ("/v1/completions", {**COMPLETION, "stream_options": {}}, 400, "invalid_value"),
    ("/v1/completions", {"prompt": ""}, 400, "invalid_value"),
    ("/v1/completions", {"prompt": []}, 400, "invalid_value"),
    ("/v1/completions", {"prompt": [[]]}, 400, "invalid_value"),
    ("/v1/completions", {"prompt": ["a"] * 1000}, 400, None),
    ("/v1/completions", {"prompt": [1, "a"]}, 400, "invalid_value"),
    ("/v1/completions", {"prompt": [4096]}, 400, "invalid_value"),
    ("/v1/completions", {"prompt": [10**40]}, 400, "invalid_value"),
    ("/v1/completions", {"prompt": {"a": 1}}, 400, "invalid_value"),
    ("/v1/completions", {"prompt": [5] * 1024}, 400, "context_length_exceeded"),
    ("/v1/completions", {"prompt": "a " * 2000}, 400, "context_length_exceeded"),
    ("/v1/completions", {"prompt": "a" * 200_000}, 413, "body_too_large"),
    ("/v1/chat/completions", {"messages": []}, 400, "invalid_value"),
    ("/v1/chat/completions", {"messages": [{"content": "a"}]}, 400, "missing_required_parameter"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": 5}]}, 400, "invalid_value"),
    ("/v1/chat/completions", {"messages": "a"}, 400, "invalid_value"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "unsupported_parameter",
    ),
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_schema"}}, 400, "missing_required_parameter"),
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": "xml"}}, 400, "invalid_value"),
    ("/v1/chat/completions", {**CHAT, "guided_json": {}}, 400, "unsupported_parameter"),
    ("/v1/chat/completions", {**CHAT, "top_logprobs": 2}, 400, "invalid_value"),
    ("/v1/chat/completions", {**CHAT, "functions": [{}]}, 400, "unsupported_parameter"),
    ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"chat_template": "{{1}}"}}, 400, "invalid_value"),
    ("/v1/chat/completions", {**CHAT, "stream": "yes"}, 400, "invalid_value"),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 0}, 400, "invalid_value"),
    ("/v1/completions", {**COMPLETION, "min_tokens": 2}, 400, "invalid_value"),
    ("/tokenize", {"text": "a"}, 400, "missing_required_parameter"),
    ("/tokenize", {"prompt": "a", **CHAT}, 400, "invalid_value"),
    ("/detokenize", {"tokens": [5000]}, 400, "invalid_value"),
    ("/detokenize", {"tokens": [-1]}, 400, "invalid_value"),
    ("/detokenize", {"tokens": [5] * 1025}, 400, "context_length_exceeded"),
    ("/v1/embeddings", {}, 404, "not_found"),
    ("/v1/models", {}, 405, "method_not_allowed"),
]


@pytest.mark.parametrize(("path", "body", "status", "code"), BAD, ids=lambda value: repr(value)[:60])
def test_bad_requests_are_refused(raw, served, path: str, body: object, status: int, code: str | None) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = raw.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert error["type"] == "invalid_request_error"
    assert served.service.open <= 1


MANY = [None] * 100_000
WRONG_LISTS = [
    (CompletionRequest, {"prompt": MANY}, "prompt.ids.0"),
    (CompletionRequest, {"prompt": ["a", *MANY]}, "prompt.texts.1"),
    (CompletionRequest, {"prompt": [[1], MANY]}, "prompt.lists of ids.1.0"),
    (CompletionRequest, {"prompt": ["a"] * 2049}, "at most 2048 items"),
    (CompletionRequest, {"prompt": "a", "stop": MANY}, "stop.str"),
    (CompletionRequest, {"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(30_000)), "a")}, "at most 300"),
    (ChatRequest, {"messages": MANY}, "messages.0"),
    (ChatRequest, {"messages": [{"role": "user", "content": MANY}]}, "messages.0.content.str"),
    (ChatRequest, {"messages": [{"role": "user", "content": "a"}] * 4097}, "at most 4096 items"),
    (ChatRequest, {**CHAT, "tools": MANY}, "tools.0"),
    (TokenizeRequest, {"messages": MANY}, "messages.0"),
    (DetokenizeRequest, {"tokens": MANY}, "tokens.0"),
]


@pytest.mark.parametrize(("kind", "body", "says"), WRONG_LISTS, ids=lambda value: repr(value)[:60])
def test_only_the_first_mistake_of_a_list_is_looked_for(kind, body: dict, says: str) -> None:
    with pytest.raises(ValidationError) as failed:
        kind.model_validate_json(json.dumps(body))
    assert failed.value.error_count() <= 2  # of a union's other kind
    assert says in of_validation(failed.value, skip=kind is TokenizeRequest).message


def test_refusals_name_the_field(client) -> None:
    with pytest.raises(openai.BadRequestError, match="beams are not searched") as failed:
        client.chat.completions.create(model="demo", **CHAT, extra_body={"use_beam_search": True})
    assert failed.value.param == "use_beam_search"


def test_bodies_of_very_many_parts_are_refused_before_they_are_made(raw) -> None:
    for body in (
        b'{"prompt": "a", "x": [' + b"[]," * 30_000 + b"1]}",
        b'{"prompt": "a", "x": [' + b"{}," * 30_000 + b"1]}",
    ):
        assert raw.post("/v1/completions", content=body, headers=JSON).status_code == 200
    check_parts(json.dumps({"prompt": "[{" * 200_000}).encode())  # in a text they are no parts
    check_parts(b'{"prompt": "' + b'\\"[' * 200_000)
    for body in (b"[[]" * 30_000, b'{"a\\"": ' + b"[" * 60_000, b'"' + b'\\"' * 400_000 + b"\\" + b"[" * 60_000):
        began = time.monotonic()
        if body.startswith(b'"'):
            check_parts(body)
        else:
            with pytest.raises(APIError, match="lists and objects; at most 50000"):
                check_parts(body)
        assert time.monotonic() - began < 0.5, "nothing is looked at twice"


def test_large_answers_leave_the_event_loop_to_others(pair) -> None:
    """While answers with thousands of figures are written, and echoes of long prompts, other requests get answers."""
    limits = Limits(1024, max_body_bytes=2**23)
    ids = pair[1]("import os\n" * 300)["input_ids"][:900]
    big = {"prompt": [ids] * 4, "max_tokens": 2, "temperature": 0, "logprobs": 20, "echo": True}
    garbage.freeze()  # as the command does: else a collection looks at all that the tests have imported
    with (
        running(make(pair, limits=limits, max_waiting=256)) as it,
        httpx.Client(base_url=it.url, timeout=60) as others,
        ThreadPoolExecutor(1) as pool,
    ):
        latencies = []
        for stream in (False, True):
            running_one = pool.submit(
                httpx.post, it.url + "/v1/completions", json={**big, "stream": stream}, timeout=60
            )
            while not running_one.done():
                began = time.monotonic()
                assert others.get("/health").status_code == 200
                latencies.append(time.monotonic() - began)
            assert len(running_one.result().content) > 1_000_000
        assert max(latencies) < 0.5, sorted(latencies)[-5:]
    gc.unfreeze()


def test_json_in_parts_is_json() -> None:
    value = {
        "a": list(range(1000)),
        "b": [],
        "c": {},
        "d": [[1], {"é": None}, "x\n"],
        "e": [{"f": 1.5}] * 300,
        "g": True,
    }
    parts = list(written(value))
    assert json.loads("".join(parts)) == value
    assert max(map(len, parts)) < 3000


def test_answers_that_nobody_reads_are_given_up(pair, monkeypatch) -> None:
    bind = Server.bind

    def narrow(host: str, port: int) -> socket.socket:
        bound = bind(host, port)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return bound

    monkeypatch.setattr(Server, "bind", staticmethod(narrow))
    asked = {"prompt": PROMPT, "max_tokens": 500, "min_tokens": 500, "logprobs": 20, "n": 8, "stream": True}
    with running(make(pair), unread_seconds=0.6) as it:
        for more in ({"deadline": 0.3}, {}):
            body = json.dumps({**asked, **more}).encode()
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect(("127.0.0.1", int(it.url.rpartition(":")[2])))
                head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                wait_for(lambda: it.service.open)
                wait_for(lambda: not it.service.open and not it.held())
        with httpx.stream(
            "POST", it.url + "/v1/completions", json={**asked, "n": 2, "max_tokens": 120, "min_tokens": 1}
        ) as answer:
            last_line = ""
            for line in answer.iter_lines():  # who reads slowly is served
                last_line = line or last_line
                time.sleep(0.002)
        assert last_line == "data: [DONE]"


def test_unknown_fields_are_ignored_and_logged(raw, log) -> None:
    assert raw.post("/v1/completions", json={**COMPLETION, "store": True, "metadata": {}}).status_code == 200
    wait_for(lambda: last(log).get("ignored") == ["metadata", "store"])  # the line is written behind the answer


def test_a_priority_that_the_policy_ignores_is_logged(pair, raw, log) -> None:
    assert raw.post("/v1/completions", json={**COMPLETION, "priority": 3}).status_code == 200
    wait_for(lambda: last(log).get("ignored") == ["priority"])
    with running(make(pair, policy="priority")) as it:
        assert httpx.post(it.url + "/v1/completions", json={**COMPLETION, "priority": 3}).status_code == 200
    assert "ignored" not in last(log)


def closed_within(sent: socket.socket, seconds: float) -> bool:
    sent.settimeout(seconds)
    try:
        return sent.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


def test_heads_that_do_not_come_are_not_waited_for(pair, monkeypatch) -> None:
    monkeypatch.setattr(server_module, "most_connections", lambda: 6)
    with running(make(pair), head_seconds=0.3) as it:
        address = ("127.0.0.1", int(it.url.rpartition(":")[2]))
        silent, half, again = (socket.create_connection(address) for _ in range(3))
        with silent, half, again:
            half.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
            again.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            again.settimeout(5)
            while b"ok" not in again.recv(4096):
                pass
            again.sendall(b"GET")  # a connection that was good once
            body = {"prompt": PROMPT, "max_tokens": 300, "temperature": 0, "stream": True}
            with httpx.stream("POST", it.url + "/v1/completions", json=body) as answer:
                assert all(closed_within(sent, 2) for sent in (silent, half, again))
                assert "[DONE]" in answer.read().decode()
    with running(make(pair)) as it:  # ten seconds would be too long: there are too many
        many = [socket.create_connection(("127.0.0.1", int(it.url.rpartition(":")[2]))) for _ in range(9)]
        time.sleep(0.3)
        assert sorted(closed_within(sent, 0.02) for sent in many) == [False] * 4 + [True] * 5
        assert httpx.get(it.url + "/health").status_code == 200
        for sent in many:
            sent.close()


def test_more_connections_than_may_be_get_an_error_of_ours(pair, monkeypatch) -> None:
    monkeypatch.setattr(server_module, "most_connections", lambda: 4)
    with running(make(pair)) as it:
        monkeypatch.setattr(it.server._waiting, "_most", 99)
        many = [socket.create_connection(("127.0.0.1", int(it.url.rpartition(":")[2]))) for _ in range(4)]
        wait_for(lambda: len(it.server.server_state.connections) == 4)
        refused = httpx.get(it.url + "/v1/models")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "too_many_connections"
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["connection"] == "close"
        for sent in many:
            sent.close()
        wait_for(lambda: not it.server.server_state.connections)
        assert httpx.get(it.url + "/v1/models").status_code == 200


def test_asyncio_is_logged_as_all_else_and_seldom(monkeypatch, capsys) -> None:
    asyncio_logger = logging.getLogger("asyncio")
    for logger in (asyncio_logger, logs.LOGGER, logging.getLogger("uvicorn.error")):
        for name in ("handlers", "filters", "level", "propagate"):
            monkeypatch.setattr(logger, name, getattr(logger, name))
    logs.to_stderr()
    for number in range(1000):
        asyncio_logger.error("no handles\nsocket: %s", number)
    monkeypatch.setattr(logs, "PAUSE", 0.0)
    asyncio_logger.error("no handles\nsocket: 1000")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["event"], line.get("left_out")) for line in lines] == [("no handles", None), ("no handles", 999)]


def test_unknown_paths_are_answered_with_a_hint_and_logged(raw, log) -> None:
    answer = raw.get("/chat/completions%0a%1b%e2%80%ae" + "x" * 500, headers={"X-Request-Id": "lost"})
    assert answer.status_code == 404
    assert {"/v1;", "/openapi.json"} <= set(answer.json()["error"]["message"].split())
    wait_for(lambda: last(log)["request_id"] == "lost")
    path = last(log)["path"]
    assert path.startswith(r"/chat/completions\n\x1b\u202exxx")
    assert len(path) < 150
    assert 'http_requests_total{path="other",status="404"}' in raw.get("/metrics").text


def test_load_balancers_may_ask_for_the_head_alone(raw) -> None:
    answer = raw.head("/health")
    assert (answer.status_code, answer.content) == (200, b"")


def test_a_body_without_length_is_limited_too(raw) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield b"a" * 1000

    try:
        answer = raw.post("/v1/completions", content=endless(), headers={"Content-Type": "application/json"})
    except httpx.TransportError:
        return  # the server closed the connection while we still sent
    assert answer.status_code == 413


def test_only_json_is_read(raw) -> None:
    """A browser sends text to other addresses without asking them first, and nothing that is called JSON."""
    answer = raw.post("/v1/completions", content=json.dumps(COMPLETION), headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415
    assert answer.json()["error"]["code"] == "unsupported_media_type"


def test_slow_bodies_are_given_up(pair) -> None:
    with running(make(pair, limits=Limits(1024, body_seconds=0.1))) as it:
        address = it.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1])), timeout=10) as client:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            client.sendall(head + b"Content-Length: 10\r\n\r\n{")
            assert client.recv(4096).startswith(b"HTTP/1.1 408")


def test_long_texts_are_refused_without_tokenizing(pair, raw, served, monkeypatch) -> None:
    monkeypatch.setattr(served.service.prompts, "_most_characters", 10)
    monkeypatch.setattr(served.service.prompts, "tokenizer", None)
    answer = raw.post("/v1/completions", json={"prompt": "a" * 11})
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_templates_may_be_missing_and_may_refuse(raw, served, monkeypatch) -> None:
    tokenizer = served.service.prompts.tokenizer
    for template, says in (
        (None, "no chat template"),
        ("{{ raise_exception('system messages are not allowed') }}", "system messages are not allowed"),
        ("{{ nothing.at.all }}", "undefined"),
    ):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        answer = raw.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 400
        assert says in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "messages"


def test_a_chat_template_takes_variables_and_unfinished_answers(raw, served, monkeypatch) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last %}|{% endif %}{% endfor %}"
    monkeypatch.setattr(
        served.service.prompts.tokenizer,
        "chat_template",
        template + "{% if add_generation_prompt %}{{ mark }}{% endif %}",
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

    def rendered(**more) -> str:
        tokens = raw.post("/tokenize", json={"messages": messages, **more}).json()["tokens"]
        return raw.post("/detokenize", json={"tokens": tokens}).json()["prompt"]

    assert rendered(chat_template_kwargs={"mark": "!"}) == "<user>a|<assistant>b!"
    assert rendered(continue_final_message=True, chat_template_kwargs={"mark": "!"}) == "<user>a|<assistant>b"


# ------------------------------------------------------------------------------------------------------------- manners


def test_a_fault_of_the_server_is_logged_without_its_message(raw, served, log, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("import os is the prompt")

    monkeypatch.setattr(served.service.prompts, "text", fail)
    answer = raw.post("/v1/completions", json=COMPLETION, headers={"X-Request-Id": "fault"})
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "prompt" not in answer.text
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    (fault,) = [line for line in lines if line["event"] == "a request failed"]
    assert (fault["request_id"], fault["error"]) == ("fault", "RuntimeError")
    assert any("test_serving" in frame for frame in fault["trace"])
    assert "import os" not in log.getvalue()


def test_a_fault_of_the_model_ends_its_request_alone(raw, served, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("the model failed")

    with monkeypatch.context() as patch:
        patch.setattr(served.service.engine.loop.runner, "run", fail)
        answer = raw.post("/v1/completions", json=COMPLETION)
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "engine_error"
        assert answer.headers["x-should-retry"] == "false"
        events = raw.post("/v1/completions", json={**COMPLETION, "stream": True}).text
        assert '"engine_error"' in events
        assert events.endswith("data: [DONE]\n\n")
    assert raw.post("/v1/completions", json=COMPLETION).status_code == 200


def test_prompts_are_logged_if_asked_for(raw, served, log, monkeypatch) -> None:
    monkeypatch.setattr(served.service, "log_prompts", True)
    start = len(log.getvalue())
    raw.post("/v1/completions", json=COMPLETION)
    raw.post("/v1/chat/completions", json=CHAT)
    one, two = [json.loads(line) for line in log.getvalue()[start:].splitlines()]
    assert one["prompt"] == "import os"
    assert two["messages"] == CHAT["messages"]
    log.seek(start)
    log.truncate()  # other tests look for prompts where none should be


@pytest.mark.parametrize("header", [None, "Bearer wrong", f"Basic {SECRET}", SECRET, "Bearer", "Bearer ü"])
def test_keys(served, log, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    answer = httpx.post(served.url + "/v1/completions", json=COMPLETION, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(served.url + "/metrics", headers=headers).status_code == 401
    assert httpx.get(served.url + "/health", headers=headers).status_code == 200
    assert SECRET not in log.getvalue()


def test_web_pages_of_other_origins_read_nothing_unless_they_may(pair, raw) -> None:
    asks = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in raw.get("/v1/models", headers=asks).headers
    assert raw.options("/v1/completions", headers=asks).status_code == 405
    with running(make(pair, Keys([SECRET])), origins=["http://localhost:3000"]) as it:
        path = it.url + "/v1/completions"
        asked = httpx.options(path, headers={**asks, "Access-Control-Request-Headers": "authorization,x-any"})
        assert asked.status_code == 200, "browsers ask without a key"
        assert asked.headers["access-control-allow-origin"] == asks["Origin"]
        assert "authorization" in asked.headers["access-control-allow-headers"].lower()
        key = {"Authorization": f"Bearer {SECRET}"}
        answer = httpx.post(path, json=COMPLETION, headers={**asks, **key})
        assert answer.headers["access-control-allow-origin"] == asks["Origin"]
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
        refused = httpx.post(path, json=COMPLETION, headers=asks)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == asks["Origin"], "pages can read errors too"
        other = httpx.post(path, json=COMPLETION, headers={**asks, **key, "Origin": "http://evil.example"})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    "origin", ["localhost:3000", "http://localhost:3000/", "http://", "", "http://a@b", "http://a:b"]
)
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(errors.InvalidOption, match="is no origin"):
        create_app(None, [origin])


def test_origins_are_compared_as_browsers_send_them() -> None:
    given = ["HTTPS://App.Example:443", "http://LOCALHOST:3000", "http://a:80", "http://[::1]:8080", "*"]
    assert known_origins(given) == [
        "https://app.example",
        "http://localhost:3000",
        "http://a",
        "http://[::1]:8080",
        "*",
    ]


def test_other_names_than_the_servers_are_refused(raw, served, log) -> None:
    """A page of evil.example may make that name mean 127.0.0.1, and would then read answers as its own."""
    port = served.url.rpartition(":")[2]
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "[::1].evil", "", "a b"):
        for path in ("/", "/health", "/v1/models"):
            answer = raw.get(path, headers={"Host": host})
            assert answer.status_code == 421, host
            assert answer.json()["error"]["code"] == "host_not_allowed"
    for host in ("localhost", f"LocalHost:{port}", "app.localhost", "127.0.0.1", f"[::1]:{port}", "192.168.0.7"):
        assert raw.get("/v1/models", headers={"Host": host}).status_code == 200, host


def test_names_that_a_server_goes_by() -> None:
    def status(host: str, server: str | None, names: list[str]) -> int:
        scope = {"headers": [(b"host", host.encode())], "server": server and (server, 80)}
        try:
            check_host(scope, known_hosts(names))
        except APIError as error:
            return error.status
        return 200

    assert status("llm.example.:8000", "127.0.0.1", ["LLM.example"]) == 200
    assert status("evil.example", "::1", ["llm.example"]) == 421
    assert status("evil.example", "192.0.2.1", ["llm.example"]) == 421
    assert status("any.example", "192.0.2.1", []) == 200, "nobody said which names"
    assert status("any.example", "127.0.0.1", ["*"]) == 200
    assert status("any.example", None, []) == 200
    check_host({"headers": [], "server": ("127.0.0.1", 80)}, frozenset())
    for name in ("http://a", "a:80", "a/b", ""):
        with pytest.raises(errors.InvalidOption, match="is no name of a machine"):
            known_hosts([name])


def test_keys_come_from_a_file_and_the_environment(tmp_path, monkeypatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst\n\n second \n", encoding="utf-8")
    monkeypatch.setenv("HF_LLMOPT_API_KEYS", "third, fourth")
    keys = Keys.read(file)
    assert [keys.owner(f"Bearer {key}") for key in ("first", "second", "third", "fourth", "# ours", "")] == [
        "key-0",
        "key-1",
        "key-2",
        "key-3",
        None,
        None,
    ]
    assert "first" not in repr(keys) + repr(vars(keys))
    file.write_text("# none\n", encoding="utf-8")
    with pytest.raises(errors.InvalidOption, match="has no key"):
        Keys.read(file)
    for empty in ("", " , "):  # a secret that did not arrive opens no server
        monkeypatch.setenv("HF_LLMOPT_API_KEYS", empty)
        with pytest.raises(errors.InvalidOption, match="HF_LLMOPT_API_KEYS is set and has no key"):
            Keys.read(None)
    monkeypatch.delenv("HF_LLMOPT_API_KEYS")
    assert len(Keys.read(None)) == 0


def test_log_and_request_id(raw, log) -> None:
    answer = raw.post("/v1/completions", json={**COMPLETION, "max_tokens": 3}, headers={"X-Request-Id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.json()["id"] == "cmpl-mine-1"
    wait_for(lambda: last(log)["request_id"] == "mine-1")  # the line is written once the answer was sent
    line = last(log)
    assert (line["status"], line["completion_tokens"], line["path"]) == (200, 3, "/v1/completions")
    assert 0 < line["first_token_seconds"] <= line["seconds"]
    assert "import os" not in log.getvalue()
    odd = raw.post("/v1/completions", json=COMPLETION, headers={"X-Request-Id": "a b"})
    assert odd.headers["x-request-id"] != "a b"


def test_a_client_that_leaves_frees_its_pages(raw, served) -> None:
    body = {"prompt": PROMPT, "max_tokens": 900, "temperature": 0, "n": 2}
    with raw.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        lines = answer.iter_lines()  # one that nobody holds is collected, and closes the connection
        next(lines)
        assert served.held()
    assert served.idle()
    with pytest.raises(httpx.ReadTimeout):
        raw.post("/v1/completions", json=body, timeout=0.3)
    assert served.idle()
    text = raw.get("/metrics").text
    aborted = next(line for line in text.splitlines() if 'finished_reason="abort"' in line and "_total" in line)
    assert float(aborted.split()[-1]) >= 2


def test_deadlines(raw, served) -> None:
    body = {"prompt": PROMPT, "max_tokens": 900, "temperature": 0, "deadline": 0.2}
    answer = raw.post("/v1/completions", json=body)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert answer.headers["x-should-retry"] == "false"
    events = raw.post("/v1/completions", json={**body, "stream": True}).text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert served.idle()


def test_metrics(raw) -> None:
    def figures() -> dict[str, float]:
        answer = raw.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}

    before = figures()
    for _ in range(2):
        raw.post("/v1/completions", json={"prompt": PROMPT + " # metrics", "max_tokens": 5, "temperature": 0})
    after = figures()

    def grown(name: str, labels: str = 'model_name="demo"') -> float:
        key = f"llmopt:{name}{{{labels}}}"
        return after[key] - before.get(key, 0)

    assert grown("generation_tokens_total") == 10
    assert grown("prompt_tokens_total") == grown("prefix_cache_queries_total") > 0
    assert 0 < grown("prefix_cache_hits_total") < grown("prompt_tokens_total")
    assert grown("request_success_total", 'finished_reason="length",model_name="demo"') == 2
    assert grown("time_to_first_token_seconds_count") == grown("e2e_request_latency_seconds_count") == 2
    assert grown("inter_token_latency_seconds_count") == 8
    assert grown("http_requests_total", 'path="/v1/completions",status="200"') == 2
    assert after['llmopt:num_requests_running{model_name="demo"}'] == 0
    assert after['llmopt:kv_cache_usage_perc{model_name="demo"}'] == 0


def test_the_dashboard_shows_figures_that_exist(raw) -> None:
    board = json.loads((Path(__file__).parents[1] / "docs" / "grafana.json").read_text("utf-8"))
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"llmopt:\w+", query)}
    text = raw.get("/metrics").text
    assert len(asked) >= 12
    assert {name for name in asked if f"\n{name}{{" not in text} == set()


def test_a_full_line_answers_429_and_the_end_is_graceful(pair, log) -> None:
    body = {"prompt": PROMPT, "max_tokens": 300, "temperature": 0}
    with running(make(pair, max_requests=1, max_waiting=1)) as it, ThreadPoolExecutor(2) as pool:
        first = pool.submit(httpx.post, it.url + "/v1/completions", json=body, timeout=60)
        wait_for(lambda: it.held())
        second = pool.submit(httpx.post, it.url + "/v1/completions", json={**body, "max_tokens": 2}, timeout=60)
        wait_for(lambda: it.service.engine.waiting)
        third = httpx.post(it.url + "/v1/completions", json=body)
        assert third.status_code == 429
        assert third.headers["retry-after"] == "1"
        assert third.json()["error"]["type"] == "rate_limit_error"
        it.server.stop()
        assert httpx.get(it.url + "/health").status_code == 503
        late = httpx.post(it.url + "/v1/completions", json=body)
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "shutting_down"
        assert first.result().json()["usage"]["completion_tokens"] == 300
        assert second.result().json()["usage"]["completion_tokens"] == 2
        it.thread.join(10)
        assert not it.thread.is_alive()


def test_what_outlives_the_drain_ends_with_an_error(pair, log) -> None:
    body = {"prompt": PROMPT, "max_tokens": 900, "temperature": 0}
    with running(make(pair), drain=0.2) as it, ThreadPoolExecutor(1) as pool:
        running_one = pool.submit(httpx.post, it.url + "/v1/completions", json=body, timeout=60)
        wait_for(lambda: it.held())
        it.server.stop()
        assert running_one.result().status_code == 503
        it.thread.join(10)
        assert not it.thread.is_alive()
        assert it.held() == 0


def test_the_command_serves_until_it_is_told_to_stop() -> None:
    script = "import sys; from hf_llmopt.cli import main; sys.argv[0] = 'hf-llmopt'; sys.exit(main())"
    root = str(Path(hf_llmopt.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", script, "serve", "--port", "0", "--served-name", "mine", "--max-model-len", "64"],
        env={**os.environ, "HF_LLMOPT_API_KEYS": SECRET, "PYTHONPATH": os.pathsep.join([root, *sys.path])},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        first = process.stderr.readline()
        url = re.search(r"serving mine on (http://127\.0\.0\.1:\d+/v1)", first)[1]
        with openai.OpenAI(base_url=url, api_key=SECRET) as client:
            answer = client.completions.create(model="mine", prompt="import", max_tokens=2, temperature=0)
            assert client.models.retrieve("mine").max_model_len == 64
        assert answer.usage.completion_tokens == 2
        process.send_signal(signal.SIGTERM)
        lines = [json.loads(line) for line in process.stderr]
        assert process.wait(30) == 0
    started = next(line for line in lines if line["event"] == "serving")
    assert {key: started[key] for key in ("model", "max_model_len", "prompt_cache", "page")} == {
        "model": "mine",
        "max_model_len": 64,
        "prompt_cache": True,
        "page": url.removesuffix("v1"),
    }
    assert SECRET not in str(lines)
    assert [line["path"] for line in lines if line["event"] == "request"] == [
        "/v1/completions",
        "/v1/models/mine",
    ]


SERVING = Path(__file__).parents[1] / "docs" / "serving.md"


def options(command: str) -> set[str]:
    """The options of a command of ours."""
    described = typer.main.get_command(cli_app).commands[command]
    return {name for parameter in described.params for name in parameter.opts}


def test_tables_for_those_who_come_from_elsewhere_name_what_exists() -> None:
    section = SERVING.read_text("utf-8").split("## Coming from another server")[1].split("\n## ")[0]
    theirs, ours = zip(*re.findall(r"^\| (.+?) \| (.+?) \|$", section, re.MULTILINE), strict=True)
    flags = {flag for cell in ours for flag in re.findall(r"--[a-z-]+", cell)}
    assert {"--llmopt", "--allow-origin", "--tool-parser", "--served-name"} <= flags <= options("serve")
    for cell in ours:
        for value in re.findall(r"--llmopt ('[^']+'|\w+)", cell):
            hf_llmopt.LLMOptConfig.parse(keyword(value.strip("'")))
    stock = inspect.signature(pytest.importorskip("transformers.cli.serve").Serve.__init__).parameters
    asked = set(re.findall(r"--([a-z-]+)", " ".join(theirs[: theirs.index("`vllm serve MODEL`")])))
    assert {"continuous-batching", "enable-cors"} <= asked <= {name.replace("_", "-") for name in stock}


def test_the_container_starts_the_command() -> None:
    text = (Path(__file__).parents[1] / "Dockerfile").read_text("utf-8")
    program, command, *rest = json.loads(re.search(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)[1])
    assert (program, command) == ("hf-llmopt", "serve")
    assert set(rest[::2]) <= options("serve")
    for line in re.findall(r"^COPY (?!--)(.+) \S+$", text, re.MULTILINE):
        for name in line.split():
            assert (Path(__file__).parents[1] / name).exists()
            assert f"!{name}\n" in (Path(__file__).parents[1] / ".dockerignore").read_text("utf-8")


def wait_for(condition) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


# -------------------------------------------------------------------------------------------------------- without HTTP


def test_text_waits_for_whole_characters_and_stops(pair) -> None:
    tokenizer = pair[1]
    text = "x = 'é€😀'  # ünd\nreturn"
    ids = tokenizer(text)["input_ids"]
    stream = TextStream(tokenizer, [])
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) + stream.end() == text
    assert not any("\ufffd" in piece for piece in pieces)
    for stop in ("€", "# ü", "return", "d\nr"):
        stream = TextStream(tokenizer, [], [stop, "nowhere"])
        shown = ""
        for token in ids:
            shown += stream.add(token)
            if stream.stopped:
                break
        assert shown + stream.end() == text[: text.index(stop)]
    cut = TextStream(tokenizer, [])
    assert cut.add(tokenizer("é")["input_ids"][0]) == ""
    assert cut.end() == "\ufffd"


def test_bytes_that_are_no_text_are_shown_alike_however_tokens_come(pair) -> None:
    tokenizer = pair[1]
    ids = tokenizer("x = 'é€😀'  # ünd\nreturn 你好 '\ufffd'")["input_ids"]
    parts = [token for token in ids if "\ufffd" in tokenizer.decode([token])]
    random = Random(0)
    for _ in range(300):
        tokens = [random.choice(parts if random.random() < 0.6 else ids) for _ in range(30)]
        singly, together, mixed = (TextStream(tokenizer, ids[:4]) for _ in range(3))
        expected = "".join([singly.add(token) for token in tokens]) + singly.end()
        assert together.add(*tokens) + together.end() == expected
        shown, rest = "", tokens
        while rest:
            size = random.randint(1, 9)
            shown, rest = shown + mixed.add(*rest[:size]), rest[size:]
        assert shown + mixed.end() == expected
        assert singly.length == together.length == mixed.length == len(expected)


def test_errors_of_the_engine_have_a_status() -> None:
    found = {kind.__name__: of_engine(kind("why")).status for kind in (errors.OutOfPages, errors.RequestFailed)}
    assert found == {"OutOfPages": 400, "RequestFailed": 500}
