"""Markdown → title, what its front matter says, and the text below it."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterator
from typing import Any

import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from blockrag.metadata import MAX_EXACT

_FRONT_MATTER = re.compile(r"(---|\+\+\+)[ \t]*\n(.*?)(?:^|\n)(\1|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_FRONT_MATTER_CHARS = 1 << 15
_HEADINGS_CHARS = 1 << 14
_HEADING_CHARS = 1000
_WITH_TEXT = ("text", "code_inline", "image")
# Only headings are read below the level of blocks.
_BLOCKS = MarkdownIt("commonmark").disable("inline")
_INLINE = MarkdownIt("commonmark")
_FIELD = re.compile(r"([A-Za-z_][\w .-]{0,60}?)[ \t]*:[ \t]+(\S.*)")
_QUOTED = re.compile(r"""(["'])(.*)\1""")


def read_markdown(text: str) -> tuple[list[str], dict[str, Any], str]:
    """Titles to choose from, the front matter's fields (JSON values), and the text without front matter."""
    fields, body = _front_matter(text)
    title = fields.pop("title", None)
    titles = [str(title)] if isinstance(title, str | int | float) and not isinstance(title, bool) else []
    return [*titles, *_headings(body[:_HEADINGS_CHARS])], fields, body


def _headings(text: str) -> Iterator[str]:
    """CommonMark's headings, of the first level first: a page may begin with a remark."""
    tokens = _BLOCKS.parse(text)
    found = [
        (heading.tag, content.content)
        for heading, content in itertools.pairwise(tokens)
        if heading.type == "heading_open" and heading.level == 0
    ]
    for _, source in sorted(found, key=lambda item: item[0] != "h1"):
        (inline,) = _INLINE.parseInline(source[:_HEADING_CHARS])
        yield "".join(map(_plain, inline.children or []))


def _plain(token: Token) -> str:
    return " " if token.type in ("softbreak", "hardbreak") else token.content if token.type in _WITH_TEXT else ""


def _front_matter(text: str) -> tuple[dict[str, Any], str]:
    match = _FRONT_MATTER.match(text[:_FRONT_MATTER_CHARS])
    if match is None:
        return {}, text
    source, body = match[2], text[match.end() :]
    if match[1] == "+++":
        try:
            return _json_fields(tomllib.loads(source)), body
        except tomllib.TOMLDecodeError:
            return {}, text
    try:
        loaded = yaml.load(source, _CoreLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        # People write "title: Part one: the sea", which YAML refuses.
        lines = [line for line in source.split("\n") if line.strip() and not line.lstrip().startswith("#")]
        found = [_FIELD.fullmatch(line.strip()) for line in lines]
        if not lines or sum(match is None for match in found) * 2 > len(lines):
            return {}, text
        return {match[1]: _unquoted(match[2]) for match in found if match}, body
    if loaded is None:
        return {}, body if not source.strip() or "#" in source else text
    # A rule of dashes, text and another rule are no front matter.
    return (_json_fields(loaded), body) if isinstance(loaded, dict) else ({}, text)


def _unquoted(value: str) -> str:
    quoted = _QUOTED.fullmatch(value.strip())
    return quoted[2] if quoted else value.strip()


def _json_fields(fields: dict[Any, Any]) -> dict[str, Any]:
    return {str(name): _json(value) for name, value in fields.items() if value is not None}


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return _json_fields(value)
    if isinstance(value, list | tuple | set):
        return [_json(item) for item in value]
    # What metadata refuses as a number; nobody would look for the reason in a page's head.
    if isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) < MAX_EXACT:
        return str(value)
    return value if isinstance(value, str | bool | int | float) or value is None else str(value)


class _CoreLoader(yaml.SafeLoader):
    """YAML 1.2's core schema: 01234, 12:30, yes and 2024-05-01 are text. No references, which can grow without end."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (PyYAML's own way)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("references are not read")
        return super().compose_node(parent, index)


for _kind, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"-?(?:0|[1-9][0-9]{0,17})$", list("-0123456789")),
    ("float", r"-?(?:0|[1-9][0-9]{0,15})\.[0-9]{1,15}$", list("-0123456789")),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), _first)
