"""The batch runner: every request has one result, whatever ends the process in between."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_llmopt import demo, errors

pytest.importorskip("fastapi")

from served import make

from hf_llmopt.cli import app
from hf_llmopt.serving import batch
from hf_llmopt.serving.batch import Line, Response, answerer, begun, read, run
from hf_llmopt.serving.journal import Journal
from hf_llmopt.serving.recipe import Recipe

needs_weights = pytest.mark.skipif(
    not (demo.path() / "config.json").is_file(), reason="the embedded model's weights are not there"
)


def request(name: str, body: object, url: str = "/v1/completions", **more) -> str:
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body, **more})


def completion(name: str, tokens: int = 4, **more) -> str:
    return request(name, {"prompt": f"def {name}(", "max_tokens": tokens, "temperature": 0, **more})


def put(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def results(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def lines_of(path: Path) -> int:
    """Whole lines of a file that may end within one."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def said(path: Path) -> dict:
    """By name, what was answered, without what is new in every run."""
    found = {}
    for result in results(path):
        name = result["custom_id"] or result["error"]["line"]
        assert name not in found, f"{name} was done twice"
        response = result["response"]
        body = response and {key: response["body"].get(key) for key in ("choices", "usage", "error")}
        if body and body["usage"]:
            body["usage"].pop("prompt_tokens_details")  # who came first is found by the others
        found[name] = (response and response["status_code"], body, result["error"])
    return found


async def echo(line: Line) -> Response:
    """Answers without a model, after a while."""
    await asyncio.sleep(random.random() * 0.004)
    return Response(200, f"id-{line.custom_id}", {"choices": json.loads(line.body), "usage": None, "error": None})


def go(source: Path, target: Path, answer=echo, at_once: int = 8, **more) -> batch.Counts:
    setting, retry = more.pop("setting", ""), more.pop("retry_failed", False)
    with begun(source, target, setting, retry) as work:
        return asyncio.run(run(work, answer, at_once, **more))


# ------------------------------------------------------------------------------------------------------ without a model


def test_a_file_of_somebody_else_is_left_alone(tmp_path) -> None:
    """Also one that does not end with a line break, as a torn result does not."""
    notes = tmp_path / "notes"
    for text in ("my notes", '{"id": "mine"}\n{"a'):
        notes.write_text(text)
        with pytest.raises(errors.InvalidRequest, match="no result of a batch"):
            Journal(notes)
        assert notes.read_text() == text


def test_a_run_that_is_killed_again_and_again_loses_and_repeats_nothing(tmp_path) -> None:
    source = put(tmp_path / "in.jsonl", [completion(f"r{i}", note="x" * 500) for i in range(500)] + ["no JSON", "{}"])
    go(source, tmp_path / "whole.jsonl")
    target, kills = tmp_path / "out.jsonl", 0
    while True:
        until = lines_of(target) + random.randrange(0, 60)
        with warnings.catch_warnings():  # of forks among threads: this one runs no torch
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            try:
                go(source, target)
                os._exit(0)
            finally:
                os._exit(1)
        ended, status = 0, 0
        while not ended and lines_of(target) < until:  # it ends, however slow the machine is
            time.sleep(0.001)
            ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            time.sleep(random.random() * 0.002)
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        kills += 1
        if random.random() < 0.3 and lines_of(target):  # as if it had been in the middle of a line
            with target.open("ab") as file:
                file.write(b'{"id": "batch_req_1", "custom_id": "r1", "resp'[: random.randrange(1, 46)])
    assert kills > 3
    assert said(target) == said(tmp_path / "whole.jsonl")
    assert len(results(target)) == 502


def test_what_stands_behind_the_last_whole_line_is_cut_off(tmp_path) -> None:
    named = {"id": "batch_req_1"}
    whole = [{**named, "custom_id": "a", "error": None}, {**named, "custom_id": None, "error": {"line": 7}}]
    lines = [json.dumps(result).encode() + b"\n" for result in whole]
    path = tmp_path / "out.jsonl"
    for end in range(len(lines[0]) + len(lines[1]) + 1):
        path.write_bytes(b"".join(lines)[:end])
        with Journal(path) as journal:
            known = ["a"] * (end >= len(lines[0])) + [7] * (end == len(lines[0]) + len(lines[1]))
            assert list(journal.known) == known
            journal.add([{"custom_id": "new", "error": None}])
        assert [result["custom_id"] for result in results(path)] == [key if key != 7 else None for key in known] + [
            "new"
        ]


