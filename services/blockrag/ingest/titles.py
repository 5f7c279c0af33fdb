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
# What programs call what nobody has named, by language; a number may follow.
_NAMELESS = """
untitled | untitled document | untitled page | untitled presentation | untitled design | untitled spreadsheet | no title
title | page title | your title | your title here | anonymous | (anonymous) | unknown | none | null | temp | tmp | con
document | new document | new page | page | webpage | website | index | home | homepage | default | about:blank | blank
draft | test | scan | scanned document | image | file | print | sheet | book | workbook | layout | slide | presentation
powerpoint presentation | unbenannt | unbenanntes dokument | neues dokument | dokument | ohne titel | mappe | tabelle
powerpoint-präsentation | sans titre | sans-titre | document sans titre | document sans nom | nouveau document
classeur | présentation powerpoint | sin título | sin titulo | documento | documento sin título | nuevo documento
libro | presentación de powerpoint | sem título | documento sem título | apresentação do powerpoint | senza titolo
senza nome | nuovo documento | presentazione di powerpoint | naamloos | naamloos document | uten navn | namnlös
nimetön | bez názvu | bez tytułu | névtelen | dokumentas | без названия | без имени | без назви | документ
χωρίς τίτλο | έγγραφο | başlıksız | adsız | belge | 無題 | 名称未設定 | 文書 | ドキュメント | 无标题 | 未命名 | 文档
無標題 | 新建文档 | 제목 없음 | 제목없음 | 문서
"""
_APART = r"[|\n]"
_NO_TITLE = re.compile(
    rf"(?:{'|'.join(re.escape(name.strip()) for name in re.split(_APART, _NAMELESS) if name.strip())})"
    r"[\s_-]*(?:\(?\d+\)?)?",
    re.IGNORECASE,
)


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
