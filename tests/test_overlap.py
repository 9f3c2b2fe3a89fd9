"""`generate` where the next pass begins before the host knows the tokens, as on a GPU: stock's tokens all the same."""

from typing import Any

import pytest
import torch
from architectures import build, ragged
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from hf_llmopt.errors import CallbackFailed, InvalidLogits

OVERLAP = {"strict": True, "batching": {"overlap": True, "continuous": False}}
KW: dict[str, Any] = {"max_new_tokens": 8, "pad_token_id": 0}
SAMPLED = {"do_sample": True, "top_k": 20, "repetition_penalty": 1.3}


def both(model: Any, **arguments: Any) -> tuple[Any, Any]:
    outputs = []
    for llmopt in (False, OVERLAP):
        torch.manual_seed(3)
        outputs.append(model.generate(**ragged(), **{**KW, **arguments}, llmopt=llmopt))
        outputs.append(torch.get_rng_state())
    assert torch.equal(outputs[1], outputs[3])
    assert model.llmopt.engine.overlaps
    if not arguments.get("return_dict_in_generate"):  # else the cache that is returned holds pages
        assert model.llmopt.engine.store.pages_used == 0
    return outputs[0], outputs[2]


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_tokens(name: str, sampling: dict[str, Any]) -> None:
    model = build(name)
    stock, ours = both(model, eos_token_id=None, **sampling)
    assert torch.equal(ours, stock)
    assert model.llmopt.stats.steps == KW["max_new_tokens"]


@pytest.mark.parametrize("returns", [False, True])
def test_rows_that_end_early(returns: bool) -> None:
    """The pass behind the last token is in vain, and counts nowhere."""
    model = build("llama")
    whole, _ = both(model, eos_token_id=None)
    ends = whole[:, -6].unique().tolist()  # another for each row, in the middle
    arguments = {"eos_token_id": ends, "return_dict_in_generate": returns, "output_scores": returns}
    stock, ours = both(model, **arguments)
    if returns:
        for given, expected in zip(ours.scores, stock.scores, strict=True):
            torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)
        stock, ours = stock.sequences, ours.sequences
    assert torch.equal(ours, stock)
    assert ours.shape[1] < whole.shape[1]
    assert model.llmopt.stats.steps == ours.shape[1] - ragged()["input_ids"].shape[1]


def test_a_cache_that_is_returned_ends_with_the_last_key() -> None:
    model = build("llama")
    cache = model.generate(**ragged(), **KW, llmopt=OVERLAP, return_dict_in_generate=True).past_key_values
    assert cache.get_seq_length() == ragged()["input_ids"].shape[1] + KW["max_new_tokens"] - 1


class Counting(LogitsProcessor, BaseStreamer):
    """Sees ids and tokens; breaks after so many steps."""

    def __init__(self, fails_at: int = 100, value: float | None = None) -> None:
        self.lengths: list[int] = []
        self.tokens: list[list[int]] = []
        self.fails_at, self.value = fails_at, value

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.lengths.append(input_ids.shape[1])
        if len(self.lengths) < self.fails_at:
            return scores
        if self.value is None:
            raise ValueError("enough")
        return scores.index_fill(0, torch.tensor([1]), self.value)

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value.flatten().tolist())

    def end(self) -> None:
        self.tokens.append([])


def test_objects_of_users() -> None:
    """Processors and streamers see what stock shows them, in the same order."""
    model = build("llama")
    seen = []
    for llmopt in (False, OVERLAP):
        own = Counting()
        model.generate(
            **{name: tensor[:1] for name, tensor in ragged().items()}, **KW, eos_token_id=None, llmopt=llmopt,
            streamer=own, logits_processor=LogitsProcessorList([own]),
        )  # fmt: skip
        seen.append((own.lengths, own.tokens))
    assert seen[0] == seen[1]


@pytest.mark.parametrize(("value", "error"), [(None, CallbackFailed), (float("nan"), InvalidLogits)])
def test_failures(value: float | None, error: type[Exception]) -> None:
    """A call that breaks in the middle leaves nothing behind."""
    model = build("llama")
    with pytest.raises(error):
        model.generate(
            **ragged(), **KW, eos_token_id=None, llmopt=OVERLAP,
            logits_processor=LogitsProcessorList([Counting(4, value)]),
        )  # fmt: skip
    assert model.llmopt.engine.store.pages_used == 0
    stock, ours = both(model, eos_token_id=None)
    assert torch.equal(ours, stock)
