"""From what `generate` hands to its decoding loop to a `Group` of requests.

Rows lose their padding here: a request holds real tokens only, each with the position id that `generate` gave it.
Masked columns between real tokens are dropped too; attention without them is the same sum. Two things need care:

* A masked last column (right padding) is the token whose logits stock's loop reads. It becomes a query without a key.
* Sliding windows and chunks count padded columns in stock, so rows with masked columns between real tokens are served
  only while no window can bind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)

from ..engine import EngineLoop, Request, position_limit
from ..errors import EmptyPrompt, InvalidRequest, NotServed, PromptTooLong, UnsupportedModel
from ..kv_cache import PagedCache
from ..prompt_cache import Prefix
from .active import Active, handle_of
from .ahead import AheadGroup, why_not
from .group import Group
from .output import export_cache, goes_on, import_cache, keeps_every_key, with_states, write_back
from .prefill import compute_whole
from .prompt import Prompt
from .row import Row
from .support import reason_against, rope_limit


def translate(
    active: Active,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    **kwargs: Any,
) -> list[Group]:
    """Build the group of a call, or one for each row if the call is only prepared.

    The arguments are those of `GenerationMixin._sample`.

    Args:
        active: The call: its model, what it asked for, and whether it is only prepared for an `Engine`.
        input_ids: Padded ids `[rows, length]`.
        logits_processor: Prepared by `generate`.
        stopping_criteria: Prepared by `generate`.
        generation_config: Prepared by `generate`.
        synced_gpus: Prepared by `generate`.
        streamer: The user's, or `None`.
        kwargs: The model's keyword arguments.

    Raises:
        NotServed: The call needs stock's loop; the message is the reason.
        InvalidRequest: The inputs cannot be generated from.
    """
    model = active.model
    handle = handle_of(model)
    embeds = kwargs.get("inputs_embeds")
    if input_ids.shape[0] == 0 or (input_ids.shape[1] == 0 and embeds is None):
        raise EmptyPrompt(f"input_ids has shape {list(input_ids.shape)}: there is no token to start from.")
    device = input_ids.device if embeds is None else embeds.device
    reason = handle.reason_against(model) or reason_against(model, generation_config, synced_gpus, device, kwargs)
    if reason is not None:
        raise NotServed(reason)
    if generation_config.prefill_chunk_size is not None and generation_config.prefill_chunk_size < 1:
        raise InvalidRequest(f"prefill_chunk_size must be at least 1, got {generation_config.prefill_chunk_size}.")
    max_length = stopping_criteria.max_length
    if max_length is None:
        raise NotServed("no stopping criterion limits the length")
    try:
        engine = handle.engine_for(model, active.config)
    except UnsupportedModel as error:
        if active.config.batch_invariant or active.config.kv_cache.eviction is not None:
            raise  # stock would not keep the promise
        raise NotServed(str(error)) from error
    prompt = Prompt(model, input_ids, generation_config, kwargs, engine.runner.states)
    total = prompt.mask.shape[1] + max_length - input_ids.shape[1]
    _check_cache(engine, prompt)
    _check_lengths(model, engine, prompt, total)
    requests = [_request(engine, prompt, row, total, generation_config) for row in range(input_ids.shape[0])]
    _share_prompts(requests, prompt, generation_config)
    if active.config.prompt_cache is not None:
        for request in requests:
            request.salt = active.config.prompt_cache.salt
            if prompt.past is None and prompt.embeds is None and not prompt.whole and _is_plain(engine, request):
                request.prefix = Prefix(len(request.tokens), request.salt)
    rows = range(len(requests))
    groups = [
        (Row if active.submitted else Group)(
            engine,
            [requests[row] for row in members],
            input_ids[members[0] : members[-1] + 1],
            logits_processor,
            stopping_criteria,
            generation_config,
            streamer,
            _keeps_running(logits_processor, stopping_criteria, generation_config, streamer, prompt),
            position_limit(model),
        )
        for members in ([[row] for row in rows] if active.submitted else [rows])
    ]
    if active.submitted:
        _check_rows(groups, prompt, generation_config)
    elif engine.speculator is not None:
        groups = [_ahead(groups[0], generation_config)]
    if active.config.speculative is not None and engine.speculator is None:
        for group in groups:
            group.stats.undrafted = engine.undrafted
    for group in groups:
        _attach_caches(group, prompt, bool(generation_config.return_dict_in_generate), active.submitted)
        if prompt.whole:
            compute_whole(group, prompt.mask, generation_config, kwargs)
    return groups


def _ahead(group: Group, generation_config: GenerationConfig) -> Group:
    """The same call with rows that draft, if they may go ahead of one another."""
    group.stats.undrafted = why_not(group)
    if group.stats.undrafted is not None:
        return group
    return AheadGroup(
        group.engine,
        group.requests,
        group.input_ids,
        group.processors,
        group.criteria,
        generation_config,
        group.streamer,
        group.keep_running,
        group.position_limit,
    )


def _check_rows(groups: Sequence[Group], prompt: Prompt, generation_config: GenerationConfig) -> None:
    """Rows that were submitted go each their own way, which what they share must allow."""
    if generation_config.return_dict_in_generate and (
        generation_config.output_scores or generation_config.output_logits
    ):
        raise NotServed("output_scores and output_logits are kept by generate only; logprobs= reports probabilities")
    for group in groups:
        # Keys that the caller's cache holds could not be computed again.
        group.requests[0].protected = prompt.past is not None or prompt.whole is not None
    if len(groups) == 1:
        return
    shared = [type(item).__name__ for item in groups[0].users_objects()]
    if prompt.past is not None:
        shared.append("past_key_values")
    if prompt.whole:
        shared.append(f"a prompt {prompt.whole}")
    if generation_config.guidance_scale not in (None, 1):
        shared.append("guidance_scale")
    if shared:
        raise InvalidRequest(
            f"{len(groups)} sequences were asked for, and they cannot share {', '.join(shared)}; submit each by itself."
        )


def _attach_caches(group: Group, prompt: Prompt, returns: bool, submitted: bool) -> None:
    """Fill the rows' pages from the caller's cache at the start, and keep them as a cache in the end."""
    engine, requests, past, length = group.engine, group.requests, prompt.past, group.input_ids.shape[1]
    known = prompt.mask[:, : prompt.past_length]
    if past is not None and not (isinstance(past, PagedCache) and goes_on(engine, past, known)):
        for request, row in zip(requests, known, strict=True):
            request.brought = int(row.sum())

    def on_start() -> None:
        if past is not None and prompt.past_length:
            import_cache(engine, requests, past, known)

    def on_done() -> None:
        generated = group.input_ids.shape[1] - length
        result = export_cache(engine, requests, prompt.mask, prompt.mask.shape[1] + generated - 1)
        if engine.runner.states:
            group.cache = with_states(result, requests, engine.runner.model.config)
            return
        if past is not None:
            write_back(past, result)
        group.cache = result if past is None else past

    group.on_start = on_start
    if past is not None or (returns and not submitted):
        group.on_done = on_done


def _check_cache(engine: EngineLoop, prompt: Prompt) -> None:
    """Refuse a cache that another model or batch made."""
    if prompt.media and engine.evictor is not None:
        raise InvalidRequest(
            "Eviction looks at how a prompt attends, and prompts with images are computed by the model's own forward "
            "pass. Leave kv_cache.eviction out for them."
        )
    past, layers = prompt.past, [spec for spec in engine.store.layers if spec.stores]
    if past is not None and engine.runner.states:
        raise NotServed("past_key_values of a model with recurrent states: its prompts are computed whole")
    if past is not None and engine.evictor is not None and not isinstance(past, PagedCache):
        raise InvalidRequest(
            f"past_key_values is a {type(past).__name__}, which holds every token, and eviction would take some away. "
            "Give the PagedCache that generate(llmopt=..., return_dict_in_generate=True) returned, or leave it out."
        )
    if past is not None and not engine.store.dense and not isinstance(past, PagedCache):
        raise NotServed("the model hands compressed states to its cache, and pages hold the expanded keys")
    if past is None or not prompt.past_length:
        return
    if (
        isinstance(past, PagedCache)
        and past.evicted
        and not goes_on(engine, past, prompt.mask[:, : prompt.past_length])
    ):
        raise InvalidRequest(
            f"past_key_values has lost {past.evicted} tokens to eviction: only generate with the same llmopt= as made "
            "it, on its rows and with their attention_mask, goes on from it. Compute the text again otherwise."
        )
    if isinstance(past, PagedCache):
        kept = [spec for spec in past.store.layers if spec.stores]
        shapes = [(len(past.rows), spec.kv_heads, spec.key_dim) for spec in kept]
    else:
        stock: Any = past.layers
        shapes = [tuple(layer.keys.shape[i] for i in (0, 1, 3)) for layer in stock if layer.keys is not None]
    wanted = [(prompt.mask.shape[0], spec.kv_heads, spec.key_dim) for spec in layers]
    if shapes != wanted:
        raise InvalidRequest(
            f"past_key_values holds {len(shapes)} layers of (rows, key heads, width) {shapes[:1]}, the call needs "
            f"{len(wanted)} of {wanted[:1]}. Was it made by another model or for another batch?"
        )


def _check_lengths(model: PreTrainedModel, engine: EngineLoop, prompt: Prompt, total: int) -> None:
    limit = rope_limit(model)
    if limit is not None and total > limit:
        raise NotServed(
            f"beyond {limit} tokens the model's rotary embedding depends on the longest sequence of the batch, and the "
            f"call may reach {total}"
        )
    windows = [group.window for group in engine.store.groups if group.window]
    if windows and total > min(windows) and prompt.gaps():
        raise NotServed(
            f"a row has masked tokens behind real ones (right padding?), which count in the model's window of "
            f"{min(windows)} tokens; pad on the left"
        )
    if prompt.whole and prompt.gaps():
        raise NotServed(f"a row {prompt.whole} has masked tokens behind real ones (right padding?); pad on the left")
    if prompt.whole and not engine.store.dense:
        raise NotServed(f"a prompt {prompt.whole} would leave compressed keys, which cannot be copied into pages")
    if engine.store.reads_columns and prompt.gaps():
        raise NotServed(
            "a row has masked tokens behind real ones (right padding?), and the model counts padded columns"
        )
    limit = position_limit(model)
    longest = int(prompt.positions.max()) + 1
    if limit is not None and int(prompt.positions.min()) < 0:
        raise InvalidRequest(
            f"position_ids go down to {int(prompt.positions.min())}; the model's positions start at 0."
        )
    if limit is not None and longest > limit:
        raise PromptTooLong(f"The prompt needs {longest} positions, the model has {limit}. Shorten the prompt.")


def _request(engine: EngineLoop, prompt: Prompt, row: int, total: int, generation_config: GenerationConfig) -> Request:
    past = prompt.past_length
    real = prompt.mask[row, past:].nonzero()[:, 0]
    masked_tail = not bool(prompt.mask[row, -1])
    if masked_tail:
        real = torch.cat([real, torch.tensor([prompt.mask.shape[1] - past - 1], device="cpu")])
    cached = int(prompt.mask[row, :past].sum())
    positions = prompt.positions[row]
    # A forked cache's last page may have to be copied: one page more.
    keeps_passed = prompt.past is not None and keeps_every_key(prompt.past)
    known = cached + len(real) + (engine.store.page_size if prompt.past else 0)
    request = Request(
        tokens=[0] * cached + prompt.ids[row, real].tolist(),
        positions=[0] * cached + positions[real].tolist(),
        next_position=int(positions[-1]) + 1,
        rooms=engine.budget.rooms(known, known + total - prompt.mask.shape[1], keeps_passed),
        left_padding=int(prompt.mask[row].long().argmax()),
        masked_tail=masked_tail,
        chunk=generation_config.prefill_chunk_size,
        keeps_passed=keeps_passed,
        protected=True,
    )
    if prompt.embeds is not None:
        embeds = prompt.embeds[row, real.to(prompt.embeds.device)]
        request.embeds = torch.cat([embeds.new_zeros(cached, embeds.shape[1]), embeds])
    if engine.evictor is not None:
        before = [table.evicted for table in prompt.past.rows[row]] if isinstance(prompt.past, PagedCache) else [0]
        limit = position_limit(engine.runner.model)
        engine.evictor.prepare(request, len(request.tokens) - masked_tail, max(before), cached, limit)
    return request


def _share_prompts(requests: list[Request], prompt: Prompt, generation_config: GenerationConfig) -> None:
    """Let rows with the same prompt share its pages: `num_return_sequences`, or equal prompts in a batch."""
    first: dict[Any, Request] = {}
    copies = max(1, generation_config.num_return_sequences or 1)
    for row, request in enumerate(requests):
        if prompt.past is not None or prompt.whole:
            continue
        same_embeds = row // copies if prompt.embeds is not None else None
        key = (tuple(request.tokens), tuple(request.positions), request.masked_tail, same_embeds)
        parent = first.setdefault(key, request)
        if parent is not request:
            request.parent = parent


def _is_plain(engine: EngineLoop, request: Request) -> bool:
    """Whether the keys of a request depend on nothing but its tokens and what the prompt cache names beside them."""
    if request.masked_tail or (engine.store.reads_columns and request.left_padding):
        return False
    return request.positions == list(range(len(request.tokens)))


def _keeps_running(
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: Any,
    prompt: Prompt,
) -> bool:
    """Whether somebody could see what finished rows would compute on padding tokens."""
    if generation_config.return_dict_in_generate or prompt.past is not None:
        return True
    if not any(hasattr(criterion, "eos_token_id") for criterion in criteria):
        # Stock pads finished rows only if there is an EOS criterion. By their length all rows finish together.
        return not all(type(criterion) is MaxLengthCriteria for criterion in criteria)
    ours = all(type(item).__module__.startswith("transformers.") for item in (*processors, *criteria))
    guided = generation_config.guidance_scale not in (None, 1)
    return not ours or guided
