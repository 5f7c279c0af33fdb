"""The prompt template: how questions and passages become the blocks of a prompt.

A prompt is one instruction block, one block per passage and one final block. Each block is tokenised alone
(Block-Attention, arXiv 2409.15355, section 2.1), so a passage has the same token ids in every prompt.

What a user typed is data: an added token's text inside a title, a passage or a question is tokenised as ordinary
characters and can never open a block or a turn of its own (``blockrag.modeling.running_text``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blockrag.errors import BundleError
from blockrag.modeling.files import check_keys
from blockrag.modeling.running_text import BundleTokenizer, field_ids, literal_ids

__all__ = ["BundleTokenizer", "PromptTemplate"]

_FIELD = re.compile(r"\{(title|text|question)\}")
# of Llama and Mistral, Gemma, Llama 3, Cohere, DeepSeek, GLM
_BEGIN = re.compile(r"^(<(s|bos|\|begin\w*\||BOS_TOKEN|｜begin▁of▁sentence｜)>|\[gMASK\]<sop>)")
INSTRUCTION = (
    "Answer the question with a few words from the passages below. If they do not hold the answer, reply: "
    "not in the passages.\n\n"
)
"""What templates made here say in the user's first turn."""


@dataclass(frozen=True)
class PromptTemplate:
    """Texts of the three kinds of block, with ``{title}``, ``{text}`` and ``{question}`` as fields.

    Spaces that end a literal part are handed to the field after it, because byte-level vocabularies write a word
    and the space before it as one token.
    """

    instruction: str
    """Text of the first block; the only one that may hold a beginning-of-sequence token."""
    passage: str
    """Text of a passage's block; fields ``{title}`` and ``{text}``."""
    final: str
    """Text of the last block, up to where the answer starts; field ``{question}``."""
    answer_prefix: str
    """What stands before the answer's first character in training (a space for byte-level vocabularies)."""
    end: str
    """Text of the token that ends an answer."""
    refusal: str
    """The answer given when the passages do not hold one."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: Path) -> PromptTemplate:
        """Read a manifest's ``template``, or a file of one. Raises BundleError naming ``where`` and the problem."""
        check_keys(cls, values, f"{where}: template")
        if not all(isinstance(value, str) for value in values.values()):
            raise BundleError(f"{where}: template texts must be strings")
        for name, needed in (("passage", "{text}"), ("final", "{question}")):
            if needed not in values[name]:
                raise BundleError(f"{where}: template.{name} lacks {needed}")
        if not values["end"]:
            raise BundleError(f"{where}: template.end is empty")
        return cls(**values)

    def to_dict(self) -> dict[str, str]:
        return asdict(self)

    def instruction_ids(self, tokenizer: BundleTokenizer) -> list[int]:
        """Token ids of the instruction block."""
        return _tokenize(tokenizer, self.instruction, {}, opening=True)

    def passage_ids(self, tokenizer: BundleTokenizer, title: str, text: str) -> list[int]:
        """Token ids of one passage's block."""
        return _tokenize(tokenizer, self.passage, {"title": title, "text": text})

    def final_ids(self, tokenizer: BundleTokenizer, question: str) -> list[int]:
        """Token ids of the final block, without the answer."""
        return _tokenize(tokenizer, self.final, {"question": question})

    @property
    def next_turn(self) -> str:
        """Text between the end of an answer and the next question: what opens a turn of the user; empty where the
        template has no turns.

        A template does not say it by itself: it is what the instruction block opens the user's first turn with, which
        is the text behind the turn before it (a system's), or all of it but a beginning of sequence. An instruction
        other than ``INSTRUCTION`` behind a system's turn is repeated, since nothing tells it from the opening.
        """
        _, found, opening = self.instruction.rpartition(self.end)
        if found:
            return opening.removesuffix(INSTRUCTION)
        opening = _BEGIN.sub("", opening)
        if not opening.endswith(INSTRUCTION):
            return ""
        closing = self.final.partition("{question}")[2]
        after = closing.removeprefix(self.end)
        between = after[: len(after) - len(after.lstrip())] if closing.startswith(self.end) else ""
        opening = opening.removesuffix(INSTRUCTION)
        return between + opening if opening else ""

    def turn_ids(self, tokenizer: BundleTokenizer, question: str, answer: str) -> list[int]:
        """Token ids of an earlier question and its answer, up to where the next question starts."""
        ids = self.final_ids(tokenizer, question) + self.answer_ids(tokenizer, answer)
        return ids + _tokenize(tokenizer, self.next_turn, {})

    def request_ids(self, tokenizer: BundleTokenizer, instructions: str) -> list[int]:
        """Token ids of what a caller asks of every answer, as text in the user's turn."""
        return _tokenize(tokenizer, "{text}\n\n", {"text": instructions})

    def answer_ids(self, tokenizer: BundleTokenizer, answer: str) -> list[int]:
        """Token ids of an answer with the token that ends it: the target in training."""
        return field_ids(tokenizer, self.answer_prefix + answer) + _tokenize(tokenizer, self.end, {})


def _tokenize(tokenizer: BundleTokenizer, pattern: str, fields: dict[str, str], *, opening: bool = False) -> list[int]:
    ids: list[int] = []
    carried = ""
    for position, part in enumerate(_FIELD.split(pattern)):
        is_field = position % 2 == 1
        if is_field:
            piece, carried = carried + fields[part], ""
        else:
            stripped = part.rstrip(" ")
            piece, carried = carried + stripped, part[len(stripped) :]
        if piece:
            opens = opening and not ids
            ids += field_ids(tokenizer, piece) if is_field else literal_ids(tokenizer, piece, opening=opens)
    if carried:
        ids += literal_ids(tokenizer, carried, opening=opening and not ids)
    return ids
