"""Speculative decoding: the tokens of plain decoding, whatever is guessed, and figures of what the guesses did."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from architectures import build
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, pipeline

import hf_llmopt
from hf_llmopt import Engine, LLMOptConfig, SpeculativeConfig, demo
from hf_llmopt.bench.oracle import Oracle
from hf_llmopt.engine.sampling import Tape
from hf_llmopt.errors import CallbackFailed, InvalidLogits, InvalidOption
from hf_llmopt.speculative import Draft, PassCosts, SuffixDrafter, choose_drafts
from hf_llmopt.speculative.drafter import Odds

GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.95}
PENALTIES = {"do_sample": True, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 5}
NEW = 24
pytestmark = pytest.mark.usefixtures("cheap_guesses")


class Words:
    """A text."""

    def __init__(self, tokens: list[int], salt: str | None = None) -> None:
        self.tokens, self.salt = tokens, salt


@pytest.fixture(scope="module")
def model():
    return build("llama")


def prompts(rows: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """Ragged, padded on the left, and full of repetitions."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 20, (rows, 6), generator=generator).repeat(1, 3)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 2 * row % 9] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def generate(model, inputs, llmopt, **kwargs):
    """The sequences, and a random number drawn afterwards."""
    torch.manual_seed(11)
    output = model.generate(**inputs, llmopt=llmopt, max_new_tokens=NEW, pad_token_id=0, **kwargs)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    return sequences.tolist(), float(torch.rand(()))


def speculating(num_tokens=4, **options):
    return {"speculative": {"num_tokens": num_tokens, **options}}


def drafted(model):
    stats = model.llmopt.stats
    assert (stats.served_by, stats.undrafted) == ("llmopt", None)
    return stats


