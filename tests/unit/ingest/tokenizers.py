"""A stand-in tokenizer that counts words."""

from __future__ import annotations

from typing import Any

from tests.models import TEST_TEMPLATE

TEMPLATE = TEST_TEMPLATE


class WordTokenizer:
    """One token for each word; a word of the template's special tokens is one too."""

    def __call__(self, text: str, **options: Any) -> Any:
        return {"input_ids": [len(word) for word in text.split()]}
