"""What every test shares: no network, one thread, fixed seeds, one tiny model per architecture."""

import gc
import os
import random
import socket
from collections.abc import Iterator

# Read when torch is imported, and by the processes that tests start. A tiny model gains nothing from a second thread,
# and the numbers must not depend on the machine. Where threads are two, one that waits leaves its core to whatever else
# computes, instead of taking turns with it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"

import numpy
import pytest
import torch

# Without a GPU Triton's kernels run in its interpreter. That is decided when Triton is imported, as transformers does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from architectures import build


def pytest_unconfigure() -> None:
    """Extensions complain about what they find still there when Python ends."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def _no_garbage() -> None:
    """Modules and tests stay to the end: no collection need go through them. What measures thaws them."""
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuses every connection that leaves the machine; the server's tests still talk to it over loopback."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def check(sock: socket.socket, address) -> None:
        local = sock.family == getattr(socket, "AF_UNIX", None) or address[0] in ("127.0.0.1", "::1", "localhost")
        if not local:
            raise RuntimeError(f"a test tried to connect to {address!r}: tests run without a network")

    def guarded_connect(sock, address):
        check(sock, address)
        return connect(sock, address)

    def guarded_connect_ex(sock, address):
        check(sock, address)
        return connect_ex(sock, address)

    def guarded_getaddrinfo(host, *args, **kwargs):
        if host not in (None, "", "127.0.0.1", "::1", "localhost", "0.0.0.0", b"127.0.0.1", b"localhost"):
            raise RuntimeError(f"a test tried to resolve {host!r}: tests run without a network")
        return getaddrinfo(host, *args, **kwargs)

    getaddrinfo = socket.getaddrinfo
    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """For what divides its work among threads."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """The same random numbers for a test whether it runs alone or after others."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def model():
    """`model(name, **arguments)`: `architectures.build`, kept for the session.

    The same object returns for the same arguments: a test that changes weights or config calls `build` itself.
    """
    built = {}

    def get(name: str, **arguments) -> torch.nn.Module:
        key = (name, repr(sorted(arguments.items())))
        if key not in built:
            built[key] = build(name, **arguments)
        return built[key]

    return get


@pytest.fixture
def cheap_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes take what they should take, however busy the machine is: which guesses pay is the same in every run."""
    monkeypatch.setattr("hf_llmopt.engine.drafters.pass_seconds", lambda runner, tokens: 1.0 + 0.01 * tokens)
    monkeypatch.setattr("hf_llmopt.speculative.length.PassCosts.observe", lambda costs, tokens, seconds: None)
