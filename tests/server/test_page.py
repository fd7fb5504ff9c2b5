"""The page at /, in a Chromium: what it sends, what it shows, and what it can't be made to do."""

import base64
import json
import os
import re
import shutil
import time

import httpx
import pytest
from playwright.sync_api import Error, expect, sync_playwright

from tests.engine.fakes import write_model

from .conftest import TEMPLATE
from .running import Server

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEY = "the-key"
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=")


@pytest.fixture(scope="module")
def browser():
    """Not for the session: while it runs, no other test could have an event loop of its own."""
    if CHROMIUM is None:
        if os.environ.get("PACE_REQUIRE_CHROMIUM") == "1":
            pytest.fail("PACE_REQUIRE_CHROMIUM=1, but there is no Chromium here")
        pytest.skip("the page: there is no Chromium here")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    """A server whose answers are long, and which asks for a key."""
    path = tmp_path_factory.mktemp("patient")
    write_model(path, max_position_embeddings=32768)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    with Server(path, "--engines", 1, "--kv-cache-bytes", "26M", "--api-key", KEY, log=path / "log") as running:
        running.client.headers["Authorization"] = f"Bearer {KEY}"
        yield running


class Visit:
    """A look at the page. At its end nothing has been asked of another host, and the console has only what is known."""

    def __init__(self, browser, url, **context):
        self.url, self.known = url, ()
        self.requests, self.console = [], []
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.console.append(str(error)))

    def open(self):
        self.page.goto(self.url)
        expect(self.page.locator("#name")).not_to_be_empty()

    def set(self, **settings):
        for label, value in settings.items():
            self.page.get_by_label(label.replace("_", " ").capitalize()).fill(str(value))

    def send(self, text):
        self.page.get_by_label("Message").fill(text)
        self.page.keyboard.press("Enter")

    def change_requests(self, **fields):
        """What the page asks for, with these fields as well."""

        def go_on(route):
            route.continue_(post_data=json.dumps(route.request.post_data_json | fields))

        self.page.route("**/v1/chat/completions", go_on)

    def answer_with(self, *deltas, finish="stop"):
        """Stand in for the server; returns the requests that come."""
        bodies = []
        choices = [*({"delta": delta} for delta in deltas), {"delta": {}, "finish_reason": finish}]
        lines = [f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in choices]

        def answer(route):
            bodies.append(route.request.post_data_json)
            route.fulfill(body="".join([*lines, "data: [DONE]\n\n"]), content_type="text/event-stream")

        self.page.route("**/v1/chat/completions", answer)
        return bodies

    @property
    def answer(self):
        """The last one, when it is there whole."""
        answer = self.page.get_by_role("article", name="Answer").last
        expect(answer).to_have_attribute("aria-busy", "false", timeout=60_000)
        return answer

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.context.close()
        if kind is None:
            assert [url for url in self.requests if not url.startswith((self.url, "data:"))] == []
            assert [text for text in self.console if not any(known in text for known in self.known)] == []


@pytest.fixture
def visit(browser, server):
    with Visit(browser, server.url) as visit:
        visit.open()
        yield visit


def letters(text):
    """Without what Markdown may take as a sign."""
    return re.sub(r"[\s`*#~+-]|\d+[.)]", "", text)


def figure(client, name):
    return float(re.search(rf"^{name} (\S+)", client.get("/metrics").text, re.MULTILINE)[1])


def test_headers_keep_the_page_to_itself(server):
    response = server.client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-cache"
    policy = response.headers["content-security-policy"]
    assert {"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"} <= set(policy.split("; "))
    assert "innerHTML" not in response.text


