"""Tool calls: read out of what models write, handed on as OpenAI's API has them, and demanded."""

from __future__ import annotations

import copy
import json
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_llmopt import demo, errors

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")
openai = pytest.importorskip("openai")

from served import make, running  # noqa: E402 - needs the extra

from hf_llmopt.serving import Service  # noqa: E402
from hf_llmopt.serving.answer import Piece  # noqa: E402
from hf_llmopt.serving.chat import ChatForm  # noqa: E402
from hf_llmopt.serving.grammar import Grammars  # noqa: E402
from hf_llmopt.serving.schema import ChatRequest  # noqa: E402
from hf_llmopt.serving.tool_formats import Found, Mistral, Reader, of_template  # noqa: E402
from hf_llmopt.serving.tool_stream import GrowingCalls  # noqa: E402
from hf_llmopt.serving.tools import Tools  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (demo.path() / "config.json").is_file(), reason="the embedded model's weights are not there"
)
OFFERED = ("get_weather", "now")


def read(form: str, pieces: list[str], **more) -> list[Found]:
    reader = Reader(of_template(None, form), OFFERED, **more)
    return [reader.add(piece, ends=place == len(pieces) - 1) for place, piece in enumerate(pieces)]


def joined(found: list[Found]) -> tuple[str, list[tuple[str, object]]]:
    calls = [(call.name, json.loads(call.arguments)) for part in found for call in part.calls]
    return "".join(part.text for part in found), calls


WEATHER = ("get_weather", {"city": "Paris", "days": 2})
NOW = ("now", {})
# What models wrote: the format, the text, what is shown, the calls.
WRITTEN = [
    # Qwen 2.5 and 3, Hermes 2 Pro
    (
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>',
        "",
        [WEATHER],
    ),
    (
        "hermes",
        'I shall look.\n\n<tool_call>\n{"arguments": {"city": "Paris", "days": 2}, "name": "get_weather"}\n</tool_call>'
        '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n',
        "I shall look.",
        [WEATHER, NOW],
    ),
    ("hermes", '<tool_call>{"name": "now"}</tool_call> Done.', " Done.", [NOW]),
    ("hermes", '<tool_call>\n{"name": "now", "arguments": "{}"}\n</tool_call>', "", [NOW]),
    ("hermes", '<tool_call>\n{"name": "now", "arguments": {}}', "", [NOW]),  # the mark is left away at the end
    (
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "</tool_call>"}}</tool_call>',
        "",
        [("get_weather", {"city": "</tool_call>"})],
    ),
    # Llama 3.1 to 3.3
    ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}', "", [WEATHER]),
    ("llama3_json", '<|python_tag|>{"name": "now", "parameters": {}}', "", [NOW]),
    (
        "llama3_json",
        '\n{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}; {"name": "now", "parameters": {}}',
        "",
        [WEATHER, NOW],
    ),
    ("llama3_json", '{"type": "function", "name": "now", "parameters": {}}', "", [NOW]),
    # Mistral: a list, as until 2024, and names first, as since
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}, {"name": "now", '
        '"arguments": {}, "id": "a1b2c3d4e"}]',
        "",
        [WEATHER, NOW],
    ),
    ("mistral", 'Well: [TOOL_CALLS]{"name": "now", "arguments": {}}', "Well:", [NOW]),
    (
        "mistral",
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 2}[TOOL_CALLS]now[CALL_ID]a1b2c3d4e[ARGS]{}',
        "",
        [WEATHER, NOW],
    ),
    ("mistral", '[TOOL_CALLS]get_weather{"city": "Paris", "days": 2}', "", [WEATHER]),
    ("mistral", '[TOOL_CALLS]now[ARGS]{"a": "[TOOL_CALLS]"}', "", [("now", {"a": "[TOOL_CALLS]"})]),
]
# What is no call stays as it is.
TEXT = [
    ("hermes", "Nothing to call; a < b, <tool_call"),
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par'),
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": ["Paris"]}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call> and text'),
    ("hermes", '<tool_call>\n{"name": ["now"], "arguments": {}}\n</tool_call>'),
    ("hermes", "<tool_call>\nnow()\n</tool_call>\n"),
    ("hermes", "<tool_call>" + "[" * 2000 + "</tool_call>"),
    ("llama3_json", '{"temperature": 20}'),
    ("llama3_json", '{"name": "now", "parameters": {}} That is the call.'),
    ("llama3_json", 'The answer is {"name": "now", "parameters": {}}'),
    ("llama3_json", '<|python_tag|>print("x")'),
    ("llama3_json", '{"name": "get_weather", "parameters": {"city'),
    ("llama3_json", " "),
    ("mistral", "[TOOL_CALLS] nothing"),
    ("mistral", '[TOOL_CALLS] [{"name": "now", "arguments": {}}, {"name": "rm", "arguments": {}}]'),
    ("mistral", '[TOOL_CALLS]now[ARGS]{"a": '),
    ("mistral", "No call [TOOL_CA"),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"x": NaN}}</tool_call>'),
    ("llama3_json", '{"name": "now", "parameters": {"x": 1e999}}'),
    ("mistral", "[TOOL_CALLS]"),
]


