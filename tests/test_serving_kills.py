"""The server as a process that is told to stop, or is killed, while it answers and while it writes its prompt cache."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from hf_llmopt import demo
from hf_llmopt.sealed import read

httpx = pytest.importorskip("httpx2")
pytest.importorskip("fastapi")

import hf_llmopt  # noqa: E402 - the extra first
from hf_llmopt.bench.serve_process import Server, started  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (demo.path() / "config.json").is_file(), reason="the embedded model has no weights"),
]
# Computing is so fast here that nothing would be read from files: the commands are told that it is slow.
COMMAND = """
import sys
from hf_llmopt.cli import main
from hf_llmopt.prompt_cache import tree

tree.compute_seconds = lambda model, tokens: 1.0
sys.argv[0] = "hf-llmopt"
sys.exit(main())
"""
PROMPTS = [
    f"{start}\n# {number}: {'of some length, and ' * 12}\ndef f_{number}(self"
    for number in range(12)
    for start in ("import os", "class Stack:")
]


@contextmanager
def server(log: Path, llmopt: dict | None = None, *options: str) -> Iterator[Server]:
    root = str(Path(hf_llmopt.__file__).parents[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([root, *sys.path]))
        command = [sys.executable, "-c", COMMAND, "serve", "demo", "--dtype", "float32", *options]
        with started([*command, "--llmopt", json.dumps(llmopt or {"prompt_cache": {}})], log) as it:
            yield it


def ask(url: str, prompt: str, tokens: int = 8) -> dict:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
    answer = httpx.post(url + "/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    """What `generate` of transformers gives."""
    model, tokenizer = demo.load()
    found = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**ids, max_new_tokens=8, do_sample=False)
        found[prompt] = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def pages(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*.safetensors"))


def damage(path: Path, number: int) -> None:
    data = bytearray(path.read_bytes())
    if number % 2:
        data[-40] ^= 1
    path.write_bytes(data if number % 2 else data[: len(data) // 2])


def test_sigkill_while_the_prompt_cache_is_written(tmp_path, expected) -> None:
    folder = tmp_path / "cache"
    settings = {"kv_cache": {"page_size": 16}, "prompt_cache": {"path": str(folder)}}
    killed_early = 0
    for round_ in range(4):
        with server(tmp_path / f"{round_}.log", settings) as it, ThreadPoolExecutor(8) as pool:
            before = len(pages(folder))
            running = [pool.submit(ask, it.url, prompt) for prompt in PROMPTS]
            until = time.monotonic() + 60
            while len(pages(folder)) < before + 7 * (round_ + 1) and time.monotonic() < until:
                if all(one.done() for one in running):
                    break
            it.process.send_signal(signal.SIGKILL)
            it.process.wait()
            killed_early += any(one.exception() is not None for one in running)
        for path in pages(folder):
            tensors, metadata = read(path)
            assert tensors
            assert len(json.loads(metadata["tokens"])) == 16
    assert killed_early, "no kill came while requests ran"
    assert len(pages(folder)) > 20
    damaged = pages(folder)[::3]
    for number, path in enumerate(damaged):
        damage(path, number)

    with server(tmp_path / "last.log", settings) as it:
        answers = {prompt: ask(it.url, prompt) for prompt in PROMPTS}
        again = {prompt: ask(it.url, prompt) for prompt in PROMPTS}
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers.values()]
    assert {prompt: answer["choices"][0]["text"] for prompt, answer in answers.items()} == expected
    assert {prompt: answer["choices"][0]["text"] for prompt, answer in again.items()} == expected
    assert cached[0] or cached[1], "what was written before the kills is found"
    assert "is not a page of the prompt cache" in (tmp_path / "last.log").read_text()


def test_sigterm_under_load_loses_no_answer(tmp_path) -> None:
    with server(tmp_path / "log") as it, ThreadPoolExecutor(24) as pool:
        alone = ask(it.url, PROMPTS[0], 60)["choices"][0]["text"]
        assert alone
        running = [pool.submit(ask, it.url, PROMPTS[0], 500) for _ in range(20)]
        while taken(it.url) < 20:
            assert not any(one.done() for one in running)
        it.process.send_signal(signal.SIGTERM)
        refused = late(it.url)
        texts = {one.result()["choices"][0]["text"] for one in running}
        assert len(texts) == 1
        assert texts.pop().startswith(alone)
        assert it.process.wait(20) == 0
    assert refused in (503, None), "or the server had ended already"
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    done = [line for line in lines if line.get("path") == "/v1/completions" and line["status"] == 200]
    assert len(done) >= 21


def taken(url: str) -> int:
    """Requests that run or wait."""
    found = re.findall(r"^llmopt:num_requests_(?:running|waiting)\{.*\} (\S+)$", httpx.get(url + "/metrics").text, re.M)
    return sum(map(int, map(float, found)))


def late(url: str) -> int | None:
    """How a request that comes after the signal is answered."""
    while True:
        try:
            status = httpx.post(url + "/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code
        except httpx.TransportError:
            return None
        if status != 200:  # before the signal has arrived
            return status


def test_the_second_signal_does_not_wait(tmp_path) -> None:
    with server(tmp_path / "log", None, "--drain", "60") as it, ThreadPoolExecutor(1) as pool:
        body = {"prompt": PROMPTS[0], "max_tokens": 900, "temperature": 0}
        running = pool.submit(httpx.post, it.url + "/v1/completions", json=body, timeout=60)
        while not taken(it.url):
            assert not running.done()
        it.process.send_signal(signal.SIGTERM)
        assert late(it.url) in (503, None)
        it.process.send_signal(signal.SIGTERM)
        assert it.process.wait(15) == -signal.SIGTERM
        assert running.result().status_code in (200, 503)
