"""What there is of replicas without Ray: a request on its way, and the application that a replica runs."""

import asyncio
import json
from importlib.util import find_spec

import pytest

pytest.importorskip("fastapi")

from typer.testing import CliRunner

from hf_llmopt.cli import app
from hf_llmopt.errors import InvalidOption
from hf_llmopt.serving import Keys
from hf_llmopt.serving.ray_replica import Replica
from hf_llmopt.serving.ray_request import Asked, Start
from hf_llmopt.serving.recipe import Recipe


def asked(path: str, body: object = None, *headers: tuple[bytes, bytes]) -> Asked:
    sent = b"" if body is None else json.dumps(body).encode()
    kind = (b"content-type", b"application/json")
    return Asked("GET" if body is None else "POST", path, b"", (kind, *headers), sent)


def alike(first: object, second: object, chunk: int = 8) -> int:
    """How many beginnings two bodies share."""
    pairs = zip(asked("/", first).beginnings(chunk), asked("/", second).beginnings(chunk), strict=False)
    return sum(one == other for one, other in pairs)


def test_beginnings() -> None:
    turn = [{"role": "user", "content": "what is a page of the KV cache?"}]
    more = [*turn, {"role": "assistant", "content": "a slot"}, {"role": "user", "content": "for what?"}]
    assert alike({"messages": turn}, {"messages": more, "max_tokens": 8}) >= len(json.dumps(turn)) // 8 - 1
    assert alike({"prompt": "import os"}, {"prompt": "import re"}) == 1
    assert alike({"prompt": "import os"}, {"prompt": "import os", "cache_salt": "x"}) == 0
    assert alike({"messages": turn}, {"messages": turn, "tools": [{"type": "function"}]}) == 0
    assert alike({"prompt": [1, 2, 3, 4, 5]}, {"prompt": [1, 2, 3, 4, 6]}) == 1
    assert asked("/").beginnings(8) == []
    assert Asked("POST", "/", b"", (), b"no json").beginnings(1) == []
    assert Asked("POST", "/", b"", (), b"[1]").beginnings(1) == []
    assert Asked("POST", "/", b"", (), b'{"prompt": "\\ud800\\ud800"}').beginnings(1)  # half a character


@pytest.fixture(scope="module")
def replica():
    made = Replica(Recipe(keys=Keys(["secret"]), max_waiting=4, origins=("http://page",)))
    yield made
    made.service.close()


def test_a_replica_answers_as_a_server(replica) -> None:
    key = (b"authorization", b"Bearer secret")
    ask = {"prompt": "import", "max_tokens": 24, "temperature": 0}

    async def parts(request: Asked) -> list:
        return [part async for part in replica.answer(request)]

    async def leave() -> None:
        stream = replica.answer(
            asked("/v1/completions", {**ask, "max_tokens": 900, "min_tokens": 900, "stream": True}, key)
        )
        await anext(stream)
        assert replica.service.open == 1
        await stream.aclose()
        for _ in range(500):
            if not replica.service.open and not replica.service.engine.loop.scheduler.running:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the request went on")

    async def all_of_it() -> None:
        (refused,) = await parts(asked("/v1/completions", ask))
        assert (refused.status, json.loads(refused.body)["error"]["code"]) == (401, "invalid_api_key")
        (whole,) = await parts(asked("/v1/completions", ask, key, (b"origin", b"http://page")))
        assert isinstance(whole, Start)
        assert not whole.streams
        assert (b"access-control-allow-origin", b"http://page") in whole.headers
        text = json.loads(whole.body)["choices"][0]["text"]
        first, *rest = await parts(asked("/v1/completions", {**ask, "stream": True}, key))
        assert first.streams
        events = b"".join([first.body, *rest]).decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        told = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
        assert "".join(event["choices"][0]["text"] for event in told) == text
        assert len(rest) > 1  # it came in parts
        await leave()

    asyncio.run(all_of_it())


def test_what_cannot_be_served() -> None:
    with pytest.raises(InvalidOption, match="transformers serve"):
        Recipe(llmopt=False).service()
    with pytest.raises(ValueError, match="max_waiting"):
        Recipe(max_waiting=0)


@pytest.mark.skipif(find_spec("ray") is not None, reason="ray is installed")
def test_without_ray_the_command_says_so() -> None:
    result = CliRunner().invoke(app, ["serve", "--replicas", "2"])
    assert result.exit_code == 1
    assert 'pip install "hf-llmopt[serve,ray]"' in result.stderr
