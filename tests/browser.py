"""A browser: Playwright's (`playwright install chromium`), or the Chromium whose path is in CHROMIUM."""

import os

import pytest


@pytest.fixture(scope="module")
def tab():
    """A page of a browser, and what goes wrong on it: errors, and requests that leave the disk."""
    from playwright.sync_api import sync_playwright

    def look(request):
        if not request.url.startswith(("file:", "data:", "blob:")):
            wrong.append(request.url)

    own = os.environ.get("CHROMIUM")
    wrong = []
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--no-zygote", "--single-process"] if own else []
        browser = playwright.chromium.launch(executable_path=own, args=arguments)
        page = browser.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", look)
        yield page, wrong
        browser.close()
