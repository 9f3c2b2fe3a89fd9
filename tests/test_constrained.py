"""Constrained output: what obeys a grammar parses, whatever else happens to its request and whoever else is served."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch

from hf_llmopt import BatchingConfig, Engine, KVCacheConfig, LLMOptConfig, demo, errors
from hf_llmopt.generation.warp import apply, constrain

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")
openai = pytest.importorskip("openai")

from served import make, running  # noqa: E402 - needs the extra

from hf_llmopt.serving import grammar as grammar_module  # noqa: E402
from hf_llmopt.serving.grammar import LONGEST_GRAMMAR, Grammars  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (demo.path() / "config.json").is_file(), reason="the embedded model's weights are not there"
)
PROMPT = "settings = "
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["reader", "writer"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "note": {"anyOf": [{"type": "string", "maxLength": 12}, {"type": "null"}]},
    },
    "required": ["name", "size", "flags", "note"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "settings", "schema": SCHEMA, "strict": True}}


def check(value: object) -> None:
    """What `SCHEMA` says, in Python."""
    assert isinstance(value, dict)
    assert set(value) == {"name", "size", "flags", "note"}
    assert value["name"] in ("reader", "writer")
    assert type(value["size"]) is int
    assert 0 <= value["size"] <= 999
    assert len(value["flags"]) <= 3
    assert {type(flag) for flag in value["flags"]} <= {bool}
    assert value["note"] is None or len(value["note"]) <= 12


@pytest.fixture(scope="module")
def pair():
    return demo.load()


@pytest.fixture(scope="module")
def grammars(pair) -> Grammars:
    return Grammars(pair[1], [pair[1].eos_token_id])


def texts(pair, grammar, config, seeds: int) -> tuple[list[str], list]:
    """A greedy answer and sampled ones, all at once, among others that are free; those must be as without them."""
    model, tokenizer = pair
    ids = tokenizer(PROMPT)["input_ids"]
    free = {"max_new_tokens": 24, "do_sample": False}
    alone = model.generate(torch.tensor([ids]), **free)[0, len(ids) :].tolist()
    with Engine(model, config) as engine:
        handles = [engine.submit(ids, max_new_tokens=256, do_sample=False, constraint=grammar)]
        others = [engine.submit(ids, **free) for _ in range(3)]
        handles += [
            engine.submit(ids, max_new_tokens=256, do_sample=True, temperature=1.3, seed=seed, constraint=grammar)
            for seed in range(seeds)
        ]
        found = [tokenizer.decode(handle.result(), skip_special_tokens=True) for handle in handles]
        assert [other.result() for other in others] == [alone] * 3
        assert all(handle.result()[-1] == tokenizer.eos_token_id for handle in handles)
    return found, handles


def test_every_answer_obeys_its_schema_and_nobody_else_does(pair, grammars) -> None:
    found, _ = texts(pair, grammars.json_schema(SCHEMA), True, 16)
    for text in found:
        check(json.loads(text))
    assert len({"".join(text.split()) for text in found}) > 8


@pytest.mark.slow
def test_hundreds_of_answers_obey(pair, grammars) -> None:
    for config in (True, "speculative"):
        found, _ = texts(pair, grammars.json_schema(SCHEMA), config, 400)
        for text in found:
            check(json.loads(text))


@pytest.mark.usefixtures("cheap_guesses")
def test_drafts_and_lost_pages_change_nothing(pair, grammars) -> None:
    grammar = grammars.json_schema(SCHEMA)
    plain, _ = texts(pair, grammar, True, 9)
    guessed, handles = texts(pair, grammar, "speculative", 9)
    assert guessed == plain
    assert sum(handle.stats.accepted_tokens for handle in handles) > 10
    overlapped, _ = texts(pair, grammar, LLMOptConfig(batching=BatchingConfig(overlap=True)), 9)
    assert overlapped == plain
    small = LLMOptConfig(kv_cache=KVCacheConfig(page_size=4, max_tokens=264), batching=BatchingConfig(max_requests=16))
    crowded, handles = texts(pair, grammar, small, 9)
    assert crowded == plain
    assert sum(handle.stats.preemptions for handle in handles) > 0


def test_a_mask_of_another_width_than_the_scores(pair) -> None:
    class Odd:
        def allowed(self, tokens) -> torch.Tensor:
            return torch.tensor([1 << 3, -(2**31)], dtype=torch.int32)  # tokens 3 and 63

    history = SimpleNamespace(tokens=[])
    for size, left in ((40, {3}), (64, {3, 63}), (100, {3, 63})):
        scores = apply([([constrain(Odd())], history), ([], history)], torch.zeros(2, size))
        assert set((scores[0] == 0).nonzero()[:, 0].tolist()) == left
        assert bool((scores[1] == 0).all())


def test_drafters_are_told_of_the_next_token_only(pair, grammars) -> None:
    """Behind it the constraint knows nothing: to apply it there would forbid what is right."""
    model, tokenizer = pair
    with Engine(model) as engine:
        handle = engine.submit(tokenizer(PROMPT)["input_ids"], max_new_tokens=1, do_sample=False)
        handle.result()
    row, logits = handle._row, torch.zeros(4096)
    row.tokens.clear()
    row.wished.append(constrain(grammars.json_schema({"const": "x"})()))
    assert {tokenizer.decode([token]) for token, _ in row.guess(logits, 0, 4096)} <= {'"', '"x', '"x"'}
    assert len(row.guess(logits, 1, 4096)) == 4096


REFUSED = [
    ({"type": "obj"}, "Invalid type: obj"),
    ({"type": "object", "not": {"required": ["a"]}}, r"\[\"not\"\]. Leave them out of the schema, and check"),
    ({"$ref": "#/$defs/missing"}, "missing"),
    ({"$ref": "http://127.0.0.1:9/schema.json"}, r"does not fetch .*\. Copy it into `\$defs`"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-ahead .*Leave it out of `pattern`"),
    ({"oneOf": [{"type": "string"}, {"const": "a"}]}, "not supported. Write `anyOf`"),
    ({"enum": ["x" * LONGEST_GRAMMAR]}, "at most"),
    ({"$ref": "#"}, "refers to itself without end"),
    ({"type": "integer", "minimum": 10**20}, "`minimum` is a number beyond 64 bits"),
    ({"properties": {"enum": {"type": "integer", "maximum": -1e20}}}, "`maximum` is a number beyond 64 bits"),
    ({"items": {"enum": [1, [10**20]]}}, "`enum` is a number beyond 64 bits"),
    ({"type": "integer", "multipleOf": 99991}, "at most 10000"),
    ({"type": "number", "multipleOf": 9.9991}, "at most 10000"),
    ({"type": "integer", "multipleOf": True}, "[Mm]ultipleOf"),
    (
        {"$defs": {"a": {"multipleOf": 311}}, "type": "integer", "allOf": [{"$ref": "#/$defs/a"}, {"multipleOf": 313}]},
        "least common multiple",
    ),
]


@pytest.mark.parametrize(("schema", "says"), REFUSED, ids=lambda value: repr(value)[:40])
def test_what_cannot_be_enforced_is_refused(grammars, schema: dict, says: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=says) as failed:
        grammars.json_schema(schema)
    assert "x-guidance" not in str(failed.value)


def test_numbers_within_the_limits_are_compiled(grammars) -> None:
    apart: dict = {"a": {"multipleOf": 0.01}, "multipleOf": {"const": {"multipleOf": 99991}}}
    apart |= {str(factor): {"type": "integer", "multipleOf": factor} for factor in range(1, 100)}
    grammars.json_schema(
        {
            "type": "object",
            "properties": apart,
        }
    )
    grammars.json_schema({"allOf": [{"type": "number", "multipleOf": 0.25}, {"multipleOf": 3, "minimum": -(2**62)}]})


def test_who_wants_no_grammar_does_not_wait_for_one(pair) -> None:
    async def beside(service) -> None:
        held = threading.Event()
        slow = [asyncio.ensure_future(service.in_thread(1, lambda: held.wait(9), compiles=True)) for _ in range(40)]
        await asyncio.wait_for(service.in_thread(0, lambda: None), 5)
        held.set()
        assert all(await asyncio.gather(*slow))

    service = make(pair)
    try:
        asyncio.run(beside(service))
    finally:
        service.close()


BOMBS = [
    {"type": "string", "pattern": "^(a{1000}){1000}$"},
    {"type": "string", "pattern": "^.*(a.{300}|b.{301}|c.{302}).*$"},
    {"allOf": [{"anyOf": [{"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(500)}}]}] * 3},
    {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}},
]


@pytest.mark.parametrize("schema", BOMBS, ids=lambda value: repr(value)[:40])
def test_costly_schemas_end_soon(pair, grammars, schema: dict) -> None:
    """Refused at once, or served within limits, or ended by them; a request beside it goes on."""
    model, tokenizer = pair
    ids = tokenizer(PROMPT)["input_ids"]
    began = time.process_time()
    try:
        grammar = grammars.json_schema(schema)
    except errors.InvalidRequest:
        grammar = None
    assert time.process_time() - began < 5
    if grammar is None:
        return
    with Engine(model) as engine:
        costly = engine.submit(ids, max_new_tokens=24, do_sample=True, seed=1, constraint=grammar)
        other = engine.submit(ids, max_new_tokens=24, do_sample=False)
        assert len(other.result()) == 24
        try:
            costly.result()
        except errors.InvalidRequest as error:
            assert "too complex" in str(error)  # noqa: PT017 - either is right
    assert time.process_time() - began < 10


def test_sequences_of_one_grammar_do_not_know_each_other(grammars) -> None:
    grammar = grammars.json_schema({"enum": ["ab", "cd"]})
    one, two = grammar(), grammar()
    mask = one.allowed([]).tolist()
    assert two.allowed([]).tolist() == mask
    two.allowed([next(token for token in range(4096) if mask[token // 32] >> (token % 32) & 1)])
    assert one.allowed([]).tolist() == mask == grammar().allowed([]).tolist()


def test_what_requests_compute_does_not_add_up(grammars) -> None:
    """A grammar whose lexer grows with every sequence serves the hundredth request as it served the first."""
    schema = {"type": "string", "pattern": "^.*(a.{300}|b.{301}|c.{302}).*$"}

    def steps(seed: int) -> int:
        sentence, tokens, chance = grammars.json_schema(schema)(), [], random.Random(seed)
        try:
            while len(tokens) < 400:
                mask = sentence.allowed(tokens).tolist()
                tokens.append(chance.choice([t for t in range(4096) if mask[t // 32] >> (t % 32) & 1]))
        except errors.InvalidRequest as error:
            assert "too complex" in str(error)  # noqa: PT017 - it is allowed to end so, but not sooner and sooner
        return len(tokens)

    first = steps(0)
    assert first > 20
    assert [steps(0) for _ in range(5)] == [first] * 5


def test_sequences_share_what_takes_long_to_compile(grammars, monkeypatch) -> None:
    monkeypatch.setattr(grammar_module, "SHARED", 3)
    compiled = []
    made = grammar_module.Grammar._made

    def counted(grammar):
        compiled.append(grammar)
        return made(grammar)

    monkeypatch.setattr(grammar_module.Grammar, "_made", counted)
    for seconds, sequences, expected in ((60.0, 4, 4), (0.0, 6, 2), (0.0, 7, 3)):
        monkeypatch.setattr(grammar_module, "LONG", seconds)
        compiled.clear()
        schema = {"const": f"{seconds} {sequences}"}
        masks = [grammars.json_schema(schema)().allowed([]).tolist() for _ in range(sequences)]
        assert masks == masks[:1] * sequences
        assert len(compiled) == expected


def test_without_an_end_or_a_fast_tokenizer_nothing_is_constrained(pair) -> None:
    with pytest.raises(errors.NotServed, match="no token ends"):
        Grammars(pair[1], [])
    with pytest.raises(errors.NotServed, match="fast"):
        Grammars(object(), [0])


def test_ended_requests_let_go_of_their_constraints(pair) -> None:
    """What it holds may be native memory, which does not tell the garbage collector how much it is."""
    made: list[weakref.ref] = []

    class Anything:
        def allowed(self, tokens):
            return torch.full((pair[0].config.vocab_size // 32 + 1,), -1, dtype=torch.int32)

    def make() -> Anything:
        constraint = Anything()
        made.append(weakref.ref(constraint))
        return constraint

    gc.collect()
    gc.disable()
    try:
        with Engine(pair[0]) as engine:
            handles = [engine.submit([5, 6], max_new_tokens=3, constraint=make) for _ in range(2)]
            for handle in handles:
                handle.result(60)
            assert [reference() for reference in made] == [None, None]
    finally:
        gc.enable()


def test_a_constraint_is_made_for_each_sequence(pair, grammars) -> None:
    model, tokenizer = pair
    ids = tokenizer(PROMPT)["input_ids"]
    with Engine(model) as engine:
        handle = engine.submit(
            ids,
            max_new_tokens=256,
            do_sample=True,
            seed=5,
            num_return_sequences=3,
            constraint=grammars.json_schema(SCHEMA),
        )
        found = [tokenizer.decode(choice.result(), skip_special_tokens=True) for choice in handle.choices]
        assert len(set(found)) == 3
        for text in found:
            check(json.loads(text))
        with pytest.raises(errors.InvalidRequest, match="makes one"):
            engine.submit(ids, max_new_tokens=1, constraint=5)


# ------------------------------------------------------------------------------------------------------ over a socket


@pytest.fixture(scope="module")
def client(pair):
    with (
        running(make(pair)) as it,
        openai.OpenAI(base_url=it.url + "/v1", api_key="none", max_retries=0) as made,
    ):
        yield made


MESSAGES = [{"role": "user", "content": PROMPT}]


def test_chats_and_completions_obey_a_schema(client) -> None:
    for seed in range(2):
        arguments = {"model": "demo", "max_tokens": 256, "seed": seed, "temperature": 1.2, "response_format": FORMAT}
        chat = client.chat.completions.create(messages=MESSAGES, n=2, **arguments)
        for choice in chat.choices:
            assert choice.finish_reason == "stop"
            check(json.loads(choice.message.content))
        stream = client.chat.completions.create(messages=MESSAGES, stream=True, **arguments)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(pieces) == chat.choices[0].message.content
        assert len(pieces) > 5
        extra = {"response_format": arguments.pop("response_format")}
        text = client.completions.create(prompt=PROMPT, extra_body=extra, **arguments).choices[0]
        assert text.finish_reason == "stop"
        check(json.loads(text.text))


def test_a_pydantic_class_comes_back(client) -> None:
    pydantic = pytest.importorskip("pydantic")

    class Point(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        x: int = pydantic.Field(ge=-9, le=9)
        label: pydantic.constr(max_length=8) | None

    answer = client.chat.completions.parse(
        model="demo", messages=MESSAGES, response_format=Point, max_tokens=128, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Point)


def test_json_objects_parse_or_are_cut_off(client) -> None:
    ends = []
    for seed in range(6):
        answer = client.chat.completions.create(
            model="demo",
            messages=MESSAGES,
            response_format={"type": "json_object"},
            max_tokens=64,
            seed=seed,
            temperature=1.5,
        )
        choice = answer.choices[0]
        ends.append(choice.finish_reason)
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
        else:
            assert (choice.finish_reason, answer.usage.completion_tokens) == ("length", 64)
    assert "stop" in ends


def test_a_schema_is_refused_before_any_work(client, monkeypatch) -> None:
    def no_work(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("hf_llmopt.serving.prompts.Prompts.chat", no_work)
    bad = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", "not": {}}}}
    with pytest.raises(openai.BadRequestError, match="Unimplemented keys") as failed:
        client.chat.completions.create(model="demo", messages=MESSAGES, response_format=bad)
    assert (failed.value.param, failed.value.code) == ("response_format", "invalid_json_schema")
    for wanted in ({"type": "json_schema"}, {"type": "xml"}, {"type": "json_schema", "json_schema": {"name": "a"}}):
        with pytest.raises(openai.BadRequestError) as failed:
            client.chat.completions.create(model="demo", messages=MESSAGES, response_format=wanted)
        assert failed.value.param == "response_format"
    with pytest.raises(openai.BadRequestError, match="alone says") as failed:
        client.chat.completions.create(
            model="demo", messages=MESSAGES, response_format=FORMAT, extra_body={"min_tokens": 2}
        )


def test_without_the_library_the_reason_is_said(pair, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(errors.NotServed, match=r"hf-llmopt\[serve\]"):
        Grammars(pair[1], [0])
