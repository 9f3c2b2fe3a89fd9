"""Plain forwards by the Triton kernels over dense keys: on a GPU where there is one, else in Triton's interpreter."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from architectures import build
from torch.nn.functional import scaled_dot_product_attention

from hf_llmopt.attention import gpu, plain, strided
from hf_llmopt.kernels import reference

tuning = pytest.importorskip("hf_llmopt.kernels.triton.tuning")
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
TOKENS = 36
# As in test_triton_attention.py: the interpreter cuts bfloat16 where a GPU rounds.
SLACK = 1.3 if GPU else 2.0


@dataclass(frozen=True)
class Case:
    """What to compute; `sees` says which tokens a token sees, by where both stand and the row's number of tokens."""

    heads: tuple[int, int] = (4, 2)
    widths: tuple[int, int] = (16, 16)
    window: int = 0
    padding: str = ""
    softcap: float | None = None
    sinks: bool = False
    scaling: float = 0.3
    layouts: tuple[str, str, str] = ("tokens", "tokens", "tokens")
    dtype: torch.dtype = torch.float32
    rows: int = 2
    tokens: int = TOKENS


def laid(layout: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """`[rows, heads, tokens, width]` as models lay them out; what lies between is NaN."""
    rows, heads, tokens, width = shape
    if layout == "heads":  # as a cache joins them
        memory = torch.full((rows, heads, tokens, width), float("nan"))
    elif layout == "joined":  # queries, keys and values of a token in one product
        memory = torch.full((rows, tokens, 3 * heads, width), float("nan"))[:, :, heads : 2 * heads].transpose(1, 2)
    elif layout == "apart":  # queries, keys and values of a head in one product
        memory = torch.full((rows, tokens, heads, 3 * width), float("nan"))[..., width : 2 * width].transpose(1, 2)
    else:
        memory = torch.full((rows, tokens, heads, width), float("nan")).transpose(1, 2)
    memory = memory.to(dtype).to(DEVICE)
    return memory.copy_(torch.randn(shape).to(dtype))


def make(case: Case) -> tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """Queries, keys and values; sinks; what is handed to the kernel; and the same as a mask."""
    torch.manual_seed(0)
    shapes = zip((case.heads[0], case.heads[1], case.heads[1]), (*case.widths[:1] * 2, case.widths[1]), strict=True)
    parts = [
        laid(layout, (case.rows, heads, case.tokens, width), case.dtype)
        for layout, (heads, width) in zip(case.layouts, shapes, strict=True)
    ]
    token = torch.arange(case.tokens, device=DEVICE)
    first, end = torch.zeros_like(token)[None], token[None] + 1
    if case.window:
        first = (end - case.window).clamp(min=0)
    if case.padding:
        count = torch.tensor([[7], [0]], device=DEVICE)
        if case.padding == "left":
            first = first.maximum(count).minimum(token)
        else:
            end = end.minimum(case.tokens - count)
            first = first.where(first < end, token)
            end = end.maximum(first + 1)
    seen = strided.items(case.rows, first, end) if case.window or case.padding else None
    mask = ((token >= first[..., None]) & (token < end[..., None]))[:, None]
    sinks = torch.randn(case.heads[0]).to(case.dtype).to(DEVICE) if case.sinks else None
    return parts, sinks, seen, mask


def check(case: Case) -> None:
    """Its error against float64 is no larger than that of torch's attention."""
    parts, sinks, seen, mask = make(case)
    found = strided.attention(*parts, seen, case.scaling, case.softcap, sinks)
    assert found.shape == (case.rows, case.tokens, case.heads[0], case.widths[1])
    assert found.dtype == case.dtype
    exact = reference.attention(
        *(part.double() for part in parts), mask, case.scaling, case.softcap, None if sinks is None else sinks.double()
    )
    if case.softcap or case.sinks:
        theirs = reference.attention(*parts, mask, case.scaling, case.softcap, sinks)
    else:
        theirs = scaled_dot_product_attention(*parts, attn_mask=mask, scale=case.scaling, enable_gqa=True)
    floor = torch.finfo(case.dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
    bound = SLACK * float((theirs.double() - exact).norm()) + floor * float(exact.norm())
    assert float((found.transpose(1, 2).double() - exact).norm()) <= bound


FEATURES = {
    "causal": {},
    "window": {"window": 9, "layouts": ("tokens", "joined", "joined")},
    "left padding": {"padding": "left"},
    "right padding": {"padding": "right", "window": 6},
    "softcap": {"softcap": 2.0, "scaling": 1.0},
    "sinks": {"sinks": True, "layouts": ("tokens", "apart", "apart")},
    "one key head": {"heads": (5, 1), "layouts": ("tokens", "heads", "heads")},
    "unequal widths": {"widths": (40, 24), "layouts": ("heads", "heads", "tokens")},
    "all": {"window": 21, "softcap": 3.0, "sinks": True, "padding": "left", "layouts": ("heads", "heads", "heads")},
}


LAYOUTS = ["tokens", "heads", "joined", "apart"]


@pytest.mark.parametrize("feature", FEATURES)
def test_errors_are_not_larger_than_torchs(feature: str) -> None:
    check(Case(**FEATURES[feature]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_errors_of_16_bits(dtype: torch.dtype) -> None:
    check(Case(**FEATURES["all"], dtype=dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("feature", "layout", "width"),
    [(f, "heads", 128) for f in FEATURES] + [("all", layout, width) for layout in LAYOUTS for width in (64, 128)],
)
def test_heads_that_hopper_has_kernels_for(feature: str, layout: str, width: int) -> None:
    given = {**FEATURES[feature], "widths": (width, width), "layouts": ("tokens", layout, layout), "scaling": 0.1}
    for window in {given.pop("window", 0), 200 if "window" in FEATURES[feature] else 0}:
        check(Case(**given, window=window, dtype=torch.bfloat16, tokens=500))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_are_read_where_they_lie(layout: str) -> None:
    case = Case(layouts=("tokens", layout, layout))
    (_, key, value), *_ = make(case)
    keys, values, apart = strided.as_slots(key, value)
    assert (keys.data_ptr(), values.data_ptr()) == (key.data_ptr(), value.data_ptr())
    slots = torch.arange(case.rows, device=DEVICE)[:, None] * apart + torch.arange(case.tokens, device=DEVICE)
    assert torch.equal(keys[slots].transpose(1, 2), key)
    assert torch.equal(values[slots].transpose(1, 2), value)


def test_keys_that_do_not_lie_evenly_are_copied() -> None:
    check(Case(layouts=("tokens", "heads", "tokens")))
    (_, key, value), *_ = make(Case(layouts=("tokens", "heads", "tokens")))
    turned = key.transpose(2, 3).contiguous().transpose(2, 3)
    keys, _, apart = strided.as_slots(turned, value)
    assert torch.equal(keys[apart : apart + TOKENS].transpose(0, 1), key[1])


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor | None]]:
    """The kernel serves on this device, short prompts too, and wins; what it was told that tokens see."""
    told: list[torch.Tensor | None] = []

    def watched(*given):
        told.append(given[3])
        return strided.attention(*given)

    monkeypatch.setattr(plain, "LONG", 16)
    monkeypatch.setattr(plain, "strided", watched)
    monkeypatch.setattr(plain, "_kernel", lambda tokens, *_: watched if tokens >= plain.LONG else None)
    monkeypatch.setattr(tuning, "raced", lambda *_: "triton")
    return told


def both(name: str, **options):
    """A model as transformers has it, and the same with our attention."""
    stock, model = (build(name, **options).to(DEVICE) for _ in range(2))
    model.set_attn_implementation("llmopt")
    return stock, model


@pytest.mark.parametrize(
    ("name", "padding"),
    [
        ("mistral", ""),
        ("mistral", "left"),
        ("mistral", "right"),
        ("gemma2", ""),
        ("gemma2", "right"),
        ("gpt_oss", "left"),
    ],
)
def test_logits_are_those_of_stock(name: str, padding: str, ours, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, softcaps and sinks, and not a single mask."""
    stock, model = both(name, num_hidden_layers=2, **({} if name == "mistral" else {"layer_types": MIXED}))
    ids, real = torch.randint(3, 90, (2, 20), device=DEVICE), torch.ones(2, 20, dtype=torch.long, device=DEVICE)
    if padding:
        real[1, slice(7) if padding == "left" else slice(13, None)] = 0
    with torch.no_grad():
        expected = stock(ids, attention_mask=real).logits
        monkeypatch.setattr(reference, "visible", lambda *_: pytest.fail("a mask is made"))
        monkeypatch.setattr(plain, "sdpa_mask", without_mask)
        logits = model(ids, attention_mask=real, use_cache=padding != "left").logits
    torch.testing.assert_close(logits[real == 1], expected[real == 1], atol=2e-4, rtol=1e-4)
    assert len(ours) == 2
    assert all(told is None or told.shape == (2, 1, 20, 3) for told in ours)


MIXED = ["sliding_attention", "full_attention"]


def without_mask(**arguments) -> None:
    """transformers' own, where it makes none."""
    from transformers.masking_utils import sdpa_mask

    assert sdpa_mask(**arguments) is None


def test_all_that_is_made_is_linear(ours, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, padding and softcaps at a length whose square would be seen; the kernel makes its result alone."""
    monkeypatch.setattr(gpu, "prefill", lambda query, *_: (query.clone(), "none"))
    _, model = both("gemma2")
    real = torch.ones(1, 2048, dtype=torch.long, device=DEVICE)
    real[:, :100] = 0
    with torch.no_grad(), torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        model(torch.ones_like(real), attention_mask=real, logits_to_keep=1)
    events = profile.events()
    largest = max(max(event.self_cpu_memory_usage, event.self_device_memory_usage) for event in events)
    assert len(ours) == model.config.num_hidden_layers
    assert 0 < largest < 2048 * 2048


@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_those_of_stock(training: bool, ours) -> None:
    found = []
    for net in both("gpt_oss"):
        ids = torch.arange(3, 23, device=DEVICE)[None]
        net.train(training)(ids, labels=ids).loss.backward()
        found.append({key: weight.grad for key, weight in net.named_parameters()})
    assert not ours
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, atol=1e-5, rtol=1e-3, msg=key)


@pytest.mark.parametrize("winner", ["sdpa", "triton"])
def test_what_torch_computes_without_a_mask_is_raced(winner: str, ours, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []

    def raced(key: str, ways: dict[str, Callable], device: torch.device) -> str:
        keys.append(key)
        assert device.type == DEVICE.type
        sdpa, triton = ways["sdpa"]()[0], ways["triton"]()
        torch.testing.assert_close(sdpa, triton, atol=1e-5, rtol=1e-4)
        ours.clear()  # those of the race
        return winner

    monkeypatch.setattr(tuning, "raced", raced)
    stock, model = both("llama", num_hidden_layers=1)
    ids = torch.randint(3, 90, (2, 20), device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, stock(ids).logits, atol=2e-4, rtol=1e-4)
    assert keys == ["plain torch.float32 heads 4/2 16/16 rows, tokens 2 32"]
    assert len(ours) == (winner == "triton")


def test_which_kernel_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_has_triton", lambda device: device.index == 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    device = torch.device("cuda:0")
    assert plain._kernel(plain.LONG, torch.bfloat16, device, 256) is strided.attention
    assert plain._kernel(plain.LONG - 1, torch.bfloat16, device) is None
    assert plain._kernel(plain.LONG, torch.float64, device) is None
    assert plain._kernel(plain.LONG, torch.bfloat16, device, 257) is None
    assert plain._kernel(plain.LONG, torch.bfloat16, torch.device("cuda:1")) is None  # older than Ampere, say
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert plain._kernel(plain.LONG, torch.bfloat16, device) is None
