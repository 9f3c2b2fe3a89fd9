"""Classes that speculate by themselves, what `strict` asks of speculation, and draft models that do not fit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from architectures import build
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MambaConfig, StoppingCriteria

import hf_llmopt
from hf_llmopt import Engine, LLMOptConfig, SpeculativeConfig, SpeculativeGenerationMixin, demo
from hf_llmopt.errors import InvalidOption, NotServed

GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 3.0}
pytestmark = pytest.mark.usefixtures("cheap_guesses")


class Speculating(SpeculativeGenerationMixin, LlamaForCausalLM):
    """As the documentation says it."""


class Behind(LlamaForCausalLM, SpeculativeGenerationMixin):
    """With the bases the other way round."""


def inputs(rows: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 20, (rows, 6), generator=torch.Generator().manual_seed(rows)).repeat(1, 3)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def run(model, rows=1, **kwargs):
    torch.manual_seed(3)
    return model.generate(**inputs(rows), max_new_tokens=16, pad_token_id=0, **{**GREEDY, **kwargs}).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", [Speculating, Behind])
def test_a_class_that_inherits_the_mixin_speculates_by_default(folder, kind):
    expected = run(LlamaForCausalLM.from_pretrained(folder))
    default = LLMOptConfig(speculative=SpeculativeConfig())
    model = kind.from_pretrained(folder)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), kind(model.config)):
        assert each.llmopt.config == default
        assert each.llmopt.stats is None
    assert run(model) == expected
    assert (model.llmopt.stats.served_by, model.llmopt.stats.undrafted) == ("llmopt", None)
    assert model.llmopt.engine.config.speculative == SpeculativeConfig()


def test_a_call_says_otherwise(folder):
    model = Speculating.from_pretrained(folder)
    expected = run(model, llmopt=False)
    assert model.llmopt.stats is None, "transformers' own"
    assert run(model, 2, assistant_model=build("llama", seed=5)) == run(model, 2, llmopt=False)
    assert model.llmopt.engine.config.speculative.effective_method == "draft_model"
    assert run(model, llmopt="kv_cache") == expected
    assert model.llmopt.engine.config.speculative is None
    assert run(model) == expected, "the default is as before"
    assert model.llmopt.engine.config.speculative == SpeculativeConfig()


def test_loading_and_optimize_say_otherwise(folder):
    assert Speculating.from_pretrained(folder, llmopt=False).llmopt.config is None
    model, _ = Speculating.from_pretrained(folder, llmopt="kv_cache", output_loading_info=True)
    assert model.llmopt.config == LLMOptConfig()
    assert hf_llmopt.optimize(model, llmopt=False).llmopt.config is None
    run(model)
    assert model.llmopt.stats is None
    assert "llmopt" not in vars(LlamaForCausalLM.from_pretrained(folder, llmopt=False))


class Looks(StoppingCriteria):
    """May look at all rows of a step."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_strict_refuses_calls_for_which_nothing_would_be_guessed():
    model, strict = build("llama"), LLMOptConfig(speculative={"num_tokens": 3}, strict=True)
    expected = run(model, 2)
    assert run(model, 2, llmopt=strict) == expected
    with pytest.raises(NotServed, match=r"strict=True, and nothing would be guessed.*criterion of yours"):
        run(model, 2, llmopt=strict, stopping_criteria=[Looks()])
    assert run(model, 1, llmopt=strict, stopping_criteria=[Looks()]) == run(model), "one row by itself drafts"
    with pytest.raises(NotServed, match=r"strict=True, and transformers would have to serve"):
        run(model, 1, llmopt=strict, num_beams=2)


