"""`BatchingPipeline` and `generate_batch`: what goes in and comes out, against the stock pipeline."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import build
from transformers import LogitsProcessor, LogitsProcessorList, pipeline
from transformers.pipelines.pt_utils import KeyDataset
from transformers.utils import logging

import hf_llmopt
from hf_llmopt import BatchingConfig, BatchingPipeline, Engine, LLMOptConfig, errors

sys.path.insert(0, str(Path(__file__).parent / "equality"))
from compare import counted_updates, stock, tokenizer

GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": 9999}
TEXTS = ["the store", "a", "Rain on stone", "no", "an inner one"]
CHATS = [
    [{"role": "user", "content": "the store"}],
    [{"role": "system", "content": "short"}, {"role": "user", "content": "a"}],
    [{"role": "user", "content": "the store"}, {"role": "assistant", "content": "is on"}],
]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def words():
    made = tokenizer().__class__(tokenizer_object=tokenizer().backend_tokenizer, **tokenizer().special_tokens_map)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def pipes(words):
    plain = pipeline("text-generation", model=build("llama"), tokenizer=words)
    fast = pipeline("text-generation", model=build("llama"), tokenizer=words, llmopt="continuous_batching")
    assert isinstance(fast, BatchingPipeline)
    yield plain, fast
    fast.close()


class Listed(torch.utils.data.Dataset):
    """Rows as a `datasets` object has them."""

    def __init__(self, texts) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict:
        return {"text": self.texts[index], "n": index}


class Column:
    """As `dataset["text"]` of the datasets library: a sequence that is no list."""

    def __init__(self, texts) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self):
        return iter(self.texts)

    def __getitem__(self, index):
        return self.texts[index]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"return_full_text": False},
        {"return_tensors": True},
        {"prefix": "so "},
        {"stop_sequence": ["e", "7"]},
        {"eos_token_id": list(range(3, 40))},
        {"max_new_tokens": None, "max_length": 14},
        {"num_return_sequences": 1, "repetition_penalty": 1.4},
        {"handle_long_generation": None, "add_special_tokens": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("texts", [TEXTS[0], TEXTS], ids=["string", "list"])
def test_same_as_the_stock_pipeline(pipes, texts, arguments) -> None:
    plain, fast = pipes
    arguments = {**GREEDY, **arguments}
    theirs = plain(texts, **arguments)
    with counted_updates() as updates:
        ours = fast(texts, **arguments)
    assert ours == theirs
    assert not updates


@pytest.mark.parametrize("chats", [CHATS[0], CHATS[2], CHATS], ids=["chat", "started answer", "list"])
def test_chats(pipes, chats) -> None:
    plain, fast = pipes
    assert fast(chats, **GREEDY) == plain(chats, **GREEDY)


def test_a_generator_of_chats(pipes) -> None:
    plain, fast = pipes
    assert list(fast((chat for chat in CHATS), **GREEDY)) == plain(CHATS, **GREEDY)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (text for text in TEXTS),
        lambda: KeyDataset(Listed(TEXTS), "text"),
        lambda: Column(TEXTS),
    ],
    ids=["generator", "KeyDataset", "column"],
)
def test_iterables_stream(pipes, make) -> None:
    plain, fast = pipes
    ours = fast(make(), **GREEDY)
    assert not isinstance(ours, list)
    assert list(ours) == plain(TEXTS, **GREEDY)


def test_rows_of_a_dataset_are_no_prompts(pipes) -> None:
    with pytest.raises(errors.InvalidRequest, match=r"\['n', 'text'\].*KeyDataset"):
        list(pipes[1](Listed(TEXTS), **GREEDY))


def test_as_completed(pipes) -> None:
    plain, fast = pipes
    theirs = plain(TEXTS, **GREEDY)
    ours = dict(fast.as_completed(TEXTS, **GREEDY))
    assert [ours[number] for number in range(len(TEXTS))] == theirs


def test_a_short_answer_does_not_wait_for_a_long_one(words) -> None:
    """In the order of the inputs the long one comes first; as completed, the short ones do."""
    model = build("llama")
    ids = words(TEXTS[0], return_tensors="pt")["input_ids"]
    first = int(model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1])
    with Engine(model) as engine:
        long = engine.submit(ids, max_new_tokens=60, eos_token_id=None, pad_token_id=0)
        short = engine.submit(ids, max_new_tokens=60, eos_token_id=first, pad_token_id=0)
        from hf_llmopt.batching.generate_batch import stream

        submits = [lambda: long, lambda: short]
        assert [number for number, _ in stream(submits, 4, in_order=False)] == [1, 0]
        assert [number for number, _ in stream(submits, 4)] == [0, 1]


def test_sequences(pipes) -> None:
    plain, fast = pipes
    arguments = {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 6, "eos_token_id": list(range(3, 20))}
    torch.manual_seed(0)
    ours = fast(TEXTS, **arguments)
    theirs = plain(TEXTS, **arguments)
    shape = [[list(record) for record in records] for records in theirs]
    assert [[list(record) for record in records] for records in ours] == shape
    tensors = fast(TEXTS[0], return_tensors=True, **arguments)
    assert len({len(record["generated_token_ids"]) for record in tensors}) == 1, "padded, as stock does"


def test_sampling_is_repeatable_and_independent(pipes) -> None:
    fast = pipes[1]
    arguments = {"do_sample": True, "max_new_tokens": 12, "eos_token_id": 9999}
    torch.manual_seed(3)
    first = fast(TEXTS, **arguments)
    torch.manual_seed(3)
    assert fast(TEXTS, **arguments) == first
    assert fast(TEXTS, seed=3, **arguments) == first, "the same seeds, whoever draws them"
    assert fast(TEXTS[:2], seed=3, **arguments) == first[:2], "whatever else is in the batch"
    assert fast(TEXTS, seed=4, **arguments) != first


def test_the_pipelines_own_defaults_hold(words) -> None:
    """transformers' pipeline samples up to 256 tokens at temperature 0.7 unless told otherwise."""
    fast = BatchingPipeline(model=build("llama"), tokenizer=words, max_new_tokens=5)
    seen = []
    submit = fast.engine.submit_call
    fast.engine.submit_call = lambda call, wishes: seen.append(submit(call, wishes)) or seen[-1]
    fast(TEXTS)
    rows = [handle._row for handle in seen]
    assert all(row.do_sample and len(row.tokens) <= 5 for row in rows)
    assert {stage.setting for stage in rows[0].stages} >= {0.7}
    fast.close()


