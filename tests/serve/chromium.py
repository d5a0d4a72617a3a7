"""Headless Chromium for tests of the page, and the few things that a reader does with it."""

import contextlib
import shutil

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="the page's tests need the package selenium")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

_CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_DRIVER = shutil.which("chromedriver")

needed = pytest.mark.skipif(
    not (_CHROMIUM and _DRIVER), reason="the page's tests need Chromium and chromedriver"
)


@contextlib.contextmanager
def browsing():
    """Yields a driver of a new browser, and closes it."""
    options = webdriver.ChromeOptions()
    options.binary_location = _CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(_DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def wait_for(browser, is_so, seconds=10):
    """Waits until `is_so()`, and fails if it does not become so."""
    WebDriverWait(browser, seconds, poll_frequency=0.02).until(lambda _: is_so())


def find(browser, selector):
    """Returns the first element of a CSS selector."""
    return browser.find_element(By.CSS_SELECTOR, selector)


def find_all(browser, selector):
    """Returns all elements of a CSS selector."""
    return browser.find_elements(By.CSS_SELECTOR, selector)


def shown(browser, selector):
    """Returns the visible text of what `selector` finds, "" where there is nothing."""
    return "\n".join(filter(None, (found.text for found in find_all(browser, selector))))


def send(browser, text):
    """Writes a message and sends it."""
    find(browser, "#message").send_keys(text, Keys.ENTER)


def ask(browser, text, seconds=10):
    """Sends `text` and waits for the answer's end."""
    send(browser, text)
    wait_for(browser, lambda: is_idle(browser), seconds)


def is_idle(browser):
    """Tells if no answer streams."""
    return find(browser, "#send").is_displayed()


def slide(browser, selector, value):
    """Moves a slider, as a reader would."""
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
    browser.execute_script(script, find(browser, selector), str(value))
