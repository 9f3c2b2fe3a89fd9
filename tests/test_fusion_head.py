"""Heads that are asked for the best token only: the same token, to the last bit of its logit."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from architectures import build
from torch import nn

import hf_llmopt
from hf_llmopt import Engine
from hf_llmopt.fusion import head as screened
from hf_llmopt.fusion.head import Screened
from hf_llmopt.fusion.kinds import inside
from hf_llmopt.kernels import cpu, reference

pytestmark = pytest.mark.skipif(not cpu.available(), reason=str(cpu.why_not()))

LEVELS = cpu.levels() or ("none",)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PROMPT = torch.tensor([[5, 9, 2, 11, 7]])


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every head is large enough and every copy pays: what is faster must not decide what is tested."""
    monkeypatch.setattr(screened, "LEAST", 0)
    monkeypatch.setattr(screened, "PASSES", 1)
    monkeypatch.setattr(Screened, "_pays", lambda self, x: True)
    monkeypatch.setattr("hf_llmopt.fusion.modules.own_rows", lambda *_: 16)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the passes in which only the best tokens were found."""
    seen: list[int] = []
    best = Screened._best

    def watched(self: Screened, x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[-2])
        return best(self, x)

    monkeypatch.setattr(Screened, "_best", watched)
    return seen


def a_head(outputs: int, inputs: int, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Linear, Screened]:
    linear = nn.Linear(inputs, outputs, bias=False).to(dtype).requires_grad_(False)
    made = Screened(linear, lambda x: cpu.linear(x, linear.weight.detach()), 8)
    made.returned = True
    return linear, made


@torch.no_grad()
def asked(made: Screened, x: torch.Tensor, best: bool = True) -> torch.Tensor:
    inside.now, inside.best = True, best
    try:
        return made(x)
    finally:
        inside.now = inside.best = False


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 15, 16, 1000, 5003])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_kernel_finds_what_its_twin_finds(dtype: torch.dtype, level: str, width: int, parts: int) -> None:
    estimates = torch.randn(parts * 3, width)
    error, spread, slack = torch.rand(width) * 0.05, torch.rand(3) + 0.5, torch.rand(3) * 0.01
    estimates[1, width // 2] = 9.0  # one of the rows has a clear winner
    with cpu.using(level):
        logits, places = cpu.leaders(estimates, error, spread, slack, dtype, width)
        expected, wanted = reference.leaders(estimates, error, spread, slack, dtype, width)
        assert torch.equal(logits, expected)
        assert places is not None
        assert wanted is not None
        assert places.tolist() == wanted.tolist()
        most = len(wanted) - 1
        assert cpu.leaders(estimates, error, spread, slack, dtype, most)[1] is None
        assert reference.leaders(estimates, error, spread, slack, dtype, most)[1] is None
        for broken in (float("nan"), float("inf")):
            given = torch.tensor([1.0, broken, 1.0])
            assert cpu.leaders(estimates, error, given, slack, dtype, width)[1] is None
            assert reference.leaders(estimates, error, given, slack, dtype, width)[1] is None


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(4100, 64), (2048, 200), (517, 24), (3000, 130)])
def test_the_best_logit_is_the_products_own(
    dtype: torch.dtype, level: str, outputs: int, inputs: int, served: list[int]
) -> None:
    with cpu.using(level):
        linear, made = a_head(outputs, inputs, dtype)
        linear.weight[7] *= 30  # an output whose estimates err more
        linear.weight[40::3] = linear.weight[40]  # ties, many of which the bounds cannot tell apart
        for rows in (1, 2, 3, 5, 8):
            x = torch.randn(1, rows, inputs).to(dtype)
            x[:, -1, ::9] *= 50  # activations that are hard to round
            x[:, 0] *= 1e-3
            whole = asked(made, x, best=False)
            best = asked(made, x)
            assert best.shape == whole.shape
            assert best.dtype == dtype
            assert torch.equal(best.argmax(-1), whole.argmax(-1))
            assert torch.equal(best.amax(-1), whole.amax(-1))
            made._pause = 0
    assert served == [1, 2, 3, 5, 8]


def test_every_output_that_may_win_is_found() -> None:
    """The bound holds for weights and activations that are meant to break it."""
    torch.manual_seed(1)
    for trial in range(40):
        linear, made = a_head(600, 48, torch.float32)
        linear.weight *= torch.logspace(-trial % 7, 2, 600)[:, None]
        linear.weight[torch.randint(600, (300,)), torch.randint(48, (300,))] *= 40
        x = torch.randn(1, 4, 48) * torch.logspace(-3, trial % 5, 48)
        exact = x[0].double() @ linear.weight.double().T
        asked(made, x)
        copied = made.copy
        assert copied is not None
        kernel = copied.kernel
        near = kernel.rounded(x[0], kernel.share)
        off = copied.error * x[0].norm(dim=1)[:, None] + copied.size * (x[0] - near).norm(dim=1)[:, None]
        estimate = near.double() @ kernel.dequantize(torch.float32).double().T
        assert bool(((estimate - exact).abs() <= off * (1 + 1e-5)).all())
        assert torch.equal(asked(made, x)[0].argmax(1), exact.argmax(1))


def test_the_default_format_does_not_matter() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        _linear, made = a_head(4096, 64)
        asked(made, torch.randn(1, 1, 64))
        assert made.copy is not None
        assert made.copy.error.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_too_many_that_may_win_cost_a_product_and_a_pause(served: list[int]) -> None:
    linear, made = a_head(4096, 64)
    linear.weight.copy_(linear.weight[:1].expand(4096, 64))
    x = torch.randn(1, 1, 64).bfloat16()
    whole = asked(made, x, best=False)
    for _ in range(screened.PAUSE + 1):
        assert torch.equal(asked(made, x), whole)
    assert served == [1]
    asked(made, x)
    for _ in range(2 * screened.PAUSE + 1):
        asked(made, x)
    assert served == [1, 1, 1]


def test_numbers_that_are_none(served: list[int]) -> None:
    linear, made = a_head(4096, 64)
    x = torch.randn(1, 2, 64).bfloat16()
    x[0, 1, 3] = float("nan")
    assert asked(made, x).isnan().any(-1).tolist() == [[False, True]]
    linear, made = a_head(4096, 64)
    linear.weight[5, 5] = float("inf")
    assert torch.equal(asked(made, x[:, :1]), asked(made, x[:, :1], best=False))
    assert made.copy is None


def test_a_write_that_nothing_shows_can_be_told() -> None:
    model = wide("llama", tie_word_embeddings=False, dtype=torch.bfloat16)
    arguments = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": False}
    first = model.generate(PROMPT, llmopt=True, **arguments)
    before = model.lm_head.weight.data.clone()
    model.lm_head.weight.data[77, 1:] = (
        9 * before[int(first[0, -1]), 1:]
    )  # the column that is looked at may be the first
    model.llmopt.weights_changed()
    assert torch.equal(model.generate(PROMPT, llmopt=True, **arguments), model.generate(PROMPT, **arguments))


def test_a_half_that_overflows(served: list[int]) -> None:
    """Every logit from 65,520 on is infinite, and the first of them is the best."""
    linear, made = a_head(2000, 64, torch.float16)
    linear.weight.copy_(torch.randn(2000, 64))
    for _ in range(20):
        x = torch.randn(1, 1, 64).half()
        x *= 66_000 / asked(made, x, best=False).amax().float() * 1.05
        whole = asked(made, x, best=False)
        made._pause = 0
        assert torch.equal(asked(made, x).argmax(-1), whole.argmax(-1))
    assert served


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_whose_squares_vanish(dtype: torch.dtype) -> None:
    small = {torch.float16: 1e-6, torch.bfloat16: 1e-24, torch.float32: 1e-24}[dtype]
    for of_weight, of_x in ((small, 1), (1, small), (small, small)):
        linear, made = a_head(1000, 64, dtype)
        linear.weight.copy_(torch.randn(1000, 64) * of_weight)
        for _ in range(10):
            x = (torch.randn(1, 2, 64) * of_x).to(dtype)
            whole = asked(made, x, best=False)
            made._pause = 0
            assert torch.equal(asked(made, x).argmax(-1), whole.argmax(-1))


def test_no_memory_for_a_copy_is_no_failure(monkeypatch: pytest.MonkeyPatch, served: list[int]) -> None:
    def full(weight: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(screened, "pack", full)
    model = wide("llama")
    arguments = {"max_new_tokens": 6, "eos_token_id": None, "do_sample": False}
    assert torch.equal(model.generate(PROMPT, llmopt=True, **arguments), model.generate(PROMPT, **arguments))
    assert not served


def test_a_hook_on_the_model_sees_logits(served: list[int]) -> None:
    model, seen = wide("llama"), []
    arguments = {"max_new_tokens": 6, "eos_token_id": None, "do_sample": False}
    model.generate(PROMPT, llmopt=True, **arguments)
    served.clear()
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.logits[0, -1].clone()))
    model.generate(PROMPT, llmopt=True, **arguments)  # whose engine is proved again
    seen.clear()
    tokens = model.generate(PROMPT, llmopt=True, **arguments)
    shown = torch.stack(seen)
    assert not served
    whole = model(input_ids=tokens).logits[0, PROMPT.shape[1] - 1 : -1]
    torch.testing.assert_close(shown, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("write", ["counted", "uncounted", "exchanged"])
def test_a_weight_that_changes_is_copied_again(write: str) -> None:
    linear, made = a_head(4096, 64)
    x = torch.randn(1, 1, 64).bfloat16()
    first = int(asked(made, x).argmax())
    new = (x[0, 0] * 9).clone()
    if write == "counted":
        linear.weight[77] = new
    elif write == "uncounted":
        linear.weight.data[77] = new
    else:
        linear.weight = nn.Parameter(linear.weight.clone(), requires_grad=False)
        linear.weight.data[77] = new
    made.refresh()
    assert first != 77
    assert int(asked(made, x).argmax()) == 77


def test_engines_share_a_copy_and_releasing_them_frees_it(served: list[int]) -> None:
    model = wide("llama")
    arguments = {"max_new_tokens": 4, "eos_token_id": None, "do_sample": False}
    before = set(screened._copies)  # of models that other tests keep
    model.generate(PROMPT, llmopt=True, **arguments)
    model.generate(PROMPT, llmopt={"kv_cache": {"page_size": 4}}, **arguments)
    assert served
    assert len(set(screened._copies) - before) == 1
    model.llmopt.release()
    gc.collect()
    assert not set(screened._copies) - before


def wide(name: str, **arguments: Any) -> nn.Module:
    return build(name, vocab_size=3000, **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_generate_gives_the_same_tokens(name: str, dtype: torch.dtype, served: list[int]) -> None:
    model = wide(name, dtype=dtype)
    ids = torch.cat([PROMPT, PROMPT.flip(1), PROMPT + 3])
    for given in (PROMPT, ids):
        arguments = {"max_new_tokens": 12, "eos_token_id": None, "do_sample": False}
        for _ in range(2):  # layers are joined in the second
            whole = model.generate(given, llmopt=True, output_logits=True, return_dict_in_generate=True, **arguments)
        assert not served
        assert torch.equal(model.generate(given, llmopt=True, **arguments), whole.sequences)
        assert set(served) == {len(given)}
        served.clear()
    assert "output head: best tokens found by an int8 copy" in str(model.llmopt.stats)


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere"])
def test_logits_that_are_changed_on_their_way_are_computed_whole(name: str, served: list[int]) -> None:
    model = wide(name)
    model.generate(PROMPT, max_new_tokens=5, eos_token_id=None, do_sample=False, llmopt=True)
    assert not served


@pytest.mark.parametrize(
    "looks",
    [
        {"do_sample": True},
        {"repetition_penalty": 1.3},
        {"output_scores": True, "return_dict_in_generate": True},
        {"min_new_tokens": 3, "eos_token_id": 4},
    ],
)
def test_who_looks_at_logits_gets_them_whole(looks: dict[str, Any], served: list[int]) -> None:
    model = wide("llama")
    arguments = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, **looks}
    torch.manual_seed(3)
    ours = model.generate(PROMPT, llmopt=True, **arguments)
    assert not served
    torch.manual_seed(3)
    stock = model.generate(PROMPT, **arguments)
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, stock)
    else:
        torch.testing.assert_close(torch.stack(ours.scores), torch.stack(stock.scores), atol=1e-4, rtol=1e-4)


def test_one_request_that_looks_is_enough(served: list[int]) -> None:
    model = wide("llama")
    tokens = PROMPT[0].tolist()
    with Engine(model) as engine:
        with engine.loop.lock:  # they come together
            both = [
                engine.submit(tokens, max_new_tokens=20, eos_token_id=None, logprobs=2),
                engine.submit(tokens[::-1], max_new_tokens=6, eos_token_id=None),
            ]
        looked, other = (handle.result() for handle in both)
        logprobs = both[0].logprobs
        mixed = list(served)
        alone = engine.submit(tokens[::-1], max_new_tokens=6, eos_token_id=None).result()
    assert not mixed
    assert served
    assert alone == other
    whole = model(input_ids=torch.tensor([tokens + looked[:-1]])).logits[0, len(tokens) - 1 :]
    found = torch.tensor([entry.logprob for entry in logprobs])
    torch.testing.assert_close(
        found, whole.log_softmax(-1).gather(1, torch.tensor(looked)[:, None])[:, 0], atol=1e-4, rtol=1e-4
    )


def test_drafts_are_judged_by_their_best_tokens(served: list[int]) -> None:
    model = wide("llama")
    prompt = torch.cat([PROMPT] * 4, dim=1)
    arguments = {"max_new_tokens": 30, "eos_token_id": None, "do_sample": False}
    plain = model.generate(prompt, **arguments)
    assert torch.equal(model.generate(prompt, llmopt="speculative", **arguments), plain)
    assert max(served) > 1


def test_a_quantized_model_keeps_its_heads_tokens(served: list[int]) -> None:
    model = wide("llama", hidden_size=64, intermediate_size=128)
    hf_llmopt.optimize(model, llmopt="int4")
    arguments = {"max_new_tokens": 12, "eos_token_id": None, "do_sample": False}
    whole = model.generate(PROMPT, llmopt=True, output_logits=True, return_dict_in_generate=True, **arguments)
    assert torch.equal(model.generate(PROMPT, llmopt=True, **arguments), whole.sequences)
    assert served


def test_copies_of_a_model_have_heads_of_their_own(served: list[int]) -> None:
    model = wide("llama", tie_word_embeddings=False)
    arguments = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": False}
    model.generate(PROMPT, llmopt=True, **arguments)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.copy_(-model.lm_head.weight)
    assert torch.equal(twin.generate(PROMPT, llmopt=True, **arguments), twin.generate(PROMPT, **arguments))
    assert served
