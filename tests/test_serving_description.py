"""`/openapi.json` is true: schemathesis draws requests from it, right and wrong ones, and looks at what comes back."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hf_llmopt import demo

httpx = pytest.importorskip("httpx2")
pytest.importorskip("fastapi")

from served import make, running  # noqa: E402 - needs the extra

from hf_llmopt.serving import Keys, Limits  # noqa: E402
from hf_llmopt.serving.description import ANSWERS, BODIES, EXAMPLES  # noqa: E402

pytestmark = pytest.mark.skipif(not (demo.path() / "config.json").is_file(), reason="the embedded model has no weights")
KEY = "sk-described"
# What fits together, lengths in tokens say, no JSON schema says: requests that obey it may be refused.
NOT_CHECKED = "positive_data_acceptance"
CONFIG = Path(__file__).parent / "schemathesis.toml"


@pytest.fixture(scope="module")
def it():
    with running(make(demo.load(), Keys([KEY]), Limits(256, max_body_bytes=200_000), max_waiting=64)) as started:
        yield started


def test_routes_are_described(it) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    found = httpx.get(it.url + "/openapi.json", headers=headers).json()
    assert set(found["paths"]) == {*ANSWERS, "/metrics"}
    assert {path for path, operations in found["paths"].items() if "post" in operations} == set(BODIES)
    assert "security" not in found["paths"]["/health"]["get"]
    for path in BODIES:
        operation = found["paths"][path]["post"]
        assert operation["security"] == [{"key": []}]
        assert {"200", "400", "401", "429", "503"} <= set(operation["responses"])
    assert "text/event-stream" in found["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"]
    assert "#/$defs" not in str(found)
    refused = httpx.put(it.url + "/tokenize", headers=headers)
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize(("path", "body"), [(path, body) for path, bodies in EXAMPLES.items() for body in bodies])
def test_examples_are_answered(it, path: str, body: dict) -> None:
    answer = httpx.post(it.url + path, json=body, headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream" if "stream" in body else "application/json")


def test_an_error_is_about_the_kind_of_body_that_was_meant(it) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    neither: dict = {"model": "demo", "messages": None}
    for body, param in (({"messages": [{"role": 1}]}, "messages"), (neither, "prompt"), ({}, "prompt"), ([], None)):
        error = httpx.post(it.url + "/tokenize", json=body, headers=headers).json()["error"]
        assert error["param"] == param
        says = {"messages": "messages.0.role:", "prompt": "prompt: give `prompt`, or `messages`", None: "The body must"}
        assert error["message"].startswith(says[param])


@pytest.mark.slow
def test_schemathesis_finds_nothing(it, tmp_path) -> None:
    command = os.environ.get("LLMOPT_TEST_SCHEMATHESIS") or shutil.which("schemathesis")
    if command is None:
        pytest.skip("schemathesis is not installed: `make contract` brings it")
    asked = ["-H", f"Authorization: Bearer {KEY}", "--checks", "all", "--exclude-checks", NOT_CHECKED]
    done = subprocess.run(
        [
            command,
            "--config-file",
            str(CONFIG),
            "run",
            f"{it.url}/openapi.json",
            "--seed",
            "1",
            "--continue-on-failure",
            *asked,
        ],
        cwd=tmp_path,  # it leaves files
        capture_output=True,
        text=True,
        timeout=1500,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert it.idle(), "pages are held that nobody waits for"
