"""Eviction: what is kept against dense attention over the same tokens, what comes free, and what cannot be done."""

import copy

import pytest
import torch
from architectures import SLIDING, build
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LogitsProcessor

from hf_llmopt import Engine, LLMOptConfig
from hf_llmopt.attention import gpu
from hf_llmopt.config import KVCacheConfig
from hf_llmopt.engine.mover import Costs
from hf_llmopt.errors import InvalidOption, InvalidRequest, OutOfPages, UnsupportedModel
from hf_llmopt.kernels import cpu
from hf_llmopt.kv_cache import BlockTable, PagePool
from hf_llmopt.kv_cache.eviction import METHODS, Scored

PAGE, KEPT, NEW = 4, 64, 8
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}
SCORED = [name for name, method in METHODS.items() if issubclass(method, Scored)]
every_method = pytest.mark.parametrize("method", METHODS)
scored = pytest.mark.parametrize("method", SCORED)


def evicting(method: str, **options) -> dict:
    return {"kv_cache": {"page_size": PAGE, "eviction": method, "keep_tokens": KEPT, **options}}


def prompt(*lengths: int, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(3, 100, (length,), generator=generator)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


# ------------------------------------------------------------------------------------------------- the dense reference


class Dense:
    """Attention with a mask for each layer and key head, and what it paid to whom."""

    def __init__(self) -> None:
        self.seen: dict[int, torch.Tensor] = {}  # by layer, bool [kv_heads, queries, keys]
        self.weights: dict[int, torch.Tensor] = {}  # [kv_heads, heads per key head, queries, keys]
        self.parts: dict[int, list[torch.Tensor]] = {}  # scaled queries, keys, values, [heads, tokens, width]

    def __call__(self, module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
        layer, length = module.layer_idx, query.shape[2]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        window = kwargs.get("sliding_window")
        if window:
            causal &= ~torch.ones(length, length, dtype=torch.bool).tril(-window)
        mask = causal.expand(key.shape[1], -1, -1)
        if layer in self.seen and not window:
            mask = mask & self.seen[layer]
        self.parts[layer] = [query[0] * (scaling or query.shape[-1] ** -0.5), key[0], value[0]]
        grouped = query[0].unflatten(0, (key.shape[1], -1))
        scores = grouped @ key[0][:, None].transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
        if softcap:
            scores = (scores / softcap).tanh() * softcap
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
        if s_aux is not None:
            scores = torch.cat([scores, s_aux.view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
        self.weights[layer] = scores.softmax(-1)[..., :length]
        return (self.weights[layer] @ value[0][:, None]).flatten(0, 1).transpose(0, 1)[None], None


def dense_logits(served, ids: torch.Tensor, dense: Dense, positions: torch.Tensor | None = None) -> torch.Tensor:
    """`[tokens, vocabulary]` of one row under the reference's masks."""
    former = served.config._attn_implementation
    AttentionInterface.register("dense_eviction", dense)
    AttentionMaskInterface.register("dense_eviction", lambda *args, **kwargs: None)
    served.set_attn_implementation("dense_eviction")
    try:
        with torch.no_grad():
            return served(input_ids=ids[None], position_ids=positions, use_cache=False).logits[0]
    finally:
        served.set_attn_implementation(former)


def expected_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`E[exp(q k)]` for normal queries, `[kv_heads, keys]`, from the mean and variance of `q k` for each key."""
    share, rows = len(query) // len(key), []
    for head, queries in enumerate(query.double()):
        along = queries @ key[head // share].double().T  # [queries, keys]
        exponent = along.mean(0) + along.var(0, correction=0) / 2
        exponent[:4] = float("-inf")
        rows.append(exponent.softmax(0))
    return (torch.stack(rows).unflatten(0, (-1, share)).sum(1) * value.double().norm(dim=2)).float()


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Scores and kept slots of each layer, in the order in which they were chosen."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    choose = Scored.choose

    def watching(self, scores, kept):
        found.append((scores.clone(), choose(self, scores, kept)))
        return found[-1][1]

    monkeypatch.setattr(Scored, "choose", watching)
    return found


def full_layers(served) -> list[int]:
    types = getattr(served.config, "layer_types", None) or ["full_attention"] * served.config.num_hidden_layers
    return [layer for layer, kind in enumerate(types) if kind != SLIDING]


def visible_after(kept: torch.Tensor, length: int, total: int) -> torch.Tensor:
    """Queries of the prompt see all before them, later ones what each head kept: bool [kv_heads, total, total]."""
    seen = torch.ones(len(kept), total, total, dtype=torch.bool)
    late = torch.zeros(len(kept), length, dtype=torch.bool).scatter_(1, kept, True)
    seen[:, length:, :length] = late[:, None]
    return seen


BACKENDS = ["reference", "sdpa", *(["cpu"] if cpu.available() else [])]
BACKENDS += ["triton"] if gpu.why_not(torch.device("cpu")) is None else []
CASES = [(method, "llama", "auto") for method in SCORED]
CASES += [("snapkv", "llama", backend) for backend in BACKENDS if backend != "triton"]
CASES += [("h2o", "gemma2", "sdpa"), ("snapkv", "gpt_oss", "auto"), ("kvzip", "gemma3_text", "auto")]


@pytest.mark.parametrize(("method", "name", "backend"), dict.fromkeys(CASES))
def test_scored_methods_are_dense_attention_over_what_they_kept(model, chosen, method, name, backend):
    served, length = model(name), 90
    inputs = prompt(length)
    config = {**evicting(method), "attention": backend, "batching": {"max_batch_tokens": 37}}
    out = served.generate(**inputs, **GREEDY, **LOGITS, llmopt=config)
    assert served.llmopt.stats.served_by == "llmopt"
    assert served.llmopt.stats.evicted_tokens == length - KEPT
    ids, layers, dense = out.sequences[0, :-1], full_layers(served), Dense()
    assert len(chosen) == len(layers)

    dense_logits(served, ids[:length], dense)
    if method == "kvzip":  # the prompt in pieces of 256, each with the tokens before it, behind the whole
        twice = torch.cat([ids[:length], ids[:length]])
        again = Dense()
        dense_logits(served, twice, again)
        expected = {layer: again.weights[layer][:, :, length:, :length].amax((1, 2)) for layer in layers}
    elif method == "expected":
        expected = {layer: expected_attention(*(part[:, :length] for part in dense.parts[layer])) for layer in layers}
    else:
        last = slice(length - 32, length) if method == "snapkv" else slice(0, length)
        expected = {layer: dense.weights[layer][:, :, last].sum((1, 2)) for layer in layers}
    for layer, (scores, kept) in zip(layers, chosen, strict=True):
        torch.testing.assert_close(scores, expected[layer], rtol=2e-3, atol=2e-4)
        assert kept.shape[1] == KEPT
        assert (kept.diff(dim=1) > 0).all()
        assert (kept[:, :4] == torch.arange(4)).all()
        assert (kept[:, -8:] == torch.arange(length - 8, length)).all()
        dense.seen[layer] = visible_after(kept, length, len(ids))
    assert not all(torch.equal(chosen[0][1], kept) for _, kept in chosen[1:]) or len(layers) == 1
    logits = dense_logits(served, ids, dense)[length - 1 :]
    torch.testing.assert_close(torch.cat(list(out.logits)), logits, rtol=1e-3, atol=1e-3)
    stock = served.generate(**inputs, **GREEDY, **LOGITS)
    assert (torch.cat(list(stock.logits[1:])) - torch.cat(list(out.logits[1:]))).abs().max() > 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_sink_is_dense_attention_over_first_and_last_pages(model, backend):
    length, new = (68, 3) if backend == "triton" else (150, 40)  # its interpreter is slow
    served = model("llama", num_hidden_layers=1) if backend == "triton" else model("llama")
    settings = {**GREEDY, "max_new_tokens": new}
    out = served.generate(**prompt(length), **settings, **LOGITS, llmopt={**evicting("sink"), "attention": backend})
    ids, layers = out.sequences[0, :-1], full_layers(served)
    kept, seen = list(range(length)), torch.ones(len(ids), len(ids), dtype=torch.bool)
    for token in range(length, len(ids)):
        while len(kept) > KEPT:
            del kept[PAGE : 2 * PAGE]
        kept.append(token)
        seen[token] = False
        seen[token, kept] = True
    dense = Dense()
    dense.seen = dict.fromkeys(layers, seen[None])
    logits = dense_logits(served, ids, dense)[length - 1 :]
    torch.testing.assert_close(torch.cat(list(out.logits)), logits, rtol=1e-3, atol=1e-3)
    assert served.llmopt.stats.evicted_tokens >= length + new - KEPT - 1


@pytest.mark.parametrize("dtype", ["int8", "int4", "fp8"])
def test_quantized_pages_move_head_by_head(model, chosen, dtype):
    """The rows move as bytes: what is read afterwards is what was read before, in another place."""
    served, length = model("llama"), 90
    out = served.generate(
        **prompt(length), **GREEDY, return_dict_in_generate=True, llmopt=evicting("snapkv", dtype=dtype)
    )
    whole = served.generate(
        **prompt(length), **GREEDY, return_dict_in_generate=True, llmopt={"kv_cache": {"dtype": dtype}}
    )
    for layer, (_, kept) in enumerate(chosen):
        (tables,), store = out.past_key_values.rows, out.past_key_values.store
        slots = store.slots(tables[0], 0, KEPT)
        rows = store.read(layer, lambda found, slots=slots: found[slots])
        before = whole.past_key_values.dense(layer)
        for moved, dense in zip(rows, before, strict=True):
            expected = torch.stack([dense[0, head, kept[head]] for head in range(len(kept))], dim=1)
            torch.testing.assert_close(moved, expected, rtol=0, atol=1e-2 if dtype == "fp8" else 2e-3)


# ------------------------------------------------------------------------------------------------- what it is good for


@every_method
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_larger_budget_changes_nothing(model, method, name):
    served, inputs = model(name), prompt(70, 33, 9)
    stock = served.generate(**inputs, **GREEDY)
    ours = served.generate(**inputs, **GREEDY, llmopt=evicting(method, keep_tokens=80))
    assert torch.equal(ours, stock)
    assert served.llmopt.stats.served_by == "llmopt"
    assert served.llmopt.stats.evicted_tokens == 0


def test_a_ratio_of_one_keeps_everything(model):
    served, inputs = model("llama"), prompt(90)
    config = {"kv_cache": {"eviction": "h2o", "keep_ratio": 1.0}}
    assert torch.equal(served.generate(**inputs, **GREEDY, llmopt=config), served.generate(**inputs, **GREEDY))


def test_sink_generates_endlessly_in_constant_memory():
    served = build("llama")  # an engine of its own
    settings = {**GREEDY, "max_new_tokens": 12 * KEPT}
    bound = KEPT // PAGE + 1
    with Engine(served, evicting("sink")) as engine:
        loop, held, sizes = engine.loop, [], []
        loop.on_step = lambda plan, began: (
            held.append(max((r.pages_held for r in loop.scheduler.running), default=0)),
            sizes.append(loop.store.groups[0].pool.num_pages),
        )
        handle = engine.submit(prompt(20)["input_ids"][0].tolist(), **settings)
        assert len(handle.result()) == 12 * KEPT
    assert bound - 1 <= max(held) <= bound
    assert sizes[-1] == sizes[KEPT] <= 2 * bound
    assert handle.stats.evicted_tokens >= 11 * KEPT


@every_method
def test_pages_come_free(model, method):
    served, length = build("llama"), 200
    out = served.generate(**prompt(length), **GREEDY, return_dict_in_generate=True, llmopt=evicting(method))
    held = out.past_key_values.num_pages
    assert held <= (KEPT + NEW) // PAGE + 1
    store = out.past_key_values.store
    assert store.pages_used == held
    del out
    assert store.pages_used == 0


def test_sink_sets_few_pages_aside(model):
    served = build("llama")
    config = evicting("sink", max_tokens=96)
    served.generate(**prompt(20), **{**GREEDY, "max_new_tokens": 150}, llmopt=config)
    assert served.llmopt.stats.served_by == "llmopt"
    assert served.llmopt.stats.pages <= 96 // PAGE


@pytest.mark.parametrize(
    ("method", "advice"),
    [
        (
            "sink",
            r"1 row\(s\) of 88 tokens, as many as are held at one time. .*'sink' .*lower KVCacheConfig\(keep_tokens=",
        ),
        (
            "snapkv",
            r"holds all of a prompt until its end: shorten it, or lower max_new_tokens, keep_tokens, keep_ratio or",
        ),
    ],
)
def test_what_to_lower_where_pages_are_too_few(model, method, advice):
    served, config = model("llama"), evicting(method, max_tokens=88)
    with pytest.raises(OutOfPages, match=advice):
        served.generate(**prompt(120), **{**GREEDY, "max_new_tokens": 20}, llmopt=config)
    if method == "sink":  # as it says
        config = {**evicting(method, max_tokens=88), "batching": {"max_batch_tokens": 20}}
        served.generate(**prompt(120), **{**GREEDY, "max_new_tokens": 20}, llmopt=config)
        assert served.llmopt.stats.served_by == "llmopt"


# ---------------------------------------------------------------------------------------------- together with the rest


@every_method
def test_ragged_rows_are_single_rows(model, method):
    served, lengths = model("llama"), (120, 70, 90)
    inputs = prompt(*lengths)
    together = served.generate(**inputs, **GREEDY, llmopt=evicting(method))
    for row, length in enumerate(lengths):
        alone = served.generate(inputs["input_ids"][row : row + 1, -length:], **GREEDY, llmopt=evicting(method))
        assert torch.equal(together[row, -NEW:], alone[0, -NEW:])


@every_method
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_submitted_and_preempted_is_single(model, monkeypatch, method, name):
    """With too few pages for all; a request that lost tokens is saved: nothing else gives the same keys again."""
    monkeypatch.setattr(Costs, "favour_copy", lambda *args: False)
    served, lengths = model(name), (100, 80, 120, 75)
    prompts = [prompt(length, seed=length)["input_ids"] for length in lengths]
    settings = {**GREEDY, "max_new_tokens": 60}
    alone = [served.generate(ids, **settings, llmopt=evicting(method))[0, ids.shape[1] :].tolist() for ids in prompts]
    config = {**evicting(method, max_tokens=310), "batching": {"policy": "priority"}}
    with Engine(served, config) as engine:
        with engine.loop.lock:  # they come together
            handles = [engine.submit(ids[0].tolist(), **settings, priority=index) for index, ids in enumerate(prompts)]
        assert [handle.result() for handle in handles] == alone
        swaps = sum(handle.stats.swaps for handle in handles)
        assert swaps > 0 or method == "sink"
        assert all(handle.stats.evicted_tokens > 0 for handle in handles)
        assert engine.loop.store.pages_used == 0
        assert engine.loop.mover.swapped_bytes == 0


@every_method
def test_sequences_of_one_prompt_share_what_is_kept(model, method):
    served, inputs = model("llama"), prompt(130)
    settings = {**GREEDY, **LOGITS, "do_sample": True, "num_return_sequences": 4}
    out = served.generate(**inputs, **settings, llmopt=evicting(method))
    for row in range(4):
        forced = served.generate(
            **inputs, **GREEDY, **LOGITS, logits_processor=[Forced(out.sequences[row, 130:])], llmopt=evicting(method)
        )
        for ours, alone in zip(out.logits, forced.logits, strict=True):
            torch.testing.assert_close(ours[row], alone[0], rtol=1e-3, atol=1e-3)
    tables = [row[0] for row in out.past_key_values.rows]
    if method != "sink":
        assert {table.pages[0] for table in tables} == {tables[0].pages[0]}, "the kept part is held once"


@scored
@pytest.mark.parametrize("places", [2, 256])
def test_submitted_sequences_of_one_prompt_are_single_ones(model, method, places):
    """Those that start late find a prompt that has lost tokens; memory that is shared with others grows."""
    served, ids = model("llama"), prompt(114)["input_ids"][0].tolist()
    settings = {"max_new_tokens": 12, "do_sample": True, "top_k": 30, "eos_token_id": None, "pad_token_id": 0}
    kept = {"page_size": 8, "eviction": method, "keep_ratio": 0.5}
    with Engine(served, {"kv_cache": kept}) as engine:
        expected = [engine.submit(ids, **settings, seed=7 + index).result() for index in range(3)]
    served.llmopt.release()  # a pool of its own
    with Engine(served, {"kv_cache": kept, "batching": {"max_requests": places}}) as engine:
        before = engine.submit(ids[:9], **{**settings, "max_new_tokens": 5}, seed=1)
        handle = engine.submit(ids, **settings, seed=7, num_return_sequences=3)
        assert [choice.result() for choice in handle.choices] == expected
        assert all(choice.stats.evicted_tokens == 57 for choice in handle.choices)
        assert len(before.result()) == 5


class Forced(LogitsProcessor):
    """Lets nothing but given tokens be chosen."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens.tolist()

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -1e9)
        forced[:, self.tokens.pop(0)] = 0
        return forced


@every_method
def test_found_prompts_lose_the_same_tokens(method):
    served, ids = build("llama"), prompt(120)["input_ids"]
    config = {**evicting(method), "prompt_cache": True, "batching": {"max_batch_tokens": 60}}
    expected = served.generate(ids, **GREEDY, llmopt={**config, "prompt_cache": None})
    for attempt in range(3):
        ours = served.generate(ids, **GREEDY, llmopt=config)
        found = served.llmopt.stats.cached_tokens
        if method != "sink" or not found:  # what a prompt's tokens see depends on how it is cut
            assert torch.equal(ours, expected)
        assert served.llmopt.stats.evicted_tokens > 0
        limit = {"snapkv": 120 - 32, "h2o": 0, "expected": 0}.get(method, 119)
        assert found <= limit
        assert (found > 0) == (attempt > 0 and limit > 0)
    # Compacted pages are found by nobody: another engine's answer without eviction is stock's.
    longer = torch.cat([expected, ids[:, :7]], dim=1)
    served.generate(longer, **GREEDY, llmopt=config)
    assert served.llmopt.stats.cached_tokens <= 120


@every_method
def test_a_returned_cache_goes_on(model, method):
    served, length = model("llama"), 100
    first = served.generate(**prompt(length), **GREEDY, return_dict_in_generate=True, llmopt=evicting(method))
    cache, evicted = first.past_key_values, served.llmopt.stats.evicted_tokens
    assert cache.get_seq_length() == length + NEW - 1
    assert cache.evicted == evicted > 0
    twin = copy.deepcopy(cache)
    with pytest.raises(InvalidRequest, match=r"lost .* to eviction"):
        served.generate(first.sequences, past_key_values=twin, **GREEDY, llmopt="kv_cache")
    with pytest.raises(InvalidRequest, match=r"lost .* to eviction"):
        served.generate(first.sequences, past_key_values=twin, **GREEDY)
    with pytest.raises(InvalidRequest, match="were evicted"):
        twin.crop(-65 - NEW)
    twin.crop(-2)
    assert twin.get_seq_length() == length + NEW - 3
    twin.reset()
    more = torch.cat([first.sequences, prompt(90, seed=5)["input_ids"]], dim=1)
    settings = {**GREEDY, "past_key_values": cache, "return_dict_in_generate": True, "llmopt": evicting(method)}
    second = served.generate(more, **settings)
    assert served.llmopt.stats.served_by == "llmopt"
    assert second.past_key_values.get_seq_length() == more.shape[1] + NEW - 1
    held = second.past_key_values.num_pages * PAGE
    if method == "kvzip":  # leaves alone what it cannot read again
        assert second.past_key_values.evicted == evicted
    else:
        assert held <= KEPT + NEW + PAGE


def test_kvzip_needs_tokens_and_positions(model):
    served = model("gpt2")
    with pytest.raises(InvalidOption, match="400 positions for that, of 256"):
        served.generate(**prompt(200), **GREEDY, llmopt=evicting("kvzip"))
    embeds = model("llama").get_input_embeddings()(prompt(90)["input_ids"])
    with pytest.raises(InvalidOption, match="of inputs_embeds the tokens are not known"):
        model("llama").generate(inputs_embeds=embeds, **GREEDY, llmopt=evicting("kvzip"))


# ------------------------------------------------------------------------------------------------------ what cannot be


def test_a_stock_cache_cannot_lose_tokens(model):
    with pytest.raises(InvalidRequest, match="DynamicCache, which holds every token"):
        model("llama").generate(**prompt(90), past_key_values=DynamicCache(), **GREEDY, llmopt=evicting("snapkv"))


def test_a_model_of_windows_only_is_refused(model):
    with pytest.raises(UnsupportedModel, match="no layer of this model has full attention"):
        model("mistral").generate(**prompt(90), **GREEDY, llmopt=evicting("sink"))


def test_a_model_with_recurrent_states_is_refused(model):
    with pytest.raises(UnsupportedModel, match=r"eviction='sink' takes tokens away, .*: leave it out"):
        model("jamba").generate(**prompt(9), **GREEDY, llmopt=evicting("sink"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"eviction": "snap"}, "snapkv"),
        ({"keep_tokens": 100}, "Choose eviction='sink'"),
        ({"keep_ratio": 0.5}, "Choose eviction='sink'"),
        ({"eviction": "h2o", "keep_ratio": 0.0}, "at least 0.01"),
        ({"eviction": "h2o", "keep_ratio": 1.5}, "at most 1.0"),
        ({"eviction": "snapkv", "keep_tokens": 32}, "at least 64"),
        ({"eviction": "snapkv", "keep_tokens": 128, "keep_ratio": 0.5}, "Give one"),
        ({"eviction": "sink", "keep_ratio": 0.5}, "'snapkv', 'h2o', 'expected' or 'kvzip'"),
        ({"eviction": "sink", "keep_tokens": 64, "page_size": 32}, "at least 96"),
    ],
)
def test_bad_options_are_named(options, says):
    with pytest.raises(InvalidOption, match=says):
        KVCacheConfig(**options)


def test_eviction_is_never_on_by_default():
    assert KVCacheConfig().eviction is None
    assert LLMOptConfig.parse(True).kv_cache.eviction is None


# ---------------------------------------------------------------------------------------------------------- the tables


def test_tables_count_evicted_tokens():
    pool = PagePool(40)
    table = BlockTable(pool, PAGE, room=10)
    table.reserve(0, 38)
    assert table.held == 10
    table.drop(1, 4)
    assert (table.held, table.evicted, table.settled, pool.used) == (6, 16, 20, 6)
    table.reserve(38, 41)
    assert table.held == 7
    assert table.missing(41, 44) == 0
    assert table.missing(41, 45) == 1
    fork = table.fork()
    assert (fork.evicted, fork.settled) == (16, 20)
    assert table.lacks(9) == 3 - 0 - pool.free
    fork.clear()
    assert (fork.evicted, fork.settled) == (0, 0)
    table.repack(41, 9, 36)
    assert (table.held, table.evicted, table.settled, table.run, pool.used) == (3, 32, 36, 0, 3)
    table.crop(37)
    assert table.held == 2
    table.clear()
    assert pool.used == 0
