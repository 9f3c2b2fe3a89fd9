"""Drafters, eviction methods, kernels and file formats of a user's own: the templates run, and mistakes are told."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import hf_llmopt
from hf_llmopt import AttentionConfig, KVCacheConfig, LLMOptConfig, QuantizationConfig, SpeculativeConfig, demo
from hf_llmopt.attention import Call, StepInputs
from hf_llmopt.config import OWN
from hf_llmopt.errors import CallbackFailed, InvalidCheckpoint, InvalidOption
from hf_llmopt.kernels import reference
from hf_llmopt.kernels.arguments import Grid
from hf_llmopt.kv_cache.eviction import Eviction, Scored
from hf_llmopt.quantization import formats
from hf_llmopt.quantization.formats import Format, Scheme
from hf_llmopt.speculative import Draft

TEMPLATES = Path(__file__).parent.parent / "examples" / "templates"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Names end with the test that gave them."""
    before = {kind: dict(names) for kind, names in OWN.items()}  # docstrings and pages register too
    for names in OWN.values():
        names.clear()
    bar = logging.is_progress_bar_enabled()
    yield
    (logging.enable_progress_bar if bar else logging.disable_progress_bar)()
    for kind, names in OWN.items():
        names.clear()
        names.update(before[kind])


def run(name: str, run_name: str = "__main__") -> None:
    if name == "kernel":
        pytest.importorskip("triton")
    runpy.run_path(str(TEMPLATES / f"{name}.py"), run_name=run_name)


@pytest.mark.usefixtures("cheap_guesses")
@pytest.mark.parametrize("name", sorted(path.stem for path in TEMPLATES.glob("*.py")))
def test_templates_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each asserts what it shows: served by llmopt, through what it registered."""
    run(name)
    assert capsys.readouterr().out.strip()
    assert sum(map(len, OWN.values())) == 1


def test_templates_are_the_kinds() -> None:
    kinds = {"drafter": "drafter", "eviction": "eviction", "file_format": "format", "kernel": "attention"}
    assert {path.stem for path in TEMPLATES.glob("*.py")} == kinds.keys()
    assert set(kinds.values()) == OWN.keys()


@pytest.mark.parametrize(
    ("kind", "name", "made", "message"),
    [
        ("evicton", "mine", Eviction, "Did you mean 'eviction'"),
        ("eviction", "sink", Eviction, "does not know yet; it knows 'sink', 'snapkv'"),
        ("attention", "auto", len, "it knows 'auto'"),
        ("format", "gptq", len, "it knows 'awq'"),
        ("drafter", "", len, "the name is a text"),
        ("drafter", "mine", "lookup", "can be called, got str"),
        ("format", "mine", len, "takes a Format, got builtin_function_or_method: it has no function layout, pack"),
        ("format", "mine", Format, "takes a Format, got type"),
    ],
)
def test_mistakes(kind: str, name: str, made: object, message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        hf_llmopt.register(kind, name, made)  # type: ignore[arg-type]
    assert not any(OWN.values())


def test_names_are_taken_only_once_they_are_registered() -> None:
    for config in (AttentionConfig, SpeculativeConfig, lambda name: KVCacheConfig(eviction=name)):
        with pytest.raises(InvalidOption, match="'mine' does not exist"):
            config("mine")
    hf_llmopt.register("eviction", "mine", Eviction)
    assert KVCacheConfig(eviction="mine").eviction == "mine"
    with pytest.raises(InvalidOption, match="Did you mean 'mine'"):
        KVCacheConfig(eviction="mien")
    with pytest.raises(InvalidOption, match="'mine' does not exist"):
        AttentionConfig("mine")


def paged(step: StepInputs, call: Call) -> torch.Tensor:
    """The definition, query by query, under a name of its own."""
    step.note("mine")
    seen = step.seen(call.layer, call.scaling, call.softcap, call.sinks, device=call.query.device)
    return reference.paged_attention(call.query[0].transpose(0, 1), seen)[None]


class AlwaysWrong:
    """Guesses the last token again, as often as it may."""

    def __init__(self) -> None:
        self.ended = 0

    def propose(self, texts, limits, odds) -> list[Draft]:
        return [Draft(text.tokens[-1:] * n, ["again"] * n) for text, n in zip(texts, limits, strict=True)]

    def learn(self, text, start, draft, chosen) -> None:
        assert all(place < len(draft.tokens) for place in chosen)

    def forget(self, text) -> None:
        self.ended += 1


def test_one_s_own_parts_go_with_all_others(model) -> None:
    """Ragged rows, cached prompts, sampling, guesses that are wrong: the tokens stay stock's."""
    drafter, llama = AlwaysWrong(), model("llama")
    hf_llmopt.register("attention", "mine", paged)
    hf_llmopt.register("drafter", "wrong", lambda given: drafter if given is llama else None)
    keyword = LLMOptConfig(
        attention="mine", prompt_cache=True, speculative={"method": "wrong", "num_tokens": 3}, kv_cache={"page_size": 4}
    )
    ids = torch.randint(3, 60, (2, 13))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for sampled in (False, True):
        tokens = []
        for llmopt in (False, keyword, keyword):  # the last one finds its prompts
            torch.manual_seed(0)
            settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": sampled}
            tokens.append(llama.generate(ids, attention_mask=mask, **settings, llmopt=llmopt))
        assert torch.equal(tokens[0], tokens[1])
        assert torch.equal(tokens[0], tokens[2])
    stats = llama.llmopt.stats
    assert (stats.served_by, stats.attention) == ("llmopt", ("mine",))
    assert stats.cached_tokens > 0
    assert stats.drafted_tokens > 0
    assert drafter.ended >= 8
    llama.llmopt.release()