@pytest.mark.parametrize("arguments", [GREEDY, SAMPLED, PENALTIES], ids=["greedy", "sampled", "penalties"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text"])
def test_the_tokens_are_those_of_stock_and_so_is_the_generator(architecture, rows, arguments):
    model, inputs = build(architecture), prompts(rows)
    expected = generate(model, inputs, None, **arguments)
    assert generate(model, inputs, speculating(), **arguments) == expected
    assert drafted(model).drafted_tokens > 0


@pytest.mark.parametrize(("right", "width"), [(0.0, 1), (0.7, 1), (1.0, 1), (0.7, 2)])
@pytest.mark.parametrize("arguments", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_guesses_that_are_partly_right(model, monkeypatch, right, width, arguments):
    inputs, arguments = prompts(4), {**arguments, "eos_token_id": None}  # guesses behind an end are never right
    expected = generate(model, inputs, None, **arguments)
    starts = inputs["attention_mask"].argmax(1).tolist()
    ends = [row[start:] for row, start in zip(expected[0], starts, strict=True)]
    monkeypatch.setattr("hf_llmopt.engine.drafters.SuffixDrafter", lambda: Oracle(ends, right, 64, width))
    model.llmopt.release() if hasattr(model, "llmopt") else None
    assert generate(model, inputs, speculating(3), **arguments) == expected
    stats = drafted(model)
    model.llmopt.release()
    assert stats.drafted_tokens > 0
    if right == 0:
        assert stats.accepted_tokens == 0
    if right == 1:
        assert stats.accepted_tokens == stats.drafted_tokens
        assert stats.steps <= 1 + -(-NEW // 4) + 1, "four tokens a step"
    if right == 0.7:
        assert 0.2 < stats.accepted_tokens / stats.drafted_tokens < 0.9


@pytest.mark.parametrize("pages", [{}, {"dtype": "int8"}], ids=["exact", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "llama4_text"])
def test_trees(monkeypatch, architecture, pages):
    """Of three guesses behind every token one may be right: the keys of those that were close ranks."""
    model, inputs = build(architecture), prompts(3)
    pages = {"kv_cache": {"page_size": 4, **pages}}
    for arguments in ({**GREEDY, "eos_token_id": None}, {**SAMPLED, "eos_token_id": None}):
        expected = generate(model, inputs, pages, **arguments)
        starts = inputs["attention_mask"].argmax(1).tolist()
        ends = [row[start:] for row, start in zip(expected[0], starts, strict=True)]
        width = 1 if architecture == "llama4_text" else 3  # its columns stand for positions: chains only
        monkeypatch.setattr(
            "hf_llmopt.engine.drafters.SuffixDrafter", lambda ends=ends, width=width: Oracle(ends, 0.8, 64, width)
        )
        model.llmopt.release()
        assert generate(model, inputs, {**pages, **speculating(9)}, **arguments) == expected
        model.llmopt.release()
        assert drafted(model).accepted_tokens > 0.1 * drafted(model).drafted_tokens


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("arguments", [GREEDY, SAMPLED, {"do_sample": True, "temperature": 3.0}])
def test_a_model_that_drafts_for_itself_is_always_right(model, rows, arguments):
    inputs, arguments = prompts(rows), {**arguments, "eos_token_id": None}
    expected = generate(model, inputs, None, **arguments)
    assert generate(model, inputs, speculating(draft_model=model), **arguments) == expected
    stats = drafted(model)
    assert stats.accepted_tokens == stats.drafted_tokens > 0


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
@pytest.mark.parametrize("arguments", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_another_model_drafts(architecture, arguments):
    model, inputs = build(architecture), prompts(3)
    draft = build("llama", seed=5)
    expected = generate(model, inputs, None, **arguments)
    config = speculating(draft_model=draft)
    assert generate(model, inputs, config, **arguments) == expected
    assert drafted(model).drafted_tokens > 0
    engine = model.llmopt.engine
    assert engine.store.pages_used == 0
    assert engine.speculator.drafter._second._loop.store.pages_used == 0, "the draft's pages go back too"


def test_a_draft_model_by_name_and_a_length_beside_it(model, tmp_path):
    build("llama", seed=5).save_pretrained(tmp_path)
    expected = generate(model, prompts(), None, **GREEDY)
    assert generate(model, prompts(), speculating(draft_model=str(tmp_path)), **GREEDY) == expected
    assert drafted(model).drafted_tokens > 0
    by_text = {"prompt_lookup_num_tokens": 3}
    assert generate(model, prompts(), {"speculative": {"num_tokens": 2}}, **GREEDY, **by_text) == expected
    assert model.llmopt.engine.config.speculative == SpeculativeConfig("suffix", num_tokens=2)


def test_a_draft_model_that_fails_harms_nobody(model, monkeypatch):
    inputs = prompts(2)
    expected = generate(model, inputs, None, **GREEDY)
    draft = build("llama", seed=5)
    config = speculating(draft_model=draft)
    assert generate(model, inputs, config, **GREEDY) == expected
    draft.model.layers[1].register_forward_hook(lambda *args: 1 / 0)
    assert generate(model, inputs, config, **GREEDY) == expected
    assert drafted(model).drafted_tokens == 0
    monkeypatch.setattr("hf_llmopt.speculative.suffix.SuffixDrafter.propose", lambda *args: 1 / 0)
    with pytest.warns(UserWarning, match="nothing is guessed any more: ZeroDivisionError"):
        assert generate(model, inputs, speculating(7), **GREEDY) == expected


def test_nothing_is_guessed_behind_a_masked_last_token(model):
    """Right padding whose id is the first new token: it must not pass for a guess."""
    for token in range(3, 20):
        inputs = {"input_ids": torch.tensor([[token, 0, 0, 0]]), "attention_mask": torch.tensor([[1, 0, 0, 0]])}
        first = model.generate(**inputs, max_new_tokens=1, pad_token_id=0, do_sample=False)[0, -1]
        inputs["input_ids"][0, 1:] = first
        expected = generate(model, inputs, None, **GREEDY)
        assert generate(model, inputs, speculating(2, draft_model=model), **GREEDY) == expected


def test_a_draft_model_with_nan_guesses_nothing(model):
    draft = build("llama", seed=5)
    with torch.no_grad():
        draft.lm_head.weight.fill_(float("nan"))
    for arguments in (GREEDY, SAMPLED):
        expected = generate(model, prompts(2), None, **arguments)
        assert generate(model, prompts(2), speculating(draft_model=draft), **arguments) == expected
        assert drafted(model).drafted_tokens == 0


def test_a_criterion_that_raises_leaves_the_generator_where_stock_does(model):
    class Raises(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] == 18 + 3:
                raise ZeroDivisionError
            return torch.zeros(len(input_ids), dtype=torch.bool)

    found = []
    for llmopt in (None, speculating(draft_model=model)):
        torch.manual_seed(3)
        with pytest.raises((ZeroDivisionError, CallbackFailed)):
            model.generate(**prompts(), **SAMPLED, max_new_tokens=NEW, stopping_criteria=[Raises()], llmopt=llmopt)
        found.append(torch.rand(()))
    assert found[0] == found[1]


def test_assistant_models_and_prompt_lookup_choose_the_drafter(model):
    inputs = prompts(2)
    expected = generate(model, inputs, None, **GREEDY)
    for arguments in ({"assistant_model": build("llama", seed=5)}, {"prompt_lookup_num_tokens": 3}):
        found = generate(model, inputs, True, **GREEDY, **arguments)  # stock refuses two rows
        assert found == expected
        assert drafted(model).drafted_tokens > 0


def test_rows_without_an_end_of_their_own_draft(model):
    inputs = prompts(3)
    expected = generate(model, inputs, None, **GREEDY, eos_token_id=None)
    assert generate(model, inputs, speculating(), **GREEDY, eos_token_id=None) == expected
    assert drafted(model).drafted_tokens > 0


def test_an_end_inside_a_draft_ends_the_row(model):
    inputs = prompts(3)
    (plain, _) = generate(model, inputs, None, **GREEDY)
    eos = plain[0][18 + 5]
    expected = generate(model, inputs, None, **GREEDY, eos_token_id=eos)
    assert expected[0] != plain
    assert generate(model, inputs, speculating(), **GREEDY, eos_token_id=eos) == expected
    drafted(model)


class StopAt(StoppingCriteria):
    """A user's criterion, which counts how often it is asked."""

    def __init__(self, length: int) -> None:
        self.length, self.asked = length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append(input_ids.shape[1])
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_a_users_criterion_sees_every_token_and_stops_inside_a_draft(model):
    inputs = prompts(1)
    seen = []
    for llmopt in (None, speculating()):
        criterion = StopAt(18 + 7)
        seen.append((generate(model, inputs, llmopt, **GREEDY, stopping_criteria=[criterion]), criterion.asked))
    assert seen[0] == seen[1]
    assert drafted(model).drafted_tokens > 0


def test_rows_that_must_stay_in_step_do_and_say_why(model):
    inputs, criterion = prompts(2), StopAt(18 + 7)
    expected = generate(model, inputs, None, **GREEDY, stopping_criteria=[criterion])
    assert generate(model, inputs, speculating(), **GREEDY, stopping_criteria=[criterion]) == expected
    assert model.llmopt.stats.drafted_tokens == 0
    assert "criterion of yours" in model.llmopt.stats.undrafted
    assert "nothing guessed" in str(model.llmopt.stats)


def test_scores_and_the_cache_are_those_of_stock(model):
    inputs = prompts(1)
    found = []
    for llmopt in (None, speculating()):
        torch.manual_seed(0)
        found.append(
            model.generate(
                **inputs,
                **SAMPLED,
                max_new_tokens=NEW,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=True,
                output_logits=True,
                llmopt=llmopt,
            )
        )
    stock, ours = found
    assert torch.equal(stock.sequences, ours.sequences)
    for name in ("scores", "logits"):
        for a, b in zip(getattr(stock, name), getattr(ours, name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert ours.past_key_values.get_seq_length() == stock.past_key_values.get_seq_length()
    longer = torch.cat([ours.sequences, torch.tensor([[5, 6]])], dim=1)
    ends = [
        model.generate(longer, past_key_values=output.past_key_values, do_sample=False, max_new_tokens=8, llmopt=llmopt)
        for output, llmopt in ((stock, None), (ours, speculating()))
    ]
    assert torch.equal(*ends)


def test_a_step_between_a_calls_last_token_and_its_end(model):
    """Of another thread, say; here of a call inside the streamer's last call."""
    inputs, settings = prompts(), {**GREEDY, "max_new_tokens": 9, "pad_token_id": 0}
    expected = model.generate(**inputs, **settings)
    inner = []

    class Nested:
        def put(self, value):
            pass

        def end(self):
            inner.append(model.generate(**inputs, **settings, llmopt=speculating()))

    outer = model.generate(
        **inputs, **settings, return_dict_in_generate=True, streamer=Nested(), llmopt=speculating()
    )  # what it returns keeps its pages until the end
    assert torch.equal(outer.sequences, expected)
    assert torch.equal(inner[0], expected)
    assert outer.past_key_values.get_seq_length() == expected.shape[1] - 1


def test_submitted_requests_draft_and_share_steps(model):
    config = LLMOptConfig(speculative=SpeculativeConfig(num_tokens=3), prompt_cache=True)
    inputs = prompts(5, seed=3)
    rows = [ids[mask == 1] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    with Engine(model, True) as plain:
        handles = [plain.submit(row, max_new_tokens=NEW, seed=i, **SAMPLED) for i, row in enumerate(rows)]
        expected = [handle.result() for handle in handles]
    with Engine(model, config) as engine:
        for _ in range(2):  # the second time prompts are found
            handles = [engine.submit(row, max_new_tokens=NEW, seed=i, **SAMPLED) for i, row in enumerate(rows)]
            assert [handle.result() for handle in handles] == expected
            assert sum(handle.stats.drafted_tokens for handle in handles) > 0
        assert any(handle.stats.cached_tokens for handle in handles)


def test_preempted_requests_draft(model):
    config = {
        "speculative": {"num_tokens": 3},
        "kv_cache": {"max_tokens": 96, "page_size": 4},
        "batching": {"max_batch_tokens": 16},
    }
    rows = list(prompts(4)["input_ids"])
    with Engine(model, True) as plain:
        expected = [plain.submit(row, max_new_tokens=NEW, **GREEDY).result() for row in rows]
    with Engine(model, config) as engine:
        with engine.loop.lock:  # all are there before the first step
            handles = [engine.submit(row, max_new_tokens=NEW, **GREEDY) for row in rows]
        assert [handle.result() for handle in handles] == expected
        assert sum(handle.stats.drafted_tokens for handle in handles) > 0
        assert sum(handle.stats.preemptions for handle in handles) > 0


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantized_pages(model, dtype):
    inputs, pages = prompts(2), {"kv_cache": {"dtype": dtype}}
    expected = generate(model, inputs, pages, **GREEDY)
    assert generate(model, inputs, {**pages, **speculating()}, **GREEDY) == expected
    assert drafted(model).drafted_tokens > 0


def test_the_pipeline_drafts():
    model, tokenizer = demo.load()
    text = "import os\nimport sys\nimport os\nimport sys\n"
    outputs = []
    for llmopt in ("kv_cache", "speculative", "speculative,continuous_batching"):
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, llmopt=llmopt)
        outputs.append(pipe(text, max_new_tokens=12, do_sample=False)[0]["generated_text"])
        assert ("speculative" in llmopt) == (model.llmopt.stats.drafted_tokens > 0)
        if hasattr(pipe, "close"):
            pipe.close()
    assert outputs[0] == outputs[1] == outputs[2]


def _joint(model, llmopt, count, draws, **kwargs):
    """How often each pair of first tokens came, `draws` rows of one call."""
    ids = torch.tensor([[3, 1, 3, 1, 3]]).expand(draws, -1)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, llmopt=llmopt, do_sample=True, **kwargs
    )
    return Counter(map(tuple, output[:, 5:].tolist()))


def _chi_squared(model, found, count, temperature, top_k):
    """Against the exact joint distribution: the statistic, and how many outcomes are likely enough to count."""
    total, probabilities = sum(found.values()), {(): 1.0}
    for _ in range(count):
        longer = {}
        for tokens, probability in probabilities.items():
            logits = model(torch.tensor([[3, 1, 3, 1, 3, *tokens]])).logits[0, -1].double() / temperature
            logits[logits < logits.topk(top_k).values[-1]] = -float("inf")
            for token, share in enumerate(logits.softmax(-1).tolist()):
                if share:
                    longer[(*tokens, token)] = probability * share
        probabilities = longer
    likely = [tokens for tokens, probability in probabilities.items() if probability * total >= 5]
    statistic = sum((found[t] - probabilities[t] * total) ** 2 / (probabilities[t] * total) for t in likely)
    removed = not set(found) <= set(probabilities)  # by top-k
    return float("inf") if removed else statistic, len(likely)


def _tiny():
    return build("llama", vocab_size=8)


@pytest.mark.parametrize("temperature", [0.6, 1.8])
@pytest.mark.parametrize("drafter", ["suffix", "tree", "draft_model", "layer_skip"])
@torch.no_grad()
def test_the_joint_distribution_is_the_models(monkeypatch, drafter, temperature):
    model, options = _tiny(), {"temperature": temperature, "top_k": 5}
    monkeypatch.setattr("hf_llmopt.engine.drafters.pass_seconds", lambda runner, tokens: 1.0 + 1e-6 * tokens)
    draft = {
        "suffix": {"num_tokens": 2},
        "tree": {},  # as many guesses as pay, several behind one token
        "draft_model": {"num_tokens": 2, "draft_model": build("llama", vocab_size=8, seed=3)},
        "layer_skip": {"num_tokens": 2, "method": "layer_skip"},
    }
    torch.manual_seed(0)
    found = _joint(model, {"speculative": draft[drafter]}, 3, 1500, **options)
    assert drafted(model).drafted_tokens > 0
    statistic, likely = _chi_squared(model, found, 3, temperature, 5)
    # Of k outcomes the statistic has mean k and variance 2k: six deviations are a chance of about 1e-9.
    assert statistic < likely + 6 * (2 * likely) ** 0.5


@pytest.mark.parametrize("mistake", ["noise of the step before", "guesses count whatever the model says"])
@torch.no_grad()
def test_the_test_of_the_distribution_finds_mistakes(monkeypatch, mistake):
    model, options = _tiny(), {"temperature": 1.0, "top_k": 5}
    if mistake == "noise of the step before":
        read = Tape.read
        monkeypatch.setattr(Tape, "read", lambda self, row, step, like: read(self, row, step // 2 * 2, like))
    else:
        from hf_llmopt.engine.request import Request

        append = Request.append

        def trusting(self, token):
            append(self, self.tokens[-self.drafted] if self.later else token)

        monkeypatch.setattr(Request, "append", trusting)
        from hf_llmopt.generation.row import Row

        accept = Row.accept
        monkeypatch.setattr(
            Row,
            "accept",
            lambda self, token, logprob=None: accept(
                self, self.request.tokens[-self.request.drafted] if self.request.later else token, logprob
            ),
        )
    torch.manual_seed(0)
    found = _joint(model, speculating(2), 3, 1500, **options)
    statistic, likely = _chi_squared(model, found, 3, 1.0, 5)
    assert statistic > likely + 6 * (2 * likely) ** 0.5


def test_where_guesses_never_help_none_are_computed():
    """Random tokens: the length comes down to 0, but for a try now and then."""
    model, _ = demo.load()
    ids = torch.randint(0, model.config.vocab_size, (1, 60), generator=torch.Generator().manual_seed(1))
    costs = PassCosts(lambda tokens: 1.0 + 0.2 * tokens)
    model.generate(ids, llmopt="speculative", max_new_tokens=2, do_sample=False)
    speculator = model.llmopt.engine.speculator
    speculator._costs = costs
    speculator._record.clear()
    model.generate(ids, llmopt="speculative", max_new_tokens=100, do_sample=True, temperature=5.0)
    assert model.llmopt.stats.drafted_tokens <= 25


def test_lengths_maximise_tokens_per_second():
    cost = PassCosts(lambda tokens: 1.0 + 0.05 * tokens)
    generator = random.Random(4)
    for _ in range(50):
        chances = []
        for _ in range(generator.randint(1, 3)):
            row, chance = [], 1.0
            for _ in range(generator.randint(0, 4)):
                chance *= generator.random()
                row.append(chance)
            chances.append(row)
        lengths = [len(drafts) for drafts in choose_drafts(chances, cost)]

        def rate(lengths, chances=chances):
            tokens = len(chances) + sum(sum(row[:n]) for row, n in zip(chances, lengths, strict=True))
            return tokens / cost(len(chances) + sum(lengths))

        options = [[]]
        for row in chances:
            options = [[*before, n] for before in options for n in range(len(row) + 1)]
        assert rate(lengths) == pytest.approx(max(map(rate, options)))


def test_the_suffix_drafter_takes_the_longest_match_the_most_frequent_and_follows_loops():
    propose = SuffixDrafter().propose
    assert propose([Words([1, 2, 9, 5, 2, 7, 1, 2])], [1])[0].tokens == [9], "1 2 is longer than 2"
    assert propose([Words([2, 7, 2, 8, 2, 8, 2])], [1])[0].tokens == [8], "twice beats once"
    assert propose([Words([4, 5, 4, 5, 4])], [6])[0].tokens == [5, 4, 5, 4, 5, 4]
    assert propose([Words([1, 2, 3])], [4])[0].tokens == []


def test_bad_options_are_refused(model):
    with pytest.raises(InvalidOption, match="need draft_model="):
        SpeculativeConfig("draft_model")
    with pytest.raises(InvalidOption, match="no other method takes one"):
        SpeculativeConfig("suffix", draft_model=model)
    with pytest.raises(InvalidOption, match="'suffix'"):
        SpeculativeConfig("sufix")
    with pytest.raises(InvalidOption, match="a model or its name"):
        SpeculativeConfig(draft_model=3)
    with pytest.raises(InvalidOption, match="num_tokens"):
        SpeculativeConfig(num_tokens=0)
    with pytest.raises(InvalidOption, match="exclude each other"):
        LLMOptConfig(kv_cache={"eviction": "sink"}, speculative=True)
    for value in (0, True, "a"):
        with pytest.raises(InvalidOption, match="prompt_lookup_num_tokens"):
            model.generate(**prompts(), llmopt=True, prompt_lookup_num_tokens=value, max_new_tokens=2)
    with pytest.raises(InvalidOption, match="PreTrainedModel or its name, got Linear"):
        model.generate(**prompts(), llmopt={"speculative": {"draft_model": torch.nn.Linear(2, 2)}}, max_new_tokens=2)
    other = build("llama", vocab_size=32)
    with pytest.raises(InvalidOption, match="knows 32 tokens"):
        model.generate(**prompts(), llmopt={"speculative": {"draft_model": other}}, max_new_tokens=2)


def test_optimize_and_lists_of_names(model):
    hf_llmopt.optimize(model, llmopt=["prompt_cache", "speculative"])
    try:
        expected = generate(model, prompts(), False, **GREEDY)
        assert generate(model, prompts(), None, **GREEDY) == expected
        assert model.llmopt.stats.served_by == "llmopt"
    finally:
        hf_llmopt.optimize(model, llmopt=False)


def test_what_the_model_chose_is_remembered_behind_wrong_guesses_and_for_texts_of_the_same_salt_alone():
    drafter, first = SuffixDrafter(), Words([1, 2, 3], "a")
    draft = Draft([7, 8, 9], ["-"] * 3, [-1, -1, 1])
    drafter.learn(first, 3, draft, {-1: 8, 0: 20, 1: 30, 2: 40})
    assert drafter.propose([Words([50, 3], "a")], [2])[0].tokens == [8, 30], "what it chose, and chose behind that"
    assert drafter.propose([Words([50, 7], "a")], [1])[0].tokens == [20], "7 was a wrong guess"
    assert drafter.propose([Words([50, 3], "b"), Words([50, 3])], [2, 2]) == [Draft([], [], [])] * 2


def test_the_likeliest_guesses_make_a_tree():
    odds = Odds(lambda grounds: 0.9 if grounds[2] > 1 else 0.3, lambda seconds: 0.0, branches=True)
    text = Words([1, 2, 5, 40, 1, 2, 5, 41, 1, 2, 6, 42, 1, 2])
    (draft,) = SuffixDrafter().propose([text], [4], odds)
    assert (draft.tokens, draft.parents) == ([5, 6, 41, 40], [-1, -1, 0, 0]), "5 twice, 6 once, and two behind 5"
    (draft,) = SuffixDrafter().propose([text], [2], odds._replace(branches=False))
    assert (draft.tokens, draft.parents) == ([5, 41], [-1, 0])


def test_no_draft_is_chosen_without_what_it_stands_behind():
    chances = [[0.9, 0.5, 0.45, 0.05], [0.6]]
    assert choose_drafts(chances, lambda tokens: 1.0 + 0.1 * tokens) == [[0, 1, 2], [0]]
    assert choose_drafts(chances, lambda tokens: tokens) == [[], []]


def test_calls_that_alternate_between_configs_keep_what_was_learned(model):
    inputs = prompts(2)
    generate(model, inputs, speculating(3), **GREEDY)
    engine = model.llmopt.engine
    assert engine.store.groups[0].pool.num_pages > 0
    generate(model, inputs, "kv_cache", **GREEDY)
    assert model.llmopt.engine is not engine
    assert engine.store.groups[0].pool.num_pages == 0, "its memory is free"
    generate(model, inputs, speculating(3), **GREEDY)
    assert model.llmopt.engine is engine


def test_a_request_with_nan_teaches_nobody(model):
    class Broken(LogitsProcessor):
        def __call__(self, ids, scores):
            return scores * float("nan") if ids.shape[1] == 9 else scores

    ids = torch.tensor([[5, 9, 11, 7, 5, 9, 11, 7]])
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **arguments)[0, 8:].tolist()
    with Engine(model, speculating(4)) as engine:
        with pytest.raises(InvalidLogits):
            engine.submit(ids, logits_processor=LogitsProcessorList([Broken()]), **arguments).result(60)
        assert engine.submit(ids, **arguments).result(60) == expected


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_the_last_token_of_a_prompt_of_embeddings_is_computed_alone(model, backend):
    ids = torch.randint(3, 112, (1, 9))
    given = {"inputs_embeds": model.get_input_embeddings()(ids).detach(), "attention_mask": torch.ones_like(ids)}
    config = {"batching": {"max_batch_tokens": 8}, "attention": backend}
    expected = generate(model, given, config, **GREEDY)
    assert generate(model, given, {**config, **speculating(4)}, **GREEDY) == expected


def test_log_probabilities_of_a_prompt_are_of_its_tokens_alone(model):
    ids = [5, 9, 11, 7, 5, 9, 11, 7, 5]
    arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "prompt_logprobs": 0}
    with Engine(model, {"batching": {"max_batch_tokens": 4}, **speculating(4)}) as engine:
        handle = engine.submit(ids, **arguments)
        handle.result(60)
        assert [entry.token for entry in handle.prompt_logprobs] == ids[1:]


@pytest.mark.parametrize("embeds", [False, True])
def test_guesses_do_not_cross_salts(model, embeds):
    ids = torch.tensor([[5, 90, 11, 7, 33]])
    given = {"inputs_embeds": model.get_input_embeddings()(ids).detach()} if embeds else {"input_ids": ids}
    given["attention_mask"] = torch.ones_like(ids)
    drafts = []
    model.llmopt.release()
    for salt in "aab":
        config = {"prompt_cache": {"salt": salt}, **speculating(4)}
        model.generate(**given, llmopt=config, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None)
        drafts.append(drafted(model).accepted_tokens)
    assert drafts[1] > drafts[0] + 10
    assert drafts[2] == drafts[0]


def test_what_was_guessed_wrong_holds_no_pages(model, monkeypatch):
    ids, held = torch.tensor([[5, 90, 11, 7, 33]]), []
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    end = model.generate(ids, **arguments)[0].tolist()
    monkeypatch.setattr("hf_llmopt.engine.drafters.SuffixDrafter", lambda: Oracle([end], 0.0, 112))
    model.llmopt.release()
    for more in ({}, speculating(16)):
        config = {"kv_cache": {"page_size": 1}, **more}
        stops = [lambda ids, scores, **_: torch.tensor([ids.shape[1] >= 8])]
        arguments |= {"stopping_criteria": stops, "return_dict_in_generate": True}
        found = model.generate(ids, llmopt=config, **arguments)
        held.append(model.llmopt.engine.store.pages_used)
        del found
    assert held[0] == held[1]
    model.llmopt.release()
