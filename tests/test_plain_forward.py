"""`attn_implementation="llmopt"` in a plain forward: results, which way was taken, gradients, no square masks."""

from collections.abc import Iterator

import pytest
import torch
from architectures import build
from transformers import DynamicCache

from hf_llmopt.attention import plain
from hf_llmopt.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason="without C kernels plain forwards are torch's")

TOKENS = 150
# Windows, chunks, softcaps, sinks, unequal widths of keys and values, one key head for several query heads.
NAMES = ("llama", "gpt2", "mistral", "gemma2", "gpt_oss", "llama4_text", "deepseek_v2", "stablelm")


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The kernel is fast enough whatever the machine does meanwhile; shapes of the queries that it was given."""
    calls, kernel = [], cpu.attention

    def watched(query, seen):
        calls.append(tuple(query.shape))
        return kernel(query, seen)

    monkeypatch.setattr(plain, "_wins", lambda *_: True)
    monkeypatch.setattr(cpu, "attention", watched)
    return calls


def both(name: str, dtype: torch.dtype = torch.float32, **options):
    """A model as transformers has it, and the same with our attention."""
    stock, model = (build(name, dtype=dtype, **options) for _ in range(2))
    model.set_attn_implementation("llmopt")
    return stock, model


def tokens(model, rows: int = 2, length: int = TOKENS) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (rows, length))


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_stock(name: str, use_cache: bool, ours) -> None:
    stock, model = both(name)
    ids = tokens(model)
    with torch.no_grad():
        expected = stock(ids, use_cache=use_cache).logits
        logits = model(ids, use_cache=use_cache).logits
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    layers = model.config.num_hidden_layers
    assert [shape[0] for shape in ours] == [2 * TOKENS] * layers


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_padding_on_either_side_is_no_mask(name: str, padding: str, ours) -> None:
    stock, model = both(name)
    ids, real = tokens(model, 3), torch.ones(3, TOKENS, dtype=torch.long)
    for row, count in enumerate((0, 40, 149)):
        real[row, slice(count) if padding == "left" else slice(TOKENS - count, None)] = 0
    with torch.no_grad():
        expected, logits = (net(ids, attention_mask=real).logits for net in (stock, model))
    torch.testing.assert_close(logits[real == 1], expected[real == 1], atol=2e-4, rtol=1e-4)
    assert logits.isfinite().all()
    assert len(ours) == model.config.num_hidden_layers


def test_a_window_as_long_as_the_prompt_is_no_mask(ours, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own function makes one there."""
    stock, model = both("mistral", sliding_window=TOKENS)
    ids = tokens(model)
    with torch.no_grad():
        expected = stock(ids).logits
        monkeypatch.setattr(plain, "sdpa_mask", lambda **_: pytest.fail("a mask is made"))
        torch.testing.assert_close(model(ids).logits, expected, atol=2e-4, rtol=1e-4)


def test_what_a_first_and_an_end_cannot_say_is_torchs(ours) -> None:
    stock, model = both("mistral")
    ids, holes = tokens(model), torch.ones(2, TOKENS, dtype=torch.long)
    holes[1, 30:40] = 0
    square = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None].expand(2, -1, -1, -1)
    packed = torch.cat([torch.arange(70), torch.arange(TOKENS - 70)])[None].expand(2, -1)
    for options in (
        {"attention_mask": holes},
        {"attention_mask": square},
        {"position_ids": packed, "use_cache": False},
    ):
        with torch.no_grad():
            expected, logits = (net(ids, **options).logits for net in (stock, model))
        torch.testing.assert_close(logits[:, 60:], expected[:, 60:], atol=2e-4, rtol=1e-4)
    assert not ours