BAD_DRAFTS = {
    "beyond": (lambda n: Draft([10**6] * n, ["x"] * n), "guessed 1000000; the model's ids are 0 to"),
    "negative": (lambda n: Draft([-1] * n, ["x"] * n), "guessed -1"),
    "no id": (lambda n: Draft([1.5] * n, ["x"] * n), r"guessed 1\.5"),
    "tensor": (lambda n: Draft(torch.full((n,), 3), ["x"] * n), "list of ids as tokens, got Tensor"),
    "grounds": (lambda n: Draft([3] * n, ["x"]), "gave 1 grounds for 3 tokens"),
    "longer": (lambda n: Draft([3] * (n + 1), ["x"] * (n + 1)), "guessed 4 tokens where the limit is 3"),
    "parents": (lambda n: Draft([3] * n, ["x"] * n, [0] * n), "the place of an earlier token"),
    "unhashable": (lambda n: Draft([3] * n, [[]] * n), "TypeError: unhashable"),
    "none": (lambda n: None, "got NoneType"),
}


@pytest.mark.parametrize("name", BAD_DRAFTS)
def test_a_bad_draft_costs_guesses_and_no_result(name: str, model) -> None:
    """One warning tells what is wrong, the stats say so, and all requests get stock's tokens."""
    make, message = BAD_DRAFTS[name]

    class Bad(AlwaysWrong):
        def propose(self, texts, limits, odds) -> list[Draft]:
            return [make(limit) if limit == 3 else Draft([], []) for limit in limits]

    llama = model("llama")
    hf_llmopt.register("drafter", "bad", lambda given: Bad())
    keyword = {"speculative": {"method": "bad", "num_tokens": 3}}
    ids = torch.randint(3, 60, (1, 13))
    stock = llama.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    with pytest.warns(UserWarning, match=f"nothing is guessed any more: .*{message}"):
        ours = llama.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, llmopt=keyword)
    assert torch.equal(stock, ours)
    assert llama.llmopt.stats.served_by == "llmopt"
    assert "whoever guessed failed" in llama.llmopt.stats.undrafted
    llama.llmopt.release()