def test_what_cannot_be_submitted_is_generated(pipes, recwarn) -> None:
    plain, fast = pipes
    arguments = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    ours, theirs = fast(TEXTS[:2], **arguments), plain(TEXTS[:2], **arguments)
    assert [records[0]["generated_text"] for records in ours] == [records[0]["generated_text"] for records in theirs]
    assert [list(records[0]) for records in ours] == [list(records[0]) for records in theirs]
    with pytest.warns(UserWarning, match="beam search"):
        assert fast(TEXTS[:2], num_beams=2, **GREEDY) == plain(TEXTS[:2], num_beams=2, **GREEDY)


def test_a_failing_input_raises_and_cancels_the_rest(words) -> None:
    small = {"kv_cache": {"page_size": 4, "max_tokens": 64}}
    fast = BatchingPipeline(model=build("llama"), tokenizer=words, llmopt=small)
    results = fast((text for text in ["a", "no", "the " * 60, "a"]), **GREEDY)
    with pytest.raises(errors.OutOfPages, match="What fits"):
        list(results)
    assert not fast.engine._live
    assert fast.engine.loop.store.pages_used == 0
    assert fast("a", **GREEDY)
    fast.close()


def test_a_failing_input_harms_no_other(words) -> None:
    small = {"kv_cache": {"page_size": 4, "max_tokens": 64}}
    fast = BatchingPipeline(model=build("llama"), tokenizer=words, llmopt=small)
    inputs = ["a", "the " * 60, "no", 7, "the store"]
    expected = fast(["a", "no", "the store"], **GREEDY)
    found = fast(inputs, return_exceptions=True, **GREEDY)
    assert [found[0], found[2], found[4]] == expected
    assert isinstance(found[1], errors.OutOfPages)
    assert str(found[1]).startswith("Input 1: ")
    assert isinstance(found[3], Exception)
    found = dict(fast.as_completed(inputs, return_exceptions=True, **GREEDY))
    assert [found[0], found[2], found[4]] == expected
    results = fast((text for text in inputs), **GREEDY)
    assert next(results) == expected[0], "what came before is delivered"
    with pytest.raises(errors.OutOfPages, match="Input 1: "):
        next(results)
    fast.close()


