"""Documents that people bring, and what must be read of them."""

from __future__ import annotations

import json
import time
import unicodedata

import pytest

from blockrag.errors import InvalidRequestError
from blockrag.ingest.media import MediaType
from blockrag.ingest.plain import unwrap_lines
from blockrag.ingest.splitting import choose_title
from tests.unit.ingest.reading import CASES, case, parsed, prepare


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("deep-in-line-2.jsonl", 2),
        ("310-digits-in-line-2.jsonl", 2),
        ("overflow-in-line-2.jsonl", 2),
        ("duplicate-bracket-id.jsonl", 2),
    ],
)
def test_a_line_that_cannot_be_kept_is_named_before_anything_is_stored(name: str, line: int) -> None:
    """Row B5."""
    with pytest.raises(InvalidRequestError, match=f"line {line}: ") as caught:
        case(name)
    assert caught.value.field == "content"


@pytest.mark.parametrize(
    "metadata",
    ['{"n": -1e999}', '{"n": [1, {"m": 1e400}]}', '{"n": 9007199254740993}', '{"": 1}', '{"n": "' + "x" * 9000 + '"}',
     '{"n": "\\udcff"}', '{"k\\n": 1}', '{"\\u00e4": 1, "a\\u0308": 2}', '{"n": ' + "[" * 40 + "]" * 40 + "}",
     '{"n": ' + "9" * 5000 + "}"],
)  # fmt: skip
def test_metadata_that_cannot_be_kept_names_its_line(metadata: str) -> None:
    """Row B5: the kind, not the three inputs."""
    good = '{"id": "a", "text": "one"}\n'
    with pytest.raises(InvalidRequestError, match="line 3: "):
        prepare(good + "\n" + '{"id": "b", "text": "two", "metadata": ' + metadata + "}\n", "rows.jsonl")


def test_metadata_with_the_files_defaults_must_be_small() -> None:
    """Row B5: what a line and the header say together is checked before anything is stored."""
    rows = '{"id": "a", "text": "one"}\n' + json.dumps({"id": "b", "text": "two", "metadata": {"m": "y" * 5000}})

    with pytest.raises(InvalidRequestError, match=r"line 2: .*8192"):
        prepare(rows, "rows.jsonl", metadata={"n": "x" * 5000})


def test_null_is_absent() -> None:
    """Section D: null as title or metadata."""
    ((document, passages),) = prepare('{"id": "a", "text": "one", "title": null, "metadata": null}', "rows.jsonl")

    assert (document.title, document.metadata, passages) == ("a", {}, ["one"])


def test_composed_everywhere() -> None:
    """Row C4: text, titles, ids, metadata."""
    ((document, passages),) = case("decomposed.md")
    assert "Prüfung" in passages[0]
    assert document.title == "Prüfung"

    typed = unicodedata.normalize("NFD", '{"id": "Jäger", "text": "Größe", "metadata": {"Maß-ä": "Öl"}}')
    ((row, texts),) = prepare(typed, "rows.jsonl", metadata={"u\u0308": "o\u0308"})
    assert (row.document_id, texts, row.metadata) == ("Jäger", ["Größe"], {"ü": "ö", "Maß-ä": "Öl"})
    assert prepare("x", "Pru\u0308fung.txt", title="u\u0308")[0][0].document_id == "Prüfung.txt"


def test_soft_hyphens() -> None:
    """Row C3."""
    assert case("soft-hyphens.html")[0][1] == ["Cover\n\nThe insurance pays for hailstorm damage to greenhouses."]


def test_lines_of_japanese_are_joined_without_a_space() -> None:
    """Row C2."""
    ((_, passages),) = case("wrapped-ja.txt")
    assert "雨天の場合は翌週の" in "".join(passages)


@pytest.mark.parametrize(
    "lines",
    [
        ["今年度の研修旅行は十月の第二金曜日に出発し、二泊三日で長野県を訪れます。参加費は一人三万円で",
         "、締め切りは八月末です。"],
        ["本公司将于下个月搬迁到新的办公地点，届时所有部门的电话号码保持不变，请各位同事提前整理好个人物",
         "品并在周五之前交给行政部门。"],
    ],
)  # fmt: skip
def test_unspaced_scripts_are_joined_by_nothing(lines: list[str]) -> None:
    """Row C2: the kind."""
    assert unwrap_lines("\n".join(lines)) == "".join(lines)


