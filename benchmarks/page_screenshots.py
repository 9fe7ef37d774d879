"""Pictures of the page at / of a running server, in light and dark: asks a question, waits for the answer, takes a screenshot.

    python benchmarks/page_screenshots.py http://127.0.0.1:10210 --out benchmarks/results

Needs the extra toka[browser] and an installed Chromium.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

QUESTIONS = (
    "In one sentence: what is a prefix cache?",
    "Name three rivers in Europe and one fact about each.",
)
_ANSWER_TIMEOUT_MS = 300_000
_SECONDS_OF_PLOTS = 12


def take(browser: Browser, url: str, scheme: str, tab: str, path: Path) -> None:
    """One picture: a short conversation, with this tab of the panel open."""
    page = browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 800}).new_page()
    page.goto(url)
    page.get_by_text("ready", exact=True).wait_for()
    page.locator("#temperature").fill("0")
    page.locator("#max_tokens").fill("128")
    for number, question in enumerate(QUESTIONS):
        page.get_by_label("Message", exact=True).fill(question)
        page.keyboard.press("Enter")
        answer = page.locator(".message.assistant:not(.streaming)").nth(number)
        answer.locator(".meta button").first.wait_for(timeout=_ANSWER_TIMEOUT_MS)
    page.wait_for_timeout(1000 * _SECONDS_OF_PLOTS)
    page.get_by_role("tab", name=tab).click()
    page.mouse.move(300, 400)
    page.screenshot(path=str(path))
    page.context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="of the server")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="directory for the pictures")
    options = parser.parse_args()
    path = shutil.which("chromium") or shutil.which("google-chrome")
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to sandbox root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        take(browser, options.url, "light", "Sampling", options.out / "page_light.png")
        take(browser, options.url, "dark", "Model", options.out / "page_dark.png")
        browser.close()


if __name__ == "__main__":
    main()
