"""Lines that were broken to fit a page are joined; lines that are records, logs or code stay.

A line was broken where the next one's first word had no room on it. That is asked of a whole paragraph, because single
lines of a table or a log look like that by chance.
"""

from __future__ import annotations

import itertools
import re
import unicodedata

_PARAGRAPHS = re.compile(r"(\n[ \t]*(?:\n[ \t]*)+)")
_STARTS_ANEW = re.compile(r"[\s\-–—*•·#>|+]|\(?\d{1,3}[.)]\s|\(?[a-z][.)]\s|https?://")
_COLUMNS = re.compile(r"\t|\S {2,}\S|\|")
_WORD = re.compile(r"\S+")
_ENDS_A_SENTENCE = frozenset("。！？!?…」』）】.;:；：។๚။။")
_STARTS_NO_LINE = frozenset("、。，．！？；：）」』】〉》’”…‥・ーァィゥェォッャュョぁぃぅぇぉっゃゅょ々")
_CODE_ENDS = frozenset("{};=\\>")
_WRAPPED_CHARS = range(30, 201)
# Scripts that put no space between words; a character takes about two columns, but for the last four.
_UNSPACED = re.compile(
    "[\u2e80-\u303f\u3040-\u30ff\u3100-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef"
    "\U00020000-\U0003ffff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"
)
_WRAPPED_UNSPACED_CHARS = range(15, 121)
_NEAR_LINES = 4
_LOWER_SHARE = 0.4
_FULL_SHARE = 0.6
_SAME_START_SHARE = 0.5
# A break within a line of these scripts may come so many characters early, where punctuation must not start a line.
_UNSPACED_SLACK = 3


def unwrap_lines(text: str) -> str:
    """The text with the lines of each paragraph joined, by a space or, where the script has none, by nothing."""
    parts = _PARAGRAPHS.split(text)
    return "".join(part if place % 2 else _unwrap(part) for place, part in enumerate(parts))


def _unwrap(paragraph: str) -> str:
    lines = paragraph.split("\n")
    # What a blank line or the text's start leaves empty counts as no line.
    if sum(bool(line.strip()) for line in lines) < 2:
        return paragraph
    if _UNSPACED.search(paragraph) and _is_unspaced(paragraph):
        joints = _unspaced_joints(lines)
    else:
        joints = _spaced_joints(lines)
    parts = [lines[0]]
    for joint, line in zip(joints, lines[1:], strict=True):
        parts += (joint, line)
    return "".join(parts)


def _spaced_joints(lines: list[str]) -> list[str]:
    """What stands between each two lines: a newline, or a space where the second goes on."""
    pairs = list(itertools.pairwise(lines))
    # A list's, a quotation's or a table's lines are no wrapped ones.
    could = [bool(line.strip()) and bool(after) and not _STARTS_ANEW.match(after) for line, after in pairs]
    full = [possible and _is_full(lines, place) for place, possible in enumerate(could)]
    if not any(full) or _are_records(lines):
        return ["\n"] * len(pairs)
    lower = sum(after[0].islower() for (_, after), goes_on in zip(pairs, full, strict=True) if goes_on)
    is_prose = lower >= _LOWER_SHARE * sum(full) and sum(full) >= _FULL_SHARE * sum(could)
    joined = [
        goes_on and (is_prose or after[0].islower()) and line.rstrip()[-1:] not in _CODE_ENDS
        for (line, after), goes_on in zip(pairs, full, strict=True)
    ]
    return [_joint(line, after) if goes_on else "\n" for (line, after), goes_on in zip(pairs, joined, strict=True)]


def _joint(line: str, after: str) -> str:
    apart = not (_UNSPACED.match(after) and _UNSPACED.match(line.rstrip()[-1:]))
    return "" if not apart or line.endswith(" ") else " "


def _is_full(lines: list[str], place: int) -> bool:
    """The next line's first word had no room on this one, as far as the lines around it show how much there was."""
    line, after = lines[place], lines[place + 1]
    if len(line) not in _WRAPPED_CHARS:
        return False
    word = _WORD.match(after)
    near = lines[max(0, place - _NEAR_LINES) : place + _NEAR_LINES + 1]
    width = max(len(item) for item in near)
    return len(line) + 1 + len(word[0] if word else "") > width


def _are_records(lines: list[str]) -> bool:
    """Each line is a thing of its own: columns, the same beginnings, the same number of fields."""
    filled = [line for line in lines if line.strip()]
    if sum(bool(_COLUMNS.search(line)) for line in filled) * 2 > len(filled):
        return True
    firsts = [line.split(maxsplit=1)[0] for line in filled]
    same = sum(first == second for first, second in itertools.pairwise(firsts))
    if same >= _SAME_START_SHARE * (len(filled) - 1):
        return True
    if sum(line[0].isdigit() or line[0] in "[<{" for line in filled) * 2 > len(filled):
        return True
    if len(filled) > 2:
        if all(line.rstrip()[-1] in ".!?;" for line in filled):
            return True
        for separator in (",", ";", "="):
            counts = {line.count(separator) for line in filled}
            if len(counts) == 1 and counts.pop() >= 2:
                return True
    return False


def _is_unspaced(paragraph: str) -> bool:
    letters = sum(character.isalpha() for character in paragraph)
    return len(_UNSPACED.findall(paragraph)) * 2 > letters


def _unspaced_joints(lines: list[str]) -> list[str]:
    firsts = [line[:1] for line in lines if line.strip()]
    same = sum(first == second for first, second in itertools.pairwise(firsts))
    if same > _SAME_START_SHARE * (len(firsts) - 1) or (
        len(firsts) > 2 and all(line.rstrip()[-1] in _ENDS_A_SENTENCE for line in lines if line.strip())
    ):
        return ["\n"] * (len(lines) - 1)
    joints = []
    sizes = [_columns(line) for line in lines]
    for place, (line, after) in enumerate(itertools.pairwise(lines)):
        width = max(sizes[max(0, place - _NEAR_LINES) : place + _NEAR_LINES + 1])
        goes_on = (
            sizes[place] in _WRAPPED_UNSPACED_CHARS
            and sizes[place] >= width - _UNSPACED_SLACK
            and bool(after)
            and not _STARTS_ANEW.match(after)
            and (line[-1] not in _ENDS_A_SENTENCE or after[0] in _STARTS_NO_LINE)
        )
        joints.append(_joint(line, after) if goes_on else "\n")
    return joints


def _columns(line: str) -> int:
    return sum(unicodedata.category(character) not in ("Mn", "Me") for character in line.rstrip())
