"""The chat page as a person uses it, in a real Chromium, beside a real server.

Skipped where there is no Chromium: Debian's `chromium`, or any that CHROMIUM names.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

from osler.inference.load import open_model
from osler.model.transformer import Transformer

pytestmark = pytest.mark.slow
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
FLAGS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
QUESTION = "Which drug is best?\nA. amoxicillin\nB. ibuprofen\nC. morphine\nD. none of these"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: install Debian's package chromium, or name yours in CHROMIUM")
    with sync_playwright() as running:
        sandbox = hasattr(os, "geteuid") and os.geteuid() != 0  # Chromium refuses to have one for root
        started = running.chromium.launch(executable_path=CHROMIUM, chromium_sandbox=sandbox, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def taught(serve, runs) -> str:
    """The address of a server whose model thinks, answers and ends."""
    return serve(models={"taught": open_model(runs.sft, device="cpu")}).url


@pytest.fixture
def serve_endless(serve, models) -> Any:
    """``serve_endless(**settings)`` starts a server whose model writes on and on, as long as the likeliest tokens are taken."""
    ready = models["text"]
    model = Transformer(replace(ready.model.config, max_seq_len=8192))
    model.load_state_dict(ready.model.state_dict())
    with torch.no_grad():
        model.embed_tokens.weight[ready.tokenizer.eos_id] = 0  # a logit of 0 is never the largest
    return lambda **settings: serve(models={"endless": replace(ready, model=model.eval())}, max_new_tokens=8000, **settings)


@pytest.fixture
def open_page(browser) -> Iterator[Any]:
    """``open_page(url, **context)`` opens a page in a fresh profile; at the end, no error was written to the console."""
    said: list[str] = []
    contexts = []

    def open_one(url: str, **settings: Any) -> Any:
        context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], **settings)
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", lambda line: said.append(line.text) if line.type == "error" else None)
        page.goto(url)
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert [line for line in said if not line.startswith("Failed to load resource")] == []  # which tests provoke


def ask(page: Any, text: str) -> Any:
    """Ask a question by keyboard, wait for the end of the reply, and return the turn."""
    page.keyboard.insert_text(text)
    page.keyboard.press("Enter")
    done(page)
    turns = page.locator(".turn")
    return turns.nth(turns.count() - 1)


def begin(page: Any, text: str) -> None:
    """Ask for a long text, and return when its beginning is there."""
    page.evaluate("Object.assign(chat.settings, {max_tokens: 8000, temperature: 0})")
    page.keyboard.insert_text(text)
    page.keyboard.press("Enter")
    expect(page.locator(".turn").last.locator(".answer")).not_to_be_empty()


def done(page: Any) -> None:
    expect(page.locator("#send")).to_be_visible(timeout=30_000)
    expect(page.locator(".turn").last.locator(".facts")).to_be_visible()


def answers(page: Any) -> list[str]:
    return page.locator(".turn .answer").all_inner_texts()


def test_a_conversation(open_page, taught):
    page = open_page(taught)
    expect(page.locator("#welcome")).to_be_visible()
    first = ask(page, "Who is ill?")
    expect(first.locator("details")).to_have_js_property("open", False)
    expect(first.locator("summary")).to_have_text(re.compile("Thought"))
    expect(first.locator(".facts")).to_have_text(re.compile(r"\d+ tokens · \d+ tokens/s · seed \d+"))
    expect(page.get_by_label("Your question")).to_be_focused()
    expect(page.locator("#status")).to_have_text(re.compile("Answer: "))
    page.keyboard.type("Two")
    page.keyboard.press("Shift+Enter")
    ask(page, "lines?")
    assert page.locator(".question > .text").all_inner_texts() == ["Who is ill?", "Two\nlines?"]

    first.get_by_role("button", name="Copy").last.click()
    expect(page.locator("#status")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == answers(page)[0]

    page.locator(".turn").last.get_by_role("button", name="Regenerate").click()
    done(page)
    assert len(answers(page)) == 2

    page.locator(".turn").first.get_by_role("button", name="Edit").click()
    page.keyboard.press("Escape")
    assert len(answers(page)) == 2
    page.keyboard.press("Enter")  # on the same button, which has the focus again
    page.keyboard.press("Control+A")
    page.keyboard.insert_text("Who is well?")
    page.keyboard.press("Enter")
    done(page)
    assert page.locator(".question > .text").all_inner_texts() == ["Who is well?"], "what came after it is forgotten"


def test_settings_reach_the_server_and_a_seed_gives_the_same_reply(open_page, taught):
    page = open_page(taught)
    asked = []
    page.on("request", lambda request: asked.append(json.loads(request.post_data)) if request.post_data else None)
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("switch").uncheck()
    page.get_by_label("Temperature").fill("1.5")
    page.get_by_label("Top-p").fill("0.9")
    page.get_by_label("Top-k").fill("40")
    page.get_by_label("Longest reply").fill("12")
    page.get_by_label("Seed").fill("7")
    page.keyboard.press("Enter")
    expect(page.locator("#settings")).to_be_hidden()
    page.locator("#entry").focus()
    first = ask(page, "Who is ill?")
    expect(first.locator("details")).to_be_hidden()
    expect(first.locator(".facts")).to_contain_text("seed 7")
    wanted = {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "max_tokens": 12, "seed": 7, "reasoning_effort": "none"}
    assert wanted.items() <= asked[0].items()
    ask(page, "Who is ill?")
    assert len(set(answers(page))) == 1
    page.reload()
    page.get_by_role("button", name="Settings").click()
    assert page.get_by_label("Seed").input_value() == "7"
    page.get_by_label("Top-k").fill("0")
    page.get_by_role("button", name="Back to the defaults").click()
    assert page.get_by_label("Seed").input_value() == "" and page.get_by_label("Top-k").input_value() == ""


def test_it_is_kept_over_a_reload_until_it_is_cleared(open_page, taught):
    page = open_page(taught)
    ask(page, "Who is ill?")
    ask(page, "And who is well?")
    before = page.locator("#turns").inner_text()
    page.reload()
    expect(page.locator("#turns")).to_have_text(before, use_inner_text=True)
    page.get_by_role("button", name="New").click()
    expect(page.locator("#welcome")).to_be_visible()
    page.reload()
    expect(page.locator("#welcome")).to_be_visible()
    assert answers(page) == []


def test_exam(open_page, taught):
    page = open_page(taught, reduced_motion="reduce")
    page.get_by_role("radio", name="Exam").check(force=True)
    page.locator("#entry").focus()
    turn = ask(page, QUESTION)
    assert turn.locator("figure .letter").all_inner_texts() == ["A", "B", "C", "D"]
    assert turn.locator("figure .name").all_inner_texts() == ["amoxicillin", "ibuprofen", "morphine", "none of these"]
    shares = [float(text.removeprefix("< ").removesuffix(" %")) for text in turn.locator("figure .share").all_inner_texts()]
    assert abs(sum(shares) - 100) < 0.5
    assert turn.locator(".best .share").inner_text() == f"{max(shares):.1f} %"
    assert "after the thinking" in turn.locator("figcaption").inner_text()
    expect(turn.locator("figure .bar b").first).to_be_attached()
    for share, bar in zip(shares, turn.locator("figure .bar").all(), strict=True):
        drawn = bar.locator("i").bounding_box()["width"] / bar.bounding_box()["width"]
        assert abs(100 * drawn - share) < 1
    page.reload()
    assert page.locator("figure .share").all_inner_texts() == turn.locator("figure .share").all_inner_texts()
    page.locator("#entry").focus()
    expect(ask(page, "Who has no options?").locator(".trouble")).to_contain_text("has no options")


def test_markup_of_a_model_stays_text(open_page, taught):
    page = open_page(taught)
    markup = "<img src=x onerror=\"document.title='broken'\"><b>bold</b><script>document.title='broken'</script>"
    turn = {"question": markup, "thinking": markup, "answer": markup, "mode": "exam", "model": markup, "end": "stop", "seed": 1}
    turn |= {"options": [{"letter": "A", "text": markup, "probability": 1}], "trouble": markup}
    page.evaluate("turn => { removeEventListener('pagehide', save); chat.turns = [turn]; save(); }", turn)
    page.reload()
    assert answers(page) == [markup]
    assert page.locator("#turns :is(img, script, .text b)").count() == 0
    assert page.title() == "Osler"


def test_stop_ends_the_reply_and_the_computation(open_page, serve_endless):
    server = serve_endless()
    page = open_page(server.url)
    for stop in (lambda: page.keyboard.press("Escape"), lambda: page.get_by_role("button", name="Stop").click()):
        begin(page, "Go on")
        assert server.served[0].outstanding == 1
        stop()
        done(page)
        turn = page.locator(".turn").last
        expect(turn.locator(".facts")).to_contain_text("stopped")
        expect(turn.locator(".trouble")).to_be_hidden()
        expect(page.locator("#entry")).to_be_focused()
        server.wait_for(lambda: server.served[0].outstanding == 0)


def test_what_is_left_in_the_middle_keeps_what_had_come(open_page, serve_endless):
    server = serve_endless()
    page = open_page(server.url)
    begin(page, "Go on")
    page.reload()
    expect(page.locator(".facts")).to_contain_text("the page was left")
    expect(page.locator(".turn .answer")).not_to_be_empty()
    begin(page, "Go on")
    page.get_by_role("button", name="New").click()
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator("#send")).to_be_visible()
    server.wait_for(lambda: server.served[0].outstanding == 0)


def test_refusals_are_sentences_and_can_be_tried_again(open_page, serve_endless):
    server = serve_endless(max_rows=1, max_waiting=0, drain_seconds=0.1)
    page, other = open_page(server.url), open_page(server.url)
    expect(ask(page, "why " * 9000).locator(".trouble")).to_contain_text("at most 8191")
    begin(other, "Go on")
    page.evaluate("Object.assign(chat.settings, {max_tokens: 8000, temperature: 0})")
    refused = ask(page, "Me too")
    expect(refused.locator(".trouble")).to_have_text(re.compile(r"at most 1 may: .* Try again in 1 s\."))
    other.keyboard.press("Escape")
    server.wait_for(lambda: server.served[0].outstanding == 0)
    refused.get_by_role("button", name="Try again").click()
    expect(page.locator(".turn").last.locator(".answer")).not_to_be_empty()
    server.stop()
    done(page)
    broken = page.locator(".turn").last
    expect(broken.locator(".trouble")).not_to_be_empty()
    expect(broken.locator(".answer")).not_to_be_empty()
    gone = ask(page, "Are you there?")
    expect(gone.locator(".trouble")).to_have_text("The server does not answer. Is `osler serve` still running?")


def test_a_connection_that_breaks_leaves_what_had_come(open_page, serve_endless):
    server = serve_endless()
    page = open_page(server.url)
    begin(page, "Go on")
    for connection in list(server.server.server_state.connections):
        server.server.servers[0].get_loop().call_soon_threadsafe(connection.transport.abort)
    done(page)
    expect(page.locator(".turn .trouble")).to_contain_text("The connection broke off")
    expect(page.locator(".turn .answer")).not_to_be_empty()


def test_the_key_is_asked_for(open_page, serve):
    page = open_page(serve(key="Sesame").url)
    for given, said in (("Simsim", "did not accept"), ("Sesame", "")):
        expect(page.locator("#key")).to_be_visible()
        expect(page.get_by_role("textbox", name="API key")).to_have_attribute("type", "password")
        page.get_by_role("textbox", name="API key").fill(given)
        page.keyboard.press("Enter")
        if said:
            expect(page.locator("#key-why")).to_contain_text(said)
    expect(page.locator("#key")).to_be_hidden()
    expect(page.locator("#model option")).to_have_count(2)
    page.reload()
    expect(page.locator("#model option")).to_have_count(2)
    assert page.evaluate("JSON.stringify(localStorage)").count("Sesame") == 0


def test_by_keyboard_alone(open_page, taught):
    page = open_page(taught)
    order = []
    page.locator(".skip").focus()
    for _ in range(12):
        page.keyboard.press("Tab")
        focused = "(({id, name, parentElement: p}) => id || name || p.id)(document.activeElement)"
        order.append(page.evaluate(focused))
        style = "getComputedStyle(document.activeElement.matches('[type=radio]') ? document.activeElement.nextSibling : "
        style += "document.activeElement.matches('textarea') ? document.querySelector('.box') : document.activeElement)"
        assert page.evaluate(f"{style}.outlineStyle") == "solid", f"the focus on {order[-1]} cannot be seen"
        if order[-1] == "send":
            break
    assert order == ["clear", "open-settings", "theme", "entry", "mode", "model", "send"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_axe_finds_nothing(open_page, taught, scheme, width):
    page = open_page(
        taught, color_scheme=scheme, viewport={"width": width, "height": 720}, reduced_motion="reduce", bypass_csp=True
    )

    def check(state: str) -> None:
        found = Axe().run(page).response["violations"]
        assert [f"{each['id']}: {each['nodes'][0]['html']}" for each in found] == [], state
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{state}: wider than the screen"
        expect(page.locator(".notice")).to_be_in_viewport()

    expect(page.locator("#model option").first).to_be_attached()
    check("before a question")
    ask(page, "Who is ill?")
    page.get_by_role("radio", name="Exam").check(force=True)
    page.locator("#entry").focus()
    ask(page, QUESTION)
    ask(page, "No options " + "x" * 200)
    check("after an answer, an exam and a refusal")
    page.locator("summary").first.click()
    page.get_by_role("button", name="Edit").first.click()
    check("with thinking unfolded and a question in edit")
    page.get_by_role("button", name="Settings").click()
    check("with the settings")
    page.keyboard.press("Escape")
    other = "Light" if scheme == "dark" else "Dark"
    page.get_by_role("button", name=f"Switch to {other.lower()} colours").click()
    check("in the other colours")
