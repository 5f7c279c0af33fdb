"""The page in headless Chromium: asks, streams, slides, uploads, warms, deletes, with a key and without.

Run by test_http.py: ``python page.py URL GUARDED_URL KEY CHROMIUM FOLDER``; screenshots go into the folder.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

MARKUP = (
    'The capital of <script>document.title="owned"</script> Freedonia is "><img src=x onerror="document.title=1"> Suva.'
)
MORE = "The capital of Norway is Oslo. Its currency is the krone, and its longest river is the Glomma. " * 6
QUESTION = "What is the capital of Freedonia?"
COLLECTION = "page-test"
SECONDS = 60

url, guarded_url, key, chromium, folder = sys.argv[1:]
shots = Path(folder)
shots.mkdir(parents=True, exist_ok=True)
expect.set_options(timeout=SECONDS * 1000)


@contextmanager
def opened(browser: Browser, address: str, *, scheme: str = "light", width: int = 1360) -> Iterator[Page]:
    """The page; at its end nothing was logged, refused by its policy, or asked of another address."""
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})  # type: ignore[arg-type]
    page = context.new_page()
    page.set_default_timeout(SECONDS * 1000)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on(
        "console", lambda said: wrong.append(f"console: {said.text}") if said.type in ("error", "warning") else None
    )
    page.on("request", lambda sent: wrong.append(sent.url) if not sent.url.startswith(address) else None)
    page.add_init_script(
        "document.addEventListener('securitypolicyviolation', (event) => console.error(event.violatedDirective))"
    )
    page.goto(address)
    yield page
    allowed = ("401 (Unauthorized)", "400 (Bad Request)")  # how a browser notes a key or a document that is refused
    assert not [line for line in wrong if not any(each in line for each in allowed)], wrong
    context.close()


def file(name: str, text: str) -> dict[str, object]:
    return {"name": name, "mimeType": "text/plain", "buffer": text.encode()}


def ask(page: Page, question: str = QUESTION) -> None:
    page.get_by_label("Your question").fill(question)
    page.keyboard.press("Enter")
    done(page)


def done(page: Page, runs: int = 1) -> None:
    """Waits until so many answers to the question are whole, and the last one's trace is drawn."""
    expect(page.locator("#runs tbody tr")).to_have_count(runs)
    expect(page.locator("#trace tbody tr").first).to_be_visible()


def upload(page: Page) -> None:
    page.get_by_role("tab", name="Documents").click()
    page.get_by_label("Into the collection").fill(COLLECTION)
    page.get_by_label("Text, Markdown").set_input_files([file("markup.txt", MARKUP), file("more.txt", MORE)])  # type: ignore[list-item]
    page.get_by_role("button", name="Upload").click()
    expect(page.locator("#uploads li", has_text="created")).to_have_count(2)
    expect(page.locator("#list tbody tr")).to_have_count(2)
    expect(page.get_by_label("Collection", exact=True)).to_have_value(COLLECTION)
    expect(page.locator("#document-count")).to_have_text("(2)")


def lists_once(page: Page) -> None:
    """Two lists of one collection that are under way together: the later one is shown, once."""
    together = "(select) => [1, 2].forEach(() => select.dispatchEvent(new Event('change')))"
    with page.expect_response("**/files?*"), page.expect_response("**/files?*"):
        page.get_by_label("Collection", exact=True).evaluate(together)
    page.wait_for_timeout(500)
    expect(page.locator("#list tbody tr")).to_have_count(2)


def warm(page: Page) -> None:
    page.get_by_role("button", name="Warm all").click()
    expect(page.locator("#documents-status")).to_contain_text("warm,")
    page.get_by_role("button", name="Warm markup.txt").click()
    expect(page.locator("#documents-status")).to_contain_text("1 of 1 passage warm, 0 encoded now.")


def asks(page: Page) -> None:
    page.get_by_role("button", name="Ask about it").first.click()
    expect(page.get_by_label("Your question")).to_be_focused()
    ask(page)
    assert page.locator("#answer").inner_text()
    expect(page.locator("#status")).to_contain_text("first token after")
    first = page.locator("#passages .passage").first
    expect(first).to_contain_text('<script>document.title="owned"</script>')
    expect(first).to_contain_text('"><img src=x onerror="document.title=1">')
    assert page.title() == "blockrag", "a passage became markup"
    assert page.locator("#passages script, #passages img").count() == 0
    expect(first.locator(".chunk.expanded")).to_have_count(1)
    assert "decoder's memory" in first.inner_text() or "object store" in first.inner_text(), "it was warmed"
    assert page.locator("#strip .segment").count() >= 3
    assert "gateway" in page.locator("#trace").inner_text()


