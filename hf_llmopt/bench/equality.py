"""Whether two runs gave the same tokens, and what counts as the same below float32."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from inspect import getclosurevars
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_llmopt.walk import sharded_forward

MOST_SCORES = 2**30  # of a layer's attention that stock may hold, beside a copy of the model in float32


@dataclass(frozen=True)
class Equality:
    """The outcome of comparing the outputs of one call, made in two ways.

    Attributes:
        same: Whether they count as equal.
        identical: Whether they are equal token for token. In float32 nothing less is the same.
        tokens: New tokens that were compared.
        differences: For each row that differs: row, step, both tokens, and below float32 the gap of their stock logits
            and the rounding noise it has to stay under, the largest that was measured at any of these rows.
    """

    same: bool
    identical: bool
    tokens: int
    differences: tuple[dict[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The outcome, ready for JSON."""
        return {**asdict(self), "differences": list(self.differences)}

    @property
    def farthest(self) -> str:
        """The difference that is farthest from a tie, in words; empty if all are ties."""
        far = [found for found in self.differences if not _is_tie(found)]
        if not far:
            return ""
        found = max(far, key=lambda found: (found["gap"] or 0.0) / (found["noise"] or 1.0))
        return "row {row}, step {step}: logits {gap} apart, noise {noise}".format(**found)

    def __str__(self) -> str:
        if self.identical:
            return "yes"
        return "up to near ties" if self.same else "NO"


def _is_tie(found: Mapping[str, Any]) -> bool:
    return found["gap"] is not None and found["gap"] <= found["noise"]


def compare(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    expected: Tensor,
    got: Tensor,
    exact: Callable[[], PreTrainedModel] | None = None,
    also: Callable[[Tensor], Tensor] | None = None,
) -> Equality:
    """Compare two outputs of `generate` for the same prompt.

    In bfloat16 and float16 a wider forward pass rounds differently, and after a near tie two runs go apart. There the
    outputs count as the same if in every row the first difference is such a tie: the model's own logits of the two
    tokens are closer than the noise, which is how far the same logits move between a batch of rows, a single row, a
    cached step, transformers' eager attention and float32, and no less than the format's own steps are apart there. A
    row shows five draws of it; the noise is the largest of all rows that differ.

    Args:
        model: The model.
        inputs: The prompt, `input_ids` and `attention_mask`, `[rows, length]`.
        expected: Stock's output `[rows, length + new]`.
        got: The other output.
        exact: Gives the model in float32, where that is more than a copy: of quantized weights, whose products may
            round activations to int8, so that near ties count in float32 too.
        also: One more way to the logits `[vocabulary]` behind a prefix `[tokens]`, which rounds as the outputs did.
    """
    expected, got = expected.cpu(), got.cpu()
    start = inputs["input_ids"].shape[1]
    new = expected.shape[0] * (expected.shape[1] - start)
    if torch.equal(expected, got):
        return Equality(True, True, new)
    if expected.shape[0] != got.shape[0]:
        return Equality(False, False, new)
    differences = []
    strict = exact is None and model.dtype in (torch.float32, torch.float64)
    exact = cache(exact or partial(in_float32, model))  # only once rows differ, and once for all of them
    for row in range(expected.shape[0]):
        width = min(expected.shape[1], got.shape[1])
        unequal = (expected[row, :width] != got[row, :width]).nonzero()[:, 0]
        if len(unequal):
            differences.append(
                _difference(
                    model, None if strict else exact, also, inputs, expected[row], got[row], row, int(unequal[0])
                )
            )
    noise = max((found["noise"] for found in differences if found["noise"] is not None), default=None)
    differences = [found if found["noise"] is None else {**found, "noise": noise} for found in differences]
    exact.cache_clear()
    gc.collect()  # a model of float32 that a cycle of references holds leaves no room for the next
    return Equality(bool(differences) and all(map(_is_tie, differences)), False, new, tuple(differences))


