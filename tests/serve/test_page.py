"""The chat page in a browser, before a stand-in for the server."""

import re

import page_stub
import pytest
from chromium import Keys, ask, browsing, find, find_all, is_idle, needed, send, shown, slide, wait_for

pytestmark = needed


@pytest.fixture(scope="module")
def browser():
    with browsing() as driver:
        yield driver


@pytest.fixture(scope="module")
def served():
    with page_stub.serving() as stub:
        yield stub


@pytest.fixture
def stub(served, browser):
    """A stand-in that answers "Hello", and a fresh tab that shows its page."""
    served.deltas, served.refusal, served.is_cut, served.key = [{"content": "Hello"}], None, False, ""
    served.asked, served.num_aborted = [], 0
    served.gate.clear()
    browser.get(served.url)
    browser.execute_script("sessionStorage.clear()")
    browser.get(served.url)
    wait_for(browser, lambda: shown(browser, "#slots") == "1 of 4 slots busy, 1,200 tokens kept")
    browser.get_log("browser")
    return served


def is_nameless(control):
    return control.is_displayed() and not control.accessible_name


def test_answer_appears_while_it_is_drawn(browser, stub):
    stub.deltas = [{"content": "Once upon"}, None, {"content": " a time."}]
    send(browser, "Tell a story")
    wait_for(browser, lambda: shown(browser, ".answer .text") == "Once upon")
    assert find(browser, "#stop").is_displayed() and not is_idle(browser)
    assert find(browser, ".answer").get_attribute("aria-busy") == "true"
    stub.gate.set()
    wait_for(browser, lambda: is_idle(browser))
    assert shown(browser, ".answer .text") == "Once upon a time."
    assert find(browser, ".answer").get_attribute("aria-busy") == "false"
    assert shown(browser, ".question") == "Tell a story"


def test_speed_and_use_of_the_cache_are_told(browser, stub):
    ask(browser, "hello")
    assert shown(browser, ".facts") == "12 tokens · 123.4 tokens/s · 32 of 40 prompt tokens from the cache"
    assert shown(browser, "#speed") == "123.4 tokens/s"
    assert shown(browser, "#context") == "52 of 8,192 tokens, 32 cached"
    assert find(browser, "#context").get_attribute("aria-valuenow") == "52"
    assert shown(browser, "#model") == "stub-16b"
    assert shown(browser, "#facts") == "8,192 tokens of context · 6 of 64 experts a token"


def test_speed_is_told_while_the_answer_streams(browser, stub):
    stub.deltas = [{"content": "one"}, {"content": " two"}, None]
    send(browser, "hello")
    wait_for(browser, lambda: re.fullmatch(r"[\d.]+ tokens/s", shown(browser, "#speed")))
    stub.gate.set()
    wait_for(browser, lambda: is_idle(browser))


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop_ends_the_request_and_keeps_what_there_is(browser, stub, way):
    stub.deltas = [{"content": "Once upon"}, None]
    send(browser, "Tell a story")
    wait_for(browser, lambda: shown(browser, ".answer .text") == "Once upon")
    if way == "button":
        find(browser, "#stop").click()
    else:
        find(browser, "#message").send_keys(Keys.ESCAPE)
    wait_for(browser, lambda: is_idle(browser))
    wait_for(browser, lambda: stub.num_aborted == 1)
    assert shown(browser, ".answer .text") == "Once upon"
    assert shown(browser, ".facts").endswith("stopped")
    assert not find(browser, "#problem").is_displayed()
    stub.deltas = [{"content": "there was"}]
    ask(browser, "go on")
    assert stub.asked[-1]["messages"] == [
        {"role": "user", "content": "Tell a story"},
        {"role": "assistant", "content": "Once upon"},
        {"role": "user", "content": "go on"},
    ]