def streams(page: Page) -> None:
    """Text is there before the answer is whole."""
    page.evaluate(
        """() => {
          window.lengths = [];
          const answer = document.getElementById("answer");
          new MutationObserver(() => window.lengths.push([answer.ariaBusy, answer.textContent.length]))
            .observe(answer, { childList: true, characterData: true, subtree: true });
        }"""
    )
    ask(page, "Tell of Norway.")
    lengths = [length for busy, length in page.evaluate("window.lengths") if busy == "true" and length]
    assert len(set(lengths)) > 1, lengths


def slides(page: Page) -> None:
    """The slider and the switch ask again, by keyboard alone."""
    page.get_by_role("slider", name="Rate").focus()
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    done(page, 2)
    expect(page.locator("#passages .chunk.compressed").first).to_be_visible()
    assert page.locator("#passages .chunk.expanded").count() > 0
    assert page.locator("#runs tbody tr").nth(1).locator("td").first.inner_text() == "4"
    page.get_by_label("As few as the question needs").focus()
    page.keyboard.press("Space")
    done(page, 3)
    assert page.locator("#runs tbody tr").nth(2).locator("td").first.inner_text() == "auto"
    page.keyboard.press("Space")
    done(page, 4)
    page.get_by_label("Cached blocks", exact=True).focus()
    page.keyboard.press("ArrowRight")
    done(page, 5)
    expect(page.get_by_role("slider", name="Rate")).to_be_disabled()
    expect(page.locator("#passages")).to_contain_text("computed with the question")
    page.keyboard.press("ArrowRight")
    done(page, 6)
    expect(page.locator("#passages")).to_contain_text("The question alone was read.")
    page.locator("#runs button").first.click()
    expect(page.locator("#passages .passage").first).to_be_visible()
    expect(page.get_by_label("Cached blocks", exact=True)).to_be_checked()
    expect(page.get_by_role("slider", name="Rate")).to_have_value("1")


def stops(page: Page) -> None:
    held: list[Route] = []
    page.route("**/responses", lambda route: held.append(route))  # or the answer is over before anybody can click
    page.get_by_label("Your question").fill("Where is Oslo, and why?")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#status")).to_have_text("Stopped.")
    page.unroute("**/responses")
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()


def says_what_is_wrong(page: Page) -> None:
    page.get_by_role("tab", name="Documents").click()
    page.get_by_label("Text, Markdown").set_input_files([file("empty.txt", " ")])  # type: ignore[list-item]
    page.get_by_role("button", name="Upload").click()
    expect(page.locator("#uploads li").first.locator(".bad")).to_be_visible()


def deletes(page: Page) -> None:
    page.get_by_role("tab", name="Documents").click()
    page.get_by_role("button", name="Delete more.txt").click()
    accessible(page)
    page.get_by_role("button", name="Keep it").click()
    expect(page.locator("#list tbody tr")).to_have_count(2)
    for left, name in enumerate(("markup.txt", "more.txt")):
        page.get_by_role("button", name=f"Delete {name}").click()
        page.get_by_role("button", name="Delete", exact=True).click()
        expect(page.locator("#list tbody tr")).to_have_count(1 - left)


def accessible(page: Page) -> None:
    """By axe's rules: names, roles, landmarks, contrast."""
    found = Axe().run(page)
    assert not found.violations_count, found.generate_report()


def looks(browser: Browser, name: str, scheme: str, width: int) -> None:
    with opened(browser, url, scheme=scheme, width=width) as page:
        page.get_by_label("Collection", exact=True).select_option(COLLECTION)
        page.get_by_role("tab", name="Ask", exact=True).click()
        ask(page)
        page.get_by_role("slider", name="Rate").focus()
        for _ in range(4):
            page.keyboard.press("ArrowRight")
        done(page, 2)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
        accessible(page)
        page.screenshot(path=shots / f"{name}.png", full_page=True)


def asks_for_a_key(browser: Browser) -> None:
    with opened(browser, guarded_url) as page:
        dialog = page.get_by_role("dialog")
        expect(dialog).to_be_visible()
        for tried in ("wrong-key-0123456789", key):
            page.get_by_label("Your tenant's key").fill(tried)
            page.keyboard.press("Enter")
            if tried != key:
                expect(page.locator("#key-problem")).not_to_be_empty()
        expect(dialog).not_to_be_visible()
        expect(page.locator("#system")).to_contain_text("blockrag")
        assert page.evaluate("localStorage.length") == 0
        assert key in page.evaluate("Object.values(sessionStorage)")
        page.get_by_role("button", name="Forget the key").click()
        expect(dialog).to_be_visible()
        assert key not in page.evaluate("Object.values(sessionStorage)")


with sync_playwright() as playwright:
    # Chromium as root needs it, and everything that it opens is on this machine.
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    with opened(browser, url) as page:
        for step in (upload, lists_once, warm, asks, streams, slides, stops, says_what_is_wrong):
            step(page)
        for look in (("light", "light", 1360), ("dark", "dark", 1360), ("narrow", "light", 360)):
            looks(browser, *look)
        deletes(page)
    asks_for_a_key(browser)
    browser.close()
print("the page answers")
