"""Chromium without a window, for the tests of the telephone in the browser and for the picture in the README.

    python -m tests.chromium docs/telephone.png     takes that picture

It needs: apt-get install chromium chromium-driver && .venv/bin/pip install selenium
"""

import contextlib
import shutil
import sys
import tempfile
import time

from tests.browser import BrowserPhone, Switchboard
from tests.claude import KEY, Claude, Reply
from tests.phone import App

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    " --disable-background-networking --disable-component-update"
).split()
CALL = [  # what the caller types, and what Claude answers
    ("Hi! I'm on a train. Tell me something about the sea.",
     "It has lakes of its own. Very salty water collects on the sea floor, like a pond with a shore."),
    ("Does anything live there?",
     "Yes, there are microbes in the salty water and mussels around it. Would you like to hear more?"),
]


@contextlib.contextmanager
def chromium(width=1280, height=900):
    """A browser, driven by selenium. Raises RuntimeError, with what to install."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        raise RuntimeError("there is no Chromium: apt-get install chromium chromium-driver")
    try:
        from selenium import webdriver
    except ImportError:
        raise RuntimeError("selenium is not installed: pip install selenium") from None
    options = webdriver.ChromeOptions()
    options.binary_location = program
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--window-size={width},{height}", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
        try:
            yield browser
        finally:
            browser.quit()


def take_picture(path):
    """Save a picture of the telephone in the middle of a call."""
    with Claude() as claude, contextlib.ExitStack() as stack:
        for words, reply in CALL:
            claude.when(words, Reply(reply, first_token=0.4, pace=60))
        app = stack.enter_context(App({"ANTHROPIC_API_KEY": KEY, "ANTHROPIC_BASE_URL": claude.url}))
        page = stack.enter_context(Switchboard(lambda: BrowserPhone(app.url, app.token)))
        browser = stack.enter_context(chromium(1100, 800))
        browser.get(page.url)
        browser.find_element("id", "call").click()
        for words, reply in CALL:
            wait(browser, "listening !== null")
            browser.find_element("id", "words").send_keys(words + "\n")
            wait(browser, f"document.body.textContent.includes({reply.split('. ')[-1]!r})")
        wait(browser, "listening !== null")
        browser.save_screenshot(path)


def wait(browser, condition):
    until = time.monotonic() + 60
    while not browser.execute_script(f"return {condition}"):
        if time.monotonic() > until:
            raise TimeoutError(condition)
        time.sleep(0.1)


if __name__ == "__main__":
    take_picture(sys.argv[1])
