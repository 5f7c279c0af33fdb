"""A fast tokenizer without transformers, for processes that hold no model: the gateway splits, counts and plans."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tokenizers import AddedToken, Tokenizer

from blockrag.errors import BundleError


class FastTokenizer:
    """The part of a transformers fast tokenizer that serving uses, by the same ``tokenizer.json``.

    Several threads may use it at a time.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.backend_tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read ``tokenizer.json`` in ``folder``. Raises BundleError."""
        if not (folder / "tokenizer.json").is_file():
            raise BundleError(f"{folder}: lacks a fast tokenizer (tokenizer.json)")
        try:
            return cls(Tokenizer.from_file(str(folder / "tokenizer.json")))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"{folder}: the tokenizer does not load: {error}") from error

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Token ids of ``text``, under "input_ids"; an added token's text is that token."""
        return {"input_ids": self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """Text of ``token_ids``, spaces as they are."""
        if clean_up_tokenization_spaces:
            raise ValueError("clean_up_tokenization_spaces: texts are given as they are")
        return self.backend_tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def get_vocab(self) -> dict[str, int]:
        """Every token's id, the added ones' too."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The added tokens by id."""
        return self.backend_tokenizer.get_added_tokens_decoder()

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the added tokens that are special."""
        return [number for number, token in self.added_tokens_decoder.items() if token.special]

    @property
    def unk_token_id(self) -> int | None:
        """Id of the model's token for what it does not know, if it has one."""
        unknown = getattr(self.backend_tokenizer.model, "unk_token", None)
        return self.backend_tokenizer.token_to_id(unknown) if unknown else None