def test_an_answer_grows_to_what_the_api_says(visit, server):
    asked = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?\nSay!"}]}
    asked |= {"temperature": 0, "max_tokens": 400, "ignore_eos": True}
    visit.change_requests(ignore_eos=True)
    visit.set(system_prompt="Be brief.", temperature=0, max_tokens=400)
    visit.page.evaluate(
        """() => {
            window.lengths = new Set();
            const note = () => lengths.add(document.querySelector(".text")?.textContent.length ?? 0);
            new MutationObserver(note).observe(document.getElementById("log"), {childList: true, subtree: true});
        }"""
    )
    box = visit.page.get_by_label("Message")
    box.fill("What is it?")
    box.press("Shift+Enter")
    box.press_sequentially("Say!")
    assert box.input_value() == "What is it?\nSay!"
    box.press("Enter")
    assert box.input_value() == ""
    text = visit.answer.locator(".text").text_content()
    expected = server.post("/v1/chat/completions", **asked).json()["choices"][0]["message"]["content"]
    assert letters(text) == letters(expected)
    assert len(visit.page.evaluate("() => [...lengths]")) > 2  # none, some, and all
    summary = visit.answer.locator(".figures").text_content()
    assert re.fullmatch(
        r"400 tokens · [\d.]+ m?s to the first · [\d.]+ tokens/s · \d+ in the prompt · cut at max tokens", summary
    )


def test_a_chat_goes_on_until_a_new_one(visit):
    bodies = visit.answer_with({"content": "Yes."})
    for text in ("One?", "Two?"):
        visit.send(text)
        assert visit.answer.locator(".text").text_content() == "Yes."
    visit.page.get_by_role("button", name="New chat").click()
    expect(visit.page.get_by_role("article")).to_have_count(0)
    visit.set(seed=7)
    visit.send("Three?")
    assert visit.answer
    one, two, three = bodies
    assert [(each["role"], each["content"]) for each in two["messages"]] == [
        ("user", "One?"),
        ("assistant", "Yes."),
        ("user", "Two?"),
    ]
    assert three["messages"] == [{"role": "user", "content": "Three?"}]
    assert three["seed"] == 7
    assert not {"seed", "temperature", "max_tokens"} & one.keys()


def test_stop_stops(browser, patient):
    with Visit(browser, patient.url, http_credentials={"username": "me", "password": KEY}) as visit:
        visit.open()
        visit.change_requests(ignore_eos=True)
        visit.send("Go on for ever.")
        visit.page.locator(".text > *").first.wait_for()
        before = figure(patient.client, "pace_generation_tokens_total")
        time.sleep(0.3)
        assert figure(patient.client, "pace_generation_tokens_total") > before  # counted while it is written
        assert figure(patient.client, "pace_requests_in_flight") == 1
        visit.page.get_by_role("button", name="Stop").click()
        assert visit.answer.locator(".figures").text_content().endswith("stopped")
        expect(visit.page.get_by_role("button", name="Send")).to_be_visible()
        deadline = time.monotonic() + 10
        while figure(patient.client, "pace_requests_in_flight") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert figure(patient.client, "pace_requests_in_flight") == 0
        assert "outcome=cancelled" in patient.text


def test_with_keys_the_browser_is_asked_for_one(browser, patient):
    response = httpx.get(patient.url)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == 'Basic realm="pace"'
    with Visit(browser, patient.url) as visit:
        visit.known = ("401",)
        with pytest.raises(Error, match="ERR_INVALID_AUTH_CREDENTIALS"):
            visit.open()


def test_figures_follow_the_server(visit, server):
    figures = visit.page.get_by_label("Figures", exact=True)
    expect(figures.get_by_role("status")).to_have_text("2 of 2 engines up")
    expect(figures.get_by_text("0 % of cache")).to_have_count(2)
    expect(visit.page.locator("#out")).to_have_text("0")
    for _ in range(5):
        server.post("/v1/completions", prompt="abc", max_tokens=300, ignore_eos=True)
    for name in ("out", "in", "p50", "p95"):
        expect(visit.page.locator(f"#{name}")).to_have_text(re.compile("[1-9]"))
    curve = visit.page.locator(".tile svg path").first.get_attribute("d")
    assert len({point.split(",")[1] for point in curve[1:].split(" L")}) > 1


