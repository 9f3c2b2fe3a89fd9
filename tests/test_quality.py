"""Perplexity and divergence: that they are what their definitions say, and `hf-llmopt eval`, which prints them."""

from __future__ import annotations

import copy
import json
import math
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from architectures import build
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from hf_llmopt.bench import quality
from hf_llmopt.bench.quality import Estimate, Perplexity
from hf_llmopt.bench.sample import Sample, Window, slide
from hf_llmopt.cli import app
from hf_llmopt.demo.tokens import train_tokenizer
from hf_llmopt.errors import InvalidLogits, InvalidOption, InvalidText

EVICTING = '{"kv_cache": {"eviction": "snapkv"}}'
TEXT = "def f(x):\n    return x + 1\n" * 12


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], vocabulary=300)


@pytest.fixture(scope="module")
def tiny() -> torch.nn.Module:
    return build("llama", vocab_size=300)


@pytest.fixture(scope="module")
def other(tiny: torch.nn.Module) -> torch.nn.Module:
    """The same with a little noise, as a quantized model has."""
    noisy = copy.deepcopy(tiny)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return noisy


@pytest.fixture(scope="module")
def sample(tiny: torch.nn.Module, tokenizer) -> Sample:
    return Sample.cut(tiny, tokenizer, [TEXT, TEXT[:40]], context=16, stride=5)


# ------------------------------------------------------------------------------------------------------------- windows