RECORDS = [
    (CASES / "one-record-a-line.txt").read_text(),
    "2024-05-01 12:00:01 WARN pump stopped after the pressure fell\n"
    "2024-05-01 12:00:07 INFO pump started by the operator\n",
    "level=info unit=pump-1 state=started reason=operator took=12\n"
    "level=info unit=pump-2 state=stopped reason=pressure took=8\n",
    "def area(width: float, height: float) -> float:\n"
    "    return width * height\n"
    "\n"
    "print(area(width=2.0, height=3.5) + 1)\n",
    "const reader = require('./reader-of-pumps');\n"
    "const writer = require('./writer-of-pumps');\n"
    "writer.write(reader.all());\n",
    "anna berg,room 101,mondays and fridays\n"
    "tomas lind,room 102,tuesdays at noon\n"
    "maria sato,room 103,every day but sunday\n",
    "anna berg from accounting has the first key.\n"
    "tomas lind from the lab has the second key.\n"
    "maria sato has none of the keys at all.\n",
    "一号会议室周一上午由张三预订，下午由李四预订\n一号会议室周二上午由王五预订，下午由赵六预订\n",
    "May 10 10:01:12 host sshd[12]: accepted key for anna from here\n"
    "May 10 10:01:15 host sshd[12]: closed session of anna at once\n",
]


@pytest.mark.parametrize("text", RECORDS)
def test_records_logs_and_code_keep_their_lines(text: str) -> None:
    """Row C2."""
    assert unwrap_lines(text) == text


@pytest.mark.parametrize(
    ("name", "titles"),
    [
        ("csharp.md", ["C#"]),
        ("code-first.md", ["Winter opening hours"]),
        ("dotted-ids.jsonl", ["St. Louis", "J. R. R. Tolkien", "Vol. 3"]),
        ("front-matter.md", ["Travel expenses"]),
    ],
)
def test_titles(name: str, titles: list[str]) -> None:
    """Row C6."""
    assert [document.title for document, _ in case(name)] == titles


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("Setext heading\n===\n\ntext", "Setext heading"),
        ("# The **bold** `code` [link](x) \\# end #\n", "The bold code link # end"),
        ("#no heading\n\n## F#\n", "F#"),
        ("    # indented code\n\ntext", "a"),
        ("~~~\n# comment\n~~~\n", "a"),
        ("<!--\n# hidden\n-->\n\n# Shown\n", "Shown"),
        ("- # in a list\n\n# Outside\n", "Outside"),
        ("# Untitled\n\n# Real\n", "Real"),
    ],
)
def test_headings_are_commonmarks(text: str, title: str) -> None:
    """Row C6: the kind."""
    assert prepare(text, "a.md")[0][0].title == title


@pytest.mark.parametrize(
    "title",
    ["Microsoft Word - Document1", "untitled", "Untitled-3", "Microsoft Word - Dokument2.docx", "Slide 1",
     "PowerPoint Presentation", "Unbenannt", "Sans titre", "無題", "--", "\u200b", "Document (2)",
     "(anonymous)", "Без названия"],
)  # fmt: skip
def test_what_is_no_title_is_passed_over(title: str) -> None:
    """Row C6: pdf titles."""
    assert choose_title([title, "Leave policy"]) == "Leave policy"
    assert choose_title([title]) == ""


def test_titles_that_say_something_stay() -> None:
    assert choose_title(["Microsoft Word - Leave policy.doc"]) == "Leave policy"
    for title in ("Document retention", "Untitled Goose Game", "Book of hours", "1984", "Test plan", "C#", "Node.js"):
        assert choose_title([title]) == title


def test_front_matter_is_metadata() -> None:
    """Row C7."""
    ((document, passages),) = case("front-matter.md")

    assert document.metadata == {"tags": ["money", "travel"]}
    assert passages == ["Meals up to 40 euro a day are refunded."]


