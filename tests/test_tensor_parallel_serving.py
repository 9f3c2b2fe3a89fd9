"""`hf-llmopt serve --tensor-parallel`: the answers of one process, and no rank outlives the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest
from transformers import PreTrainedModel
from typer.testing import CliRunner

from hf_llmopt import demo
from hf_llmopt.batching.sharded import ShardedEngine
from hf_llmopt.cli import app
from hf_llmopt.cli.models import load_shard
from hf_llmopt.errors import EngineClosed, InvalidOption

httpx = pytest.importorskip("httpx2")
pytest.importorskip("fastapi")

from served import make, running  # noqa: E402 - needs the extra

import hf_llmopt  # noqa: E402
from hf_llmopt.bench.serve_process import Server, started  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (demo.path() / "config.json").is_file(), reason="the embedded model's weights are not there"
)
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}}, "required": ["a", "b"]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
MESSAGES = [{"role": "user", "content": "def main("}]
COMPLETIONS = [
    {"prompt": "import os\n", "max_tokens": 24, "temperature": 0},
    {"prompt": "import os\n", "max_tokens": 24, "temperature": 0, "cache_salt": "another's"},
    {"prompt": ["class Stack:", "def f(self"], "max_tokens": 12, "n": 2, "seed": 5, "temperature": 0.9, "top_k": 40},
    {
        "prompt": "def f(",
        "max_tokens": 8,
        "temperature": 0,
        "logit_bias": {"20": 4},
        "frequency_penalty": 1,
        "stop": ")",
    },
    {"prompt": "x = ", "max_tokens": 40, "seed": 1, "response_format": {"type": "json_object"}},
]
CHATS = [
    {
        "messages": MESSAGES,
        "max_tokens": 40,
        "seed": 2,
        "n": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}},
    },
    {"messages": MESSAGES, "max_tokens": 60, "temperature": 0, "tools": [TOOL], "tool_choice": "required"},
]
LONG = {"prompt": "import os\n", "max_tokens": 700, "min_tokens": 700, "temperature": 0}


def refusal(*args: str) -> str:
    result = CliRunner().invoke(app, [*args])
    assert result.exit_code == 1
    return result.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--tensor-parallel", "3"], "num_attention_heads=4, which cannot be shared evenly"),
        (["--tensor-parallel", "4"], "num_key_value_heads=2, which cannot be shared evenly"),
        (["--tensor-parallel", "2", "--device", "cuda:1"], "--device cuda:1 is one device"),
        (["--tensor-parallel", "2", "--llmopt", "int8"], "--llmopt asks for int8"),
        (["--tensor-parallel", "2", "--llmopt", '{"prompt_cache": {"ttl": 3}}'], "not served where a model is sharded"),
        (["nowhere/nothing/none", "--tensor-parallel", "2"], "there is no folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_sharded_is_refused_before_anything_starts(monkeypatch, args, says) -> None:
    monkeypatch.setattr("hf_llmopt.batching.sharded.Followers", None)
    assert says in refusal("serve", "--port", "0", *args)


def test_a_batch_refuses_the_same(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("hf_llmopt.batching.sharded.Followers", None)
    source = requests_in(tmp_path)
    assert "cannot be shared evenly" in refusal("batch", str(source), str(tmp_path / "out"), "--tensor-parallel", "3")


def requests_in(folder: Path) -> Path:
    """A file with a request of each kind of completion, and a long one."""
    lines = [
        {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": {"model": "demo", **one}}
        for number, one in enumerate([*COMPLETIONS, LONG])
    ]
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return source


@contextmanager
def server(log: Path, *options: str) -> Iterator[Server]:
    root = str(Path(hf_llmopt.__file__).parents[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([root, *sys.path]))
        command = [sys.executable, "-m", "hf_llmopt", "serve", "demo", "--dtype", "float32", "--tensor-parallel", "2"]
        with started([*command, *options], log) as it:
            yield it


def others(it: Server) -> list[psutil.Process]:
    """The processes that a server has started."""
    return psutil.Process(it.process.pid).children(recursive=True)


def answers(url: str) -> list[object]:
    found: list[object] = []
    for path, bodies in (("/v1/completions", COMPLETIONS), ("/v1/chat/completions", CHATS)):
        for body in bodies:
            answer = httpx.post(url + path, json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            found.append([said(choice) for choice in answer.json()["choices"]])
    events = httpx.post(url + "/v1/completions", json={**COMPLETIONS[0], "stream": True}, timeout=60).text
    assert events.endswith("data: [DONE]\n\n")
    heard = [json.loads(line.removeprefix("data: ")) for line in events.splitlines() if line.startswith("data: {")]
    return [*found, "".join(choice["text"] for event in heard for choice in event["choices"])]


def said(choice: dict) -> object:
    if "message" not in choice:
        return choice["text"], choice["finish_reason"]
    calls = [call["function"] for call in choice["message"].get("tool_calls", ())]
    return choice["message"]["content"], calls, choice["finish_reason"]


@pytest.mark.slow
def test_answers_are_those_of_one_process_and_signals_lose_none(tmp_path) -> None:
    model, tokenizer = demo.load()
    with running(make((model.float(), tokenizer))) as whole:
        expected = answers(whole.url)
    with server(tmp_path / "log", "--drain", "200") as it:
        assert answers(it.url) == expected
        ranks = others(it)
        body = {**LONG, "max_tokens": 300, "min_tokens": 300}
        with ThreadPoolExecutor(2) as pool:
            last = [pool.submit(httpx.post, it.url + "/v1/completions", json=body, timeout=200) for _ in range(2)]
            while 'num_requests_running{model_name="demo"} 2.0' not in httpx.get(it.url + "/metrics").text:
                assert not any(one.done() for one in last)
            for process in (it.process, *ranks):  # as a terminal and systemd do it
                process.send_signal(signal.SIGTERM)
            assert [one.result().json()["usage"]["completion_tokens"] for one in last] == [300, 300]
        assert it.process.wait(20) == 0
    assert psutil.wait_procs(ranks, timeout=5)[1] == []
    assert '"tensor_parallel": 2' in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("busy", [True, False])
def test_a_rank_that_dies_ends_the_server(tmp_path, busy: bool) -> None:
    with server(tmp_path / "log") as it, ThreadPoolExecutor(1) as pool:
        running_one = pool.submit(httpx.post, it.url + "/v1/completions", json=LONG, timeout=60) if busy else None
        while busy and 'num_requests_running{model_name="demo"} 1.0' not in httpx.get(it.url + "/metrics").text:
            assert not running_one.done()
        ranks = others(it)
        (rank,) = [one for one in ranks if "spawn_main" in " ".join(one.cmdline())]
        rank.kill()
        assert it.process.wait(20) == 1
        if busy:
            assert running_one.result().status_code in (500, 503)
            assert running_one.result().json()["error"]["type"] == "server_error"
    assert psutil.wait_procs(ranks, timeout=5)[1] == []
    assert "error: Rank 1 of 2 has ended with exit code -9" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_batch_goes_on_after_a_rank_has_died(tmp_path) -> None:
    """Its answers are those of one process."""
    root = str(Path(hf_llmopt.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    source, target = requests_in(tmp_path), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "hf_llmopt", "batch", "--dtype", "float32", str(source)]
    sharded = [*command, str(target), "--tensor-parallel", "2"]
    with subprocess.Popen(sharded, env=environment, stderr=subprocess.PIPE, text=True) as batch:
        while not (target.exists() and target.read_text()):
            time.sleep(0.01)
        (rank,) = [
            one for one in psutil.Process(batch.pid).children(recursive=True) if "spawn_main" in " ".join(one.cmdline())
        ]
        rank.kill()
        said = batch.communicate(timeout=60)[1]
        assert batch.returncode == 1
        assert "Rank 1 of 2 has ended with exit code -9" in said
    subprocess.run([*sharded, "--retry-failed"], env=environment, check=True, timeout=120)
    subprocess.run([*command, str(tmp_path / "whole.jsonl")], env=environment, check=True, timeout=120)
    assert texts(target) == texts(tmp_path / "whole.jsonl")


def texts(results: Path) -> dict[str, list[object]]:
    found = map(json.loads, results.read_text().splitlines())
    return {one["custom_id"]: [choice["text"] for choice in one["response"]["body"]["choices"]] for one in found}


@pytest.mark.slow
def test_the_others_end_with_rank_0(tmp_path) -> None:
    with server(tmp_path / "log") as it:
        ranks = others(it)
        assert len(ranks) >= 1
        it.process.kill()
        assert psutil.wait_procs(ranks, timeout=10)[1] == []


def _broken() -> PreTrainedModel:
    if int(os.environ["RANK"]):
        os._exit(9)  # rank 0 is left waiting for it
    return load_shard("demo", "float32")


def _refused() -> PreTrainedModel:
    raise InvalidOption("it cannot be")


@pytest.mark.slow
def test_a_start_that_fails_says_why() -> None:
    with pytest.raises(InvalidOption, match="it cannot be"):
        ShardedEngine.start(_refused, 2)
    with pytest.raises(InvalidOption, match="2 processes"):
        ShardedEngine.start(partial(load_shard, "demo"), 2, {"kv_cache": {"eviction": "sink"}})
    with pytest.raises(EngineClosed, match=r"Rank 1 of 2 has ended with exit code 9.*while the model was loaded"):
        ShardedEngine.start(_broken, 2)