@pytest.mark.parametrize(
    ("status", "headers", "sentence"),
    [
        (400, {}, "The server refused the request (400): It is so."),
        (429, {"Retry_After": "2"}, "The server has as many requests as it takes (429): It is so."),
        (
            503,
            {"Retry_After": "1"},
            "The server is not ready (503): It is so. It asks for 1 second of patience.",
        ),
        (500, {}, "The server failed (500): It is so."),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_refusal_is_a_sentence_and_can_be_tried_again(browser, stub, status, headers, sentence):
    stub.refuse(status, "It is so", **headers)
    ask(browser, "hello")
    assert shown(browser, "#problem-text").startswith(sentence)
    assert shown(browser, ".answer") == ""
    stub.refusal = None
    find(browser, "#retry").click()
    wait_for(browser, lambda: shown(browser, ".answer .text") == "Hello")
    wait_for(browser, lambda: is_idle(browser))
    assert not find(browser, "#problem").is_displayed()
    assert stub.asked[0]["messages"] == stub.asked[1]["messages"] == [{"role": "user", "content": "hello"}]


def test_answer_that_breaks_off_says_so(browser, stub):
    stub.deltas, stub.is_cut = [{"content": "Once"}], True
    ask(browser, "hello")
    assert shown(browser, "#problem-text") == "The connection broke off before the answer was complete."
    assert shown(browser, ".answer .text") == "Once"
    assert shown(browser, ".facts") == "broken off"
    stub.is_cut = False
    find(browser, "#retry").click()
    wait_for(browser, lambda: is_idle(browser))
    assert len(find_all(browser, ".answer")) == 1


def test_server_that_is_gone_says_so(browser, stub):
    with page_stub.serving() as short_lived:
        browser.get(short_lived.url)
        wait_for(browser, lambda: shown(browser, "#slots"))
    ask(browser, "hello")
    assert shown(browser, "#problem-text").startswith("The server cannot be reached")


def test_question_without_an_answer_is_not_sent_twice(browser, stub):
    stub.refuse(400, "Too long")
    ask(browser, "a long question")
    stub.refusal = None
    ask(browser, "a short one")
    assert stub.asked[-1]["messages"] == [{"role": "user", "content": "a short one"}]


def test_key_is_asked_for_and_kept_for_the_tab(browser, stub):
    stub.key = "secret"
    browser.refresh()
    wait_for(browser, lambda: "(401)" in shown(browser, "#problem-text"))
    assert browser.switch_to.active_element.get_attribute("id") == "api-key"
    send(browser, "hello")
    wait_for(browser, lambda: is_idle(browser))
    find(browser, "#api-key").send_keys("secret", Keys.ENTER)
    wait_for(browser, lambda: shown(browser, ".answer .text") == "Hello")  # asked again of itself
    wait_for(browser, lambda: shown(browser, "#slots") == "1 of 4 slots busy, 1,200 tokens kept")
    assert not find(browser, "#problem").is_displayed()
    browser.refresh()
    wait_for(browser, lambda: shown(browser, "#model") == "stub-16b")
    assert find(browser, "#api-key").get_attribute("value") == "secret"
    assert browser.execute_script("return localStorage.length + document.cookie.length") == 0


HOSTILE = (
    '<img src=x onerror="document.title=1"> </script><script>document.title=1</script> '
    "**<b onclick=1>bold</b>** `<i>code</i>`\n```<s>\n<img src=x onerror=alert(1)>\n```\n"
    "- <iframe src=/></iframe>\n## <style>*{display:none}</style>"
)


def test_text_of_a_model_is_never_read_as_html(browser, stub):
    call = {
        "index": 0,
        "id": "1",
        "function": {"name": "<u>f</u>", "arguments": "<img src=x onerror=alert(1)>"},
    }
    stub.deltas = [{"content": HOSTILE}, {"reasoning_content": HOSTILE}, {"tool_calls": [call]}]
    ask(browser, HOSTILE.replace("\n", " "))
    text = shown(browser, ".answer")
    assert '<img src=x onerror="document.title=1">' in text and "</script>" in text
    assert "<img src=x onerror=alert(1)>" in text and "tool call: <u>f</u>" in text
    forbidden = "#log :is(img, script, iframe, style, i, b, s, u)"
    assert find_all(browser, forbidden) == []
    assert browser.title == "stub-16b · mla-jax"


def test_code_is_set_apart_and_all_of_a_text_is_shown(browser, stub):
    stub.deltas = [
        {"content": text} for text in ("Use ``", "`python\ndef f(**kw):\n", "    return 1\n```\nor `g`.")
    ]
    ask(browser, "hello")
    assert shown(browser, ".answer .text").startswith("Use ```python")  # a fence begins a line
    stub.deltas = [
        {"content": text} for text in ("Use\n``", "`python\ndef f(**kw):\n", "    return 1\n```\nor `g`.")
    ]
    ask(browser, "hello")
    answer = ".answer:last-child"
    assert shown(browser, f"{answer} figcaption span") == "python"
    assert shown(browser, f"{answer} pre") == "def f(**kw):\n    return 1"
    assert shown(browser, f"{answer} p") == "Use\nor g."
    assert shown(browser, f"{answer} p code") == "g"


def test_lists_headings_and_emphasis_are_set_and_powers_left_alone(browser, stub):
    stub.deltas = [{"content": "## Two **things**\n- one\n2. **two**\n\nf(**a, **b) and 2**3 and 4**5"}]
    ask(browser, "hello")
    assert shown(browser, ".answer h3") == "Two things"
    assert [found.text for found in find_all(browser, ".answer .item")] == ["• one", "2. two"]
    assert shown(browser, ".answer p:last-child") == "f(**a, **b) and 2**3 and 4**5"
    assert shown(browser, ".answer strong") == "things\ntwo"


def test_plain_answers_keep_every_character(browser, stub):
    find(browser, "#plain").click()
    text = "# **a**, `b`\n- c\n\n\n    return **kw"
    stub.deltas = [{"content": text}]
    ask(browser, "hello")
    assert find(browser, ".answer pre").get_attribute("textContent") == text


def test_thoughts_are_folded_and_tool_calls_joined(browser, stub):
    name = {"index": 0, "id": "call-1", "function": {"name": "search", "arguments": '{"for'}}
    rest = {"index": 0, "function": {"arguments": '": "a"}'}}
    stub.deltas = [
        {"reasoning_content": "Hm."},
        {"content": "Well."},
        {"tool_calls": [name]},
        {"tool_calls": [rest]},
    ]
    ask(browser, "hello")
    assert shown(browser, "details summary") == "Thoughts"
    assert "Hm." not in shown(browser, ".answer")
    find(browser, "details summary").click()
    assert "Hm." in shown(browser, ".answer")
    assert shown(browser, ".calls pre") == '{"for": "a"}'
    ask(browser, "and now?")
    assert stub.asked[-1]["messages"][1]["tool_calls"] == [
        {"id": "call-1", "type": "function", "function": {"name": "search", "arguments": '{"for": "a"}'}}
    ]


def test_settings_are_sent_once_they_are_touched(browser, stub):
    ask(browser, "hello")
    sent = {"messages", "stream", "stream_options", "timings_per_token"}
    assert set(stub.asked[-1]) == sent
    find(browser, "#system").send_keys("Be brief.")
    slide(browser, "#temperature", 0.25)
    find(browser, "#max-tokens").send_keys("64")
    find(browser, "#ser-on").click()
    slide(browser, "#ser-minimum", 4)
    slide(browser, "#ser-threshold", 1)
    assert shown(browser, "#ser-hint") == "Exactly 4 of a token's 6 experts."
    ask(browser, "again")
    asked = stub.asked[-1]
    assert set(asked) == sent | {"temperature", "max_tokens", "ser"}
    assert (asked["temperature"], asked["max_tokens"], asked["ser"]) == (0.25, 64, "4,1")
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    browser.refresh()
    wait_for(browser, lambda: shown(browser, "#model") == "stub-16b")
    assert shown(browser, "#ser-minimum-value") == "4 of 6"


def test_new_chat_forgets_and_again_replaces(browser, stub):
    ask(browser, "first")
    stub.deltas = [{"content": "Hello again"}]
    find(browser, ".answer .again").click()
    wait_for(browser, lambda: shown(browser, ".answer .text") == "Hello again")
    wait_for(browser, lambda: is_idle(browser))
    assert stub.asked[-1]["messages"] == [{"role": "user", "content": "first"}]
    find(browser, "#new-chat").click()
    assert shown(browser, "#log") == "" and find(browser, "#welcome").is_displayed()
    ask(browser, "second")
    assert stub.asked[-1]["messages"] == [{"role": "user", "content": "second"}]


def test_new_chat_stops_what_runs(browser, stub):
    stub.deltas = [{"content": "Once"}, None]
    send(browser, "first")
    wait_for(browser, lambda: shown(browser, ".answer .text") == "Once")
    find(browser, "#new-chat").click()
    wait_for(browser, lambda: stub.num_aborted == 1)
    stub.deltas = [{"content": "Hello"}]
    ask(browser, "second")
    assert shown(browser, ".answer .text") == "Hello"
    assert stub.asked[-1]["messages"] == [{"role": "user", "content": "second"}]


def test_shift_enter_starts_a_line_and_nothing_sends_nothing(browser, stub):
    send(browser, "   ")
    find(browser, "#message").clear()
    find(browser, "#message").send_keys("one", Keys.SHIFT + Keys.ENTER + Keys.NULL, "two", Keys.ENTER)
    wait_for(browser, lambda: is_idle(browser) and shown(browser, ".answer .text") == "Hello")
    assert [asked["messages"][0]["content"] for asked in stub.asked] == ["one\ntwo"]


def test_copy_takes_the_text_as_it_was_sent(browser, stub):
    browser.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    stub.deltas = [{"content": "a **b**\n```\nc\n```"}]
    ask(browser, "hello")
    find(browser, ".meta [aria-label='Copy answer']").click()
    wait_for(browser, lambda: shown(browser, ".meta [aria-label='Copy answer']") == "Copied")
    script = "const done = arguments[0]; navigator.clipboard.readText().then(done, done)"
    assert browser.execute_async_script(script) == "a **b**\n```\nc\n```"


def test_page_obeys_its_policy_and_names_every_control(browser, stub):
    ask(browser, "hello")
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    controls = find_all(browser, "button, input, textarea, [role=meter], [role=log]")
    assert [found.get_attribute("id") for found in controls if is_nameless(found)] == []


@pytest.mark.parametrize("width", [320, 390, 768])
def test_page_fits_narrow_screens(browser, stub, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        browser.refresh()
        stub.deltas = [{"content": "x" * 300 + "\n```\n" + "y" * 300 + "\n```\n"}]
        ask(browser, "z" * 300)
        assert browser.execute_script("return document.documentElement.scrollWidth") == width
        assert browser.execute_script("return scroller.scrollWidth - scroller.clientWidth") == 0
        assert find(browser, "#send").rect["x"] + find(browser, "#send").rect["width"] <= width
        assert not find(browser, "#settings").is_displayed()
        find(browser, "#toggle-settings").click()
        assert find(browser, "#api-key").is_displayed()
        browser.switch_to.active_element.send_keys(Keys.ESCAPE)
        assert not find(browser, "#settings").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
