"""Kernels of others in the race of a pass: what they are asked for, and what they are not. Fakes stand for them."""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_llmopt.attention import Span, StepInputs, dense, gpu
from hf_llmopt.attention.dense import Packed
from hf_llmopt.attention.paths import sdpa
from hf_llmopt.config import KVCacheConfig
from hf_llmopt.kv_cache import LayerSpec, PagedStore

tuning = pytest.importorskip("hf_llmopt.kernels.triton.tuning")
CPU = torch.device("cpu")
PROMPTS = [(3, 3), (20, 20), (31, 31)]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    found = dense.installed
    found.cache_clear()
    yield
    found.cache_clear()


def fake(packed: Packed) -> torch.Tensor:
    """Prompt by prompt."""
    outputs = []
    for start, stop in zip(packed.bounds[:-1].tolist(), packed.bounds[1:].tolist(), strict=True):
        query, key, value = (part[None, start:stop].transpose(1, 2) for part in packed[:3])
        attended = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=packed.scaling, enable_gqa=True
        )
        outputs.append(attended[0].transpose(0, 1))
        assert stop - start <= packed.longest
    return torch.cat(outputs)


Make = Callable[..., tuple[StepInputs, Any, list[str]]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    """A pass over one layer, its call with the keys in their pages, and the paths it takes; `fake` is installed."""
    monkeypatch.setattr(dense, "installed", lambda: {"fake": fake})

    def made(
        spans: list[tuple[int, int]] = PROMPTS,
        window: tuple[str, int] = ("full", 0),
        dtype: torch.dtype = torch.bfloat16,
        form: str = "auto",
        widths: tuple[int, int] = (16, 16),
        parents: list[int] | None = None,
    ) -> tuple[StepInputs, Any, list[str]]:
        torch.manual_seed(0)
        store = PagedStore([LayerSpec(*window, 2, *widths, dtype, CPU)], KVCacheConfig(page_size=4, dtype=form))
        store.provide([100])
        placed, offset, noted = [], 0, []
        for context, length in spans:
            (table,) = store.tables([0])
            table.reserve(0, context)
            placed.append(Span([table], offset, length, context, parents))
            offset += length
        slots = torch.cat([store.slots(s.tables[0], s.context - s.length, s.context) for s in placed])
        query = torch.randn(1, 4, offset, widths[0]).to(dtype)
        key, value = (torch.randn(1, 2, offset, width).to(dtype) for width in widths)
        calls: list[Any] = []

        def keep(step: StepInputs, call: Any) -> torch.Tensor:
            calls.append(call)
            return call.query

        step = StepInputs(store, placed, [slots], keep, noted.append)
        step.read(SimpleNamespace(layer_idx=0), query, key, value, 0.3, {})  # type: ignore[arg-type]
        return step, calls[0], noted

    return made


def test_a_kernel_of_others_computes_prompts(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    step, call, noted = make()
    keys: list[str] = []

    def raced(key: str, ways: dict[str, Any], device: torch.device) -> str:
        keys.append(key)
        for way in ways.values():
            way()
        return list(ways)[-1]

    monkeypatch.setattr(tuning, "raced", raced)
    found = gpu.fastest_paged(step, call)
    assert noted == ["prefill-fake"] * 2  # the short prompt and the others; the race itself is no news
    torch.testing.assert_close(found, sdpa(step, call), rtol=0, atol=0.02)
    assert all(key.startswith("attention full torch.bfloat16") and key.endswith(", fake") for key in keys)


def test_bounds_are_made_once_a_step(make: Make) -> None:
    step, _, _ = make()
    assert step.bounds(range(3), CPU).tolist() == [0, 3, 23, 54]
    assert step.bounds(range(1, 3), CPU).tolist() == [0, 20, 51]
    assert step.bounds(range(3), CPU) is step.bounds(range(3), CPU)


@pytest.mark.parametrize(
    "options",
    [
        {"spans": [(20, 20), (40, 9)]},  # one goes on behind cached keys
        {"window": ("sliding", 8)},
        {"window": ("chunked", 16)},
        {"dtype": torch.float32},
        {"form": "int8"},
        {"widths": (16, 24)},
        {"widths": (12, 12)},
        {"parents": [-1, -1, 0]},
    ],
    ids=str,
)
def test_what_they_are_not_asked_for(make: Make, options: dict[str, Any]) -> None:
    step, call, _ = make(**options)
    assert dense.entrants(step, call, range(len(step.spans))) == {}


def test_windows_that_are_not_passed_are_none(make: Make) -> None:
    step, call, _ = make(window=("sliding", 31))
    assert list(dense.entrants(step, call, range(3))) == ["fake"]


def test_softcaps_are_ours_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "raced", lambda *_: pytest.fail("a race was run"))
    step, call, noted = make()
    gpu.fastest_paged(step, call._replace(softcap=2.0))
    assert set(noted) == {"triton-decode", "triton-extend"}


def packages(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    for name in ("torch.nn.attention.varlen", *dense.PACKAGES.values()):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    for name, function in functions.items():
        module = ModuleType(name)
        setattr(module, "varlen_attn" if name == "varlen" else "flash_attn_varlen_func", function)
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen" if name == "varlen" else name, module)


def test_packages_are_called_by_their_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def varlen(q, k, v, q_ends, k_ends, q_most, k_most, *, scale, window_size, enable_gqa):  # type: ignore[no-untyped-def]
        asked.append({"scale": scale, "window": window_size, "gqa": enable_gqa, "most": (q_most, k_most)})
        return q

    def package(q: Any, k: Any, v: Any, **named: Any) -> Any:
        asked.append(named)
        return q, None

    packages(monkeypatch, varlen=varlen, flash_attn=package, flash_attn_interface=package)
    ways = dense.installed()
    assert list(ways) == ["varlen", "flash-attn-3", "flash-attn"]
    packed = Packed(*(torch.ones(2, 1, 8) for _ in range(3)), torch.tensor([0, 2], dtype=torch.int32), 2, 0.5)
    for way in ways.values():
        assert way(packed) is packed.query
    assert asked[0] == {"scale": 0.5, "window": (-1, 0), "gqa": True, "most": (2, 2)}
    assert asked[1]["causal"]
    assert asked[1]["softmax_scale"] == 0.5
    assert asked[1]["cu_seqlens_k"] is packed.bounds


def test_an_older_varlen_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch 2.12 it takes no grouped queries."""
    packages(monkeypatch, varlen=lambda q, k, v, q_ends, k_ends, q_most, k_most, is_causal=False: q)
    assert dense.installed() == {}


def test_a_package_that_does_not_import_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    packages(monkeypatch)
    assert dense.installed() == {}
