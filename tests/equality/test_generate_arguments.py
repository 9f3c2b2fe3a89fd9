"""Every argument of generate keeps its meaning: full attention, sliding windows, learned positions."""

import copy
import gc
from functools import cache
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from architectures import build
from compare import (
    SMALL_PAGES,
    TOLERANCE,
    VOCABULARY,
    assert_close,
    assert_equal,
    assert_same,
    prompts,
    served,
    stock,
    tokenizer,
)
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import stopping_criteria
from transformers.generation.streamers import BaseStreamer

from hf_llmopt import PagedCache

NEW = 8
ONE, RAGGED = prompts(9), prompts(4, 11, 7)
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 30, "top_p": 0.95}
FULL = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
NEVER = {"eos_token_id": 9999}  # outside the vocabulary
ALL = torch.arange(3, VOCABULARY).tolist()


@cache
def tiny(name: str):
    return build(name)


@pytest.fixture(params=["llama", "gemma3_text", "gpt2"])
def model(request):
    return tiny(request.param)


def greedy(model, **arguments) -> list[list[int]]:
    """Stock's new tokens."""
    prompt = arguments["input_ids"].shape[1]
    return stock(model, **arguments, **NEVER, max_new_tokens=NEW)[:, prompt:].tolist()


# -- processors of transformers' own ----------------------------------------------------------------------------------

PROCESSORS = {
    "min_new_tokens": {"min_new_tokens": 4, "eos_token_id": ALL[:40]},
    "min_length": {"min_length": 14, "eos_token_id": ALL[:40]},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[token] for token in ALL[::2]] + [[4, 6]]},
    "sequence_bias": {"sequence_bias": [[[token], 3.0] for token in ALL[::3]] + [[[5, 7], 9.0]]},
    "suppress_tokens": {"suppress_tokens": ALL[1::2]},
    "begin_suppress_tokens": {"begin_suppress_tokens": ALL[1::2]},
    "forced_eos": {"forced_eos_token_id": 5, "eos_token_id": 5},
    "exponential_decay": {"exponential_decay_length_penalty": (2, 1.6), "eos_token_id": 5},
    "min_p": {**SAMPLED, "min_p": 0.05},
    "typical_p": {**SAMPLED, "typical_p": 0.8},
    "epsilon_cutoff": {**SAMPLED, "epsilon_cutoff": 0.01},
    "eta_cutoff": {**SAMPLED, "eta_cutoff": 0.01},
    "top_h": {**SAMPLED, "top_h": 0.5},
    "renormalize_logits": {**SAMPLED, "renormalize_logits": True},
    "remove_invalid_values": {"remove_invalid_values": True},
    "several eos ids": {"eos_token_id": ALL[::4]},
    "prefix_allowed_tokens": {"prefix_allowed_tokens_fn": lambda row, ids: ALL[row % 2 :: 2]},
    "watermark": {**SAMPLED, "watermarking_config": {"bias": 2.0, "seeding_scheme": "lefthash"}},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors(model, name):
    arguments = {**NEVER, **PROCESSORS[name], "max_new_tokens": NEW}
    assert_equal(model, {**RAGGED, **arguments, **FULL})
    assert_equal(model, {**RAGGED, **arguments})


# -- lengths, ends, forms of the arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_batch_sizes(model, rows, sampling):
    inputs = prompts(*(3 + 2 * row for row in range(rows)))
    assert_equal(model, {**inputs, **sampling, **NEVER, **FULL, "max_new_tokens": NEW})


def test_max_length(model):
    assert_equal(model, {**RAGGED, **NEVER, **FULL, "max_length": 15})


def test_generation_config_object(model):
    config = GenerationConfig(max_new_tokens=NEW, **SAMPLED, **FULL, **NEVER, pad_token_id=0)
    assert_equal(model, {**RAGGED, "generation_config": config})
    assert_equal(model, {**RAGGED, "generation_config": config, "temperature": 0.5, "max_new_tokens": 3})