def test_a_name_that_is_given_again_counts_from_release_on(model) -> None:
    llama, first, second = model("llama"), AlwaysWrong(), AlwaysWrong()
    keyword = {"speculative": {"method": "wrong", "num_tokens": 3}}
    for drafter, release, used in ((first, False, False), (second, False, False), (second, True, True)):
        hf_llmopt.register("drafter", "wrong", lambda given, drafter=drafter: drafter)
        if release:
            llama.llmopt.release()
        llama.generate(torch.arange(3, 9)[None], max_new_tokens=3, min_new_tokens=3, llmopt=keyword)
        assert first.ended > 0
        assert (second.ended > 0) == used
    llama.llmopt.release()


@pytest.mark.filterwarnings("ignore:llmopt. nothing is guessed any more")
@pytest.mark.parametrize("method", ["propose", "learn", "forget"])
def test_a_drafter_that_fails_harms_no_request_of_an_engine(method: str, model) -> None:
    class Bad(AlwaysWrong):
        def propose(self, texts, limits, odds) -> list[Draft]:
            return [Draft([10**6 if method == "propose" else 3] * n, ["x"] * n) for n in limits]

        def learn(self, text, start, draft, chosen) -> None:
            assert method != "learn"

        def forget(self, text) -> None:
            assert method != "forget"

    llama = model("llama")
    hf_llmopt.register("drafter", "bad", lambda given: Bad())
    prompts = [torch.randint(3, 60, (length,)) for length in (5, 9, 13)]
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    stock = [llama.generate(ids[None], **settings)[0, len(ids) :].tolist() for ids in prompts]
    with hf_llmopt.Engine(llama, {"speculative": {"method": "bad", "num_tokens": 3}}) as engine:
        handles = [engine.submit(ids, **settings) for ids in prompts]
        assert [handle.result() for handle in handles] == stock
    assert any("whoever guessed failed" in (handle.stats.undrafted or "") for handle in handles)
    llama.llmopt.release()


class Summed(Scored):
    """Keeps what the whole prompt looks at most."""

    def looks(self, prompt: int) -> range:
        return range(prompt)

    def fold(self, scores: torch.Tensor, seen: torch.Tensor) -> None:
        scores += seen.sum(dim=(1, 2))


def test_an_eviction_method_that_keeps_all_changes_nothing(model) -> None:
    llama = model("llama")
    hf_llmopt.register("eviction", "all", Summed)
    ids = torch.randint(3, 60, (1, 90))
    settings = {"max_new_tokens": 6, "do_sample": False}
    stock = llama.generate(ids, **settings)
    for kept, evicted in ((1.0, 0), (0.8, 18)):
        ours = llama.generate(ids, **settings, llmopt={"kv_cache": {"eviction": "all", "keep_ratio": kept}})
        assert llama.llmopt.stats.served_by == "llmopt"
        assert llama.llmopt.stats.evicted_tokens == evicted
        assert evicted or torch.equal(ours, stock)
    llama.llmopt.release()