def compare_answers(
    model: PreTrainedModel,
    prompt: list[int],
    expected: list[int],
    got: list[int],
    exact: Callable[[], PreTrainedModel] | None = None,
    also: Callable[[Tensor], Tensor] | None = None,
) -> Equality:
    """As `compare`, of one request's new tokens."""
    ids = torch.tensor([prompt], device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return compare(model, inputs, torch.tensor([prompt + expected]), torch.tensor([prompt + got]), exact, also)


def worst(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], expected: Tensor, outputs: Iterable[Tensor]
) -> Equality:
    """The worst outcome of comparing several outputs with the expected one; each different output is compared once."""
    seen: list[tuple[Tensor, Equality]] = []
    for output in outputs:
        if not any(torch.equal(output, other) for other, _ in seen):
            seen.append((output, compare(model, inputs, expected, output)))
    return least(outcome for _, outcome in seen)


def least(outcomes: Iterable[Equality]) -> Equality:
    """The worst of several outcomes."""
    return min(outcomes, key=lambda outcome: (outcome.same, outcome.identical))


def in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model in float32; of a sharded one, called by all of its processes, as its copies are."""
    found = copy.deepcopy(model).float()
    for module in found.modules():
        sharded = sharded_forward(module)
        if sharded is not None:  # it runs the model's own module
            del vars(module)["forward"]
            held = getclosurevars(sharded).nonlocals
            if "self" in held:
                held["self"].install_forward(module, held["mesh"])
    return found


def rounding_noise(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> float:
    """How far stock's own logits behind the first prompt move by rounding alone; 0 in float32.

    Args:
        model: The model.
        inputs: The prompts, `[rows, length]`.
    """
    if model.dtype in (torch.float32, torch.float64):
        return 0.0
    prefix = inputs["input_ids"][0][inputs["attention_mask"][0].bool()]
    return _spread(_logits(model, partial(in_float32, model), prefix, len(inputs["input_ids"])))


def _difference(
    model: PreTrainedModel,
    exact: Callable[[], PreTrainedModel] | None,
    also: Callable[[Tensor], Tensor] | None,
    inputs: Mapping[str, Tensor],
    expected: Tensor,
    got: Tensor,
    row: int,
    column: int,
) -> dict[str, Any]:
    start = inputs["input_ids"].shape[1]
    ours, theirs = int(got[column]), int(expected[column])
    found: dict[str, Any] = {
        "row": row,
        "step": column - start,
        "expected": theirs,
        "got": ours,
        "gap": None,
        "noise": None,
    }
    if exact is None or column < start:
        return found
    real = inputs["attention_mask"][row].bool().cpu()
    prefix = torch.cat([inputs["input_ids"][row].cpu()[real], expected[start:column]]).to(model.device)
    forms = _logits(model, exact, prefix, len(inputs["input_ids"]))
    forms += [also(prefix).float()] if also is not None else []
    found["gap"] = float((forms[0][theirs] - forms[0][ours]).abs())
    step = torch.finfo(model.dtype).eps * float(forms[0][[theirs, ours]].abs().max())
    found["noise"] = max(_spread(forms), step)
    return found


def _spread(forms: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a in forms for b in forms)


@torch.no_grad()
def _logits(model: PreTrainedModel, exact: Callable[[], PreTrainedModel], prefix: Tensor, rows: int) -> list[Tensor]:
    """The logits behind a prefix, float32 `[vocabulary]`: alone, among rows, as a cached step, exactly, eagerly.

    Behind a long prefix without the last two: stock would hold every score, of queries in float32 with shared keys too.
    """
    forms = [
        model(input_ids=prefix[None], use_cache=False).logits[0, -1],
        model(input_ids=prefix.expand(max(2, rows), -1), use_cache=False).logits[0, -1],
    ]
    if len(prefix) > 1:
        past = model(input_ids=prefix[None, :-1], use_cache=True).past_key_values
        forms.append(model(input_ids=prefix[None, -1:], past_key_values=past, use_cache=True).logits[0, -1])
        del past
    if len(prefix) ** 2 * model.config.get_text_config().num_attention_heads <= MOST_SCORES:
        forms.append(exact()(input_ids=prefix[None], use_cache=False).logits[0, -1])
        former = model.config._attn_implementation
        model.set_attn_implementation("eager")
        try:
            forms.append(model(input_ids=prefix[None], use_cache=False).logits[0, -1])
        finally:
            model.set_attn_implementation(former)
    return [logits.float() for logits in forms]