def test_eos_is_the_first_token(model):
    first = [row[0] for row in greedy(model, **RAGGED)]
    for ends in (first[:1], first):
        assert_equal(model, {**RAGGED, "eos_token_id": ends, "max_new_tokens": NEW, **FULL})
        assert_equal(model, {**RAGGED, "eos_token_id": ends, "max_new_tokens": NEW})


def test_no_eos_and_a_pad_token(model):
    """Without an EOS token stock's finished rows are not padded: a criterion may end a row, which then goes on."""

    class EndFirstRow(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.arange(len(input_ids)) == 0

    config = GenerationConfig(max_new_tokens=NEW, pad_token_id=0)
    own = copy.copy(model.generation_config)
    try:
        model.generation_config.eos_token_id = None
        arguments = {**RAGGED, "generation_config": config, "stopping_criteria": StoppingCriteriaList([EndFirstRow()])}
        assert_equal(model, arguments)
        assert_equal(model, {**arguments, **FULL})
    finally:
        model.generation_config = own


def test_position_ids(model):
    positions = torch.arange(5, 14)[None]
    assert_equal(model, {**ONE, "position_ids": positions, **NEVER, **FULL, "max_new_tokens": NEW})
    ragged = torch.stack([torch.arange(11), torch.arange(20, 31), torch.arange(3, 14)])
    assert_equal(model, {**RAGGED, "position_ids": ragged, **NEVER, **FULL, "max_new_tokens": NEW})


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # windows count the masked columns: see test_fall_through.py
def test_holes_in_the_mask(name):
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, 3:5] = mask[1, :2] = mask[1, 6] = mask[2, 7:] = 0
    inputs = {**prompts(9, 9, 9), "attention_mask": mask}
    assert_equal(tiny(name), {**inputs, **NEVER, **FULL, "max_new_tokens": NEW})
    assert_equal(tiny(name), {**inputs, **NEVER, **FULL, "max_new_tokens": NEW}, llmopt=SMALL_PAGES)


def test_masks_of_ones(model):
    for mask in (torch.ones(1, 9, dtype=torch.long), torch.ones(1, 9, dtype=torch.bool)):
        assert_equal(model, {**ONE, "attention_mask": mask, **NEVER, **FULL, "max_new_tokens": NEW})


def test_generator_of_later_calls(model):
    """Two sampled calls after one seed: the second starts from the state that stock's first call leaves."""
    arguments = {**RAGGED, **SAMPLED, **NEVER, "max_new_tokens": 4}
    theirs = stock(model, **arguments), model.generate(**arguments)
    ours = served(model, **arguments), model.generate(llmopt=True, **arguments)
    for our, their in zip(ours, theirs, strict=True):
        assert_same(our, their)


@pytest.mark.parametrize("lengths", [(11,), (11, 11, 11)])
def test_prefill_chunk_size(model, lengths):
    assert_equal(model, {**prompts(*lengths), **NEVER, **FULL, "prefill_chunk_size": 4, "max_new_tokens": NEW})


def test_time_runs_out(model, monkeypatch):
    def ticking():
        ticks = iter(range(1000))
        monkeypatch.setattr(stopping_criteria, "time", SimpleNamespace(time=lambda: next(ticks)))
        return {**RAGGED, **NEVER, "max_time": 4.5, "max_new_tokens": 20}

    assert assert_equal(model, ticking).shape[1] < 20


# -- embeddings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("inputs", [ONE, RAGGED], ids=["one row", "ragged"])
def test_inputs_embeds(model, inputs, with_ids):
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {"inputs_embeds": embeds + 0.01, **{k: v for k, v in inputs.items() if with_ids or k != "input_ids"}}
    assert_equal(model, {**given, **NEVER, **FULL, "max_new_tokens": NEW})
    assert_equal(model, {**given, **SAMPLED, **NEVER, "max_new_tokens": NEW}, llmopt=SMALL_PAGES)
    assert_equal(model, {**given, **SAMPLED, **NEVER, "num_return_sequences": 2, "max_new_tokens": NEW})