@pytest.mark.parametrize(
    ("text", "title", "metadata", "body"),
    [
        ("---\ntitle: Part one: the sea\nzip: 01234\n---\nbody", "Part one: the sea", {"zip": "01234"}, "body"),
        ("---\ntitle: 'A'\nzip: 01234\ndate: 2024-05-01\nat: 12:30\nok: yes\nn: 3\nf: 0.5\nb: true\ne:\n---\nx", "A",
         {"zip": "01234", "date": "2024-05-01", "at": "12:30", "ok": "yes", "n": 3, "f": 0.5, "b": True}, "x"),
        ('+++\ntitle = "T"\ndate = 2024-05-01\ntags = ["a"]\n+++\nx', "T", {"date": "2024-05-01", "tags": ["a"]}, "x"),
        ("---\nid: 9007199254740992\n---\nx", "a", {"id": "9007199254740992"}, "x"),
        ("+++\na = nan\nb = -inf\nc = 1e300\n+++\nx", "a", {"a": "nan", "b": "-inf", "c": "1e+300"}, "x"),
        ("---\r\ntitle: W\r\n---\r\nx", "W", {}, "x"),
        ("---\ntitle: T\nid: 12345678901234567\n...\nx", "T", {"id": "12345678901234567"}, "x"),
        ("---\n\nA rule, then text.\n\n---\n\nmore", "a", {}, "---\n\nA rule, then text.\n\n---\n\nmore"),
        ("---\na: &a [x, x]\nb: [*a, *a]\n---\ny", "a", {"a": "&a [x, x]", "b": "[*a, *a]"}, "y"),
    ],
)  # fmt: skip
def test_front_matter(text: str, title: str, metadata: dict[str, object], body: str) -> None:
    """Row C7: the kind."""
    ((document, passages),) = prepare(text, "a.md")

    assert (document.title, document.metadata, passages) == (title, metadata, [body])


def test_what_the_sender_says_goes_before_front_matter() -> None:
    text = "---\ntitle: Own\nyear: 1999\n---\nx"
    ((document, _),) = prepare(text, "a.md", title="Given", metadata={"year": 2024})

    assert (document.title, document.metadata) == ("Given", {"year": 2024})


def test_a_row_stays_a_line_and_its_cells_apart() -> None:
    """Row C8."""
    assert case("cells-with-paragraphs.html")[0][1] == ["Name | Extension\nBerg | 4711\nLind | 4712\nSato | 4713"]


def test_later_passages_of_a_table_repeat_its_header() -> None:
    """Row C9."""
    ((_, passages),) = case("long-table.md")

    assert passages[0].startswith("# Spare parts\n\n| part |")
    assert len(passages) > 5
    rows = [line for passage in passages for line in passage.splitlines() if line.startswith("| bracket")]
    assert rows == [line for line in (CASES / "long-table.md").read_text().splitlines() if "bracket" in line]
    for passage in passages[1:]:
        assert passage.startswith("| part | price in euro | in stock |\n|---|---|---|\n| bracket")


def test_tables_of_web_pages_and_of_many_windows_repeat_their_header() -> None:
    """Row C9: every format, any size."""
    rows = "".join(f"<tr><td>bolt {number}<td>{number} mm</tr>" for number in range(9000))
    ((_, passages),) = prepare(f"<p>Sizes.</p><table><tr><th>part<th>size</tr>{rows}</table><p>The end.", "a.html")

    assert passages[0].startswith("Sizes.")
    table = [passage for passage in passages if "bolt" in passage]
    assert all("part | size\n--- | ---\nbolt" in passage for passage in table)
    assert sum(passage.count("bolt ") for passage in table) == 9000
    assert passages[-1].endswith("The end.")


def test_text_that_begins_like_an_image_is_text() -> None:
    """Section D."""
    for text in ("GIF89a is a format of images.", "GIF8", "%PDF-1.4 begins a pdf.", "MZ is a district."):
        assert parsed(text, MediaType.TEXT)[1] == text


@pytest.mark.parametrize("document_id", ["a.txt", "a.md", "a.html"])
def test_zero_width_characters_alone_are_no_text(document_id: str) -> None:
    """Section D."""
    with pytest.raises(InvalidRequestError, match="no text"):
        prepare("\u200b\u200d\n\u2060 \u200c\ufeff", document_id)
    with pytest.raises(InvalidRequestError, match="line 1"):
        prepare('{"id": "a", "text": "\\u200b\\u200d"}', "rows.jsonl")


@pytest.mark.parametrize("unit", ["x", "7Qf+", "本日", "a;b(c)", "https://example.org/"])
def test_a_megabyte_without_a_space_is_fast(unit: str) -> None:
    """Section D."""
    text = unit * (1_000_000 // len(unit))
    started = time.process_time()
    ((_, passages),) = prepare(text, "a.txt")

    assert "".join(passages) == text
    assert time.process_time() - started < 5
