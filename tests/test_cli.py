"""The command line: what it prints where, and how it ends."""

from __future__ import annotations

import json
import resource
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import fresh
import pytest
import torch
from architectures import build
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import hf_llmopt
from hf_llmopt import demo
from hf_llmopt.cli import app, ui
from hf_llmopt.cli.bench.shown import Ending
from hf_llmopt.cli.command import UserError
from hf_llmopt.demo.tokens import train_tokenizer
from hf_llmopt.kernels import cpu

needs_weights = pytest.mark.skipif(
    not (demo.path() / "config.json").is_file(), reason="the embedded model's weights are not there"
)
FIGURES = {"served_by", "generated_tokens", "seconds", "tokens_per_second", "time_to_first_token", "stats"}


def run(*args: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


def ok(*args: object, stdin: str | None = None) -> Result:
    result = run(*args, stdin=stdin)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer, saved as a user's would be."""
    path = tmp_path_factory.mktemp("tiny")
    tokenizer = train_tokenizer(["def f(x):\n    return x + 1\n"] * 4, vocabulary=300)
    build("llama", vocab_size=300).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def plain(folder: Path, tmp_path: Path) -> Path:
    """The same model; its tokenizer has no chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------- help


def test_help() -> None:
    text = ok("--help").stdout
    assert all(name in text for name in ("demo", "generate", "chat", "env", "bench"))
    assert "kv_cache" in ok("bench", "--help").stdout


def test_version() -> None:
    assert ok("--version").stdout == f"hf_llmopt {hf_llmopt.__version__}\n"


@pytest.mark.parametrize(
    "args",
    [
        ("generate",),
        ("nonsense",),
        ("generate", "demo", "x", "--max-new-tokens", "0"),
        ("generate", "demo", "x", "--llmopt"),
        ("bench", "kv_cache", "--model", "demo", "--shape", "0.5b"),
    ],
)
def test_usage_errors(args: tuple[str, ...]) -> None:
    assert run(*args).exit_code == 2


def test_as_module() -> None:
    done = fresh.run("-m", "hf_llmopt", "generate", "no-such/model", "x")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: cannot load 'no-such/model'")
    assert len(done.stderr.splitlines()) == 1


def test_installs_the_keyword_itself(folder: Path) -> None:
    """`HF_LLMOPT_INSTALL=0` is meant for programs that import the package, not for its own commands."""
    arguments = ("generate", str(folder), "def f(", "--max-new-tokens", "2", "--json")
    done = fresh.run("-m", "hf_llmopt", *arguments, HF_LLMOPT_INSTALL="0")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["served_by"] == "llmopt"


# ------------------------------------------------------------------------------------------------------------ generate


def expected(folder: Path, prompt: str, **arguments: object) -> list[int]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, **arguments)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize(
    "llmopt", ["--llmopt=true", "--llmopt=kv_cache", '--llmopt={"kv_cache": {"page_size": 4}}', "--llmopt=false"]
)
def test_generate(folder: Path, llmopt: str) -> None:
    result = ok("generate", folder, llmopt, "def f(", "--max-new-tokens", 9, "--json")
    report = json.loads(result.stdout)
    assert report["tokens"] == expected(folder, "def f(", max_new_tokens=9, do_sample=False)
    assert report.keys() >= {"model", "prompt", "text", "tokens"} | FIGURES
    assert report["generated_tokens"] == len(report["tokens"])
    assert report["served_by"] == ("transformers" if llmopt == "--llmopt=false" else "llmopt")
    assert (report["stats"] is None) == (llmopt == "--llmopt=false")
    assert 0 < report["time_to_first_token"] <= report["seconds"]


def test_generate_streams_text(folder: Path) -> None:
    result = ok("generate", folder, "def f(", "--max-new-tokens", 9)
    report = json.loads(ok("generate", folder, "def f(", "--max-new-tokens", 9, "--json").stdout)
    assert result.stdout == report["text"] + "\n"
    assert "served by llmopt" in result.stderr
    assert "\x1b" not in result.output


def test_generate_reads_stdin(folder: Path) -> None:
    report = json.loads(ok("generate", folder, "-", "--max-new-tokens", 3, "--json", stdin="def f(").stdout)
    assert report["prompt"] == "def f("


def test_generate_samples_with_a_seed(folder: Path) -> None:
    options = ("--temperature", 0.9, "--top-k", 20, "--top-p", 0.9, "--seed", 5, "--max-new-tokens", 9, "--json")
    report = json.loads(ok("generate", folder, "def f(", *options).stdout)
    torch.manual_seed(5)
    sampled = {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.9}
    assert report["tokens"] == expected(folder, "def f(", max_new_tokens=9, **sampled)


def test_generate_stops(folder: Path) -> None:
    text = json.loads(ok("generate", folder, "def f(", "--max-new-tokens", 9, "--json").stdout)["text"]
    stop = text[1:3]
    report = json.loads(ok("generate", folder, "def f(", "--max-new-tokens", 9, "--stop", stop, "--json").stdout)
    assert stop in report["text"]
    assert len(report["text"]) < len(text)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("/no/such/folder", "x"), "no folder '/no/such/folder'"),
        (("./missing", "x"), "no folder './missing'"),
        (("no-such/model", "x"), "cannot load 'no-such/model'"),
        (("{empty}", "x"), "has no config.json"),
        (("{folder}", "x", "--llmopt=kv_cach"), "Did you mean 'kv_cache'?"),
        (("{folder}", "x", "--llmopt", "kv_cahce"), "Did you mean 'kv_cache'?"),
        (("{folder}", "x", "--llmopt", "kv_cache,sink"), 'belongs into JSON: {"kv_cache": {"eviction": "sink"}}'),
        (("{folder}", "--llmopt", "ture", "x"), "Did you mean 'true'? Allowed: "),
        (("{folder}", "x", "--llmopt", '{{"kv_cache": 1'), "is no JSON (Expecting"),
        (("{folder}", "x", "--llmopt", '{{"quantization": {{"method": "int44"}}}}'), "Did you mean 'int4'?"),
        (("{folder}", "x", "--dtype", "float31"), "Allowed: auto, float32"),
        (("{folder}", "x", "--device", "abacus"), "cannot use device 'abacus'"),
        (("{folder}", ""), "the prompt is empty"),
    ],
)
def test_user_errors(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], says: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run("generate", *(arg.format(folder=folder, empty=tmp_path) for arg in args))
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("Loading weights")]
    assert line.startswith("error: ")
    assert says in line


def test_warnings_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: ui.warn(str(message))
        warnings.simplefilter("always")
        warnings.warn("transformers serves this call", stacklevel=1)
    assert capsys.readouterr().err == "warning: transformers serves this call\n"


# ---------------------------------------------------------------------------------------------------------------- chat


def test_chat(folder: Path) -> None:
    lines = "def f(\n\n/stats\nreturn\n/reset\n/what\ndef f(\n/exit\nnever\n"
    result = ok("chat", folder, "--max-new-tokens", 4, "--temperature", 0, "--json", stdin=lines)
    replies = [json.loads(line) for line in result.stdout.splitlines()]
    assert [reply["role"] for reply in replies] == ["assistant"] * 3
    first, second, third = replies
    assert first["content"] == third["content"]
    assert second["prompt_tokens"] > first["prompt_tokens"] == third["prompt_tokens"]
    assert all(reply["served_by"] == "llmopt" for reply in replies)
    assert "served by llmopt: 4 tokens" in result.stderr
    assert "the conversation is forgotten" in result.stderr
    assert "no command /what" in result.stderr


def test_chat_help_lists_its_commands() -> None:
    text = ok("chat", "--help").stdout
    assert all(command in text for command in ("/exit", "/reset", "/stats", "Ctrl-C"))


def test_chat_streams_text(folder: Path) -> None:
    args = ("chat", folder, "--max-new-tokens", 4, "--temperature", 0, "--llmopt", "false")
    reply = json.loads(ok(*args, "--json", stdin="def f(").stdout)
    assert reply["served_by"] == "transformers"
    assert ok(*args, stdin="def f(").stdout == reply["content"] + "\n"


@pytest.mark.parametrize("template", [True, False])
def test_chat_has_a_system_message(folder: Path, plain: Path, template: bool) -> None:
    path = folder if template else plain
    args = ("chat", path, "--max-new-tokens", 2, "--json")
    alone = json.loads(ok(*args, stdin="def f(").stdout)
    told = json.loads(ok(*args, "--system", "return x", stdin="def f(").stdout)
    assert told["prompt_tokens"] > alone["prompt_tokens"]


def test_chat_template_that_refuses(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ raise_exception('no system message, please') }}"
    tokenizer.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    result = run("chat", tmp_path, "--system", "x", stdin="hello")
    assert result.exit_code == 1
    assert "no system message, please" in result.stderr


# ----------------------------------------------------------------------------------------------------------------- env


def test_env_json() -> None:
    report = json.loads(ok("env", "--json").stdout)
    assert report.keys() >= {
        "hardware", "cpu", "cores", "memory_bytes", "free_bytes", "devices", "system", "versions", "features", "git"
    }  # fmt: skip
    assert report["versions"]["torch"] == torch.__version__
    features = {feature["name"]: feature for feature in report["features"]}
    assert features["keyword llmopt="]["available"]
    said = [features[f"llmopt={part!r}"]["why"] for part in ("prompt_cache", "kv_cache", "int4")]
    assert said == ["exact", "exact, unless its dtype is int8, fp8 or int4", "lossy"]
    assert features["CUDA"]["available"] == torch.cuda.is_available()
    assert all(feature["why"] for feature in features.values() if not feature["available"])
    assert {name for name in features if name.startswith("extra")} == {"extra 'bench'", "extra 'serve'"}
    kernels = features["C kernels for the CPU"]
    assert kernels["available"] == features["attention backend 'cpu'"]["available"] == cpu.available()
    assert (cpu.levels()[-1] if cpu.available() else cpu.why_not()) in kernels["why"]


def test_env_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available", lambda: False)
    monkeypatch.setattr(cpu, "why_not", lambda: "no compiler")
    features = {feature["name"]: feature for feature in json.loads(ok("env", "--json").stdout)["features"]}
    assert not features["attention backend 'cpu'"]["available"]
    assert features["C kernels for the CPU"] == {
        "name": "C kernels for the CPU", "available": False, "why": "no compiler"
    }  # fmt: skip


def test_the_extra_of_the_server_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["hf_llmopt.cli.env"]
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "fastapi" else find_spec(name))
    features = {feature["name"]: feature["why"] for feature in module.collect()["features"] if not feature["available"]}
    assert features["extra 'serve'"].startswith("fastapi")
    assert features["extra 'serve'"].endswith("pip install '.[serve]' in the checkout")
    monkeypatch.delattr(hf_llmopt, "serving", raising=False)
    monkeypatch.setitem(sys.modules, "hf_llmopt.serving", None)
    assert "or in the checkout pip install '.[serve]'" in " ".join(run("serve").stderr.split())


def test_env_without_hooks() -> None:
    hf_llmopt.uninstall()
    try:
        report = json.loads(ok("env", "--json").stdout)
    finally:
        hf_llmopt.install()
    assert not report["features"][0]["available"]


def test_env_plain() -> None:
    text = ok("env").stdout
    assert hf_llmopt.__version__ in text
    assert "\x1b" not in text
    assert not set(text) & set("│┃╭━")


# --------------------------------------------------------------------------------------------------------------- bench


@needs_weights
def test_bench_quick_says_that_it_does_not_count() -> None:
    result = ok("bench", "kv_cache", "--quick", "--workload", "batch-1", "--repeat", 1, "--json")
    assert json.loads(result.stdout)["quick"]
    assert "none of these figures counts" in result.stderr


@needs_weights
def test_bench_draws_its_schedule(tmp_path: Path) -> None:
    drawing = tmp_path / "schedule.svg"
    result = ok("bench", "continuous_batching", "--quick", "--repeat", 1, "--markdown", "--timeline", drawing)
    assert "| random-8 | llmopt |" in result.stdout
    assert "request rates" in result.stdout
    assert drawing.read_text("utf-8").startswith("<svg")
    missing = run("bench", "continuous_batching", "--load", "sharegtp")
    assert missing.exit_code == 1
    assert "Did you mean 'sharegpt'?" in missing.stderr


# ---------------------------------------------------------------------------------------------------------------- demo


@needs_weights
def test_demo_json() -> None:
    report = json.loads(ok("demo", "--max-new-tokens", 6, "--repeat", 2, "--json").stdout)
    assert report["passed"]
    assert report["served_by_llmopt"]
    assert report["equality"] == {"same": True, "identical": True, "tokens": 6, "differences": []}
    assert report["texts"]["stock"] == report["texts"]["llmopt"] != ""
    for way in ("stock", "llmopt"):
        figures = report["ways"][way]
        assert figures["generated_tokens"] == 6
        assert figures["kv_bytes"] > 0
        assert all(len(figures[key]["samples"]) == 2 for key in ("seconds", "tokens_per_second", "time_to_first_token"))
    assert report["ratio"]["low"] <= report["ratio"]["ratio"] <= report["ratio"]["high"]


@needs_weights
def test_demo_plain() -> None:
    text = ok("demo", "--prompt", "import os\n", "--max-new-tokens", 6, "--repeat", 1).stdout
    assert text.count("import os\n") == 2
    assert "tokens per second" in text
    assert text.splitlines()[-1].startswith("same tokens: all 6")


@needs_weights
def test_demo_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = ok("demo", "--max-new-tokens", 6, "--repeat", 1).stdout
    assert all(part in text for part in ("╭", " stock ", " llmopt "))
    assert "\x1b[" in text
    assert "✓ same tokens" in text


@needs_weights
def test_demo_fails_when_tokens_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_llmopt.generation.group.greedy", lambda scores: scores.argmin(-1))
    result = run("demo", "--max-new-tokens", 6, "--repeat", 1)
    assert result.exit_code == 1
    assert "FAILED: other tokens than stock; first at step 0" in result.stdout
    assert "×" not in result.stdout


def test_demo_without_llmopt() -> None:
    result = run("demo", "--llmopt=false")
    assert result.exit_code == 1
    assert "nothing to compare" in result.stderr


def test_a_report_that_cannot_be_written_is_not_lost(tmp_path, capsys) -> None:
    path = tmp_path / "report.json"
    path.write_text("what was there")
    most, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # as a full disk
    try:
        with pytest.raises(UserError, match=r"--output '.*report\.json' cannot be written: File too large"):
            Ending(output=path).record({"figure": 1, "text": "a" * 200})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    assert json.loads(capsys.readouterr().out)["figure"] == 1
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="No space left on device"):
        Ending(output=Path("/dev/full")).record({"figure": 2})
    assert json.loads(capsys.readouterr().out)["figure"] == 2
