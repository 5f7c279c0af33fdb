"""The prompt template: how questions and passages become the blocks of a prompt.

A prompt is one instruction block, one block per passage and one final block. Each block is tokenised alone
(Block-Attention, arXiv 2409.15355, section 2.1), so a passage has the same token ids in every prompt.

What a user typed is data: an added token's text inside a title, a passage or a question is tokenised as ordinary
characters and can never open a block of its own.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from blockrag.modeling.tokenizer import text_ids

_FIELD = re.compile(r"\{(title|text|question)\}")


class BundleTokenizer(Protocol):
    """The part of a transformers fast tokenizer that the template uses."""

    def __call__(self, text: str, *, add_special_tokens: bool = ..., split_special_tokens: bool = ...) -> Any: ...


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

    def to_dict(self) -> dict[str, str]:
        return asdict(self)

    def instruction_ids(self, tokenizer: BundleTokenizer) -> list[int]:
        """Token ids of the instruction block."""
        return _tokenize(tokenizer, self.instruction, {})

    def passage_ids(self, tokenizer: BundleTokenizer, title: str, text: str) -> list[int]:
        """Token ids of one passage's block."""
        return _tokenize(tokenizer, self.passage, {"title": title, "text": text})

    def final_ids(self, tokenizer: BundleTokenizer, question: str) -> list[int]:
        """Token ids of the final block, without the answer."""
        return _tokenize(tokenizer, self.final, {"question": question})

    def answer_ids(self, tokenizer: BundleTokenizer, answer: str) -> list[int]:
        """Token ids of an answer with the token that ends it: the target in training."""
        return text_ids(tokenizer, self.answer_prefix + answer) + _tokenize(tokenizer, self.end, {})


def _tokenize(tokenizer: BundleTokenizer, pattern: str, fields: dict[str, str]) -> list[int]:
    ids: list[int] = []
    carried = ""
    for position, part in enumerate(_FIELD.split(pattern)):
        is_field = position % 2 == 1
        if is_field:
            piece = carried + fields[part]
            carried = ""
        else:
            stripped = part.rstrip(" ")
            piece, carried = carried + stripped, part[len(stripped) :]
        if piece:
            ids += text_ids(tokenizer, piece) if is_field else tokenizer(piece, add_special_tokens=False)["input_ids"]
    if carried:
        ids.extend(tokenizer(carried, add_special_tokens=False)["input_ids"])
    return ids