# -- objects of the user ----------------------------------------------------------------------------------------------


class Journal(list):
    """What the user's objects were shown, in order."""

    def note(self, who, *tensors):
        self.append((who, [None if t is None else t.clone() for t in tensors]))


class PushingProcessor(LogitsProcessor):
    """Depends on how often it was called, and looks at everything."""

    def __init__(self, journal):
        self.journal, self.calls = journal, 0

    def __call__(self, input_ids, scores):
        self.journal.note("processor", input_ids, scores)
        self.calls += 1
        scores = scores.clone()
        scores[:, self.calls :: 5] += 2.0
        return scores.scatter(1, input_ids[:, -1:], -4.0)


class EndingCriterion(StoppingCriteria):
    """Ends row r after 2 + 2r calls."""

    def __init__(self, journal):
        self.journal, self.calls = journal, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.journal.note("criterion", input_ids, *(scores or ()))
        self.calls += 1
        return torch.tensor([self.calls >= 2 + 2 * row for row in range(len(input_ids))])


class Streamer(BaseStreamer):
    def __init__(self, journal):
        self.journal = journal

    def put(self, value):
        self.journal.note("put", value)

    def end(self):
        self.journal.note("end")


@pytest.mark.parametrize("returned", [{}, FULL], ids=["tokens", "dict"])
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("inputs", [ONE, RAGGED], ids=["one row", "ragged"])
def test_objects_of_the_user(model, inputs, sampling, returned):
    """Stateful processors and criteria and a streamer see what stock shows them, in stock's order."""
    journals = []

    def arguments():
        journals.append(journal := Journal())
        return {
            **inputs,
            **sampling,
            **returned,
            "eos_token_id": ALL[:20],
            "max_new_tokens": NEW,
            "logits_processor": LogitsProcessorList([PushingProcessor(journal)]),
            "stopping_criteria": StoppingCriteriaList([EndingCriterion(journal)]),
            "streamer": Streamer(journal),
        }

    assert_equal(model, arguments)
    theirs, ours = journals
    assert [who for who, _ in ours] == [who for who, _ in theirs]
    for (_, our), (_, their) in zip(ours, theirs, strict=True):
        for a, b in zip(our, their, strict=True):
            if b.is_floating_point():
                assert_close(a, b)
            else:
                assert torch.equal(a, b)
                assert a.dtype == b.dtype


@pytest.mark.parametrize("inputs", [ONE, RAGGED], ids=["one row", "ragged"])
def test_streamer(model, inputs):
    """Without a user's object beside it, finished rows are streamed as pad tokens too."""
    ends = [row[2] for row in greedy(model, **inputs)][:1]
    journals = []

    def arguments():
        journals.append(Journal())
        return {**inputs, "streamer": Streamer(journals[-1]), "eos_token_id": ends, "max_new_tokens": NEW}

    assert_equal(model, arguments)
    theirs, ours = ([(who, [t.tolist() for t in tensors]) for who, tensors in journal] for journal in journals)
    assert ours == theirs


@pytest.mark.parametrize("inputs", [ONE, RAGGED], ids=["one row", "ragged"])
def test_stop_strings(model, inputs):
    text = [tokenizer().decode(row) for row in greedy(model, **inputs)]
    stops = [text[0][2:4], text[-1][3:5]]
    arguments = {**inputs, **NEVER, "tokenizer": tokenizer(), "stop_strings": stops, "max_new_tokens": NEW}
    ours = assert_equal(model, arguments)
    assert "<pad>" in tokenizer().decode(ours[0]) or ours.shape[1] < inputs["input_ids"].shape[1] + NEW
    assert_equal(model, {**arguments, **FULL})
    assert_equal(model, {**arguments, **SAMPLED})


