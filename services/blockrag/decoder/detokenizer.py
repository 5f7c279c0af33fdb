"""From token ids to text, one token at a time, without ever splitting a character.

A byte-level vocabulary may spread one character over several tokens, so a token's text is not always known when the
token is. What is returned here are whole characters; the bytes of an unfinished one are kept until it is complete.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeAlias

from tokenizers import decoders

from blockrag.modeling.tokenizer import FastTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    AnyTokenizer: TypeAlias = PreTrainedTokenizerFast | FastTokenizer

_REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """Text of one growing sequence of tokens."""

    def feed(self, token_id: int) -> str:
        """Characters that this token completes; may be empty."""
        ...


class ByteLevelDetokenizer:
    """For byte-level vocabularies: exact, one table look-up per token.

    Bytes that are no UTF-8 become U+FFFD as soon as that is certain. A character left unfinished at the end is
    dropped.
    """

    def __init__(self, token_bytes: list[bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        return self._decoder.decode(self._token_bytes[token_id])


class WindowDetokenizer:
    """For every other vocabulary: decodes a short window of tokens before and after, and returns the difference.

    Tokens enter the window's text when it does not end inside a character, so ``feed`` costs a decode of a few tokens.
    """

    def __init__(self, tokenizer: AnyTokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def feed(self, token_id: int) -> str:
        self._pending.append(token_id)
        before = self._decode(self._context)
        text = self._decode(self._context + self._pending)
        if len(text) <= len(before) or text.endswith(_REPLACEMENT):
            return ""
        self._context, self._pending = self._pending, []
        return text[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        )


class PrefixStripper:
    """Removes what the template puts before an answer, when the answer starts with it."""

    def __init__(self, detokenizer: Detokenizer, prefix: str) -> None:
        self._detokenizer = detokenizer
        self._prefix = prefix
        self._held = ""

    def feed(self, token_id: int) -> str:
        text = self._detokenizer.feed(token_id)
        if not self._prefix or not text:
            return text
        self._held += text
        if len(self._held) < len(self._prefix) and self._prefix.startswith(self._held):
            return ""
        stripped, self._prefix = self._held.removeprefix(self._prefix), ""
        return stripped


def detokenizer_factory(tokenizer: AnyTokenizer, answer_prefix: str) -> Callable[[], Detokenizer]:
    """A function that makes a detokeniser for a new sequence.

    Special tokens give no text; ``answer_prefix`` is stripped once, at the very start.
    """
    if isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        table = _token_bytes(tokenizer)
        return lambda: PrefixStripper(ByteLevelDetokenizer(table), answer_prefix)
    return lambda: PrefixStripper(WindowDetokenizer(tokenizer), answer_prefix)


def _token_bytes(tokenizer: AnyTokenizer) -> list[bytes]:
    """The bytes of every token id; none for special tokens and for ids that the vocabulary leaves out."""
    byte_of = _byte_alphabet()
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    table = [b""] * (max(vocabulary.values()) + 1)
    for token, token_id in vocabulary.items():
        if all(character in byte_of for character in token):
            table[token_id] = bytes(byte_of[character] for character in token)
        else:
            table[token_id] = token.encode()
    special = set(tokenizer.all_special_ids)
    for token_id, added in tokenizer.added_tokens_decoder.items():
        # Added tokens are matched before the byte-level step: their content is the text itself.
        table[token_id] = b"" if added.special or token_id in special else added.content.encode()
    return table


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return alphabet