@given(st.integers(0, 60), st.integers(1, 12), st.data())
def test_every_token_is_predicted_once(length: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    windows = list(slide(torch.arange(length), context, stride))
    predicted = [int(i) for window in windows for i in window.ids[-window.counted :]]
    assert predicted == list(range(1, length))
    for window in windows:
        assert 1 <= window.counted <= len(window.ids) - 1 <= context
        first = int(window.ids[-window.counted])  # its place in the text, as ids count up
        read = len(window.ids) - window.counted
        assert read >= min(first, context - stride), "tokens before the first prediction"


def test_stride_one_gives_every_token_all_its_context(tiny: torch.nn.Module, tokenizer) -> None:
    found = quality.perplexity(tiny, Sample.cut(tiny, tokenizer, [TEXT], context=8, stride=1))
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        nats = [
            float(F.cross_entropy(tiny(ids[None, max(0, end - 8) : end]).logits[0, -1:], ids[end : end + 1]))
            for end in range(1, len(ids))
        ]
    assert sum(found.nats) == pytest.approx(sum(nats), rel=1e-5)
    assert found.tokens == len(nats)


def test_texts_are_opened(tiny: torch.nn.Module, tokenizer) -> None:
    cut = Sample.cut(tiny, tokenizer, ["x", "x + 1"])
    assert [int(window.ids[0]) for window in cut.windows] == [tokenizer.bos_token_id] * 2
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = bare.eos_token = None
    assert Sample.cut(tiny, bare, ["x", "x + 1"]).tokens == cut.tokens - 2


def test_a_limit_cuts_the_text(tiny: torch.nn.Module, tokenizer) -> None:
    cut = Sample.cut(tiny, tokenizer, [TEXT, TEXT], context=16, tokens=40)
    assert cut.tokens == 40
    ids = [int(i) for window in cut.windows for i in window.ids[-window.counted :]]
    assert cut.bytes == len(tokenizer.decode(ids)) < len(TEXT)
    assert Sample.cut(tiny, tokenizer, ["é"]).bytes == 2


def test_the_default_fits_the_model(tokenizer) -> None:
    long = [TEXT * 60]
    small = build("gpt2", vocab_size=300)
    positions = small.config.max_position_embeddings
    assert max(len(window.ids) for window in Sample.cut(small, tokenizer, long).windows) == positions + 1
    assert quality.perplexity(small, Sample.cut(small, tokenizer, long, tokens=3 * positions)).value > 1


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"context": 9, "stride": 10}, InvalidOption, "at most 9"),
        ({"context": 0}, InvalidOption, "context must be at least 1, got 0"),
        ({"stride": 0}, InvalidOption, "stride must be at least 1"),
        ({"tokens": 0}, InvalidOption, "tokens must be at least 1"),
        ({"context": 1 << 20}, InvalidOption, "positions; give at most"),
        ({"texts": []}, InvalidText, "no token to predict"),
        ({"texts": [""]}, InvalidText, "no token to predict"),
    ],
)
def test_what_cannot_be_cut(tiny: torch.nn.Module, tokenizer, arguments: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        Sample.cut(tiny, tokenizer, **{"texts": [TEXT], **arguments})


# ---------------------------------------------------------------------------------------------------------- perplexity


def test_perplexity_is_its_definition(tiny: torch.nn.Module, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "_ROWS", 3)
    seen: list[str] = []
    found = quality.perplexity(tiny, sample, seen.append)
    assert len(seen) == len(sample.windows)
    nats = []
    for window in sample.windows:
        with torch.no_grad():
            rows = tiny(window.ids[None, :-1]).logits[0].log_softmax(-1)
        nats.append(-sum(float(rows[i, window.ids[i]]) for i in range(-window.counted, 0)))
    assert list(found.nats) == pytest.approx(nats, rel=1e-5)
    assert found.value == found.estimate.value == pytest.approx(math.exp(sum(nats) / sample.tokens), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / (len(TEXT) + 40))
    assert found.to_dict()["low"] < found.value < found.to_dict()["high"]
    json.dumps(found.to_dict())


def test_a_single_window_has_no_interval(tiny: torch.nn.Module, tokenizer) -> None:
    found = quality.perplexity(tiny, Sample.cut(tiny, tokenizer, ["x + 1"])).estimate
    assert found.low is found.high is None
    assert str(Estimate(1.25)) == "1.25"


def test_a_perplexity_is_printed_in_a_line() -> None:
    assert str(Perplexity((1.0, 1.0), (1, 1), 8)) == "2.718 [2.718, 2.718] on 2 tokens"


def test_models_are_compared_window_by_window() -> None:
    theirs = Perplexity(nats=(10.0, 24.0, 33.0, 8.0), counts=(8, 8, 8, 4), bytes=90)
    ours = Perplexity(nats=(10.3, 24.5, 33.3, 8.3), counts=(8, 8, 8, 4), bytes=90)
    ratio = ours.over(theirs)
    assert ratio.value == pytest.approx(ours.value / theirs.value) == pytest.approx(math.exp(1.4 / 28))
    assert 1 < ratio.low < ratio.value < ratio.high < 1.1
    assert ours.estimate.high / ours.estimate.low > 2, "what the windows have in common does not cancel here"
    assert ours.over(ours) == Estimate(1.0, 1.0, 1.0)
    with pytest.raises(InvalidOption, match="one Sample"):
        ours.over(Perplexity(ours.nats[:-1], ours.counts[:-1], ours.bytes))


def test_the_interval_covers() -> None:
    """The interval of 60 windows of unequal size holds the true mean about 95 times in 100."""
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(150):
        counts = torch.randint(5, 20, (60,), generator=generator)
        sums = [float((2 + torch.randn(int(n), generator=generator)).sum()) for n in counts]
        found = quality._mean(sums, counts.tolist())
        inside += found.low <= 2 <= found.high
    assert 0.88 <= inside / 150 <= 0.99


def test_nan_is_an_error(tiny: torch.nn.Module, sample: Sample) -> None:
    broken = copy.deepcopy(tiny)
    broken.lm_head.weight.data[7] = math.nan
    with pytest.raises(InvalidLogits, match="window 0"):
        quality.perplexity(broken, sample)


# ---------------------------------------------------------------------------------------------------------- divergence


def test_divergence_is_its_definition(
    tiny: torch.nn.Module, other: torch.nn.Module, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "_ROWS", 3)
    found = quality.compare(other, tiny, sample)
    a, b = (torch.cat(list(quality.logits(model, sample))).double() for model in (other, tiny))
    kl = F.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert found.kl.value == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found.kl_99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-3)
    assert 0 < found.kl.low < found.kl.value < found.kl.high
    assert found.top1.value == pytest.approx(float((a.argmax(-1) == b.argmax(-1)).double().mean()))
    assert found.overlap == pytest.approx(float(torch.minimum(a.softmax(-1), b.softmax(-1)).sum(-1).mean()), rel=1e-5)
    assert found.rms == pytest.approx(float((a - b).square().mean().sqrt()), rel=1e-5)
    assert found.largest == pytest.approx(float((a - b).abs().max()), rel=1e-5)
    assert found.spread == pytest.approx(float(b.std(-1).mean()), rel=1e-5)
    expected = quality.perplexity(other, sample).over(quality.perplexity(tiny, sample))
    assert found.perplexity.value == pytest.approx(expected.value, rel=1e-5)
    assert found.tokens == sample.tokens
    json.dumps(found.to_dict())