def test_token_healing(model):
    """transformers heals by generate calls of its own, which llmopt leaves alone."""
    ids = tokenizer()(["the store", "a"], return_tensors="pt", padding=True)["input_ids"]
    arguments = {"tokenizer": tokenizer(), "token_healing": True, **NEVER, "max_new_tokens": NEW}
    assert_equal(model, {"input_ids": ids[:1], **arguments}, own_caches=False)
    assert_equal(model, {"input_ids": ids, **arguments}, own_caches=False)


@pytest.mark.parametrize("inputs", [ONE, RAGGED], ids=["one row", "ragged"])
def test_guidance(model, inputs):
    """The guiding processor runs the model by itself, on every row, finished or not."""
    negative = prompts(*[5] * len(inputs["input_ids"]), seed=3)["input_ids"]
    ends = [row[2] for row in greedy(model, **inputs)][:1]
    for more in ({}, {"negative_prompt_ids": negative}, {"negative_prompt_ids": negative, **FULL}):
        arguments = {**inputs, "guidance_scale": 1.7, "eos_token_id": ends, "max_new_tokens": NEW, **more}
        # What differs from the unguided scores is multiplied.
        assert_equal(model, arguments, own_caches=False, scores=1.7 * TOLERANCE)
        assert_equal(model, {**arguments, **SAMPLED}, own_caches=False, scores=1.7 * TOLERANCE)


# -- caches -----------------------------------------------------------------------------------------------------------


def assert_same_cache(ours: DynamicCache, theirs: DynamicCache, mask: torch.Tensor) -> None:
    """Same lengths, same keys and values; padded columns hold keys in stock that nobody reads."""
    assert type(ours) is type(theirs)
    assert ours.get_seq_length() == theirs.get_seq_length()
    for our, their in zip(ours.layers, theirs.layers, strict=True):
        assert type(our) is type(their)
        assert our.get_seq_length() == their.get_seq_length()
        for a, b in ((our.keys, their.keys), (our.values, their.values)):
            assert a.shape == b.shape
            real = mask[:, -a.shape[2] :].bool()
            assert_close(a.transpose(1, 2)[real], b.transpose(1, 2)[real])


@pytest.mark.parametrize("pages", [True, SMALL_PAGES], ids=["pages of 16", "pages of 4"])
@pytest.mark.parametrize("with_config", [False, True], ids=["plain", "config"])
@pytest.mark.parametrize("inputs", [ONE, RAGGED], ids=["one row", "ragged"])
def test_empty_cache_of_the_user(model, inputs, with_config, pages):
    """Filled in place, as stock leaves it; a second call goes on from it."""
    caches = [DynamicCache(config=model.config) if with_config else DynamicCache() for _ in range(2)]
    first = {**inputs, **NEVER, **FULL, "max_new_tokens": NEW}
    theirs = stock(model, **first, past_key_values=caches[0])
    ours = served(model, llmopt=pages, **first, past_key_values=caches[1], own_caches=False)
    assert_same(ours, theirs)
    assert ours.past_key_values is caches[1]
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    mask = torch.cat([mask, mask.new_ones(len(mask), NEW)], dim=1)
    assert_same_cache(caches[1], caches[0], mask[:, :-1])

    second = {"input_ids": ours.sequences, "attention_mask": mask, **NEVER, **FULL, "max_new_tokens": 3}
    theirs = stock(model, **second, past_key_values=caches[0])
    ours = served(model, llmopt=pages, **second, past_key_values=caches[1], own_caches=False)
    assert_same(ours, theirs)
    mask = torch.cat([mask, mask.new_ones(len(mask), 3)], dim=1)
    assert_same_cache(caches[1], caches[0], mask[:, :-1])


@pytest.fixture
def begun(model):
    """Both ways after six tokens: the full ids and mask, stock's cache and ours."""

    def begin(inputs, ours_by=True):
        arguments = {**inputs, **NEVER, "return_dict_in_generate": True, "max_new_tokens": 6}
        theirs, ours = stock(model, **arguments), served(model, llmopt=ours_by, **arguments)
        assert_same(ours, theirs)
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        mask = torch.cat([mask, mask.new_ones(len(mask), 6)], dim=1)
        assert isinstance(ours.past_key_values, PagedCache)
        full = {"input_ids": ours.sequences, "attention_mask": mask}
        return full, theirs.past_key_values, ours.past_key_values

    return begin


