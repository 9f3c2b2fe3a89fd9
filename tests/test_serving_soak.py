"""20,000 requests, many of which nobody should send, from clients of which many leave."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from contextlib import suppress

import psutil
import pytest

from hf_llmopt import demo

httpx = pytest.importorskip("httpx2")

from served import Running, make, running  # noqa: E402 - needs the extra

from hf_llmopt.serving import Limits  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (demo.path() / "config.json").is_file(), reason="the embedded model has no weights"),
]
REQUESTS, AT_ONCE = 20_000, 48
GROWTH = 48 * 2**20  # bytes, from a quarter of the requests to the last one
SETTINGS = {
    "temperature": [0, 0.7, 2, 1e-300],
    "n": [1, 2, 3],
    "top_p": [0, 0.5, 1],
    "top_k": [-1, 0, 1, 5, 10**9],
    "min_p": [0, 0.3, 1],
    "stop": ["\n", ["self", "("]],
    "logprobs": [0, 20],
    "echo": [True],
    "stream": [True],
    "presence_penalty": [-2, 2],
    "repetition_penalty": [0.01, 1.1, 10],
    "logit_bias": [{"5": -100, "6": 100}],
    "seed": [-5, 0, 2**63 - 1],
    "user": ["u"],
    "priority": [-100, 100],
    "min_tokens": [1, 5, 10**12],
    "deadline": [1e-9, 0.01, 5],
    "cache_salt": ["x"],
    "skip_special_tokens": [False],
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"a": {}}}}}
DEEP = json.loads("{" + '"properties": {"a": {' * 60 + "}}" * 60 + "}")
DEMANDS = [
    {"response_format": {"type": "json_object"}},
    {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"schema": {"type": "array", "items": {"enum": [1, 2]}}},
        }
    },
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "zzz"}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/no"}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"pattern": "(a*)*b{9999}"}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": DEEP}}},
    {"tools": [TOOL], "tool_choice": "required"},
    {"tools": [TOOL] * 2, "tool_choice": {"type": "function", "function": {"name": "zzz"}}},
]
JUNK = [None, True, -1, 0, 1, 1.5, 1e400, 10**30, "", "a", [], [[]], {}, {"a": 1}, [None], "\0", "\ud83d" * 3]
FIELDS = ["messages", "tools", "stream_options", "response_format", "logit_bias", "n", "zzz", "chat_template_kwargs"]
BROKEN = [b"\xff\xfe{}", b'{"prompt": "\xc3\x28"}', b'{"prompt": "\xed\xa0\x80"}', b'{"prompt": "a"', b"", b"[" * 9000]
LIMITS = [{"n": 10**9}, {"n": 129}, {"max_tokens": -1}, {"max_tokens": 10**18}, {"top_logprobs": -3}, {"logprobs": 99}]
ALLOWED = {200, 400, 413, 415, 429, 504}


def body(path: str) -> dict:
    if path == "/detokenize":
        return {"tokens": [random.randrange(4096) for _ in range(9)]}
    made = {name: random.choice(values) for name, values in SETTINGS.items() if random.random() < 0.15}
    text = random.choice(demo.PROMPTS) * random.randint(1, 3)
    if random.random() < 0.05:
        made |= random.choice(DEMANDS)
    asked = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
    return {**made, **asked, "max_tokens": random.randint(1, 12)}


def spoiled(asked: dict) -> bytes:
    if random.random() < 0.1:
        return b"a" * 60_000
    if random.random() < 0.1:
        return random.choice(BROKEN)
    if random.random() < 0.1:
        return json.dumps({**asked, **random.choice(LIMITS)}).encode()
    for _ in range(random.randint(1, 3)):
        asked[random.choice([*asked, *FIELDS])] = random.choice(JUNK)
    written = bytearray(json.dumps(asked).encode())
    if random.random() < 0.2:
        for _ in range(3):
            written[random.randrange(len(written))] = random.randrange(256)
    return bytes(written)


async def half(address: str, path: str) -> None:
    """A client that goes before it has sent what it announced."""
    host, _, port = address.partition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n"
    writer.write(head.encode() + b'{"prompt": "import')
    await writer.drain()
    await asyncio.sleep(random.uniform(0, 0.02))
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


async def one(client, seen: Counter, faults: list[str]) -> None:
    path = random.choice(["/v1/completions"] * 3 + ["/v1/chat/completions", "/tokenize", "/detokenize"])
    kind, asked = random.random(), body(path)
    headers = {"Content-Type": "application/json" if random.random() < 0.95 else "text/plain"}
    if kind < 0.1:
        asked |= {"stream": True, "max_tokens": 400}
        stays, last = random.random() < 0.3, ""
        async with client.stream("POST", path, json=asked) as answer:
            async for line in answer.aiter_lines():
                last = line or last
                if not stays and random.random() < 0.2:
                    seen["left a stream"] += 1
                    return
        if answer.headers["content-type"].startswith("text/event-stream"):
            seen["whole streams"] += 1
            if last != "data: [DONE]":
                faults.append(f"a stream of {path} ends with {last[-300:]}")
    elif kind < 0.2:
        asked |= {"max_tokens": 500}
        try:
            answer = await client.post(path, json=asked, timeout=random.uniform(0.005, 0.1))
        except httpx.TimeoutException:
            seen["left"] += 1
            return
    elif kind < 0.22:
        await half(client.base_url.netloc.decode(), path)
        seen["left within the body"] += 1
        return
    elif kind < 0.5:
        answer = await client.post(path, content=spoiled(asked), headers=headers)
    else:
        answer = await client.post(path, json=asked)
    seen[answer.status_code] += 1
    text = "" if answer.is_stream_consumed and kind < 0.1 else answer.text
    if answer.status_code not in ALLOWED or "engine_error" in text or "internal_error" in text:
        faults.append(f"{path} {answer.status_code} {text[-300:]}")


async def load(it: Running, seen: Counter, faults: list[str], requests: int) -> None:
    async with httpx.AsyncClient(base_url=it.url, timeout=120, limits=httpx.Limits(max_connections=AT_ONCE)) as client:

        async def worker() -> None:
            for _ in range(requests // AT_ONCE):
                await one(client, seen, faults)

        await asyncio.gather(*(worker() for _ in range(AT_ONCE)))


@pytest.mark.filterwarnings("default")  # a client that leaves in the middle leaves open sockets behind
def test_soak() -> None:
    seen, faults, sizes = Counter(), [], []
    limits = Limits(1024, max_body_bytes=50_000)
    with running(make(demo.load(), limits=limits, cache_bytes=2**23, max_waiting=64, max_requests=16)) as it:
        for _ in range(4):
            asyncio.run(load(it, seen, faults, REQUESTS // 4))
            assert it.idle(), "pages are held that nobody waits for"
            sizes.append(psutil.Process().memory_info().rss)
        assert it.service.engine.submit([5], max_new_tokens=1).result()
    assert faults == []
    assert seen[200] > REQUESTS / 3
    assert all(seen[how] > 0 for how in ("left", "left a stream", "left within the body", "whole streams"))
    assert {status for status in seen if isinstance(status, int)} <= ALLOWED
    assert sizes[-1] - sizes[0] < GROWTH, sizes