def test_recorded_logits_are_the_same(
    tiny: torch.nn.Module, other: torch.nn.Module, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = quality.recorded(quality.logits(tiny, sample), sample, tmp_path)
    assert len(list(tmp_path.iterdir())) == len(sample.windows)
    assert quality.divergence(quality.logits(other, sample), rows, sample) == quality.compare(other, tiny, sample)
    full = namedtuple("Usage", "free")(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: full)
    with pytest.raises(OSError, match="do not fit"):
        quality.recorded(quality.logits(tiny, sample), sample, tmp_path)


def test_other_vocabularies_are_refused() -> None:
    cut = Sample((Window(torch.arange(3), 2),), 3)
    with pytest.raises(InvalidOption, match="vocabularies of 5 and 7"):
        quality.divergence([torch.zeros(2, 5)], [torch.zeros(2, 7)], cut)


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folders(tiny: torch.nn.Module, other: torch.nn.Module, tokenizer, tmp_path_factory) -> list[Path]:
    made = []
    for model in (tiny, other):
        made.append(tmp_path_factory.mktemp("model"))
        model.save_pretrained(made[-1])
        tokenizer.save_pretrained(made[-1])
    return made


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "code.py"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, args)])


def ok(*args: object) -> Result:
    result = run(*args)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def test_command_perplexity(folders: list[Path], text: Path, tiny: torch.nn.Module, tokenizer) -> None:
    args = ("perplexity", folders[0], "--text", text, "--context", 16, "--stride", 4)
    report = json.loads(ok(*args, "--json").stdout)
    expected = quality.perplexity(tiny, Sample.cut(tiny, tokenizer, [TEXT], context=16, stride=4)).to_dict()
    assert {key: report[key] for key in expected} == pytest.approx(expected)
    assert (report["text"], report["context"], report["dtype"]) == (str(text), 16, "float32")
    shown = ok(*args)
    assert f"{folders[0]}, float32: " in shown.stdout
    assert f"windows {report['windows']}" in " ".join(shown.stdout.split())
    assert f"{folders[0]}, int8, float32: " in ok(*args, "--llmopt", "int8").stdout
    assert f"{expected['perplexity']:.4g} [{expected['low']:.4g}, {expected['high']:.4g}]" in shown.stdout
    assert "single window" in ok("perplexity", folders[0], "--text", text).stderr


def test_command_takes_a_dict(folders: list[Path], text: Path) -> None:
    args = ("perplexity", folders[0], "--text", text, "--context", 16, "--json", "--llmopt")
    named = json.loads(ok(*args, "int8").stdout)["perplexity"]
    assert json.loads(ok(*args, '{"quantization": {"method": "int8"}}').stdout)["perplexity"] == named
    assert json.loads(ok(*args, '{"quantization": {"bits": 2, "group_size": 32}}').stdout)["perplexity"] != named


