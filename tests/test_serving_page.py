"""The page at `/`: its headers without a browser, the rest in headless Chromium."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hf_llmopt import demo

httpx = pytest.importorskip("httpx2")
pytest.importorskip("fastapi")

from served import Running, make, running  # noqa: E402 - needs the extra

from hf_llmopt.serving import Keys, Limits, page  # noqa: E402

pytestmark = pytest.mark.skipif(not (demo.path() / "config.json").is_file(), reason="the embedded model has no weights")
KEY = "sk-page"
BROWSERS = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome")
ATTACK = '<img src=x onerror="window.stolen=1"><script>window.stolen=1</script><b id=bold>bold</b>'


@pytest.fixture(scope="module")
def pair():
    return demo.load()


@pytest.fixture(scope="module")
def it(pair) -> Iterator[Running]:
    with running(make(pair, Keys([KEY]), Limits(1024))) as started:
        yield started


def test_the_page_needs_no_key_and_loads_nothing(it) -> None:
    answer = httpx.get(it.url + "/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert {"default-src 'none'", "frame-ancestors 'none'", "connect-src 'self'"} <= set(policy.split("; "))
    assert policy.count("'sha256-") == 2
    assert KEY not in answer.text
    assert re.findall(r"(?:https?:)?//[a-z]", re.sub(r"// .*", "", answer.text)) == []
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(| style=| on[a-z]+=", answer.text)
    assert httpx.post(it.url + "/").status_code == 405
    assert httpx.get(it.url + "/v1/models").status_code == 401


def test_the_page_shows_figures_that_exist(it) -> None:
    figures = httpx.get(it.url + "/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    known = set(re.findall(r"^llmopt:(\w+)", figures, re.MULTILINE))
    shown = set(re.findall(r"now\.(\w+_(?:total|count|sum|perc|running|waiting))", page.PAGE))
    assert len(shown) > 8
    assert shown <= known


@pytest.mark.parametrize("streams", [True, False])
def test_tokens_count_while_an_answer_grows(it, streams: bool) -> None:
    def growing() -> float:
        found = httpx.get(it.url + "/metrics", headers=headers).text
        return float(re.search(r"^llmopt:generation_tokens_running\{.*\} (\S+)$", found, re.MULTILINE)[1])

    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"prompt": "def main(", "max_tokens": 200, "temperature": 0, "stream": streams}
    assert growing() == 0
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, it.url + "/v1/completions", json=body, headers=headers, timeout=60)
        seen = []
        while not answer.done():
            seen.append(growing())
    assert answer.result().status_code == 200
    assert len(set(seen)) > 3
    assert growing() == 0


# --------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    """Chromium, from `LLMOPT_TEST_BROWSER` or the path."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = os.environ.get("LLMOPT_TEST_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("there is no Chromium; LLMOPT_TEST_BROWSER may name one")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(params=["light", "dark"])
def opened(it, browser, request):
    """The page with its key given, without a word in the console; with `LLMOPT_TEST_PICTURES` a picture of its end."""
    said: list[str] = []
    context = browser.new_context(color_scheme=request.param, viewport={"width": 1200, "height": 760})
    tab = context.new_page()
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(it.url + "/")
    tab.wait_for_selector("#locked:not([hidden])")
    until(tab, "document.getElementById('state').textContent.includes('key')")
    tab.fill("#key", KEY)
    tab.press("#key", "Enter")
    until(tab, "document.getElementById('model').textContent === 'demo'")
    assert not tab.is_visible("#key")
    yield tab
    if folder := os.environ.get("LLMOPT_TEST_PICTURES"):
        tab.screenshot(path=Path(folder) / f"{request.node.name}.png")
    context.close()
    assert [line for line in said if "Failed to load resource" not in line] == [], (
        "but for refusals, which a browser notes"
    )


def until(tab, expression: str) -> None:
    """Wait for something to be true; `wait_for_function` needs what the page's policy forbids."""
    end = time.monotonic() + 15
    while not tab.evaluate(expression):
        assert time.monotonic() < end, expression
        tab.wait_for_timeout(50)


