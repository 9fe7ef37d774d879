"""The page at / in a headless Chromium, clicked and typed through like a person would; and what guards it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_engine import REPORT, Behaviour
from running_server import RunningServer

from toka.messages import Submit, unpack_tokens

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the extra toka[browser]")
    path = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(CHROMIUM_NAMES)} is installed")
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to sandbox root
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a server's page. Afterwards: nothing went wrong in it, and it has asked nobody but its server."""
    opened: list[tuple[Any, list[str], list[str]]] = []

    def open_it(server: RunningServer, **options: Any) -> Any:
        page = browser.new_context(base_url=server.url, **options).new_page()
        page.set_default_timeout(15_000)
        faults: list[str] = []
        strangers: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "console",
            lambda message: faults.append(message.text) if "Content Security Policy" in message.text else None,
        )
        page.on(
            "request",
            lambda request: None if request.url.startswith((server.url, "data:")) else strangers.append(request.url),
        )
        page.goto("/")
        opened.append((page, faults, strangers))
        return page

    yield open_it
    for page, faults, strangers in opened:
        page.context.close()
        assert not faults
        assert not strangers


def _say(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def _prompt(submit: Submit) -> str:
    return bytes(unpack_tokens(submit.prompt).tolist()).decode()


def test_a_conversation(start_server, open_page: Callable[..., Any]) -> None:
    text = "**Bold** and `code` <b>raw</b>\n\n```py\nprint('<i>')\n```\n\n- one\n- two\n\nEnd."
    server = start_server(Behaviour(reply=lambda submit, _: list(text.encode()), max_request_tokens=2000))
    page = open_page(server)
    page.get_by_text("ready", exact=True).wait_for()
    _say(page, "hello <script>")
    answer = page.locator(".message.assistant:not(.streaming)")
    answer.get_by_text("End.").wait_for()
    assert page.locator(".message.user .text").inner_text() == "hello <script>"
    assert answer.locator("strong").inner_text() == "Bold"
    assert answer.locator("li").count() == 2
    assert answer.locator("pre").inner_text() == "print('<i>')"
    assert answer.locator("b, i").count() == 0  # what the model writes never becomes markup
    assert re.search(r"\d+ tokens · .* tokens/s · .*first after \d+ ms", answer.locator(".meta").inner_text())
    _say(page, "and more")
    page.locator(".message.assistant:not(.streaming)").nth(1).get_by_text("End.").wait_for()
    prompts = [_prompt(submit) for submit in server.engine.submitted()]
    assert prompts[1].startswith(f"[user]hello <script>\n[assistant]{text}") and "and more" in prompts[1]
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".message").count() == 0
    assert page.evaluate("document.activeElement.id") == "prompt"


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_the_request_in_the_engine_too(start_server, open_page: Callable[..., Any], how: str) -> None:
    server = start_server(Behaviour(reply=lambda submit, _: [97] * 1900, step_s=0.02))
    page = open_page(server)
    _say(page, "go on")
    page.locator(".message.streaming").get_by_text("aaa").wait_for()
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    page.get_by_text("stopped").wait_for()
    server.wait(lambda: bool(server.engine.aborted()))
    assert page.get_by_role("button", name="Send").is_visible()
    page.get_by_role("button", name="Again").click()
    page.locator(".message.streaming").get_by_text("aaa").wait_for()
    assert page.locator(".message.user").count() == page.locator(".message.assistant").count() == 1


def test_the_sliders_reach_the_engine_and_are_kept(start_server, open_page: Callable[..., Any]) -> None:
    server = start_server()
    page = open_page(server)
    for name, value in (
        ("temperature", "0.25"),
        ("top_p", "0.5"),
        ("min_p", "0.1"),
        ("top_k", "40"),
        ("max_tokens", "32"),
    ):
        page.locator(f"#{name}").fill(value)
    page.locator("#seed").fill("7")
    page.locator("#system").fill("be brief")
    page.reload()
    assert page.locator("#temperature").input_value() == "0.25"
    _say(page, "hi")
    server.wait(lambda: len(server.engine.submitted()) == 1)
    [submit] = server.engine.submitted()
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_p, sampling.min_p, sampling.top_k) == (0.25, 0.5, 0.1, 40)
    assert (sampling.max_tokens, submit.seed) == (32, 7)
    assert _prompt(submit).startswith("[system]be brief")
    page.get_by_role("button", name="Back to the defaults").click()
    assert page.locator("#temperature").input_value() == "0.7"