def test_one_process_writes_at_a_time(tmp_path) -> None:
    with Journal(tmp_path / "out.jsonl"), pytest.raises(errors.InvalidRequest, match="Another process"):
        Journal(tmp_path / "out.jsonl")
    with Journal(tmp_path / "out.jsonl"):
        pass


def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path, monkeypatch) -> None:
    source, target = put(tmp_path / "in.jsonl", [completion(f"r{i}") for i in range(40)]), tmp_path / "out.jsonl"
    write, room = os.write, [4000]

    def scarce(file: int, data) -> int:
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = data[: min(len(data), room[0], 300)]  # a write may be a part of what was asked for
        room[0] -= len(part)
        return write(file, part)

    with monkeypatch.context() as patch:
        patch.setattr("hf_llmopt.serving.journal.os.write", scarce)
        with pytest.raises(OSError, match="No space"):
            go(source, target)
    kept = target.read_text().split("\n")[:-1]
    assert 0 < len(kept) < 40
    counts = go(source, target)
    assert (counts.before, counts.answered) == (len(kept), 40 - len(kept))
    assert target.read_text().split("\n")[: len(kept)] == kept
    assert len(said(target)) == 40


def test_a_device_is_no_place_for_results(tmp_path) -> None:
    """Reading `/dev/full` never ends, and a run begins with what is there."""
    source = put(tmp_path / "in.jsonl", [completion("a")])
    result = CliRunner().invoke(app, ["batch", str(source), "/dev/full"])
    assert result.exit_code == 1
    assert "'/dev/full' is no regular file" in result.stderr


def test_a_file_that_cannot_grow_is_named(tmp_path) -> None:
    """As on a full disk: what was there stays, and the command says in one line which file it was."""
    most, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(tmp_path / "out.jsonl") as journal:
        journal.add([{"id": "batch_req_1", "custom_id": "a", "error": None}])
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            with pytest.raises(OSError, match=r"out\.jsonl") as failed:
                journal.add([{"id": "batch_req_2", "custom_id": "b" * 200, "error": None}])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    assert failed.value.errno == errno.EFBIG
    with Journal(tmp_path / "out.jsonl") as journal:
        assert list(journal.known) == ["a"]


def test_an_interrupt_keeps_what_was_answered(tmp_path, caplog) -> None:
    source, target = put(tmp_path / "in.jsonl", [completion(f"r{i}") for i in range(50)]), tmp_path / "out.jsonl"

    async def interrupted() -> None:
        with begun(source, target) as work:
            going = asyncio.ensure_future(run(work, echo, 4))
            await asyncio.sleep(0.015)
            going.cancel()
            await going

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(interrupted())
    gc.collect()  # asyncio complains of what nobody looked at when it is collected
    assert "never retrieved" not in caplog.text
    before = len(results(target))
    assert 0 < before < 50
    assert go(source, target).before == before
    assert len(said(target)) == 50


