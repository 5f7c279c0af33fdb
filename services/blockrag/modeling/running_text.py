"""Token ids of the parts of a prompt, as they have them in running text.

A tokenizer is made for whole texts, and a prompt is tokenised in parts. Two things of it must not happen to a part:

- An added token's text is taken for that token. In what a user typed it is text, whether the tokenizer has the token
  flagged as special or not: a passage that holds a chat's turn marker may not open a turn.
- A space is put before the text (SentencePiece: Llama 2, Mistral 7B). Only the first part of a prompt begins a text.

And a fast tokenizer without transformers, for processes that hold no model: the gateway splits, counts and plans.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Tokenizer

from blockrag.errors import BundleError

T = TypeVar("T")


class BundleTokenizer(Protocol):
    """The part of a tokenizer that prompts need; of fast ones ``backend_tokenizer`` too."""

    def __call__(self, text: str, *, add_special_tokens: bool = ...) -> Any: ...


class RunningText:
    """Tokenises text that goes on from other text. Several threads may use it at a time."""

    def __init__(self, backend: Tokenizer) -> None:
        """``backend`` stays as it is."""
        described = json.loads(backend.to_str())
        described.update(truncation=None, padding=None, post_processor=None)
        markers = {}
        for token in described["added_tokens"]:
            # a run of spaces, or one character, is a way to write text
            if len(token["content"].strip()) > 1 or token["special"]:
                token["special"] = True
                markers[token["content"]] = int(token["id"])
        normalizer, pre_tokenizer = described.get("normalizer"), described.get("pre_tokenizer")
        described["normalizer"] = _without_prefix(normalizer, "normalizers")
        described["pre_tokenizer"] = _without_prefix(pre_tokenizer, "pretokenizers")
        self.goes_on = (described["normalizer"], described["pre_tokenizer"]) == (normalizer, pre_tokenizer)
        """Whether the tokenizer itself puts nothing before a text."""
        self._markers = markers
        self._control = frozenset(markers.values())
        self._tokenizer = Tokenizer.from_str(json.dumps(described))
        self._tokenizer.encode_special_tokens = True

    @cached_property
    def described(self) -> str:
        """What ids depend on, as text."""
        return self._tokenizer.to_str()

    @cached_property
    def _marker(self) -> re.Pattern[str]:
        longest_first = sorted(self._markers, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def ids(self, text: str) -> list[int]:
        """Ids of ``text`` as it was typed: never one of an added token, but for those of spaces."""
        return self.ids_of([text])[0]

    def ids_of(self, texts: Sequence[str]) -> list[list[int]]:
        """``ids`` of several texts at once."""
        encoded = [found.ids for found in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        return [
            ids if self._control.isdisjoint(ids) else self._broken_up(text)
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def split_at_marker(self, text: str) -> tuple[str, str]:
        """``text`` before its first added token, and from there on."""
        found = self._marker.search(text)
        return (text[: found.start()], text[found.start() :]) if found else (text, "")

    def _broken_up(self, text: str) -> list[int]:
        # The model itself has a marker as one piece (SentencePiece's user-defined symbols), or has no other way to
        # write something, which is then left out.
        pieces, start = [], 0
        for found in self._marker.finditer(text):
            pieces += [text[start : found.start() + 1]]
            start = found.start() + 1
        ids = [
            token
            for piece in [*pieces, text[start:]]
            for token in self._tokenizer.encode(piece, add_special_tokens=False).ids
        ]
        return [token for token in ids if token not in self._control]


_KNOWN: WeakKeyDictionary[Any, tuple[int, RunningText]] = WeakKeyDictionary()


def running_text(tokenizer: Any) -> RunningText | None:
    """Of a fast tokenizer; None of one that has no ``backend_tokenizer``. Made once, and anew for added tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    size = backend.get_vocab_size(with_added_tokens=True)
    known = _KNOWN.get(tokenizer)
    if known is None or known[0] != size:
        known = _KNOWN[tokenizer] = (size, RunningText(backend))
    return known[1]


def field_ids(tokenizer: BundleTokenizer, text: str) -> list[int]:
    """Ids of what a user typed, behind other text."""
    known = running_text(tokenizer)
    return known.ids(text) if known is not None else _whole(tokenizer, text)


def literal_ids(tokenizer: BundleTokenizer, text: str, *, opening: bool) -> list[int]:
    """Ids of a template's own text, in which added tokens are meant; ``opening``: it begins the prompt."""
    known = running_text(tokenizer)
    if known is None or known.goes_on or opening:
        return _whole(tokenizer, text)
    # behind an added token the tokenizer does as it does in any text
    before, rest = known.split_at_marker(text)
    return [*(known.ids(before) if before else ()), *(_whole(tokenizer, rest) if rest else ())]


def _whole(tokenizer: BundleTokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _without_prefix(step: Any, members: str) -> Any:
    """A normaliser or pre-tokeniser of ``tokenizer.json`` without what puts a space before the text."""
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Sequence":
        kept = [_without_prefix(one, members) for one in step[members]]
        return {**step, members: [one for one in kept if one is not None]}
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if step["type"] == "ByteLevel":
        return {**step, "add_prefix_space": False}
    return step


def load_tokenizer(folder: Path, load: Callable[[], T]) -> T:
    """What ``load`` makes of ``tokenizer.json`` in ``folder``. Raises BundleError."""
    if not (folder / "tokenizer.json").is_file():
        raise BundleError(f"{folder}: lacks a fast tokenizer (tokenizer.json)")
    try:
        return load()
    except Exception as error:  # the tokenizers library raises bare Exception
        raise BundleError(f"{folder}: the tokenizer does not load: {error}") from error


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
        return load_tokenizer(folder, lambda: cls(Tokenizer.from_file(str(folder / "tokenizer.json"))))

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