def cuts(text: str) -> list[list[str]]:
    """A text as one piece, as characters, and as pieces of three and seven."""
    return [[text], list(text), *([text[i : i + size] for i in range(0, len(text), size)] for size in (3, 7))]


@pytest.mark.parametrize(("form", "text", "shown", "calls"), WRITTEN)
def test_calls_are_found_however_they_come(form: str, text: str, shown: str, calls: list) -> None:
    for pieces in cuts(text):
        assert joined(read(form, pieces)) == (shown, calls)


@pytest.mark.parametrize(("form", "text"), TEXT, ids=lambda value: value[:40])
def test_what_is_no_call_stays_text(form: str, text: str) -> None:
    for pieces in cuts(text):
        assert joined(read(form, pieces)) == (text, [])


@pytest.mark.parametrize(
    "piece", ["<tool_call></tool_call>", '<tool_call>{"a": "</tool_call>', '<tool_call>{"a": [', "<tool_call>"]
)
def test_many_marks_are_read_in_little_time(piece: str) -> None:
    pieces, began = [piece] * 2000, time.process_time()
    for given_pieces in (pieces, ["".join(pieces)]):
        assert joined(read("hermes", given_pieces)) == ("".join(pieces), [])
    assert time.process_time() - began < 1
    called = ['<tool_call>{"name": "now"}</tool_call>'] * 2000
    assert len(joined(read("hermes", called))[1]) == 2000


PARTS = [
    *(
        "<tool_call>",
        "</tool_call>",
        "<tool",
        "_call>",
        "[TOOL_CALLS]",
        "[TOOL_",
        "[ARGS]",
        "[CALL_ID]",
        "<|python_tag|>",
    ),
    *('{"name": "now"}', '{"name": "now", "arguments": {}}', '[{"name": "now", "arguments": {}}]', '"parameters": '),
    *('{"name": "get_weather", "arguments": {"city": "</tool_call>"}}', '{"name": "now", "parameters": {}}'),
    *("now", "\n", " ", "text", "{", "}", "[", "]", ";", '"', "\\", "é"),
]


@settings(max_examples=300, deadline=None)
@given(
    form=st.sampled_from(["hermes", "llama3_json", "mistral"]),
    text=st.lists(st.sampled_from(PARTS), max_size=9).map("".join),
    places=st.lists(st.integers(0, 200), max_size=6),
    most=st.sampled_from([None, 1]),
)
def test_it_does_not_matter_where_a_text_is_cut(form: str, text: str, places: list[int], most: int | None) -> None:
    ends = sorted({min(place, len(text)) for place in places} | {len(text)})
    pieces = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert joined(read(form, pieces, most=most)) == joined(read(form, [text], most=most))


