"""Languages of collections. Imports nothing of ours, so that a command line may name them."""

from __future__ import annotations

from typing import Literal, get_args

Stemmed = Literal[
    "arabic", "danish", "dutch", "english", "finnish", "french", "german", "greek", "hungarian", "italian",
    "norwegian", "portuguese", "romanian", "russian", "spanish", "swedish", "turkish",
]  # fmt: skip
Language = Literal[Stemmed, "none"]

DEFAULT_LANGUAGE: Language = "english"
STEMMED: tuple[str, ...] = get_args(Stemmed)
"""Their words are reduced to stems, and their stop words weigh nothing."""
LANGUAGES: tuple[str, ...] = get_args(Language)
"""Those, and "none": words as they are written. Chinese, Japanese, Thai and Korean are cut in pairs in each of them."""