MORE = {**NEVER, **FULL, "max_new_tokens": 5}


@pytest.mark.parametrize("inputs", [ONE, RAGGED], ids=["one row", "ragged"])
def test_from_stock_cache_under_llmopt(model, begun, inputs):
    full, theirs, _ = begun(inputs)
    reference = stock(model, **full, **MORE, past_key_values=copy.deepcopy(theirs))
    ours = served(model, **full, **MORE, past_key_values=theirs, own_caches=False)
    assert_same(ours, reference)
    assert model.llmopt.stats.cached_tokens == full["attention_mask"][:, :-1].sum()


@pytest.mark.parametrize("pages", [True, SMALL_PAGES], ids=["pages of 16", "pages of 4"])
@pytest.mark.parametrize("inputs", [ONE, RAGGED], ids=["one row", "ragged"])
def test_from_paged_cache_under_stock(model, begun, inputs, pages):
    full, theirs, ours = begun(inputs, pages)
    reference = stock(model, **full, **MORE, past_key_values=theirs)
    result = stock(model, **full, **MORE, past_key_values=ours, llmopt=False)
    assert_same(result, reference)
    assert ours.get_seq_length() == theirs.get_seq_length()
    # And back: what stock appended is found in the pages.
    mask = torch.cat([full["attention_mask"], torch.ones(len(ours.rows), 5, dtype=torch.long)], dim=1)
    last = {"input_ids": result.sequences, "attention_mask": mask, **MORE}
    assert_same(served(model, llmopt=pages, **last, past_key_values=ours), stock(model, **last))


def test_only_the_new_ids(model, begun):
    """Ids of the new tokens alone, with a mask over everything."""
    full, theirs, ours = begun(ONE)
    last = {"input_ids": full["input_ids"][:, -1:], "attention_mask": full["attention_mask"], **MORE}
    reference = stock(model, **last, past_key_values=theirs)
    assert_same(served(model, **last, past_key_values=ours), reference)