GROWN = [  # the format, the text, and what would be read of the whole
    ("hermes", 'Well.\n<tool_call>\n{"name": "now", "arguments": {"a": "}\\"{", "b": [{"c": {}}]}}\n</tool_call>\n'),
    (
        "hermes",
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><tool_call>\n{"name": "get_weather", "argum'
        'ents": {"city": "</tool_call>"}}\n</tool_call> Done.',
    ),
    ("hermes", "No call, a <tool"),
    ("hermes", '<tool_call>\n{"name": "no'),
    ("llama3_json", '{"name": "now", "parameters": {"a": {"b": "\\\\"}}}'),
    ("llama3_json", " It is {1}."),
    ("llama3_json", " "),
    ("mistral", '[TOOL_CALLS] [{"name": "now", "arguments": {}}, {"name": "get_weather", "arguments": {"a": "]}"}}]'),
    ("mistral", 'Well. [TOOL_CALLS]now[ARGS]{"a": 1}[TOOL_CALLS]get_weather[ARGS]{"b": "[ARGS]"}'),
]


@pytest.mark.parametrize(("form", "text"), GROWN)
@pytest.mark.parametrize("most", [None, 1])
def test_calls_grow_to_what_is_read_of_the_whole(form: str, text: str, most: int | None) -> None:
    shown, calls = joined(read(form, [text], most=most))
    for pieces in cuts(text):
        growing, got, said = GrowingCalls(of_template(None, form), most), {}, ""
        for place, piece in enumerate(pieces):
            growth = growing.add(piece, ends=place == len(pieces) - 1)
            said += growth.text
            for number, name, arguments in growth.calls:
                assert (name is None) == (number in got), "the name comes first, and once"
                got[number] = (got[number][0], got[number][1] + arguments) if number in got else (name, arguments)
        assert said == shown
        assert [(name, json.loads(arguments)) for name, arguments in got.values()] == calls
        assert bool(growing.calls) == bool(calls)


def test_a_call_that_is_cut_off_has_shown_its_beginning() -> None:
    growing = GrowingCalls(of_template(None, "hermes"))
    growth = growing.add('<tool_call>\n{"name": "now", "arguments": {"a": "b', ends=True)
    assert (growth.text, growth.calls) == ("", [(0, "now", '{"a": "b')])


def test_half_characters_stay_escaped() -> None:
    """Nothing else could send them."""
    text = '<tool_call>{"name": "now", "arguments": {"zone": "\\ud800"}}</tool_call>'
    (call,) = (call for found in read("hermes", [text]) for call in found.calls)
    assert call.arguments == '{"zone": "\\ud800"}'


def test_a_call_behind_a_spoiled_one_counts() -> None:
    text = '<tool_call>oops</tool_call>\n<tool_call>{"name": "now"}</tool_call>'
    for pieces in cuts(text):
        assert joined(read("hermes", pieces)) == ("<tool_call>oops</tool_call>", [NOW])


def test_text_is_shown_as_soon_as_it_is_no_mark() -> None:
    found = read("hermes", ["a <tool", "box> b", ' <tool_call>{"name": "now"}</tool_call>', ""])
    assert [part.text for part in found] == ["a", " <toolbox> b", "", ""]
    assert [len(part.calls) for part in found] == [0, 0, 1, 0]


def test_calls_beyond_the_most_are_dropped() -> None:
    text = '<tool_call>{"name": "now"}</tool_call>' * 3
    for pieces in cuts(text):
        assert joined(read("hermes", pieces, most=1)) == ("", [NOW])


TEMPLATES = {
    '{{- "<tools>" }} return json within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": ': "hermes",
    'Respond in the format {"name": function name, "parameters": dictionary of argument name}': "llama3_json",
    '{{- "<|python_tag|>" + tool_call.name + ".call(" }}{{ \'"parameters": \' }}': "llama3_json",
    '{{- "[AVAILABLE_TOOLS] [" }} {{- "[TOOL_CALLS] [" }}': "mistral",
    "<tool_call>\\n<function=example_function_name>\\n<parameter=a>": None,  # XML between the same marks
    "{% for message in messages %}{{ message['content'] }}{% endfor %}": None,
    None: None,
}


@pytest.mark.parametrize(("template", "name"), TEMPLATES.items())
def test_templates_tell_the_format(template: str | None, name: str | None) -> None:
    found = of_template(template)
    assert (found and found.name) == name
    assert of_template({"default": "plain", "tool_use": template or ""}) == found or name is not None


def test_new_templates_of_mistral_put_names_first() -> None:
    new, old = of_template('"[TOOL_CALLS]" + name + "[ARGS]"'), of_template("[TOOL_CALLS] [")
    assert isinstance(new, Mistral)
    assert isinstance(old, Mistral)
    assert (new.names_first, old.names_first) == (True, False)


# ----------------------------------------------------------------------------------------------------------- grammars

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"$ref": "#/$defs/City"},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                },
                "required": ["city", "days"],
                "$defs": {"City": {"enum": ["Paris", "Oslo"]}},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
