"""Stock and llmopt, one after the other in one process, and what "equal" means.

Equality is trivial where llmopt hands the call to transformers, so `served` also checks who computed: the statistics,
the attention paths, and that no cache of transformers' own was updated behind our back.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_llmopt import LLMOptConfig
from hf_llmopt.errors import NotServed

PAD, VOCABULARY = 0, 112
TOLERANCE = 1e-5  # of the largest logit, at least 1
SMALL_PAGES = LLMOptConfig(kv_cache={"page_size": 4})


def prompts(*lengths: int, pad: str = "left", seed: int = 0) -> dict[str, torch.Tensor]:
    """Random prompts of these lengths, padded; without a mask if there is nothing to pad."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.full((len(lengths), longest), PAD)
    for row, length in enumerate(lengths):
        columns = slice(longest - length, None) if pad == "left" else slice(length)
        ids[row, columns] = torch.randint(3, VOCABULARY, (length,), generator=generator)
    if min(lengths) == longest:
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


@contextmanager
def counted_updates() -> Iterator[list[type]]:
    """The cache layers of transformers that were updated inside the block, one entry per update."""
    updates: list[type] = []

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def update(self: Any, *args: Any, **kwargs: Any) -> Any:
            updates.append(type(self))
            return original(self, *args, **kwargs)

        return update

    with pytest.MonkeyPatch.context() as patch:
        for layer in (DynamicLayer, DynamicSlidingWindowLayer):
            patch.setattr(layer, "update", counting(layer.update))
        yield updates


def stock(model: PreTrainedModel, seed: int = 0, **arguments: Any) -> Any:
    """What transformers returns."""
    torch.manual_seed(seed)
    return model.generate(**arguments)


def served(model: PreTrainedModel, seed: int = 0, llmopt: Any = True, own_caches: bool = True, **arguments: Any) -> Any:
    """What llmopt returns; fails if transformers did any of the work.

    Args:
        model: The model.
        seed: Given to torch before the call.
        llmopt: The keyword.
        own_caches: Every key must go to our pages. `False` where the call has a DynamicCache for a good reason: the
            user gave one, or guidance or token healing runs the model by itself.
        arguments: Given to `generate`.
    """
    torch.manual_seed(seed)
    with counted_updates() as updates:
        output = model.generate(llmopt=llmopt, **arguments)
    check_served(model.llmopt.stats)
    if own_caches:
        assert not updates, f"{len(updates)} updates of transformers' own caches"
    return output


def check_served(stats: Any) -> None:
    assert stats.served_by == "llmopt", stats.reason
    assert stats.attention


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal shapes, the same infinities, and finite numbers within `tolerance` of the largest one."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    finite = theirs.isfinite()
    assert torch.equal(ours.isfinite(), finite)
    assert torch.equal(ours[~finite], theirs[~finite])
    if finite.any():
        error, size = (ours[finite] - theirs[finite]).abs().max(), theirs[finite].abs().max().clamp(min=1)
        assert error <= tolerance * size, f"differs by {error:.3g}, the largest is {size:.3g}"


def assert_same(ours: Any, theirs: Any, scores: float = TOLERANCE) -> None:
    """The same tokens, and the same logits and scores (within `scores`) where they were returned."""
    if isinstance(theirs, torch.Tensor):
        assert ours.tolist() == theirs.tolist()
        return
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert ours.keys() == theirs.keys()
    for name, tolerance in (("logits", TOLERANCE), ("scores", scores)):
        for our, their in zip(ours.get(name) or (), theirs.get(name) or (), strict=True):
            assert_close(our, their, tolerance)


def assert_equal(
    model: PreTrainedModel,
    arguments: dict[str, Any] | Callable[[], dict[str, Any]],
    llmopt: Any = True,
    own_caches: bool = True,
    scores: float = TOLERANCE,
) -> Any:
    """Both ways give the same, and leave torch's generator in the same state; returns llmopt's output.

    Args:
        model: The model.
        arguments: Of `generate`; a function where they hold objects that remember (caches, processors).
        llmopt: The keyword.
        own_caches: As in `served`.
        scores: Tolerance of scores, where a processor makes differences larger.
    """
    make = arguments if callable(arguments) else lambda: arguments
    theirs = stock(model, **make())
    state = torch.get_rng_state()
    ours = served(model, llmopt=llmopt, own_caches=own_caches, **make())
    assert torch.equal(torch.get_rng_state(), state), "the generator's state differs"
    assert_same(ours, theirs, scores)
    return ours


def assert_falls_through(model: PreTrainedModel, arguments: dict[str, Any] | Callable, reason: str) -> None:
    """One warning that names the reason, stock's result; and with strict=True an error before the model runs."""
    make = arguments if callable(arguments) else lambda: arguments
    theirs = stock(model, **make())
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = model.generate(llmopt=True, **make())
    messages = [str(warning.message) for warning in caught if "llmopt" in str(warning.message)]
    assert len(messages) == 1, messages
    assert reason in messages[0], messages[0]
    assert_same(ours, theirs)
    assert model.llmopt.stats.served_by == "transformers"
    assert reason in model.llmopt.stats.reason

    arguments, forwards = make(), []
    hook = model.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        with pytest.raises(NotServed, match="strict"):
            model.generate(llmopt=LLMOptConfig(prompt_cache=True, strict=True), **arguments)
    finally:
        hook.remove()
    assert not forwards, "the model ran before the error"


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """112 tokens: the special ones, printable ASCII (a space is "Ġ"), and some pairs of letters; pads on the left."""
    characters = ["Ġ", *map(chr, range(33, 127))]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<bos>", "<eos>", *characters])}
    merges = [(a, b) for a in "aeio" for b in "nrst"][: VOCABULARY - len(vocabulary)]
    vocabulary |= {a + b: len(vocabulary) + index for index, (a, b) in enumerate(merges)}
    bpe = Tokenizer(BPE(vocabulary, merges))
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = ByteLevelDecoder()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, padding_side="left", **special)
