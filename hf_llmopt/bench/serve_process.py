"""Servers of a model in processes of their own, and the folder that all of them read."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

START, STOP = 600.0, 20.0  # seconds that a server has to start and to stop


class NoServer(Exception):
    """A server did not start; the message is the end of its log."""


@dataclass(frozen=True)
class Server:
    """A server that was started.

    Attributes:
        url: Where it listens.
        process: Its process.
    """

    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def paused(servers: Iterable[Server]) -> Iterator[None]:
    """Stop servers meanwhile: one that only waits computes too, now and then."""
    stopped = list(servers)
    for server in stopped:
        server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for server in stopped:
            server.process.send_signal(signal.SIGCONT)


def ours(folder: str, dtype: str, device: str, llmopt: str) -> list[str]:
    """The command of `hf-llmopt serve`."""
    given = ["--llmopt", llmopt, "--dtype", dtype, "--device", device]
    return [sys.executable, "-m", "hf_llmopt", "serve", folder, *given]


def theirs(folder: str, dtype: str, device: str, requests: int) -> list[str]:
    """The command of `transformers serve`; on a CPU it has to be told its room, and gets enough for all requests."""
    given = ["--continuous-batching", "--host", "127.0.0.1", "--dtype", dtype, "--device", device]
    room = ["--cb-num-blocks", str(6 * requests + 8), "--cb-max-batch-tokens", "512"] if device == "cpu" else []
    return [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, *given, *room]


@contextmanager
def started(command: Sequence[str], log: Path) -> Iterator[Server]:
    """Run a server until the end of the block.

    Args:
        command: Its command; `--port` is added.
        log: What it writes.

    Raises:
        NoServer: It ended, or did not answer `/health` in time.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with log.open("wb") as written:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        url, until = f"http://127.0.0.1:{port}", monotonic() + START
        while not _healthy(url):
            if process.poll() is not None or monotonic() > until:
                raise NoServer(ending(log))
            sleep(0.1)
        yield Server(url, process)
    finally:
        process.terminate()
        try:
            process.wait(STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _healthy(url: str) -> bool:
    try:
        with urlopen(url + "/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def ending(log: Path, characters: int = 300) -> str:
    """What a server wrote last."""
    return log.read_text("utf-8", "replace")[-characters:].strip() or "it wrote nothing"


def stretched(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> PreTrainedTokenizerBase:
    """A tokenizer that can show every token of a larger vocabulary: those it did not have are made-up words.

    A model of random weights generates them; what a text is tokenized to does not change.

    Args:
        tokenizer: Of the embedded model.
        vocabulary: Token ids of the other model.
    """
    written = json.loads(tokenizer.backend_tokenizer.to_str())
    words: dict[str, int] = written["model"]["vocab"]
    known = {*words.values(), *(token["id"] for token in written["added_tokens"])}
    words.update({f"Ġw{number}": number for number in range(vocabulary) if number not in known})
    special: Any = tokenizer.special_tokens_map
    return type(tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(written)), **special)
