"""The embedded pair: its files, its quality against the recorded one, and the command that trains it."""

import ast
import json

import pytest
import torch

from hf_llmopt import demo
from hf_llmopt.bench import quality
from hf_llmopt.bench.sample import Sample
from hf_llmopt.demo import corpus, train

RECORDED = json.loads((demo.path().parent / "training.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def target():
    return demo.load()


@pytest.fixture(scope="module")
def draft():
    return demo.load(draft=True)


@pytest.fixture(scope="module")
def sample():
    """Some seven thousand tokens that neither model was trained on."""
    return [text[:3300] for text in corpus.held_out_texts() if len(text) > 2000][:8]


def complete(pair, prompt, tokens=40):
    model, tokenizer = pair
    inputs = tokenizer(prompt, return_tensors="pt")
    return tokenizer.decode(model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0])


def test_data_is_small():
    assert sum(file.stat().st_size for file in demo.path().parent.rglob("*")) < 20e6


def test_shapes(target, draft):
    assert 7.0e6 < target[0].num_parameters() < 7.5e6
    assert draft[0].num_parameters() * 8 < target[0].num_parameters()
    assert target[1].get_vocab() == draft[1].get_vocab()
    assert len(target[1]) == target[0].config.vocab_size == draft[0].config.vocab_size == 4096


def test_load_dtype():
    model, _ = demo.load(draft=True, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training


def test_path_rejects_other_names():
    with pytest.raises(ValueError, match="'target' and 'draft'"):
        demo.path("teacher")


def test_tokenizer_is_lossless(target, sample):
    tokenizer = target[1]
    for text in [*sample, "", " a  b ,c .", "\tx\r\n\n    y = 'é✓😀'  \n", *demo.PROMPTS]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_pads_left_and_chats(target):
    tokenizer = target[1]
    batch = tokenizer(["x = 1", "def f(a, b):"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0, 0] == tokenizer.pad_token_id != tokenizer.eos_token_id
    messages = [{"role": "user", "content": "import os\n"}, {"role": "user", "content": "import sys"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "import os\nimport sys"


def test_split_is_stable_and_disjoint():
    assert corpus.Document("test/test_glob.py", "").split == "held_out"
    assert corpus.Document("secrets.py", "").split == "validation"
    assert corpus.Document("turtle.py", "").split == "train"
    parts = {split: {document.text for document in corpus.documents(split)} for split in corpus.SPLITS}
    assert len(parts["train"]) > 10 * len(parts["held_out"]) > 0
    assert not parts["held_out"] & (parts["train"] | parts["validation"])


def test_no_source_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Python source"):
        corpus.held_out_texts(tmp_path)


@pytest.mark.parametrize("name", ["target", "draft"])
def test_quality_is_the_recorded_one(name, request, sample):
    model, tokenizer = request.getfixturevalue(name)
    cut = Sample.cut(model, tokenizer, sample, context=train.CONTEXT, stride=train.CONTEXT)
    measured = quality.perplexity(model, cut)
    # Another sample, and perhaps another Python's: near the recorded number, never far above it.
    assert 0.6 < measured.bits_per_byte / RECORDED["held_out"][name]["bits_per_byte"] < 1.35


def test_draft_agrees_with_target(target, draft, sample):
    agreement = quality.compare(draft[0], target[0], Sample.cut(*target, sample))
    assert agreement.top1.value > 0.85 * RECORDED["agreement"]["top1"]
    assert agreement.overlap > 0.85 * RECORDED["agreement"]["overlap"]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("class Stack:\n    def __init__(self", "self."),
        ("    try:\n        value = int(text)\n    except ValueError", ":\n"),
        ("import unittest\n\nclass TestQueue(unittest.TestCase):\n    def setUp(self):", "self."),
    ],
)
def test_completions_are_python(target, prompt, expected):
    assert expected in complete(target, prompt)[len(prompt) :]


def test_completion_parses(target):
    text = complete(target, "def read_lines(path):\n    with open(path")
    function = ast.parse(text.split("\n\n")[0]).body[0]
    assert isinstance(function, ast.FunctionDef)


def test_training_runs(tmp_path, monkeypatch):
    source = tmp_path / "lib"
    source.mkdir()
    for split in corpus.SPLITS:
        for document in corpus.documents(split)[:12]:
            (source / document.name.replace("/", "_")).write_text(document.text[:1500], encoding="utf-8")
    monkeypatch.setattr(train, "CONTEXT", 32)
    tiny = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 64}
    monkeypatch.setattr(train, "_SHAPES", {"target": tiny, "draft": tiny})
    monkeypatch.setattr(corpus.Document, "split", property(lambda self: corpus.SPLITS[len(self.text) % 3]))
    options = ["--steps", "5", "--batch-size", "2", "--device", "cpu"]
    train.main([*options, "--source", str(source), "--out", str(tmp_path)])
    report = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {record["model"] for record in records} == {"target", "draft"}
    assert 0 < report["agreement"]["overlap"] <= 1
    for name in train.RECIPES:
        assert {path.name for path in (tmp_path / name).iterdir()} >= {"model.safetensors", "tokenizer.json"}
