"""The page at /, driven by a real browser: needs a Chromium on this machine."""

import re
import shutil

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """A page that has been loaded; it must ask for nothing elsewhere, and report no error."""
    context = browser.new_context(viewport={"width": 1000, "height": 800})
    page = context.new_page()
    requested, problems = [], []
    page.on("request", lambda request: requested.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    page.goto(server.url)
    wait_until(page, "document.getElementById('model').textContent.includes('tiny')")
    yield page
    # an answer of 400 is shown to the user; that the browser notes it too is no problem
    assert [text for text in problems if "Failed to load resource" not in text] == []
    assert all(url.startswith((server.url, "data:")) for url in requested)
    context.close()


def wait_until(page, condition):
    """`wait_for_function` needs eval, which the page's policy forbids."""
    for _ in range(400):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never true: {condition}")


def ask(page, text, tokens=30):
    page.fill("#tokens", str(tokens))
    page.focus("#input")
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def wait_for_answers(page, number):
    wait_until(
        page,
        f"document.querySelectorAll('.answer').length >= {number} "
        "&& !document.getElementById('send').disabled",
    )


def test_a_chat_from_the_keyboard_shows_where_text_came_from(page, offline):
    page.select_option("#gamma", "3")
    ask(page, "Hi")
    wait_for_answers(page, 1)
    assert page.inner_text(".you") == "Hi"
    kinds = page.eval_on_selector_all(".text span", "nodes => nodes.map(node => node.className)")
    assert set(kinds) == {"drafted", "own"}
    assert re.search(r"[\d.]+ tokens/s", page.inner_text(".figures"))
    assert "accepted" in page.inner_text(".figures")
    assert "\N{GREEK SMALL LETTER GAMMA} 3" in page.inner_text(".figures")
    assert not page.is_visible("#key")
    assert page.evaluate("document.activeElement.id") == "input"
    shown = page.evaluate("document.querySelector('.text').textContent")
    from qspec_llm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=30)
    (result,) = offline.chat([{"role": "user", "content": "Hi"}], params)
    assert shown == result.outputs[0].text
    ask(page, "And now?")  # a second turn sends the first one too
    wait_for_answers(page, 2)
    assert page.locator(".answer").count() == 2


def test_plain_beside_speculative_says_that_both_are_identical(page):
    page.check("#compare")
    ask(page, "Compare")
    page.wait_for_selector(".verdict")
    assert "identical" in page.inner_text(".verdict")
    left, right = page.eval_on_selector_all(".text", "nodes => nodes.map(n => n.textContent)")
    assert left == right
    boxes = [box.bounding_box() for box in page.locator(".answer").all()]
    assert boxes[0]["y"] == boxes[1]["y"]


def test_escape_stops(page, server):
    ask(page, "Never end", tokens=900)
    page.wait_for_selector(".text span")
    page.keyboard.press("Escape")
    wait_for_answers(page, 1)
    server.wait_until_idle()


def test_an_error_is_shown(page):
    ask(page, "x" * 1100)
    page.wait_for_selector(".error")
    assert "1024" in page.inner_text(".error")
    page.click("#reset")
    assert page.locator(".error").count() == 0


def test_a_phone_needs_no_sideways_scrolling(page):
    page.set_viewport_size({"width": 360, "height": 640})
    page.check("#compare")
    ask(page, "Averyveryveryveryveryveryveryveryveryveryveryveryverylongword" * 2)
    page.wait_for_selector(".verdict")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("document.documentElement.scrollHeight") <= 640
    boxes = [box.bounding_box() for box in page.locator(".answer").all()]
    assert boxes[0]["x"] == boxes[1]["x"]
    for name in ("#input", "#send", "#stop", "#reset"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360


def test_every_control_can_be_reached_with_tab(page):
    page.focus("#gamma")
    reached = []
    for _ in range(8):
        reached.append(page.evaluate("document.activeElement.id"))
        page.keyboard.press("Tab")
    wanted = ["gamma", "temperature", "tokens", "compare", "input", "send", "reset"]
    assert [name for name in reached if name in wanted] == wanted
