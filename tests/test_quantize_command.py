"""`hf-llmopt quantize`: what it writes, what it says, and that nothing half-written is left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from architectures import build
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from hf_llmopt.cli import app
from hf_llmopt.demo.tokens import train_tokenizer

TEXT = "def f(x):\n    return x + 1\n" * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    build("llama", vocab_size=304, hidden_size=64, intermediate_size=96).save_pretrained(path)
    train_tokenizer([TEXT], vocabulary=300).save_pretrained(path)
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["quantize", *map(str, args)])


def ok(*args: object) -> Result:
    result = run(*args)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_what_is_written_is_what_ran(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = json.loads(ok(folder, out, "--method", "int4", "--group-size", 32, "--json").stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config == report["quantization_config"]
    assert config["quant_method"] != "llmopt"
    assert report["bytes"] == (out / "model.safetensors").stat().st_size < report["bytes_before"]
    full = AutoModelForCausalLM.from_pretrained(folder)
    assert report["bytes_before"] == sum(p.numel() * p.element_size() for p in full.parameters())
    quantized = AutoModelForCausalLM.from_pretrained(
        folder, llmopt={"quantization": {"method": "int4", "group_size": 32}}
    )
    again = AutoModelForCausalLM.from_pretrained(out, llmopt=True)
    ids = torch.tensor([AutoTokenizer.from_pretrained(out)(TEXT)["input_ids"][:50]])
    assert torch.equal(again(ids).logits, quantized(ids).logits)
    assert not torch.equal(again(ids).logits, full(ids).logits)


@pytest.mark.parametrize("method", ["int8", "gptq", "awq"])
def test_methods(folder: Path, tmp_path: Path, method: str) -> None:
    text = tmp_path / "calibration.txt"
    text.write_text(TEXT)
    calibrated = ("--group-size", 32, "--calibration", text, "--samples", 8, "--length", 16)
    ok(folder, tmp_path / "out", "--method", method, *(() if method == "int8" else calibrated))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", llmopt=True)
    assert "x + 1" not in (tmp_path / "out" / "config.json").read_text()


def test_it_says_what_it_left(folder: Path, tmp_path: Path) -> None:
    text = ok(folder, tmp_path / "out", "--group-size", 64, "--skip", "layers.0.self_attn").stdout
    assert "skipped model.layers.0.self_attn.q_proj and 3 more: named in skip" in text
    assert "down_proj and 2 more: its 96 inputs" in text
    assert "weights, MB" in text
    assert f"modules quantized; written to {tmp_path / 'out'} (load it with llmopt=True)" in " ".join(text.split())


def test_it_says_where_a_method_could_not_do_all(tmp_path: Path) -> None:
    build("olmo2", vocab_size=304).save_pretrained(tmp_path / "olmo2")  # its norms stand behind the products
    train_tokenizer([TEXT], vocabulary=300).save_pretrained(tmp_path / "olmo2")
    args = ("--method", "smoothquant", "--calibration", tmp_path / "text", "--samples", 2, "--length", 16)
    (tmp_path / "text").write_text(TEXT)
    found = json.loads(ok(tmp_path / "olmo2", tmp_path / "out", *args, "--json").stdout)["notes"]
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    text = ok(tmp_path / "olmo2", tmp_path / "again", *args).stdout
    assert "quantized, but model.layers.0.self_attn.q_proj and" in text
    assert "its inputs could not be scaled: no norm or product" in text.replace("\n", " ")


def test_eval(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_llmopt.cli.quantize.EVALUATED", 300)
    args = (folder, tmp_path / "out", "--method", "int8", "--eval")
    found = json.loads(ok(*args, "--json").stdout)["perplexity"]
    value, low, high = found["times"]
    assert value == pytest.approx(found["after"]["perplexity"] / found["before"]["perplexity"])
    assert low <= value <= high
    assert 0.95 < value < 1.05
    assert f"{value:.4f}" in ok(*args, "--force").stdout


def test_an_empty_folder_may_be_filled(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    ok(folder, tmp_path / "out", "--method", "int8")
    assert (tmp_path / "out" / "config.json").is_file()


def test_force_replaces(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    refused = run(folder, out, "--method", "int8")
    assert refused.exit_code == 1
    assert "not empty; give another one, or --force" in refused.stderr
    assert list(files(out)) == ["mine.txt"]
    ok(folder, out, "--method", "int8", "--force")
    assert "mine.txt" not in files(out)
    assert "config.json" in files(out)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left")])
def test_what_fails_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool, error: Exception
) -> None:
    out = tmp_path / "out"
    if held:
        ok(folder, out, "--method", "int8")
    before = files(out) if held else {}

    def full(self: object, path: Path, *args: object, **kwargs: object) -> None:
        (Path(path) / "vocabulary.json").write_text("half")
        raise error

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    result = run(folder, out, "--method", "int8", "--force")
    assert result.exit_code == 1
    assert "No space left" in result.stderr
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if held else [])
    assert not held or files(out) == before


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("{folder}", "{folder}", "--force"), "the folder of the model itself"),
        (("{folder}", "{file}"), "is a file"),
        (("{folder}", "{tmp}/no/out"), "there is no folder"),
        (("{folder}", "{tmp}/out", "--method", "gtpq"), "Did you mean 'gptq'?"),
        (("{folder}", "{tmp}/out", "--bits", "5"), "Allowed: 2, 3, 4, 8"),
        (("{folder}", "{tmp}/out", "--method", "gptq", "--calibration", "{tmp}/none.txt"), "there is no file"),
        (("{tmp}/nothing", "{tmp}/out"), "there is no folder"),
    ],
)
def test_user_errors(folder: Path, tmp_path: Path, args: tuple[str, ...], says: str) -> None:
    (tmp_path / "file").write_text("x")
    names = {"folder": folder, "tmp": tmp_path, "file": tmp_path / "file"}
    result = run(*(arg.format(**names) for arg in args))
    assert result.exit_code == 1
    assert says in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_torn_file_is_one_line(folder: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(folder, torn)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    for method in ("int4", "gptq"):
        result = run(torn, tmp_path / "out", "--method", method)
        assert result.exit_code == 1
        assert result.stderr.count("error: ") == 1
        assert "not fully covered" in result.stderr
        assert "Traceback" not in result.stderr


def test_a_quantized_model_is_refused(folder: Path, tmp_path: Path) -> None:
    ok(folder, tmp_path / "out", "--method", "int8")
    result = run(tmp_path / "out", tmp_path / "again", "--method", "int4")
    assert result.exit_code == 1
    assert "quantized already" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_quantized_folder_is_measured_as_it_is_and_not_quantized_again(folder, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    ok(folder, tmp_path / "one")
    asked = ["eval", "perplexity", str(tmp_path / "one"), "--text", str(tmp_path / "text"), "--json"]
    measured = CliRunner().invoke(app, asked)
    assert measured.exit_code == 0, measured.output
    assert run(tmp_path / "one", tmp_path / "two").exit_code != 0
    assert not (tmp_path / "two").exists()


def test_a_short_calibration_names_the_options(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("def f(x):")
    result = run(folder, tmp_path / "out", "--method", "gptq", "--calibration", tmp_path / "short.txt")
    assert result.exit_code == 1
    assert "--calibration" in result.stderr
    assert "--length" in result.stderr
    result = run(folder, tmp_path / "out", "--method", "int8", "--samples", 4)
    assert "sees only the weights" in result.stderr