def test_files_that_do_not_fit_are_refused_before_any_work(tmp_path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"

    async def never(line: Line) -> Response:
        raise AssertionError

    put(source, [completion("a"), "", completion("b"), completion("a")])
    with pytest.raises(errors.InvalidRequest, match="'a' stands on lines 1 and 4"):
        go(source, target, never)
    assert not target.exists()
    put(source, [completion("a")])
    with pytest.raises(errors.InvalidRequest, match="both input and output"):
        go(source, source, never)
    go(source, target)
    put(source, [completion("b")])
    with pytest.raises(errors.InvalidRequest, match=r"result for custom_id 'a'.* does not ask for it"):
        go(source, target, never)
    target.write_text("anything\n")
    with pytest.raises(errors.InvalidRequest, match=r"Line 1 of .* is no result"):
        go(source, target, never)
    assert target.read_text() == "anything\n"


async def refuse(line: Line) -> Response:
    """As `echo`, but for names that begin with w."""
    return Response(400 if line.key[0] == "w" else 200, "id", {"by": "refuse", "usage": None})


def test_a_request_or_a_setting_that_changed_is_refused(tmp_path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    go(put(source, [completion("a"), completion("b")]), target, setting="one model")
    before = target.read_bytes()
    with pytest.raises(errors.InvalidRequest, match=r"custom_id '[ab]', and another model"):
        go(source, target, setting="another one")
    put(source, [completion("a"), completion("b", tokens=5)])
    with pytest.raises(errors.InvalidRequest, match=r"custom_id 'b', .* has changed since. Give another output file"):
        go(source, target, setting="one model")
    assert target.read_bytes() == before
    old = [{name: value for name, value in result.items() if name != "fingerprint"} for result in results(target)]
    put(target, list(map(json.dumps, old)))  # as earlier versions wrote it
    assert go(source, target, setting="another one").before == 2


def test_the_setting_is_of_what_changes_answers() -> None:
    same = Recipe(llmopt={"batching": {"max_requests": 4}, "prompt_cache": False}, device="cpu", max_waiting=3)
    assert same.setting == Recipe().setting
    others = [{"llmopt": "int4"}, {"llmopt": {"kv_cache": "int8"}}, {"dtype": "float32"}, {"served_name": "x"}]
    others += [{"max_model_len": 64}, {"tool_parser": "none"}, {"model": "other"}]
    others += [{"llmopt": {"quantization": {"method": "gptq", "calibration": [text]}}} for text in ("one", "two")]
    assert len({Recipe(**other).setting for other in [{}, *others]}) == 10


def test_failed_requests_are_tried_again_if_that_is_asked_for(tmp_path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    counts = go(put(source, [completion("a"), completion("w"), "no JSON"]), target, refuse)
    assert (counts.answered, counts.failed) == (3, 2)
    counts = go(source, target)
    assert (counts.answered, counts.failed) == (0, 2)  # of the whole file
    put(source, [completion("a"), completion("w", tokens=5), completion("c")])  # mended
    with pytest.raises(errors.InvalidRequest, match="retry"):
        go(source, target)
    linked = tmp_path / "link.jsonl"
    linked.symlink_to(target)
    counts = go(source, linked, retry_failed=True)
    assert (counts.before, counts.answered, counts.failed) == (1, 2, 0)
    assert linked.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "link.jsonl", "out.jsonl"]
    assert {name: said(target)[name][0] for name in "awc"} == dict.fromkeys("awc", 200)
    assert results(target)[0]["response"]["body"]["by"] == "refuse"  # what was answered stayed


def test_results_are_dropped_all_or_none(tmp_path, monkeypatch) -> None:
    source, target = put(tmp_path / "in.jsonl", [completion("a"), completion("w")]), tmp_path / "out.jsonl"
    go(source, target, refuse)
    before = target.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("hf_llmopt.serving.journal.os.replace", full)
        with pytest.raises(OSError, match="No space"):
            go(source, target, retry_failed=True)
    assert target.read_bytes() == before
    with Journal(target) as journal:
        journal.drop_failed()
        with pytest.raises(errors.InvalidRequest, match="Another process"):  # the new file is locked, too
            Journal(target)
        journal.add([{"custom_id": "w", "error": None}])
    assert [result["custom_id"] for result in results(target)] == ["a", "w"]


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


LINES = [
    ("{", "no JSON"),
    ("[" * 100_000, "no JSON"),
    ("5", "custom_id"),
    (json.dumps({"custom_id": 5}), "custom_id"),
    (request("a", {}, method="GET"), "method"),
    (request("a", {}, "/v1/embeddings"), "url"),
    (request("a", {}, ["/v1/completions"]), "url"),
    (request("a", None), "body"),
    (request("a", {"stream": True}), "no streams"),
]


@pytest.mark.parametrize(("line", "says"), LINES, ids=lambda value: value[:20])
def test_a_line_that_cannot_be_sent_has_its_error_as_result(tmp_path, line: str, says: str) -> None:
    source, target = put(tmp_path / "in.jsonl", [completion("before"), line, completion("behind")]), tmp_path / "out"
    counts = go(source, target)
    assert (counts.total, counts.answered, counts.failed) == (3, 3, 1)
    (failed,) = [result for result in results(target) if result["error"]]
    assert says in failed["error"]["message"]
    assert failed["error"]["line"] == 2
    assert failed["response"] is None
    assert go(source, target).before == 3  # it is done, too


def test_bytes_that_are_no_text_and_a_mark_of_order(tmp_path) -> None:
    (tmp_path / "in").write_bytes(b"\xef\xbb\xbf" + completion("a").encode() + b"\n\xff\xfe\n")
    first, second = read(tmp_path / "in")
    assert first.custom_id == "a"
    assert second.error


# --------------------------------------------------------------------------------------------------------- with a model


@pytest.fixture(scope="module")
def service():
    made = make(demo.load(), max_requests=8, max_waiting=16)
    yield made
    made.close()


@needs_weights
def test_results_are_what_the_server_answers(service, tmp_path) -> None:
    model, tokenizer = service.engine.model, service.prompts.tokenizer
    chat = {"messages": [{"role": "user", "content": "x = "}], "max_tokens": 4, "temperature": 0}
    lines = [completion(f"r{i}") for i in range(6)]
    lines += [
        request("chat", chat, "/v1/chat/completions"),
        request("wrong", {"prompt": 5}),
        request("other", {"prompt": "a", "model": "gpt-5"}),
        request("many", {"prompt": "a", "n": 16, "max_tokens": 2}),  # waits until there is room in the line
    ]
    target, told = tmp_path / "out.jsonl", []
    counts = go(
        put(tmp_path / "in.jsonl", lines), target, answerer(service), 16, tell=lambda counts, new: told.append(new)
    )
    assert (counts.total, counts.answered, counts.failed) == (10, 10, 2)
    assert sum(told) == 10
    found = {result["custom_id"]: result for result in results(target)}
    for index in range(6):
        ids = tokenizer(f"def r{index}(", return_tensors="pt", return_token_type_ids=False)
        alone = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
        result = found[f"r{index}"]
        assert set(result) == {"id", "custom_id", "fingerprint", "response", "error"}
        assert result["error"] is None
        assert result["response"]["status_code"] == 200
        body = result["response"]["body"]
        assert body["choices"][0]["text"] == tokenizer.decode(alone)
        assert body["id"] == f"cmpl-{result['response']['request_id']}"
    assert found["chat"]["response"]["body"]["object"] == "chat.completion"
    assert found["wrong"]["response"]["status_code"] == 400
    assert found["wrong"]["response"]["body"]["error"]["param"] == "prompt"
    assert found["other"]["response"]["status_code"] == 404
    assert len(found["many"]["response"]["body"]["choices"]) == 16


@needs_weights
def test_a_closed_engine_is_no_result(tmp_path) -> None:
    closed = make(demo.load())
    closed.close()
    source, target = put(tmp_path / "in.jsonl", [completion("a")]), tmp_path / "out.jsonl"
    with pytest.raises(errors.EngineClosed):
        go(source, target, answerer(closed))
    assert target.read_text() == ""


@needs_weights
def test_the_command_goes_on_where_it_was_killed(tmp_path) -> None:
    source = put(tmp_path / "in.jsonl", [completion(f"r{i}") for i in range(6)])
    target = tmp_path / "out.jsonl"
    go(put(tmp_path / "first.jsonl", source.read_text().splitlines()[:2]), target)
    with target.open("a") as file:
        file.write('{"id": "batch')
    done = CliRunner().invoke(app, ["batch", str(source), str(target), "--served-name", "mine"])
    assert done.exit_code == 0, done.output
    assert "4 of 6 requests answered, 2 were there; 0 of all have an error" in done.output
    assert len(said(target)) == 6
    assert results(target)[-1]["response"]["body"]["model"] == "mine"
    other = CliRunner().invoke(app, ["batch", str(source), str(target), "--served-name", "theirs"])
    assert other.exit_code == 1
    assert "has a result for custom_id 'r" in other.output
    assert "another model" in other.output
    missing = CliRunner().invoke(app, ["batch", str(tmp_path / "none"), str(target)])
    assert missing.exit_code == 1
    assert "there is no file" in missing.output


@needs_weights
@pytest.mark.slow
def test_the_command_is_killed_at_random_moments(tmp_path) -> None:
    lines = [completion(f"r{i}", 40, seed=i, temperature=i % 3 / 2) for i in range(400)]
    source = put(tmp_path / "in.jsonl", [*lines, "no JSON", request("wrong", {"prompt": 5})])
    script = "import sys; from hf_llmopt.cli import main; sys.argv[0] = 'hf-llmopt'; sys.exit(main())"
    root = str(Path(batch.__file__).parents[2])

    def start(target: Path) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, *sys.path])}
        command = ["batch", str(source), str(target), "--dtype", "float32", "--llmopt", '{"batch_invariant": true}']
        return subprocess.Popen([sys.executable, "-c", script, *command], env=environment)

    assert start(tmp_path / "whole.jsonl").wait(600) == 1  # two have an error
    whole, target, kills = said(tmp_path / "whole.jsonl"), tmp_path / "out.jsonl", 0
    assert len(whole) == 402
    while True:
        until = lines_of(target) + random.randrange(5, 90)
        process = start(target)
        while process.poll() is None and lines_of(target) < until:
            time.sleep(0.001)
        process.kill()
        if process.wait(60) != -signal.SIGKILL:
            assert process.returncode == 1
            break
        kills += 1
        with target.open("r+b") as file:  # a line that was torn where the machine stopped
            if random.random() < 0.5:
                file.truncate(max(0, file.seek(0, os.SEEK_END) - random.randrange(1, 100)))
    assert kills > 3
    assert said(target) == whole