@pytest.mark.parametrize("pages", [True, SMALL_PAGES], ids=["pages of 16", "pages of 4"])
def test_deepcopy_forks(model, begun, pages):
    """Two continuations of one text; neither sees the other's tokens."""
    full, theirs, ours = begun(RAGGED, pages)
    fork = copy.deepcopy(ours)
    for tail, our in (([[5], [6], [7]], ours), ([[50], [60], [70]], fork)):
        more = {
            "input_ids": torch.cat([full["input_ids"], torch.tensor(tail)], dim=1),
            "attention_mask": torch.cat([full["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1),
            **MORE,
        }
        reference = stock(model, **more, past_key_values=copy.deepcopy(theirs))
        assert_same(served(model, llmopt=pages, **more, past_key_values=our), reference)


@pytest.mark.parametrize("pages", [True, SMALL_PAGES], ids=["pages of 16", "pages of 4"])
@pytest.mark.parametrize("inputs", [ONE, RAGGED], ids=["one row", "ragged"])
def test_crop(inputs, pages):
    """The last tokens are dropped, and others follow. (Windows forget what cropping would uncover, in stock too.)"""
    model = tiny("llama")
    arguments = {**inputs, **NEVER, "return_dict_in_generate": True, "max_new_tokens": 6}
    first = served(model, llmopt=pages, **arguments)
    first.past_key_values.crop(-3)
    length = first.sequences.shape[1] - 4
    assert first.past_key_values.get_seq_length() == length
    ids = torch.cat([first.sequences[:, :length], torch.full((len(first.sequences), 2), 9)], dim=1)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], dim=1)
    reference = stock(model, input_ids=ids, attention_mask=mask, **MORE)
    ours = served(
        model, llmopt=pages, input_ids=ids, attention_mask=mask, **MORE, past_key_values=first.past_key_values
    )
    assert_same(ours, reference)


@pytest.mark.parametrize("how", ["repeat", "select", "reset"])
@pytest.mark.parametrize("llmopt", [SMALL_PAGES, False], ids=["llmopt", "stock"])
def test_rows_of_a_cache(model, begun, how, llmopt):
    full, theirs, ours = begun(RAGGED, SMALL_PAGES)
    if how == "repeat":
        theirs.batch_repeat_interleave(2)
        ours.batch_repeat_interleave(2)
        full = {name: tensor.repeat_interleave(2, dim=0) for name, tensor in full.items()}
    elif how == "select":
        rows = torch.tensor([2, 0])
        theirs.batch_select_indices(rows)
        ours.batch_select_indices(rows)
        full = {name: tensor[rows] for name, tensor in full.items()}
    else:
        theirs = DynamicCache(config=model.config)
        ours.reset()
        assert ours.get_seq_length() == ours.num_pages == 0
    reference = stock(model, **full, **MORE, **SAMPLED, past_key_values=theirs)
    if llmopt:
        result = served(model, llmopt=llmopt, **full, **MORE, **SAMPLED, past_key_values=ours)
    else:
        result = stock(model, llmopt=False, **full, **MORE, **SAMPLED, past_key_values=ours)
    assert_same(result, reference)


@pytest.mark.parametrize("inputs", [ONE, RAGGED], ids=["one row", "ragged"])
def test_beam_search_from_a_paged_cache(model, begun, inputs):
    """llmopt runs no beams; stock's search reorders our rows, which share pages."""
    full, theirs, ours = begun(inputs, SMALL_PAGES)
    beams = {**full, **NEVER, "num_beams": 3, "max_new_tokens": 6}
    for cache_ in (theirs, ours):
        cache_.batch_repeat_interleave(3)
    reference = stock(model, **beams, past_key_values=theirs)
    assert_same(stock(model, **beams, past_key_values=ours, llmopt=False), reference)


def test_pages_return(model):
    """Caches that nobody holds give their pages back."""
    gc.collect()  # what earlier tests left
    output = served(model, **RAGGED, **MORE)
    store = output.past_key_values.store
    assert store.pages_used
    del output
    assert not store.pages_used, "a reference cycle holds the cache until the collector runs"


# -- bfloat16 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [ONE, RAGGED], ids=["one row", "ragged"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "mixtral"])
def test_bfloat16(name, inputs):
    """Equal up to the first difference, which must be a near tie within the rounding noise of stock itself.

    The noise is measured against the same weights in float32. An expert that is chosen in one and not in the other is
    noise too, hence a median where sizes are compared.
    """
    model = build(name, dtype=torch.bfloat16)
    arguments = {**inputs, **NEVER, **FULL, "max_new_tokens": 20}
    theirs, ours = stock(model, **arguments), served(model, **arguments)
    prompt, ids = inputs["input_ids"].shape[1], theirs.sequences
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    mask = torch.cat([mask, mask.new_ones(len(ids), 20)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        exact = copy.deepcopy(model).float()(ids, attention_mask=mask, position_ids=positions).logits[:, prompt - 1 :]
    our_noise, noise = [], []
    for row, differs in enumerate((ours.sequences != ids)[:, prompt:]):
        agreed = int(differs.nonzero()[0]) + 1 if differs.any() else 20  # steps whose logits follow the same text
        our_noise += [float((ours.logits[t][row] - exact[row, t]).abs().max()) for t in range(agreed)]
        noise += [float((theirs.logits[t][row] - exact[row, t]).abs().max()) for t in range(agreed)]
        if differs.any():
            chosen = [int(result.sequences[row, prompt + agreed - 1]) for result in (theirs, ours)]
            gap = theirs.logits[agreed - 1][row][chosen]
            assert gap[0] - gap[1] <= max(noise[-agreed:])
    assert median(our_noise) <= 1.5 * median(noise)