MESSAGES = [{"role": "user", "content": "call = "}]


@pytest.fixture(scope="module")
def pair():
    return demo.load()


def tools(parser: str | None, choice: object = "required", tokenizer: object = None, **more) -> Tools:
    ask = ChatRequest.model_validate({"messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, **more})
    found = Tools.of(ask, tokenizer, parser)
    assert found is not None
    return found


def accepts(grammars: Grammars, tokenizer, rules: str, text: str) -> bool:
    """Whether a text, and its end behind it, obeys a grammar."""
    sentence = grammars.lark(rules)()
    ids = tokenizer(text)["input_ids"]
    for place, token in enumerate([*ids, tokenizer.eos_token_id]):
        if not int(sentence.allowed(ids[:place])[token // 32]) >> (token % 32) & 1:
            return False
    return True


@pytest.mark.parametrize("form", ["hermes", "llama3_json", "mistral"])
def test_grammars_allow_what_is_read_and_nothing_else(pair, form: str) -> None:
    _, tokenizer = pair
    grammars = Grammars(tokenizer, [tokenizer.eos_token_id])
    key = "parameters" if form == "llama3_json" else "arguments"
    around = {
        "hermes": "<tool_call>\n%s\n</tool_call>",
        "llama3_json": "%s",
        "mistral": "[TOOL_CALLS][%s]",
    }[form]

    def call(name: str, arguments: str) -> str:
        return around % f'{{"name": "{name}", "{key}": {arguments}}}'

    rules = tools(form, tokenizer=tokenizer).grammar(tokenizer, None)
    assert rules is not None
    for text, right in (
        (call("get_weather", '{"city": "Oslo", "days": 3}'), True),
        (call("now", "{}"), True),
        (call("now", '{"zone": "UTC"}'), False),  # the schema names no argument
        (call("get_weather", '{"city": "Rome", "days": 3}'), False),
        (call("get_weather", '{"city": "Oslo"}'), False),
        (call("other", "{}"), False),
        ("Well, " + call("now", "{}"), False),
        ("", False),
    ):
        assert accepts(grammars, tokenizer, rules, text) is right, text
        if right:
            assert len(Reader(of_template(None, form), OFFERED).add(text, ends=True).calls) == 1
    named = tools(form, {"type": "function", "function": {"name": "now"}}, tokenizer).grammar(tokenizer, None)
    assert accepts(grammars, tokenizer, named, call("now", "{}"))
    assert not accepts(grammars, tokenizer, named, call("get_weather", '{"city": "Oslo", "days": 3}'))
    either = tools(form, "auto", tokenizer).grammar(tokenizer, {"type": "array", "items": {"type": "null"}})
    assert accepts(grammars, tokenizer, either, "[null]")
    assert accepts(grammars, tokenizer, either, call("now", "{}"))
    assert not accepts(grammars, tokenizer, either, "null")


@pytest.mark.parametrize("form", ["hermes", "llama3_json", "mistral", "mistral, names first"])
def test_a_strict_function_is_called_rightly_or_not_at_all(pair, form: str) -> None:
    _, tokenizer = pair
    grammars = Grammars(tokenizer, [tokenizer.eos_token_id])
    written = Mistral(names_first=True) if "," in form else of_template(None, form)
    schemas = {"get_weather": TOOLS[0]["function"]["parameters"], "now": {}}
    rules = Tools(written, schemas, None, True, frozenset({"get_weather"})).grammar(tokenizer, None)
    assert rules is not None
    assert Tools(written, schemas, None, True).grammar(tokenizer, None) is None

    def call(name: str, arguments: str) -> str:
        return {
            "hermes": f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>',
            "llama3_json": f'{{"name": "{name}", "parameters": {arguments}}}',
            "mistral": f'[TOOL_CALLS] [{{"name": "{name}", "arguments": {arguments}}}]',
            "mistral, names first": f"[TOOL_CALLS]{name}[ARGS]{arguments}",
        }[form]

    right = call("get_weather", '{"city": "Oslo", "days": 3}')
    several = form in ("hermes", "mistral, names first")  # lists are one call of the format, and Llama makes one
    for text, allowed in (
        ("", True),
        ("Well.\n\n1 < 2, <tool, [TOOL, {1}", True),
        (right, True),
        (call("now", '{"anything": [1]}'), True),  # it is not strict
        ("Well. " + right, form != "llama3_json" or None),  # text that has a call in it, or not
        (right + right, several),
        (right + "\n" + right + " Done.", form == "hermes"),
        (call("get_weather", '{"city": "Rome", "days": 3}'), False),
        (call("get_weather", '{"city": "Oslo"}'), False),
        (call("rm", "{}"), False),
        ("Well. " + call("rm", "{}"), False if form != "llama3_json" else None),
    ):
        if allowed is not None:
            assert accepts(grammars, tokenizer, rules, text) is allowed, text
            read = Reader(written, OFFERED).add(text, ends=True)
            assert not allowed or len(read.calls) == text.count('{"city"') + text.count("anything")


def test_marks_may_be_special_tokens(pair) -> None:
    tokenizer = copy.deepcopy(pair[1])
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "[ARGS]"]})
    used = tools("mistral", tokenizer=tokenizer)
    assert used.shows_marks(tokenizer)
    assert not tools("mistral", tokenizer=pair[1]).shows_marks(pair[1])
    used = Tools(Mistral(names_first=True), used.functions, ["now"], False)
    rules = used.grammar(tokenizer, None)
    assert rules is not None
    mark, args = tokenizer.convert_tokens_to_ids(["[TOOL_CALLS]", "[ARGS]"])
    assert f"<[{mark}]>" in rules
    assert f"<[{args}]>" in rules
    free = Tools(Mistral(names_first=True), used.functions, None, True, frozenset({"now"})).grammar(tokenizer, None)
    grammars = Grammars(tokenizer, [tokenizer.eos_token_id])
    assert accepts(grammars, tokenizer, rules, "[TOOL_CALLS]now[ARGS]{}")
    assert accepts(grammars, tokenizer, free, "Well. [TOOL_CALLS]now[ARGS]{}")
    assert accepts(grammars, tokenizer, free, "Well.")
    assert not accepts(grammars, tokenizer, free, "Well. [TOOL_CALLS]rm[ARGS]{}")
    (entry,) = used.entries([(0, "now", "{}")])
    assert len(entry["id"]) == 9  # templates of Mistral refuse others


# ------------------------------------------------------------------------------------------------------ over a socket


WRITES_TOOLS = (
    "{% for t in tools or [] %}# {{ t.function.name }}\n{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
)


@pytest.fixture(scope="module")
def served(pair):
    template = pair[1].chat_template
    pair[1].chat_template = WRITES_TOOLS
    with running(make(pair)) as it:
        yield it
    pair[1].chat_template = template


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def demand(client, **more):
    asked = {"model": "demo", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 400, "temperature": 1.0, "seed": 1}
    return client.chat.completions.create(**{**asked, **more})


def test_a_demanded_call_is_always_valid(client) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    answer = demand(client, tool_choice=named, n=4)
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls
        assert call.function.name == "get_weather"
        arguments = json.loads(call.function.arguments)
        assert set(arguments) == {"city", "days"}
        assert arguments["city"] in ("Paris", "Oslo")
        assert 1 <= arguments["days"] <= 9
    assert len({call.id for choice in answer.choices for call in choice.message.tool_calls}) == 4
    # The call, and what the tool said, go back into the chat.
    (call,) = answer.choices[0].message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    again = [*MESSAGES, answer.choices[0].message, result]
    assert demand(client, messages=again, tool_choice="none", max_tokens=4).choices[0].message.tool_calls is None


def test_a_stream_has_the_same_calls(client) -> None:
    asked = {"tool_choice": "required", "parallel_tool_calls": False, "temperature": 0}
    (call,) = demand(client, **asked).choices[0].message.tool_calls
    calls, finish, deltas = {}, [], 0
    for chunk in demand(client, stream=True, **asked):
        choice = chunk.choices[0]
        assert not choice.delta.content
        for delta in choice.delta.tool_calls or ():
            deltas += 1
            known = calls.setdefault(delta.index, {"id": delta.id, "name": "", "arguments": ""})
            known["name"] += delta.function.name or ""
            known["arguments"] += delta.function.arguments or ""
        finish += [choice.finish_reason] if choice.finish_reason else []
    assert finish == ["tool_calls"]
    assert calls[0]["name"] == call.function.name
    assert calls[0]["arguments"] == call.function.arguments
    assert deltas > 2, "arguments come while they are written"
    assert calls[0]["id"].startswith("call_")


def test_arguments_stay_as_they_were_written(served) -> None:
    written = '{"celsius":1.50e1, "days":-0}'
    text = f'<tool_call>\n{{"name": "set", "arguments": {written}}}\n</tool_call>'
    held = Tools(of_template(None, "hermes"), {"set": {}}, ["set"], True)

    class Asked:
        index = 0

    form = ChatForm(served.service, "chatcmpl-1", False, held, grows=True)
    (call,) = form.choice(Asked(), [Piece(text, finish="stop")])["message"]["tool_calls"]
    assert call["function"]["arguments"] == written
    one, streamed = Asked(), ""
    for piece in (*map(Piece, text), Piece(finish="stop")):
        for part in (form.chunk(one, piece) or {"delta": {}})["delta"].get("tool_calls", ()):
            streamed += part["function"]["arguments"]
    assert streamed == written
    cut = form.choice(Asked(), [Piece(text[:50], finish="length")])["message"]
    assert cut == {"role": "assistant", "content": text[:50]}


def test_a_call_that_is_cut_off_stays_text(client) -> None:
    (choice,) = demand(client, tool_choice="required", max_tokens=5).choices
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None
    assert choice.message.content.startswith("<tool")


def test_what_the_model_writes_by_itself_is_read(client, served, pair, monkeypatch) -> None:
    """The embedded model writes no calls: the text of one is put into its mouth, token by token."""
    _, tokenizer = pair
    text = 'Well. <tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    submit = served.service.engine.submit

    class Said:
        def allowed(self, tokens):
            words = torch.zeros(128, dtype=torch.int32)
            token = ids[len(tokens)]
            words[token // 32] = torch.tensor(1, dtype=torch.int32) << (token % 32)
            return words

    monkeypatch.setattr(
        served.service.engine, "submit", lambda *args, **more: submit(*args, **{**more, "constraint": Said})
    )
    for parser, found in (("hermes", True), ("none", False), (None, False)):
        monkeypatch.setattr(served.service, "tool_parser", parser)
        (choice,) = demand(client).choices
        assert choice.message.content == ("Well." if found else text)
        assert [call.function.name for call in choice.message.tool_calls or ()] == ["now"] * found
        assert choice.finish_reason == ("tool_calls" if found else "stop")
    monkeypatch.setattr(served.service, "tool_parser", "hermes")
    stream = [chunk.choices[0] for chunk in demand(client, stream=True, logprobs=True)]
    assert "".join(choice.delta.content or "" for choice in stream) == "Well."
    assert sum(len(choice.logprobs.content) for choice in stream if choice.logprobs) == len(ids) - 1
    assert stream[-1].finish_reason == "tool_calls"
    assert demand(client, tool_choice="none").choices[0].message.content == text


def test_calls_that_stay_text_cannot_be_demanded(client, served, monkeypatch) -> None:
    monkeypatch.setattr(served.service, "tool_parser", "none")
    for choice in ("required", {"type": "function", "function": {"name": "now"}}):
        with pytest.raises(openai.BadRequestError, match="one of mistral, hermes, llama3_json") as failed:
            demand(client, tool_choice=choice)
        assert failed.value.param == "tool_choice"


def test_tools_that_the_template_leaves_out_are_refused(client, served, pair, monkeypatch) -> None:
    monkeypatch.setattr(pair[1], "chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}")
    for more in ({}, {"tool_choice": "auto"}):
        with pytest.raises(openai.BadRequestError, match="chat template leaves them out") as failed:
            demand(client, **more)
        assert failed.value.param == "tools"
    for more in ({"tool_choice": "none"}, {"tool_choice": "required"}, {"tools": []}):
        demand(client, max_tokens=2, **more)
    result = {"role": "tool", "tool_call_id": "1", "content": "sunny"}
    demand(client, max_tokens=2, messages=[*MESSAGES, result])


def test_strict_functions_leave_other_text_alone(client, served, monkeypatch) -> None:
    monkeypatch.setattr(served.service, "tool_parser", "hermes")
    strict = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
    asked = {"max_tokens": 24, "temperature": 0, "messages": [{"role": "user", "content": demo.PROMPTS[0]}]}
    free, held = demand(client, tools=TOOLS[:1], **asked), demand(client, tools=strict, **asked)
    assert held.choices[0].message.content == free.choices[0].message.content
    strict[0]["function"]["parameters"] = {"type": "object", "not": {}}
    with pytest.raises(openai.BadRequestError, match="Unimplemented keys"):
        demand(client, tools=strict)


BAD = [
    ({"tools": None, "tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"tool_choice": {"type": "function", "function": {"name": "rm"}}}, "tool_choice", "one of them"),
    ({"tool_choice": "always"}, "tool_choice", "required"),
    ({"tools": [{"type": "function"}]}, "tools", "a tool is"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "letters"),
    ({"tools": [TOOLS[1], TOOLS[1]]}, "tools", "of its own"),
    ({"tool_choice": "required", "extra_body": {"min_tokens": 3}}, "min_tokens", "demanded"),
    (
        {
            "tool_choice": "required",
            "tools": [{"type": "function", "function": {"name": "a", "parameters": {"not": {}}}}],
        },
        "tools",
        "Unimplemented keys",
    ),
]


@pytest.mark.parametrize(("more", "param", "says"), BAD, ids=lambda value: repr(value)[:40])
def test_bad_tools_are_refused(client, more: dict, param: str, says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says) as failed:
        demand(client, **more)
    assert failed.value.param == param


def test_parsers_have_names(pair) -> None:
    from hf_llmopt import Engine

    with Engine(pair[0]) as engine, pytest.raises(errors.InvalidOption, match="Did you mean 'hermes'"):
        Service(engine, pair[1], "demo", tool_parser="hermess")
