"""Languages of collections. Imports nothing, so that a command line may name them."""

from __future__ import annotations

DEFAULT_LANGUAGE = "english"
STEMMED = (
    "arabic", "danish", "dutch", "english", "finnish", "french", "german", "greek", "hungarian", "italian",
    "norwegian", "portuguese", "romanian", "russian", "spanish", "swedish", "turkish",
)  # fmt: skip
"""Their words are reduced to stems, and their stop words weigh nothing."""
UNSTEMMED = ("none",)
"""Words as they are written. For Chinese, Japanese, Korean and Thai too: their scripts are cut in pairs anyway."""
LANGUAGES = (*STEMMED, *UNSTEMMED)
