"""From token ids to text, one token at a time, without ever splitting a character.

A byte-level vocabulary may spread one character over several tokens, so a token's text is not always known when the
token is. What is returned here are whole characters; the bytes of an unfinished one are kept until it is complete.

And stop strings: text ends before them, and nothing that may become one is shown too early.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

from tokenizers import decoders

from blockrag.modeling.running_text import FastTokenizer


class StopScanner:
    """Cuts a stream of text before the stop string that is **completed first**.

    Among stop strings completed by the same character the longest counts. So the result depends on the text alone,
    not on the pieces that it came in. Text that may be the beginning of a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """What may be shown now; after a stop string was found, always empty and ``stopped`` is set."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        self._held += text
        ends = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            shown, self._held = self._held[: min(ends)[1]], ""
            return shown
        kept = self._possible_beginning()
        cut = len(self._held) - kept
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        shown, self._held = self._held, ""
        return shown

    def _possible_beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max(len(stop) for stop in self._stops) - 1)
        for length in range(longest, 0, -1):
            ending = self._held[-length:]
            if any(stop.startswith(ending) for stop in self._stops):
                return length
        return 0


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