def test_plots_and_tables(start_server, open_page: Callable[..., Any]) -> None:
    server = start_server(Behaviour(reply=lambda submit, _: [97] * 1900, step_s=0.01))
    page = open_page(server)
    _say(page, "go on")
    page.locator("#plot-requests output", has_text="1 / 0").wait_for()
    page.locator("#plot-cache output", has_text="25 %").wait_for()
    page.locator("#plot-hits output", has_text="40 %").wait_for()
    page.wait_for_function("parseFloat(document.querySelector('#plot-speed output').textContent) > 5")
    assert page.locator("#plot-speed .line").get_attribute("d").count("L") >= 1
    page.locator("#plot-requests svg").hover()
    assert page.locator("#plot-requests .rule").get_attribute("visibility") == "visible"
    page.get_by_role("tab", name="Sampling").focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("tab", name="Model").get_attribute("aria-selected") == "true"
    facts = page.locator("#facts").inner_text()
    assert "tiny-bytes" in facts and "2,000 tokens" in facts and "1,000 × 16 tokens" in facts
    memory = page.locator("#memory tr").all_inner_texts()
    assert [line.split() for line in memory] == [
        ["weights", "3.0", "MiB"],
        ["activations", "1.0", "MiB"],
        ["kv", "cache", "12.0", "MiB"],
    ]
    page.keyboard.press("ArrowRight")
    warmup = page.locator("#warmup").inner_text()
    assert "1.50" in warmup and "2.00" in warmup and "1 tokens, 1 samples" in warmup
    assert str(REPORT["kernels"]["paged_attention"]) in warmup


def test_the_key_is_asked_for(start_server, open_page: Callable[..., Any]) -> None:
    server = start_server(Behaviour(), api_key="right")
    page = open_page(server)
    for key in ("wrong", "right"):
        dialog = page.get_by_role("dialog")
        dialog.wait_for()
        page.locator("#key").fill(key)
        page.keyboard.press("Enter")
    page.get_by_text("ready", exact=True).wait_for()
    _say(page, "hi")
    page.locator(".message.assistant:not(.streaming) .meta").get_by_text("tokens").wait_for()
    assert page.evaluate("localStorage.length") == 0  # the key lives no longer than the tab


def test_errors_are_shown_where_the_answer_would_be(start_server, open_page: Callable[..., Any]) -> None:
    server = start_server(Behaviour(error_at_token=2), max_prompt_tokens=60)
    page = open_page(server)
    _say(page, "x" * 100)
    page.locator(".message.error", has_text="this server takes 60 at most").wait_for()
    page.get_by_role("button", name="New chat").click()
    _say(page, "hi")
    page.locator(".message.error", has_text="could not go on").wait_for()
    server.call(lambda: server.serving.engine.died("The engine process has ended (status 7)."))
    page.get_by_text("failed", exact=True).wait_for()


def test_dark_and_light_and_narrow(server: RunningServer, open_page: Callable[..., Any]) -> None:
    page = open_page(server, color_scheme="dark", viewport={"width": 420, "height": 800})
    theme = "document.documentElement.dataset.theme"
    assert page.evaluate(theme) == "dark"
    page.get_by_role("button", name="Dark or light").click()
    assert page.evaluate(theme) == "light"
    page.reload()
    assert page.evaluate(theme) == "light"
    assert not page.locator("#plot-speed").is_visible()
    page.get_by_role("button", name="Engine").click()
    assert page.locator("#plot-speed").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 420


# --------------------------------------------------------------------------------------------------- without a browser


def test_the_page_needs_no_key_and_nothing_from_outside(start_server) -> None:
    server = start_server(Behaviour(), api_key="right")
    reply = server.get("/")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert "unsafe" not in reply.headers["content-security-policy"]
    assert not re.search(r"""(src|href)=["'](?!data:)""", reply.text)
    assert "https://" not in reply.text
    assert server.get("/status").status_code == 401


def test_status(start_server) -> None:
    server = start_server()
    server.post("/v1/completions", {"prompt": "abc", "max_tokens": 5})
    status = server.get("/status").json()
    assert status["state"] == "ready"
    assert status["model"]["id"] == "tiny-bytes"
    assert status["engine"]["kv_cache_usage"] == 0.25
    assert status["engine"]["generation_tokens_total"] == 5
    assert server.get("/status/report").json() == REPORT
    server.serving.draining = True
    assert server.get("/status").json()["state"] == "draining"


def test_status_while_warming_up(start_server) -> None:
    server = start_server(Behaviour(warm_s=1.0))
    status = server.get("/status").json()
    assert (status["state"], status["model"]["dtype"]) == ("warming up", None)
    assert server.get("/status/report").status_code == 503
    assert server.get("/").status_code == 200
