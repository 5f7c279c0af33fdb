"""Which of the titles that a file offers is one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from blockrag.characters import clean_line
from blockrag.ingest.media import known_suffix

MAX_TITLE_CHARS = 300
"""Longest title that is taken from a file."""

# What programs write before the name of the file that they made.
_WRITTEN_BY = re.compile(
    r"(?:Microsoft\s+(?:Office\s+)?(?:Word|Excel|PowerPoint|Publisher|Visio)|Print)\s+-\s+", re.IGNORECASE
)
_OFFICE_SUFFIX = re.compile(
    r"\.(?:docx?|dotx?|odt|rtf|xlsx?|ods|pptx?|odp|pub|pages|tex|dvi|indd|qxd|wpd|fm|pdf|txt|md|html?)$", re.IGNORECASE
)
_NUMBER = r"[\s_-]*(?:\(?\d+\)?)?"
_NO_TITLE = re.compile(
    r"(?:"
    r"(?:new |neues? |nouveau |nuevo |nuovo )?(?:document|documento|dokument|dokumentas|документ|文档|文書|ドキュメント|문서)"
    r"|untitled(?:[ -](?:document|page|presentation|design|spreadsheet|form|\d+))?|no title|title|page title|your title( here)?|\(anonymous\)|anonymous|unknown|none|null"
    r"|new page|webpage|website|index|home|homepage|default|about:blank|blank|test|draft|scan|scanned document|image|file|print|presentation|powerpoint presentation|slide"
    r"|layout|sheet|book|mappe|tabelle|tabellenblatt|classeur|libro|workbook|con|temp|tmp"
    r"|unbenannt(?:es dokument)?|ohne titel|sans[ -]titre|document sans (?:titre|nom)|sin t[ií]tulo|documento sin t[ií]tulo|sem t[ií]tulo|senza (?:titolo|nome)"
    r"|naamloos|uten navn|namnl[oö]s|nimet[oö]n|bez (?:n[aá]zvu|tytu[lł]u)|n[eé]vtelen|без (?:названия|имени)|без назви|χωρίς τίτλο|başlıksız|adsız"
    r"|無題|名称未設定|无标题|未命名|無標題|제목 ?없음|présentation powerpoint|powerpoint-präsentation|presentación de powerpoint"
    r")" + _NUMBER,
    re.IGNORECASE,
)  # fmt: skip


def choose_title(candidates: Iterable[str]) -> str:
    """The first that says something, on one line; empty: none does."""
    for candidate in candidates:
        title = clean_line(candidate)
        title = _WRITTEN_BY.sub("", title, count=1) if _WRITTEN_BY.match(title) else title
        # Whoever named the file named the document; its suffix says nothing.
        title = _OFFICE_SUFFIX.sub("", title).strip()
        if title and not _NO_TITLE.fullmatch(title) and any(character.isalnum() for character in title):
            return title[:MAX_TITLE_CHARS].rstrip()
    return ""


def title_from_id(document_id: str) -> str:
    """``reports/annual_report-2024.txt`` → ``annual report-2024``: without folders and a suffix that is known."""
    name = PurePosixPath(document_id).name
    suffix = known_suffix(name)
    name = name[: -len(suffix)] if suffix and name != suffix else name
    return " ".join(name.replace("_", " ").split()) or document_id
