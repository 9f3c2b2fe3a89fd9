"""Several replicas behind Ray Serve: what one server answers, and nothing lost but what a dead replica had begun.

Ray is not part of the tests' environment: `make test-ray` makes one that has it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ray = pytest.importorskip("ray", reason="ray is not installed: `make test-ray` runs these tests")
import httpx2  # noqa: E402
import openai  # noqa: E402
import psutil  # noqa: E402
from ray import serve  # noqa: E402

from hf_llmopt import demo  # noqa: E402
from hf_llmopt.serving import ray_app  # noqa: E402
from hf_llmopt.serving.ray_app import Arguments, build  # noqa: E402

pytestmark = pytest.mark.slow

TEXT = (Path(ray_app.__file__).parent / "service.py").read_text("utf-8")
GREEDY = {"model": "demo", "temperature": 0}


@pytest.fixture(scope="module")
def url():
    ray.init(include_dashboard=False, num_cpus=2, _node_ip_address="127.0.0.1", log_to_driver=False)
    yield ray_app.start(Arguments(replicas=2, cpus=0.4, dtype="float32", max_body_bytes=100_000), "127.0.0.1", 0)
    ray_app.stop()
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def http(url):
    with httpx2.Client(base_url=url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def pair():
    model, tokenizer = demo.load()
    return model.float(), tokenizer


def expected(pair, prompt: str, tokens: int) -> str:
    model, tokenizer = pair
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    found = model.generate(**ids, max_new_tokens=tokens, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(found, skip_special_tokens=True)


def complete(http, prompt: str, tokens: int = 8, **more) -> dict:
    return http.post("/v1/completions", json={**GREEDY, "prompt": prompt, "max_tokens": tokens, **more}).json()


def figure(http, name: str) -> dict[str, float]:
    """A figure of each replica."""
    lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith(f"llmopt:{name}{{")]
    return {line.partition('replica="')[2].partition('"')[0]: float(line.rpartition(" ")[2]) for line in lines}


def until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def test_answers_are_those_of_generate(http, pair) -> None:
    found = complete(http, "import os\n", 16)
    assert found["choices"][0]["text"] == expected(pair, "import os\n", 16)
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_every_endpoint_is_there(http) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/v1/models").json()["data"][0]["id"] == "demo"
    assert http.get("/v1/models/demo").json()["id"] == "demo"
    assert http.get("/").headers["content-type"].startswith("text/html")
    assert "/v1/completions" in http.get("/openapi.json").json()["paths"]
    tokens = http.post("/tokenize", json={"prompt": "import"}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == "import"


def test_openais_client_streams(url, pair) -> None:
    client = openai.OpenAI(base_url=url + "/v1", api_key="none")
    chat = {"messages": [{"role": "user", "content": "def main("}], "max_tokens": 24, **GREEDY}
    whole = client.chat.completions.create(**chat)
    began, times, text = time.monotonic(), [], ""
    for chunk in client.chat.completions.create(stream=True, **chat):
        times.append(time.monotonic() - began)
        text += chunk.choices[0].delta.content or ""
    assert text == whole.choices[0].message.content
    assert len(times) > 8  # it did not come all at once
    assert times[0] < times[-1] / 2


def test_errors_are_those_of_one_server(http) -> None:
    assert complete(http, "x", 10_000)["error"]["code"] == "context_length_exceeded"
    assert http.get("/nowhere").status_code == 404
    assert http.post("/nowhere").status_code == 404
    assert http.post("/v1/completions", content=b"x").json()["error"]["code"] == "unsupported_media_type"
    assert http.post("/v1/completions", json={"prompt": "x" * 200_000}).json()["error"]["code"] == "body_too_large"
    parts = (b"x" * 50_000 for _ in range(4))  # in pieces: no length is given
    headers = {"content-type": "application/json"}
    assert http.post("/v1/completions", content=parts, headers=headers).status_code == 413


def test_prompts_go_where_their_beginning_is(http) -> None:
    prompts = [TEXT[start : start + 1000] for start in range(0, 4000, 1000)]
    for prompt in prompts:
        complete(http, prompt, 1)
    for turn in range(3):
        for prompt in prompts:
            counts = complete(http, f"{prompt} {turn}", 1)["usage"]
            assert counts["prompt_tokens_details"]["cached_tokens"] > 0.9 * counts["prompt_tokens"]
    assert all(figure(http, "prompt_tokens_total").values())  # and none has to do it all


def test_who_leaves_frees(http) -> None:
    until(lambda: sum(figure(http, "num_requests_running").values()) == 0)
    ask = {**GREEDY, "prompt": "import", "max_tokens": 900, "min_tokens": 900, "stream": True}
    with http.stream("POST", "/v1/completions", json=ask) as answer:
        lines = answer.iter_lines()
        next(lines)
        until(lambda: sum(figure(http, "num_requests_running").values()) == 1, 5)
    until(lambda: sum(figure(http, "num_requests_running").values()) == 0, 5)
    assert sum(figure(http, "request_success_total").values()) > 0


def test_too_many_get_429(url, http) -> None:
    small = build(Arguments(cpus=0.2, max_ongoing=1, max_waiting=1))
    serve.run(small, name="small", route_prefix="/small")
    try:
        ask = {**GREEDY, "prompt": "import", "max_tokens": 600}
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: http.post("/small/v1/completions", json=ask), range(8)))
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses[0] == 200
        assert statuses[-1] == 429
        assert set(statuses) == {200, 429}
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.json()["error"]["code"] == "engine_full"
        assert refused.headers["retry-after"] == "1"
    finally:
        serve.delete("small")


def test_load_starts_another_replica(http) -> None:
    scaled = build(Arguments(cpus=0.1, max_replicas=2, target_requests=1.0))
    serve.run(scaled, name="scaled", route_prefix="/scaled")
    try:
        ask = {**GREEDY, "prompt": "import", "max_tokens": 900, "min_tokens": 900}
        over = threading.Event()

        def go_on() -> list[int]:
            statuses = []
            while not over.is_set():
                statuses.append(http.post("/scaled/v1/completions", json=ask).status_code)
            return statuses

        def replicas() -> int:
            lines = http.get("/scaled/metrics").text.splitlines()
            return sum(line.startswith("llmopt:num_requests_running{") for line in lines)

        with ThreadPoolExecutor(6) as pool:
            answers = [pool.submit(go_on) for _ in range(6)]
            try:
                until(lambda: replicas() == 2, 120)
            finally:
                over.set()
        assert {status for found in answers for status in found.result()} == {200}
    finally:
        serve.delete("scaled")


def test_a_replica_of_two_ranks_answers_and_does_without_neither(http, pair) -> None:
    serve.run(build(Arguments(tensor_parallel=2, cpus=0.4, dtype="float32")), name="two", route_prefix="/two")
    try:
        ask = {**GREEDY, "prompt": "import os\n", "max_tokens": 16}
        truth = expected(pair, "import os\n", 16)
        assert http.post("/two/v1/completions", json=ask).json()["choices"][0]["text"] == truth
        replica = psutil.Process(serve.get_deployment_handle("Replica", "two").process.remote().result())
        (rank,) = [child for child in replica.children() if "spawn_main" in " ".join(child.cmdline())]
        rank.kill()
        assert psutil.wait_procs([replica], timeout=30)[1] == [], "it ends as a whole"
        until(lambda: http.post("/two/v1/completions", json=ask).status_code == 200, 120)  # another one has its place
        assert http.post("/two/v1/completions", json=ask).json()["choices"][0]["text"] == truth
    finally:
        serve.delete("two")


def stream(http, prompt: str, tokens: int, begun: threading.Semaphore) -> tuple[str, str]:
    """The text of a stream, and the code of the error that it ended with."""
    text, error, done = "", "", False
    ask = {**GREEDY, "prompt": prompt, "max_tokens": tokens, "stream": True}
    with http.stream("POST", "/v1/completions", json=ask) as answer:
        assert answer.status_code == 200
        for line in filter(None, answer.iter_lines()):
            assert not done
            if line == "data: [DONE]":
                done = True
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                error = event["error"]["code"]
            else:
                begun.release()
                text += event["choices"][0]["text"]
    assert done
    return text, error


def test_a_replica_dies_under_load(url, pair) -> None:
    """Streams that it had begun end with an error; all other requests are answered as if nothing had happened."""
    prompts = [TEXT[start : start + 60] for start in range(0, 60 * 24, 60)]
    truth = [expected(pair, prompt, 200) for prompt in prompts]
    handle = serve.get_deployment_handle("Replica", ray_app.NAME)
    begun = threading.Semaphore(0)
    with httpx2.Client(base_url=url, timeout=120, limits=httpx2.Limits(max_connections=64)) as http:
        until(lambda: len(figure(http, "num_requests_running")) == 2)
        with ThreadPoolExecutor(48) as pool:
            streams = [pool.submit(stream, http, prompt, 200, begun) for prompt in prompts]
            whole = [pool.submit(complete, http, prompt, 200) for prompt in prompts]
            for _ in range(60):
                assert begun.acquire(timeout=60)
            os.kill(handle.process.remote().result(), signal.SIGKILL)
            later = [pool.submit(complete, http, prompt, 200) for prompt in prompts]
        texts, errors = zip(*(found.result() for found in streams), strict=True)
        assert [found.result()["choices"][0]["text"] for found in whole] == truth
        assert [found.result()["choices"][0]["text"] for found in later] == truth
        assert set(errors) <= {"", "replica_lost"}
        assert 0 < errors.count("replica_lost") < len(errors)
        for text, error, right in zip(texts, errors, truth, strict=True):
            assert right.startswith(text) if error else text == right
        until(lambda: len(figure(http, "num_requests_running")) == 2)  # another one has taken its place
        assert complete(http, prompts[0], 200)["choices"][0]["text"] == truth[0]


def test_the_command(tmp_path) -> None:
    """It starts its own cluster, serves, and ends at the first signal."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hf_llmopt", "serve", "--replicas", "1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_LLMOPT_API_KEYS": "secret"}
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            until(lambda: answers(http) or process.poll() is not None)
            assert complete(http, "import")["error"]["code"] == "invalid_api_key"
            http.headers["authorization"] = "Bearer secret"
            assert complete(http, "import", 4)["usage"]["completion_tokens"] == 4
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        log.seek(0)
        print(log.read())


def answers(http) -> bool:
    try:
        return http.get("/health").status_code == 200
    except httpx2.TransportError:
        return False


def test_the_example_runs(tmp_path) -> None:
    example = Path(__file__).parent.parent / "examples" / "08_ray.py"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", str(example)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "with an error" in done.stdout
    assert list(tmp_path.iterdir()) == []