def failure(llama, kind: str, made: object, llmopt: object, message: str) -> CallbackFailed:
    """What a call raises whose part of a kind is `made`; the error says so."""
    hf_llmopt.register(kind, "wrong", made)  # type: ignore[arg-type]
    with pytest.raises(CallbackFailed, match=f"{kind} 'wrong': {message}") as failed:
        llama.generate(torch.randint(3, 60, (1, 90)), max_new_tokens=4, llmopt=llmopt)
    llama.llmopt.release()
    return failed.value


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("fold", lambda *args: {}[7], r"fold\(\) raised KeyError: 7"),
        ("score", lambda *args: {}[7], r"score\(\) raised KeyError: 7"),
        ("score", lambda seen, read: seen[:, :-1], r"score\(\) returned \[\d+, 89\]; a row for each key head is \["),
        ("ranked", lambda *args: {}[7], r"choose\(\) raised KeyError: 7"),
        ("choose", lambda scores, kept: None, r"choose\(\) returned NoneType"),
        ("choose", lambda scores, kept: torch.zeros(2, kept, dtype=int), r"choose\(\) returned no slots from 0 to 89"),
        ("choose", lambda scores, kept: torch.arange(kept).expand(2, -1) + 30, r"choose\(\) returned no slots"),
        ("kept", lambda prompt: 4.5, r"kept\(90\) returned 4\.5"),
        ("kept", lambda prompt: {}[7], r"kept\(\) raised KeyError: 7"),
        ("excess", lambda slots: {}[7], r"excess\(\) raised KeyError: 7"),
        ("room", lambda *args: {}[7], r"room\(\) raised KeyError: 7"),
        ("room", lambda *args: None, r"room\(90, 94, 94\) returned None; it is the most tokens"),
        ("selection", lambda *args: {}[7], r"selection\(\) raised KeyError: 7"),
        ("looks", lambda prompt: range(0), r"looks\(90\) returned range\(0, 0\); .* one at least"),
        ("looks", lambda prompt: [89], r"looks\(90\) returned \[89\]"),
    ],
)
def test_mistakes_of_an_eviction_method_are_told_by_name(name: str, given, message: str, model) -> None:
    """And what it raised stands behind the error."""
    made = type("Wrong", (Summed,), {name: staticmethod(given)})
    keyword = {"kv_cache": {"eviction": "wrong", "keep_ratio": 0.8}}
    error = failure(model("llama"), "eviction", made, keyword, message)
    assert isinstance(error.__cause__, KeyError) == ("KeyError" in message)


NOT_MADE = {
    "raises": (lambda config: {}[7], "making it raised KeyError: 7"),
    "no method": (lambda config: 3, "what was made is a int; an Eviction is wanted"),
    "no init": (type("Bare", (Eviction,), {"__init__": lambda self, config: None}), "calls super"),
    "excess": (type("Last", (Eviction,), {"excess": lambda self, slots: (1, 99)}), r"excess\(90\) returned \(1, 99\)"),
    "float": (type("Half", (Eviction,), {"excess": lambda self, slots: (0.5, 1)}), r"excess\(90\) returned \(0.5, 1\)"),
    "none": (type("None_", (Eviction,), {"excess": lambda self, slots: None}), "returned None"),
}


@pytest.mark.parametrize("name", NOT_MADE)
def test_an_eviction_method_that_is_none_is_told(name: str, model) -> None:
    made, message = NOT_MADE[name]
    failure(model("llama"), "eviction", made, {"kv_cache": {"eviction": "wrong"}}, f".*{message}")


WRONG_ATTENTION = {
    "raises": (lambda step, call: {}[7], "it raised KeyError: 7"),
    "nothing": (lambda step, call: None, "it returned NoneType"),
    "fewer": (lambda step, call: paged(step, call)[:, 1:], r"it returned \(\[1, \d+, 4, 16\]"),
    "heads first": (lambda step, call: paged(step, call).transpose(1, 2), r"it returned \(\[1, 4, "),
    "wider": (lambda step, call: paged(step, call).double(), r".*torch\.float64\)"),
}


@pytest.mark.parametrize("name", WRONG_ATTENTION)
def test_mistakes_of_an_attention_are_told_by_its_name(name: str, model) -> None:
    """It is not the model that cannot be served: nothing falls through."""
    function, message = WRONG_ATTENTION[name]
    failure(model("llama"), "attention", function, {"attention": "wrong"}, message)


def test_a_drafter_that_cannot_be_made_is_told(model) -> None:
    message = "making it raised KeyError: 7"
    failure(model("llama"), "drafter", lambda given: {}[7], {"speculative": "wrong"}, message)