def test_chunks_count_from_each_rows_own_beginning(ours) -> None:
    stock, model = both("llama4_text")
    ids, real = tokens(model, 3), torch.ones(3, TOKENS, dtype=torch.long)
    real[2, :45] = 0  # not the first row
    with torch.no_grad():
        expected, logits = (net(ids, attention_mask=real).logits for net in (stock, model))
    torch.testing.assert_close(logits[real == 1], expected[real == 1], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_softcaps_and_sinks_of_short_prompts_are_the_models_own(name: str) -> None:
    """Padding that sees nothing beside windows, masks of numbers, dropout."""
    stock, model = both(name)
    ids, real = tokens(model, 3, 40), torch.ones(3, 40, dtype=torch.long)
    real[0, :25], real[1, 15:], real[2, 9:30] = 0, 0, 0
    hidden = torch.rand(3, 1, 40, 40) > 0.7
    numbers = torch.zeros(3, 1, 40, 40).masked_fill(hidden, torch.finfo(torch.float32).min)
    numbers.diagonal(dim1=2, dim2=3).zero_()
    for mask in (real, numbers):
        with torch.no_grad():
            expected, logits = (net(ids, attention_mask=mask).logits for net in (stock, model))
        shown = real == 1 if mask is real else slice(None)
        torch.testing.assert_close(logits[shown], expected[shown], atol=2e-4, rtol=1e-4)
    found = []
    for net in both(name):
        for module in net.train().modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
        torch.manual_seed(0)
        found.append(net(ids).logits)
    torch.testing.assert_close(*found, atol=2e-4, rtol=1e-4)


def test_a_cache_goes_on_with_torchs_attention(ours) -> None:
    stock, model = both("gemma3_text")
    ids, found = tokens(model, 1, 2 * TOKENS), []
    for net in (stock, model):
        cache = DynamicCache(config=net.config)
        with torch.no_grad():
            net(ids[:, :TOKENS], past_key_values=cache)
            found.append(net(ids[:, TOKENS:], past_key_values=cache).logits)
    torch.testing.assert_close(*found, atol=2e-4, rtol=1e-4)
    assert len(ours) == model.config.num_hidden_layers  # the beginning's


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_rounding_in_bfloat16_is_not_worse_than_stocks(name: str, ours) -> None:
    stock, model = both(name, torch.bfloat16)
    ids = tokens(model)
    with torch.no_grad():
        exact = build(name, dtype=torch.bfloat16).double()(ids).logits
        theirs, logits = (net(ids).logits.double() for net in (stock, model))
    assert ours
    assert (logits - exact).norm() <= 1.1 * (theirs - exact).norm()


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_those_of_stock(name: str, training: bool, ours) -> None:
    found = []
    ids = tokens(build(name))
    for net in both(name):
        net.train(training)
        net(ids, labels=ids).loss.backward()
        found.append({key: weight.grad for key, weight in net.named_parameters()})
    assert not ours
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, atol=1e-5, rtol=1e-3, msg=key)


def test_training_mode_alone_keeps_torchs_attention(ours) -> None:
    stock, model = both("mistral")
    ids = tokens(model)
    with torch.no_grad():
        expected, logits = (net.train()(ids).logits for net in (stock, model))
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    assert not ours


def test_inputs_that_learn_keep_their_gradients(ours) -> None:
    _, model = both("llama")
    embeds = model.get_input_embeddings()(tokens(model)).detach().requires_grad_()
    model.requires_grad_(False)(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad is not None
    assert not ours


def test_no_square_of_tokens_is_made(ours) -> None:
    """Windows, padding and softcaps: nothing of the size of a mask or of scores is allocated."""
    _, model = both("gemma2")
    length = 2048
    real = torch.ones(1, length, dtype=torch.long)
    real[:, :100] = 0
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        model(tokens(model, 1, length), attention_mask=real, logits_to_keep=1)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert len(ours) == model.config.num_hidden_layers
    assert 0 < largest < length * length


def test_short_prompts_and_other_numbers_are_torchs(ours) -> None:
    stock, model = both("mistral")
    ids = tokens(model, length=plain.LONG - 1)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, stock(ids).logits)
    stock, model = both("mistral", torch.float64)
    ids = tokens(model)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, stock(ids).logits)
    assert not ours


def test_the_race_is_run_once_and_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    plain._wins.cache_clear()
    races = []

    def lost(ways):
        races.append(len(ways))
        return [2.0, 1.0]

    monkeypatch.setattr(plain, "best_seconds", lost)
    monkeypatch.setattr(plain, "_ours", lambda *_: pytest.fail("the race was lost"))
    _, model = both("mistral")
    with torch.no_grad():
        model(tokens(model))
    plain._wins.cache_clear()
    assert races == [2]
