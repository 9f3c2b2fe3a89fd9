"""A batch file on a pool of engines: the results of one engine, and nothing lost or twice where one of them dies."""

import asyncio
import json
import os
import signal
import threading
import time

import psutil
import pytest

ray = pytest.importorskip("ray", reason="ray is not installed: `make test-ray` runs these tests")

from hf_llmopt.serving import batch, ray_batch  # noqa: E402
from hf_llmopt.serving.recipe import Recipe  # noqa: E402

pytestmark = pytest.mark.slow

RECIPE = Recipe(dtype="float32")
WORDS = ("import", "class", "def", "from", "return", "while", "for", "with")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init("local", include_dashboard=False, num_cpus=2, _node_ip_address="127.0.0.1", log_to_driver=False)
    yield
    ray.shutdown()


def request(number: int, **body) -> str:
    sent = {"prompt": f"{WORDS[number % len(WORDS)]} x{number}", "max_tokens": 60, "temperature": 0, **body}
    return json.dumps({"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": sent}) + "\n"


def results(path) -> dict:
    """Text or status of each result; a name that comes twice fails."""
    found = {}
    for line in path.read_text("utf-8").splitlines():
        result = json.loads(line)
        assert result["custom_id"] not in found
        response = result["response"]
        found[result["custom_id"]] = (
            result["error"]["message"]
            if response is None
            else response["body"]["choices"][0]["text"]
            if response["status_code"] == 200
            else response["status_code"]
        )
    return found


def answer_alone(source, target) -> None:
    service = RECIPE.service()
    with batch.begun(source, target, RECIPE.setting) as work:
        asyncio.run(batch.run(work, batch.answerer(service), 32))
    service.close()


def test_results_are_those_of_one_engine(tmp_path) -> None:
    source, ours, alone = (tmp_path / name for name in ("in.jsonl", "ours.jsonl", "alone.jsonl"))
    lines = [request(number) for number in range(40)]
    source.write_text("".join([*lines, request(40, max_tokens=-1), "no json\n", request(41, stream=True)]), "utf-8")
    told = []
    counts = ray_batch.run(source, ours, RECIPE, 2, 0.5, batch_size=8, tell=lambda _, new: told.append(new))
    assert (counts.total, counts.before, counts.answered, counts.failed) == (43, 0, 43, 3)
    assert sum(told) == 43
    assert len(told) > 2
    answer_alone(source, alone)
    assert results(ours) == results(alone)
    assert results(ours)["r40"] == 400
    again = ray_batch.run(source, ours, RECIPE, 2, 0.5)
    assert (again.before, again.answered) == (43, 0)


def test_an_engine_dies(tmp_path) -> None:
    source, target, alone = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "alone.jsonl"))
    source.write_text("".join(request(number, max_tokens=150) for number in range(240)), "utf-8")
    killed = []

    def kill() -> None:
        """Kill an actor once some results are there."""
        end = time.monotonic() + 120
        while time.monotonic() < end and not (target.exists() and target.stat().st_size):
            time.sleep(0.05)
        for process in psutil.process_iter(["cmdline", "pid"]):
            if "MapWorker" in " ".join(process.info["cmdline"] or ()) and mine(process):
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)
                return

    def mine(process) -> bool:
        return any(parent.pid == os.getpid() for parent in process.parents())

    thread = threading.Thread(target=kill)
    thread.start()
    counts = ray_batch.run(source, target, RECIPE, 2, 0.5, batch_size=8)
    thread.join()
    assert killed
    assert counts.answered == 240
    assert counts.failed == 0
    answer_alone(source, alone)
    assert results(target) == results(alone)