def test_nothing_is_asked_while_nobody_looks(visit):
    visit.page.evaluate("() => Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
    visit.page.wait_for_timeout(300)
    before = len(visit.requests)
    visit.page.wait_for_timeout(2500)
    assert len(visit.requests) == before
    visit.page.evaluate("() => delete document.hidden")
    visit.page.wait_for_timeout(1500)
    assert len(visit.requests) > before


def test_errors_are_shown_as_the_server_says_them(visit, server):
    visit.known = ("400",)
    text = "a" * 600
    visit.set(max_tokens=4)
    visit.send(text)
    asked = {"messages": [{"role": "user", "content": text}], "max_tokens": 4}
    expect(visit.answer.get_by_role("alert")).to_have_text(
        server.post("/v1/chat/completions", **asked).json()["error"]["message"]
    )
    visit.set(temperature=-1)
    visit.send("Hello")
    expect(visit.answer.get_by_role("alert")).to_contain_text("temperature is -1.0")
    visit.set(temperature=0)
    visit.answer.get_by_role("button", name="Try again").click()  # what failed is not sent along
    expect(visit.answer.locator(".figures")).to_contain_text("tokens")
    expect(visit.page.get_by_role("alert")).to_have_count(1)


def test_a_stream_that_breaks_off_is_said(visit):
    visit.answer_with({"content": "Half an"}, finish=None)
    visit.send("Hello")
    expect(visit.answer.get_by_role("alert")).to_have_text("The answer broke off.")
    assert visit.answer.locator(".text").text_content() == "Half an"


def test_markdown_becomes_elements_and_html_stays_text(visit):
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    text = (
        f"# Title\nSome **bold {evil}** and `a **b** {evil}`.\n\n1. One\n   - deep\n\n2. Two\n\n```html\n{evil}\n"
        "- no list\n```\nEnd 2*3*4 **"
    )
    visit.answer_with(*({"content": character} for character in text))
    visit.send(evil)
    shown = visit.answer.locator(".text")
    assert shown.locator("img, script").count() == 0
    assert visit.page.get_by_role("article", name="You").text_content() == evil
    assert shown.locator("p strong").all_text_contents() == ["Title", f"bold {evil}"]
    assert shown.locator("p code").text_content() == f"a **b** {evil}"
    assert shown.locator("pre code").text_content() == f"{evil}\n- no list"
    assert shown.locator("> ol > li").all_text_contents() == ["Onedeep", "Two"]
    assert shown.locator("ol ul li").all_text_contents() == ["deep"]
    assert shown.locator("> p").last.text_content() == "End 2*3*4 **"


def test_lists_without_end_are_no_matter(visit):
    visit.answer_with({"content": "- " * 5000 + "x\n" + "**" * 3000 + "`" * 3001})
    visit.send("Hello")
    assert visit.answer.locator("ul").count() == 8
    assert visit.answer.locator(".text").text_content().endswith("`")


def test_thinking_is_folded_and_calls_are_shown(visit):
    call = {"index": 0, "id": "a", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    visit.answer_with({"reasoning_content": "Hm, <b>"}, {"content": "Well."}, {"tool_calls": [call]})
    visit.send("Hello")
    thought = visit.answer.get_by_text("Hm, <b>")
    expect(thought).to_be_hidden()
    visit.answer.get_by_text("Thinking").click()
    expect(thought).to_be_visible()
    expect(visit.answer.get_by_text('add({"a": 1})')).to_be_visible()


def test_images_where_the_model_takes_them(browser, server, visit):
    expect(visit.page.get_by_role("button", name="Attach images")).to_be_hidden()
    with Visit(browser, server.url) as seeing:
        model = server.client.get("/v1/models").json()["data"][0] | {"modalities": ["text", "image"]}
        seeing.page.route("**/v1/models", lambda route: route.fulfill(json={"data": [model]}))
        bodies = seeing.answer_with({"content": "A dot."})
        seeing.open()
        with seeing.page.expect_file_chooser() as chooser:
            seeing.page.get_by_role("button", name="Attach images").click()
        chooser.value.set_files([{"name": f"{i}.png", "mimeType": "image/png", "buffer": PIXEL} for i in range(2)])
        seeing.page.get_by_role("button", name="Remove image 2").click()
        seeing.send("What is it?")
        expect(seeing.page.get_by_alt_text("An attached image")).to_be_visible()
        assert seeing.answer
        image, text = bodies[0]["messages"][0]["content"]
        assert image["image_url"]["url"] == "data:image/png;base64," + base64.b64encode(PIXEL).decode()
        assert text == {"type": "text", "text": "What is it?"}
        expect(seeing.page.get_by_role("button", name="Remove image")).to_have_count(0)


def test_a_question_about_an_image(browser, seeing):
    """From a file to an answer, and on to the next turn, which has the image too."""
    with Visit(browser, seeing.url) as visit:
        visit.open()
        with visit.page.expect_file_chooser() as chooser:
            visit.page.get_by_role("button", name="Attach images").click()
        chooser.value.set_files([{"name": "dot.png", "mimeType": "image/png", "buffer": PIXEL}])
        expect(visit.page.get_by_role("button", name="Remove image 1")).to_be_visible()
        visit.change_requests(ignore_eos=True)
        visit.set(temperature=0, max_tokens=5)
        visit.send("What is it?")
        url = "data:image/png;base64," + base64.b64encode(PIXEL).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
        asked = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 5}
        told = seeing.post("/v1/chat/completions", **asked, ignore_eos=True).json()
        prompt_tokens = told["usage"]["prompt_tokens"]
        assert letters(visit.answer.locator(".text").text_content()) == letters(
            told["choices"][0]["message"]["content"]
        )
        expect(visit.answer.locator(".figures")).to_contain_text(f"{prompt_tokens} in the prompt")
        visit.send("And now?")
        assert visit.answer
        (more,) = re.findall(r"(\d+) in the prompt", visit.answer.locator(".figures").text_content())
        assert int(more) > prompt_tokens


def test_a_phone_is_wide_enough(browser, server):
    with Visit(browser, server.url, viewport={"width": 360, "height": 700}, has_touch=True) as visit:
        visit.open()
        visit.answer_with({"content": "x" * 300 + "\n```\n" + "y " * 200 + "\n```\n`" + "z" * 100 + "`"})
        visit.send("w" * 300)
        assert visit.answer
        too_wide = """() => ["html", "#log", "#side"].filter((selector) => {
            const node = document.querySelector(selector);
            return node.scrollWidth > node.clientWidth;
        })"""
        assert visit.page.evaluate(too_wide) == []
        toggle = visit.page.get_by_role("button", name="Figures and settings")
        settings = visit.page.get_by_label("Temperature")
        expect(settings).to_be_hidden()
        toggle.click()
        expect(toggle).to_have_attribute("aria-expanded", "true")
        expect(settings).to_be_visible()
        assert visit.page.evaluate(too_wide) == []
        toggle.click()
        expect(settings).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(browser, server, scheme):
    with Visit(browser, server.url, color_scheme=scheme) as visit:
        visit.open()
        visit.answer_with({"content": "Some `code`."}, finish=None)
        visit.send("Hello")
        assert visit.answer
        assert (luminance(style(visit.page, "body", "background-color")) < 0.1) == (scheme == "dark")
        on = {
            ".user": ".user", ".text": "body", ".text code": ".text code", ".problem": ".problem", "#model": "header",
            "#new": "#new", "h2": "aside", "dt": ".tile", ".engine p": "aside", "#send": "#send", ".answer": "body",
        }  # fmt: skip
        for text, ground in on.items():
            dark, light = sorted(
                luminance(style(visit.page, *each)) for each in ((text, "color"), (ground, "background-color"))
            )
            assert (light + 0.05) / (dark + 0.05) >= 4.5, text  # WCAG AA


def style(page, selector, name):
    return page.locator(selector).first.evaluate("(node, name) => getComputedStyle(node).getPropertyValue(name)", name)


def luminance(color):
    """Of WCAG, from rgb(r, g, b)."""
    values = [int(part) / 255 for part in re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", color).groups()]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