PLAIN = {
    "layout": lambda scheme, outputs, inputs, dtype: {
        "codes": ((outputs, inputs), torch.uint8),
        "scales": ((outputs, scheme.groups(inputs)), dtype),
    },
    "pack": lambda grid, scheme, dtype: {"codes": grid.codes, "scales": grid.scales.to(dtype)},
    "unpack": lambda stored, scheme, outputs, inputs: Grid(stored["codes"], stored["scales"], None, scheme.bits),
    "obstacle": lambda scheme, outputs, inputs: None if scheme.symmetric else "it stores no zeros",
}
WRONG_FORMAT = {
    "layout": [(lambda *args: {}[7], "raised KeyError: 7"), (lambda *args: ["codes"], r"returned \['codes'\]")],
    "pack": [
        (lambda *args: {}[7], "raised KeyError: 7"),
        (lambda *args: None, "returned None, and layout"),
        (lambda grid, *args: {"codes": grid.codes}, r"returned {'codes': \(\(8, 4\), torch.uint8\)}, and layout"),
    ],
    "unpack": [
        (lambda *args: {}[7], "raised KeyError: 7"),
        (lambda *args: None, "returned NoneType"),
        (lambda stored, *args: Grid(stored["codes"][1:], stored["scales"]), r"returned \(\[7, 4\], \[8, 1\]\)"),
    ],
    "obstacle": [(lambda *args: {}[7], "raised KeyError: 7"), (lambda *args: True, "returned True")],
}


@pytest.mark.parametrize("name", WRONG_FORMAT)
def test_mistakes_of_a_format_are_told_by_name(name: str) -> None:
    grid = Grid(torch.ones(8, 4, dtype=torch.uint8), torch.ones(8, 1), None, 8)
    for function, message in WRONG_FORMAT[name]:
        hf_llmopt.register("format", "wrong", Format(**{**PLAIN, name: function}))
        scheme = Scheme("wrong", 8, -1, symmetric=True)
        with pytest.raises(CallbackFailed, match=rf"format 'wrong': {name}\(\) {message}"):
            formats.unpack(formats.pack(grid, scheme, torch.float32), scheme, 8, 4)
    hf_llmopt.register("format", "right", Format(**PLAIN))
    scheme = Scheme("right", 8, -1, symmetric=True)
    assert formats.unpack(formats.pack(grid, scheme, torch.float32), scheme, 8, 4).codes.equal(grid.codes)


def test_who_shares_the_pass_in_which_a_method_fails_learns_why(model) -> None:
    """Both requests have shown some layers by then; the engine serves whoever comes next."""

    class FailsOnce(Scored):
        calls = 0

        def looks(self, prompt: int) -> range:
            return range(prompt - 1, prompt)

        def fold(self, scores: torch.Tensor, seen: torch.Tensor) -> None:
            FailsOnce.calls += 1
            scores += seen.sum(dim=(1, 2)) if FailsOnce.calls != 2 else {}["second"]

    llama = model("llama")
    hf_llmopt.register("eviction", "once", FailsOnce)
    prompts = [torch.randint(3, 60, (90,)) for _ in range(2)]
    with hf_llmopt.Engine(llama, {"kv_cache": {"eviction": "once", "keep_ratio": 0.8}}) as engine:
        with llama.llmopt.engine.lock:  # so that they share a pass
            handles = [engine.submit(ids, max_new_tokens=4, do_sample=False) for ids in prompts]
        for handle in handles:
            with pytest.raises(CallbackFailed, match="'once': fold"):
                handle.result(60)
        later = engine.submit(prompts[0], max_new_tokens=4, do_sample=False)
        assert len(later.result(60)) == 4
        assert later.stats.evicted_tokens > 0
    llama.llmopt.release()


def test_files_of_a_format_that_is_not_registered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are named, instead of loaded as if they held full weights; registered, all ways to them agree."""
    run("file_format", run_name="imported")
    logging.disable_progress_bar()
    keyword = {"quantization": QuantizationConfig("int4", format="nibbles", skip="down_proj")}
    model = hf_llmopt.optimize(demo.load()[0], llmopt=keyword)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, llmopt=True)
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert type(again.model.layers[0].mlp.down_proj) is torch.nn.Linear
    OWN["format"].clear()
    with pytest.raises(InvalidCheckpoint, match="'nibbles', which nobody knows"):
        AutoModelForCausalLM.from_pretrained(tmp_path, llmopt=True)