def test_command_reads_held_out_texts_by_default(folders: list[Path]) -> None:
    report = json.loads(ok("perplexity", folders[0], "--tokens", 64, "--context", 32, "--json").stdout)
    assert report["tokens"] == 64
    assert "standard library" in report["text"]


def test_command_logits(
    folders: list[Path], text: Path, tiny: torch.nn.Module, other: torch.nn.Module, tokenizer
) -> None:
    args = ("logits", folders[1], "--against", folders[0], "--text", text, "--context", 16)
    report = json.loads(ok(*args, "--json").stdout)
    expected = quality.compare(other, tiny, Sample.cut(tiny, tokenizer, [TEXT], context=16)).to_dict()
    assert report["kl"] == pytest.approx(expected["kl"], rel=1e-4)
    assert report["rms"] == pytest.approx(expected["rms"], rel=1e-4)
    assert report["tokens"] == expected["tokens"]
    assert f"{report['rms']:.4g}" in ok(*args).stdout


def test_command_sees_quantized_pages(folders: list[Path], text: Path) -> None:
    args = (folders[0], "--text", text, "--context", 16, "--json", "--llmopt")
    exact, coarse = (
        json.loads(ok("perplexity", *args, json.dumps({"kv_cache": {"dtype": dtype}})).stdout)["perplexity"]
        for dtype in ("auto", "int4")
    )
    assert exact != coarse
    assert coarse == pytest.approx(exact, rel=0.2)
    assert json.loads(ok("logits", *args, '{"kv_cache": "int4"}').stdout)["kl"]["value"] > 1e-6


def test_command_compares_no_files_with_themselves(folders: list[Path], text: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folders[0], llmopt="int8").save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folders[0]).save_pretrained(tmp_path)
    args = ("logits", tmp_path, "--text", text, "--context", 16, "--json")
    for llmopt in ("int8", '{"quantization": {}}'):
        result = run(*args, "--llmopt", llmopt)
        assert result.exit_code == 1
        assert "give --against the full-precision model" in result.stderr
    assert json.loads(ok(*args, "--against", folders[0]).stdout)["kl"]["value"] > 0
    assert json.loads(ok(*args, "--llmopt", '{"quantization": {"head_bits": 4}}').stdout)["kl"]["value"] > 0


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("perplexity", "{folder}", "--text", "no/such.txt"), "there is no file 'no/such.txt'"),
        (("perplexity", "{folder}", "--text", "{latin}"), "not UTF-8: byte 0xe9 at position 3"),
        (("perplexity", "{folder}", "--text", "{empty}"), "is empty"),
        (("perplexity", "{folder}", "--text", "{text}", "--context", "4000000"), "positions; give at most"),
        (("perplexity", "{folder}", "--text", "{text}", "--context", "4", "--stride", "5"), "at most 4"),
        (("perplexity", "{folder}", "--text", "{text}", "--llmopt", "int44"), "Did you mean 'int4'?"),
        (("logits", "{folder}", "--text", "{text}"), "nothing to compare with"),
        (("logits", "{folder}", "--text", "{text}", "--llmopt", "kv_cache"), "give --against another model"),
        (("perplexity", "{folder}", "--text", "{text}", "--llmopt", EVICTING), "eviction='snapkv' gives up tokens"),
        (("logits", "{folder}", "--text", "{text}", "--llmopt", EVICTING), "bench kv_cache --long --eviction"),
    ],
)
def test_command_errors(folders: list[Path], text: Path, tmp_path: Path, args: tuple[str, ...], says: str) -> None:
    (tmp_path / "latin").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "empty").write_text(" \n")
    names = {"folder": folders[0], "text": text, "latin": tmp_path / "latin", "empty": tmp_path / "empty"}
    result = run(*(arg if arg == EVICTING else arg.format(**names) for arg in args))
    assert result.exit_code == 1
    assert says in result.stderr
    assert result.stdout == ""