def say(tab, text: str, **settings: str) -> None:
    for name, value in settings.items():
        tab.fill(f"#{name}", value)
    tab.fill("#prompt", text)
    tab.press("#prompt", "Enter")


def answer_text(tab) -> str:
    return tab.inner_text(".turn.assistant:last-child .text")


@pytest.mark.slow
def test_a_chat_streams_and_goes_on(opened, pair) -> None:
    say(opened, "def main(", temperature="0", most="12")
    opened.wait_for_selector(".turn.assistant .note:not(:empty)")
    assert "12 tokens" in opened.inner_text(".turn.assistant .note")
    model, tokenizer = pair
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "def main("}], add_generation_prompt=True)
    ids = ids["input_ids"] if not isinstance(ids, list) else ids
    alone = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    found = opened.evaluate("document.querySelector('.turn.assistant .text').textContent")
    assert found == tokenizer.decode(alone, skip_special_tokens=True)
    say(opened, "and more")
    until(opened, "document.querySelectorAll('.turn.assistant .note:not(:empty)').length === 2")
    assert not opened.inner_text(".turn.assistant:last-child .note").startswith(" 0 of")
    until(opened, "Number(document.getElementById('tokens').textContent) >= 24")
    assert opened.inner_text("#hits").endswith("%")
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.id") in ("send", "clear"), "the next thing is reached by Tab"
    opened.click("#clear")
    assert opened.query_selector(".turn") is None


@pytest.mark.slow
@pytest.mark.parametrize("how", ["click", "Escape"])
def test_stop_frees_the_request(opened, it, how: str, monkeypatch) -> None:
    monkeypatch.setattr(it.service.engine.loop, "on_step", lambda plan, began: time.sleep(0.02))
    say(opened, "def main(", temperature="0", most="900")
    until(opened, "document.querySelector('.turn.assistant .text').textContent.length > 5")
    until(opened, "Number(document.getElementById('running').textContent) >= 1")
    opened.click("#stop") if how == "click" else opened.keyboard.press("Escape")
    until(opened, "document.querySelector('.turn.assistant .note').textContent === 'stopped'")
    assert it.idle()
    assert opened.is_enabled("#send")


@pytest.mark.slow
def test_a_new_chat_knows_nothing_of_an_answer_that_still_came(opened, it, monkeypatch) -> None:
    monkeypatch.setattr(it.service.engine.loop, "on_step", lambda plan, began: time.sleep(0.02))
    say(opened, "def main(", temperature="0", most="900")
    until(opened, "document.querySelector('.turn.assistant .text').textContent.length > 5")
    opened.click("#clear")
    with opened.expect_request("**/v1/chat/completions") as asked:
        say(opened, "class A", most="2")
    assert json.loads(asked.value.post_data)["messages"] == [{"role": "user", "content": "class A"}]
    until(opened, "document.querySelectorAll('.turn.assistant .note:not(:empty)').length === 1")
    assert it.idle()


@pytest.mark.slow
def test_what_a_model_writes_stays_text(opened) -> None:
    """The answer holds markup, and comes as a server would send it."""
    chunks = [
        {"choices": [{"delta": {"content": piece}}]}
        for piece in (ATTACK[:30], ATTACK[30:], "\u2028 e\u0301 \U0001f600")
    ]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    opened.route(
        "**/v1/chat/completions", lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body)
    )
    say(opened, ATTACK)
    until(opened, "document.querySelector('.turn.assistant .text').textContent.includes('bold</b>')")
    time.sleep(0.3)  # an image would fail by then
    assert ATTACK in opened.evaluate("document.querySelector('.turn.user .text').textContent")
    assert opened.query_selector("#log img, #log script, #log b") is None
    assert opened.evaluate("window.stolen") is None


@pytest.mark.slow
def test_errors_are_shown_and_the_message_is_kept(opened) -> None:
    say(opened, "x " * 3000)
    opened.wait_for_selector(".turn.assistant .note.bad")
    assert "maximum context length" in opened.inner_text(".turn.assistant .note")
    assert opened.input_value("#prompt").startswith("x x")