def test_what_fails_while_it_runs_harms_no_other(pipes) -> None:
    found = pipes[1](TEXTS[:2], deadline=0, return_exceptions=True, **GREEDY)
    assert [type(error) for error in found] == [errors.DeadlineExceeded] * 2
    assert str(found[1]).startswith("Input 1: ")
    with pytest.raises(errors.DeadlineExceeded, match=r"^The deadline"):
        pipes[1](TEXTS[0], deadline=0, **GREEDY)


def test_figures_and_log_probabilities_of_a_pipeline(pipes) -> None:
    plain, fast = pipes
    outputs = fast(TEXTS, logprobs=2, prompt_logprobs=0, return_stats=True, num_return_sequences=1, **GREEDY)
    for (output,), (stock_output,), text in zip(outputs, plain(TEXTS, **GREEDY), TEXTS, strict=True):
        stats, logprobs, prompt = (output.pop(name) for name in ("stats", "logprobs", "prompt_logprobs"))
        assert output == stock_output
        assert stats.served_by == "llmopt"
        assert stats.usage["completion_tokens"] == len(logprobs) == GREEDY["max_new_tokens"]
        assert stats.usage["prompt_tokens"] == len(prompt) + 1 == len(fast.tokenizer(text)["input_ids"])
        assert all(len(entry.top) == 2 for entry in logprobs)
    fast.model.llmopt.stats = None
    fast(TEXTS[:3], **{**GREEDY, "max_new_tokens": 5})
    assert (fast.model.llmopt.stats.served_by, fast.model.llmopt.stats.generated_tokens) == ("llmopt", 5)
    with pytest.warns(UserWarning, match="beam search"):
        ((output,),) = fast(TEXTS[:1], num_beams=2, return_stats=True, **GREEDY)
    assert output["stats"].served_by == "transformers"
    with pytest.raises(errors.NotServed, match="beam search"):
        fast(TEXTS[:1], num_beams=2, logprobs=1, **GREEDY)


class Counts(LogitsProcessor):
    """Raises the score of a token that depends on how often it was called: stock's order is the only right one."""

    calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores[:, 3 + self.calls % 40] += 100
        return scores


def test_a_processor_of_the_users_own_serves_one_input_at_a_time(pipes) -> None:
    plain, fast = pipes
    ours, theirs = Counts(), Counts()
    found = fast(TEXTS, logits_processor=LogitsProcessorList([ours]), **GREEDY)
    assert found == plain(TEXTS, logits_processor=LogitsProcessorList([theirs]), **GREEDY)
    assert ours.calls == theirs.calls
    ids = [fast.tokenizer(text)["input_ids"] for text in TEXTS]
    ours.calls = 0
    tokens = hf_llmopt.generate_batch(fast.model, ids, logits_processor=LogitsProcessorList([ours]), **GREEDY)
    assert ours.calls == theirs.calls == sum(map(len, tokens))


def test_an_iterator_that_is_dropped_stops(pipes) -> None:
    fast = pipes[1]
    taken = []

    def source():
        for number in range(10_000):
            taken.append(number)
            yield "the store"

    results = fast(source(), do_sample=False, max_new_tokens=2, eos_token_id=9999)
    for _ in range(3):
        next(results)
    results.close()
    assert len(taken) <= 4 * 2 * 256 + 1, "read as far as needed"
    assert not fast.engine._live
    assert fast.engine.loop.store.pages_used == 0