def test_strict_refuses_calls_after_the_drafter_failed(monkeypatch):
    model, strict = build("llama"), LLMOptConfig(speculative={"num_tokens": 3}, strict=True)
    expected = run(model)
    with monkeypatch.context() as patched:
        patched.setattr("hf_llmopt.speculative.suffix.SuffixDrafter.propose", lambda *args: 1 / 0)
        with pytest.warns(UserWarning, match="nothing is guessed any more"):
            assert run(model, llmopt=strict) == expected
        assert "whoever guessed failed (ZeroDivisionError" in model.llmopt.stats.undrafted
    assert run(model, llmopt={"speculative": {"num_tokens": 3}}) == expected
    assert "guessed failed (ZeroDivisionError: division by zero)" in model.llmopt.stats.undrafted
    with pytest.raises(NotServed, match=r"nothing would be guessed.*guessed failed.*release\(\) starts anew"):
        run(model, llmopt=strict)
    with Engine(model, strict) as engine, pytest.raises(NotServed, match="guessed failed"):
        engine.submit(inputs()["input_ids"][0], max_new_tokens=4)
    model.llmopt.release()
    assert run(model, llmopt=strict) == expected
    assert model.llmopt.stats.drafted_tokens > 0


@pytest.mark.parametrize("arguments", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_model_as_its_own_assistant_is_always_right(arguments):
    model = build("llama")
    arguments = {**arguments, "eos_token_id": None}
    expected = run(model, 3, **arguments)
    config = {"speculative": {"num_tokens": 3}}
    assert run(model, 3, llmopt=config, assistant_model=model, **arguments) == expected
    stats = model.llmopt.stats
    assert stats.accepted_tokens == stats.drafted_tokens > 0


def test_a_call_names_one_drafter():
    """Its arguments go before the model's default, and contradict nothing that the same call says."""
    model, draft = build("llama"), build("llama", seed=5)
    for section in ("suffix", {"method": "layer_skip"}, {"draft_model": build("llama", seed=6)}):
        with pytest.raises(
            InvalidOption, match=r"llmopt= names the drafter .*assistant_model= of the same call another"
        ):
            run(model, llmopt={"speculative": section}, assistant_model=draft)
    with pytest.raises(InvalidOption, match=r"'draft_model', and prompt_lookup_num_tokens= .* 'suffix'"):
        run(model, llmopt={"speculative": {"draft_model": draft}}, prompt_lookup_num_tokens=3)
    assert run(model, llmopt={"speculative": {"draft_model": draft}}, assistant_model=draft) == run(model)
    hf_llmopt.optimize(model, {"speculative": {"method": "suffix"}})
    assert run(model, assistant_model=draft) == run(model, llmopt=False)
    assert model.llmopt.engine.config.speculative.method == "draft_model"


def test_draft_models_that_do_not_fit_are_refused():
    model = build("llama")

    def asked(**options):
        run(model, llmopt={"speculative": options})

    with pytest.raises(InvalidOption, match=r"lies on meta, the model on cpu. Move it: draft_model.to\('cpu'\)"):
        asked(draft_model=build("llama", seed=5).to("meta"))
    with pytest.raises(InvalidOption, match=r"num_tokens=\.\.\.\) must be at least 1 and at most 64, got 65"):
        asked(num_tokens=65)
    with pytest.raises(InvalidOption, match="Give both tokenizers, tokenizer= and draft_tokenizer="):
        asked(draft_model=build("llama", vocab_size=30))
    with pytest.raises(InvalidOption, match="no other method takes one"):
        asked(method="layer_skip", draft_model=model)


def test_a_draft_model_with_fewer_positions_guesses_as_long_as_it_has_some(monkeypatch):
    model, draft, asked = build("llama"), build("gpt2", max_position_embeddings=24), []
    table = draft.transformer.wpe
    monkeypatch.setattr(
        table, "forward", lambda ids: asked.extend(ids.flatten().tolist()) or type(table).forward(table, ids)
    )
    expected = run(model, 2, eos_token_id=None)
    assert run(model, 2, llmopt={"speculative": {"draft_model": draft, "num_tokens": 3}}, eos_token_id=None) == expected
    assert model.llmopt.stats.drafted_tokens > 0
    assert 18 < max(asked) < 24, "a GPU would not forgive more"
    assert model.llmopt.engine.speculator.drafter._second._loop.store.pages_used == 0


@pytest.mark.parametrize("arguments", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_draft_model_reads_a_prompt_once_for_all_rows_that_begin_with_it(arguments):
    model, draft = build("llama"), build("llama", seed=5)
    config, arguments = {"speculative": {"draft_model": draft, "num_tokens": 2}}, {**arguments, "eos_token_id": None}
    run(model, llmopt=config)  # makes the engine
    second, lengths = model.llmopt.engine.speculator.drafter._second, []
    second._loop.on_step = lambda plan, began: lengths.extend(length for _, length in plan.spans)
    expected = (
        run(model, num_return_sequences=3, **arguments) if arguments["do_sample"] else [run(model, **arguments)[0]] * 3
    )
    same = {name: tensor.expand(3, -1) for name, tensor in inputs().items()}
    torch.manual_seed(3)
    found = model.generate(**same, max_new_tokens=16, pad_token_id=0, llmopt=config, **arguments)
    assert found.tolist() == expected
    assert sorted(length for length in lengths if length > 4) == [19], "prompt and first token"
    assert model.llmopt.stats.drafted_tokens > 0
    assert second._loop.store.pages_used == 0


@pytest.mark.parametrize("method", ["draft_model", "layer_skip"])
def test_what_a_draft_model_has_read_is_found_again_by_those_who_may(method):
    model = build("llama")
    drafter = {"method": method, "draft_model": build("llama", seed=5) if method == "draft_model" else None}
    config = {"speculative": {"num_tokens": 2, **drafter}, "prompt_cache": True, "kv_cache": {"page_size": 4}}
    first = run(model, llmopt=config, eos_token_id=None)
    assert first == run(model, llmopt=False, eos_token_id=None)
    second, lengths = model.llmopt.engine.speculator.drafter._second, []
    second._loop.on_step = lambda plan, began: lengths.extend(length for _, length in plan.spans)
    ids = torch.tensor([[*first[0], 5, 6, 7]])  # the next turn: whole pages of what was read are known
    for salt, expected in ((None, range(4, 15)), ("another tenant", range(38, 39))):
        llmopt = {**config, "prompt_cache": {"salt": salt}}
        arguments = {**GREEDY, "max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, **arguments, llmopt=llmopt), model.generate(ids, **arguments))
        assert model.llmopt.stats.drafted_tokens > 0
        assert max(lengths) in expected
        lengths.clear()


def test_draft_models_that_cannot_draft_are_refused(tmp_path):
    model = build("llama")
    with pytest.raises(InvalidOption, match="LlamaModel, which has no head"):
        run(model, llmopt={"speculative": {"draft_model": model.model}})
    with pytest.raises(InvalidOption, match=r"cannot be loaded.*method='eagle'"):
        run(model, llmopt={"speculative": {"draft_model": tmp_path}})
    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=model.config.vocab_size, hidden_size=16, num_hidden_layers=1)
    )
    with pytest.raises(InvalidOption, match="that is to draft cannot be served"):
        run(model, llmopt={"speculative": {"draft_model": mamba}})


def test_a_draft_model_whose_saved_keys_outlast_their_tokens_goes_on():
    """It loses its pages while it guesses, and what it guessed is wrong: less of what was saved is needed."""
    model, tokenizer = demo.load()
    draft, _ = demo.load(draft=True)
    texts = ("import os\n", "class Point:\n", "def main():\n", "import re", "x = 1\n", "def f(a):\n")
    config = {"kv_cache": {"max_tokens": 200}, "speculative": {"draft_model": draft, "num_tokens": 16}}
    with Engine(model, llmopt=config) as engine:
        handles = [
            engine.submit(tokenizer(text)["input_ids"], seed=9, max_new_tokens=80, do_sample=True) for text in texts
        ]
        for handle in handles:
            handle.result(60)
        assert sum(handle.stats.preemptions for handle in handles)
        assert engine.loop.speculator is not None
