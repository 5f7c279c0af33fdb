"""The page's files as they are served: headers, sizes, and nothing from elsewhere."""

from __future__ import annotations

import re

import httpx

from blockrag.http.app import page_files

MOST_BYTES = 150_000


async def test_the_page_is_small_and_all_of_it_is_served(client: httpx.AsyncClient) -> None:
    first = await client.get("/")
    assert first.headers["content-type"] == "text/html; charset=utf-8"
    names = {"index.html", *re.findall(r'(?:src|href)="page/([^"]+)"', first.text)}
    sizes = {"index.html": len(first.content)}
    waiting = names - set(sizes)
    while waiting:
        name = waiting.pop()
        response = await client.get(f"/page/{name}")
        assert response.status_code == 200, name
        sizes[name] = len(response.content)
        waiting |= set(re.findall(r'from "\./([^"]+)"', response.text)) - set(sizes)
    assert set(sizes) == set(page_files()), "a file that nothing uses, or one that is missing"
    assert sum(sizes.values()) < MOST_BYTES


async def test_a_browser_may_do_nothing_else(client: httpx.AsyncClient) -> None:
    for path in ("/", "/page/main.js", "/page/page.css", "/page/icon.svg"):
        headers = (await client.get(path)).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert {policy[kind] for kind in ("script-src", "style-src", "img-src", "connect-src")} == {"'self'"}
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert "unsafe" not in headers["content-security-policy"]


async def test_what_is_unchanged_is_not_sent_again(client: httpx.AsyncClient) -> None:
    first = await client.get("/page/main.js")
    again = await client.get("/page/main.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert (await client.get("/page/main.js", headers={"if-none-match": '"other"'})).content == first.content
    assert (await client.head("/")).status_code == 200


def test_nothing_comes_from_elsewhere_and_text_never_becomes_markup() -> None:
    for name, content in page_files().items():
        text = content.decode("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]+\.[a-z]|url\(|@import", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|DOMParser", text), name
        assert not re.search(r"<script>|<style|\son[a-z]+=|\sstyle=|javascript:", text), name
        assert "localStorage" not in text, name


async def test_the_page_needs_no_key_but_what_it_shows_does() -> None:
    from tests.unit.http.test_door import GUARDED

    from .standin import StandIn, served

    async with served(StandIn(), GUARDED) as client:
        assert (await client.get("/")).status_code == 200
        for path in ("/v1/models", "/v1/blockrag/system"):
            assert (await client.get(path)).status_code == 401