def test_progress_bar(pipes, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []

    def bar(items, total=None):
        for item in items:
            shown.append(total)
            yield item

    monkeypatch.setattr(logging, "tqdm", bar)
    pipes[1](TEXTS, progress_bar=True, **GREEDY)
    assert shown == [5] * 5
    pipes[1](TEXTS, **GREEDY)
    assert len(shown) == 5


def test_the_keyword_belongs_to_the_pipeline(pipes) -> None:
    _, ours = pipes
    with pytest.raises(errors.InvalidOption, match="belongs to pipeline"):
        ours("a", llmopt=False)


def test_true_keeps_the_stock_class(words) -> None:
    """`True` means exact, and a sampled batch of requests has noise of its own for each."""
    made = pipeline("text-generation", model=build("llama"), tokenizer=words, llmopt=True)
    assert not isinstance(made, BatchingPipeline)


@pytest.mark.parametrize(
    ("llmopt", "batches"),
    [
        (BatchingConfig("fair"), True),
        (BatchingConfig(), True),
        (LLMOptConfig(batching="fair"), True),
        ({"batching": {"max_requests": 4}}, True),
        ("prompt_cache,continuous_batching", True),
        (BatchingConfig(continuous=False), False),
        (LLMOptConfig(), False),
        ({"kv_cache": True}, False),
    ],
    ids=str,
)
def test_who_names_batching_gets_it(words, llmopt, batches: bool) -> None:
    model = build("llama")
    made = pipeline("text-generation", model=model, tokenizer=words, llmopt=llmopt)
    assert isinstance(made, BatchingPipeline) is batches
    if batches:
        assert made.engine.loop is model.llmopt.engine_for(
            model, replace(made.engine.config, batching=replace(made.engine.config.batching, continuous=False))
        ), "generate shares its pages"
        made.close()


def test_generate_batch() -> None:
    model = build("qwen3")
    prompts = [[5 + index, 7, 9 + index % 3] * (1 + index % 4) for index in range(20)]
    arguments = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    expected = [stock(model, input_ids=torch.tensor([ids]), **arguments)[0, len(ids) :].tolist() for ids in prompts]
    config = {"batching": {"max_requests": 3, "max_waiting": 4}}
    assert hf_llmopt.generate_batch(model, prompts, **arguments) == expected
    assert hf_llmopt.generate_batch(model, (ids for ids in prompts), config, **arguments) == expected
    sampled = dict(arguments, do_sample=True, num_return_sequences=2)
    one = hf_llmopt.generate_batch(model, prompts, config, seed=1, **sampled)
    assert len(one) == 40
    assert one == hf_llmopt.generate_batch(model, prompts, seed=1, **sampled)
    assert one[0::2] != one[1::2]


def test_generate_batch_says_which_prompt_is_wrong() -> None:
    model = build("llama")
    arguments = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}
    prompts = [[5, 6], [7, 8, 9], [10_000], [5, 7]]
    with pytest.raises(errors.TokenOutOfRange, match=r"^Input 2: The prompt contains token id 10000"):
        hf_llmopt.generate_batch(model, prompts, **arguments)
    found = hf_llmopt.generate_batch(model, prompts, return_exceptions=True, **arguments)
    assert found[:2] + found[3:] == hf_llmopt.generate_batch(model, [*prompts[:2], *prompts[3:]], **arguments)
    assert isinstance(found[2], errors.TokenOutOfRange)
    arguments |= {"do_sample": True, "num_return_sequences": 2}
    found = hf_llmopt.generate_batch(model, prompts, return_exceptions=True, **arguments)
    assert [isinstance(item, errors.TokenOutOfRange) for item in found] == [False] * 4 + [True] * 2 + [False] * 2


def test_generate_batch_gives_handles() -> None:
    model = build("llama")
    arguments = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}
    handles = hf_llmopt.generate_batch(model, [[5, 6], [7, 8, 9]], return_handles=True, logprobs=1, **arguments)
    assert model.llmopt.stats is handles[-1].stats
    assert [handle.result() for handle in handles] == hf_llmopt.generate_batch(model, [[5, 6], [7, 8, 9]], **arguments)
    assert [handle.stats.usage["total_tokens"] for handle in handles] == [6, 7]
    assert [[entry.token for entry in handle.logprobs] for handle in handles] == [h.result() for h in handles]


def test_generate_batch_waits_where_others_fill_the_line() -> None:
    model = build("llama")
    arguments = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}
    config = {"batching": {"max_requests": 1, "max_waiting": 2}}
    with Engine(model, config) as engine:
        others = [engine.submit([5, 6], **arguments) for _ in range(2)]
        assert len(hf_llmopt.generate_batch(model, [[5, 6, 7]] * 3, config, **arguments)) == 3
        for handle in others:
            handle.result(60)
