"""The chat page as the server serves it, with the packaged model behind it."""

import contextlib
import re
import subprocess
import sys
import time

import pytest
from chromium import ask, browsing, find, is_idle, needed, send, shown, slide, wait_for

pytestmark = needed

KEY = "key-for-this-test"
SECONDS_TO_START = 180  # compiles, and on a busy machine
WATCH = """
seen = [];
const note = () => seen.push(log.querySelector(".answer .text:not(details *)")?.textContent.length ?? 0);
new MutationObserver(note).observe(log, {childList: true, subtree: true});
"""


@contextlib.contextmanager
def serving(log, *flags):
    """Yields the address of a new `mla-jax serve`; what it says goes to the file `log`."""
    command = [sys.executable, "-m", "mla_jax", "serve", "--port", "0", *flags]
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield _address(process, log)
    finally:
        process.terminate()
        process.wait(timeout=60)


def _address(process, log):
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r"serving .* at (http://\S+)", log.read_text()):
            return found[1]
        time.sleep(0.1)
    pytest.fail(f"the server did not start:\n{log.read_text()}")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A browser that shows the page of a server that asks for a key, given as browsers ask for it."""
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(log, "--ctx-size", "2048", "--api-key", KEY) as address, browsing() as driver:
        driver.get(address.replace("://", f"://:{KEY}@"))  # as if it were typed in the browser's dialogue
        yield driver


def test_page_talks_to_the_server(browser):
    wait_for(browser, lambda: shown(browser, "#slots").startswith("0 of 4 slots busy"))
    assert "2,048 tokens of context · 6 of " in shown(browser, "#facts")
    slide(browser, "#temperature", 0)
    find(browser, "#max-tokens").send_keys("96")

    browser.execute_script(WATCH)
    ask(browser, "def read_lines(path):", seconds=60)
    lengths = browser.execute_script("return seen")
    assert len(set(lengths)) > 2 and lengths == sorted(lengths)  # it grew before one's eyes
    assert re.match(r"\d+ tokens? · [\d.]+ tokens/s", shown(browser, ".facts"))
    assert re.fullmatch(r"[\d.]+ tokens/s", shown(browser, "#speed"))
    assert re.match(r"\d+ of 2,048 tokens", shown(browser, "#context"))

    ask(browser, "def write_lines(path):", seconds=60)
    assert "from the cache" in shown(browser, ".answer:last-child .facts")

    find(browser, "#ser-on").click()
    slide(browser, "#ser-minimum", 1)
    slide(browser, "#ser-threshold", 1)
    before = shown(browser, ".answer:last-child .text")
    find(browser, ".answer:last-child .again").click()
    wait_for(browser, lambda: is_idle(browser), seconds=60)
    assert shown(browser, ".answer:last-child .text") != before
    assert not find(browser, "#problem").is_displayed()
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_same_question_is_answered_alike(browser):
    """All of its prompt is in the cache the second time."""
    find(browser, "#new-chat").click()
    if find(browser, "#ser-on").is_selected():
        find(browser, "#ser-on").click()
    ask(browser, "import os", seconds=60)
    before = shown(browser, ".answer .text")
    find(browser, ".answer .again").click()
    wait_for(browser, lambda: is_idle(browser), seconds=20)
    assert shown(browser, ".answer .text") == before != ""


def test_stop_frees_the_slot(browser):
    find(browser, "#new-chat").click()
    find(browser, "#max-tokens").clear()
    send(browser, "def fibonacci(n):")  # the likeliest answer goes in circles until the context is full
    wait_for(browser, lambda: shown(browser, ".answer .text"), seconds=60)
    find(browser, "#stop").click()
    wait_for(browser, lambda: shown(browser, ".facts").endswith("stopped"))
    wait_for(browser, lambda: shown(browser, "#slots").startswith("0 of 4 slots busy"))


def test_refusal_is_shown(browser):
    find(browser, "#new-chat").click()
    browser.execute_script("message.value = 'word '.repeat(5000)")
    ask(browser, "more", seconds=60)
    assert shown(browser, "#problem-text").startswith("The server refused the request (400): ")
