"""What the command `serve` makes of its options: prompts stay cached, and mistakes are found first of all."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

import hf_llmopt
from hf_llmopt import demo, errors
from hf_llmopt.cli import app
from hf_llmopt.cli.command import keyword
from hf_llmopt.cli.service import config_of

pytest.importorskip("fastapi")

from served import make

from hf_llmopt.serving import Keys, Limits, Server


def caches(text: str) -> bool:
    return config_of(keyword(text)).prompt_cache is not None


def test_prompts_are_cached_unless_the_keyword_says_otherwise() -> None:
    kept = ("true", "int4", "kv_cache,int8", '{"batching": {"max_requests": 4}}', '{"kv_cache": "int8"}', "{}")
    assert all(map(caches, kept))
    assert not any(map(caches, ("kv_cache", '{"prompt_cache": false}', '{"prompt_cache": null, "graphs": false}')))
    assert config_of(keyword("int4")).quantization.method == "int4"
    assert config_of(hf_llmopt.LLMOptConfig()).prompt_cache is None  # a config says everything


@pytest.fixture
def no_model(monkeypatch) -> None:
    """Loading one would end with another error."""
    monkeypatch.setattr("hf_llmopt.cli.service.load", None)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--tool-parser", "hermess"], "Did you mean 'hermes'"),
        (["--allow-origin", "localhost:3000"], "'localhost:3000' is no origin"),
        (["--api-key-file", "missing.txt"], "--api-key-file 'missing.txt' cannot be read"),
        (["--max-replicas", "2"], "--max-replicas 2 needs --replicas"),
        (["--llmopt", "true,int4"], "'true' stands alone"),
        (["--host", "192.0.2.1"], "cannot listen on port 8000 of 192.0.2.1"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_found_before_the_model_is_loaded(args: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["serve", *args])
    assert (result.exit_code, says in result.stderr) == (1, True), result.output


@pytest.mark.usefixtures("no_model")
def test_a_port_in_use_is_found_before_the_model_is_loaded() -> None:
    with Server.listen("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        result = CliRunner().invoke(app, ["serve", "--port", str(port)])
    assert result.exit_code == 1
    assert f"port {port} of 127.0.0.1 is in use; choose another --port" in result.stderr


def test_lines_of_the_key_file_that_begin_with_a_hash_are_no_keys(tmp_path) -> None:
    (tmp_path / "keys").write_text("# of the team\n\nfirst\n  # old\nsecond\n", encoding="utf-8")
    keys = Keys.read(tmp_path / "keys")
    assert len(keys) == 2
    assert keys.owner("Bearer # old") is None


@pytest.mark.skipif(not (demo.path() / "config.json").is_file(), reason="the embedded model's weights are not there")
def test_no_more_tokens_than_the_model_has_positions() -> None:
    with pytest.raises(errors.InvalidOption, match=r"max_model_len=1025 is more than the 1024 positions"):
        make(demo.load(), limits=Limits(1025))
