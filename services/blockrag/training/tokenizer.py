"""The reader's tokenizer: byte-level BPE with one token per digit and the special tokens of the prompt template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from blockrag.training.data import ReaderData

NAMED_TOKENS = ("<|pad|>", "<|begin|>", "<|end|>", "<|passage|>", "<|text|>", "<|question|>", "<|answer|>")
SPECIAL_TOKENS = (*NAMED_TOKENS, *(f"<|reserved_{number}|>" for number in range(len(NAMED_TOKENS), 16)))
"""Special tokens; the place in the list is the id."""

PAD_ID, BEGIN_ID, END_ID = 0, 1, 2

# The GPT-2 pattern with one change: a digit stands alone, so that a number is copied digit by digit.
_WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Learn the merges from ``texts``; ids 0 to 15 are ``SPECIAL_TOKENS``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_texts(data: ReaderData, articles: int) -> Iterator[str]:
    """Texts the merges are learned from: evenly spaced articles, and people's questions."""
    step = max(1, len(data.articles) // articles)
    for number, article in enumerate(data.articles.values()):
        if number % step == 0:
            yield article.title
            yield article.text
    for paragraphs in data.people.values():
        for paragraph in paragraphs:
            yield paragraph.article.text
            yield from (question.text for question in paragraph.questions)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_tokens: int) -> None:
    """Write files that ``AutoTokenizer.from_pretrained`` loads without a network."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS[PAD_ID],
        bos_token=SPECIAL_TOKENS[BEGIN_ID],
        eos_token=SPECIAL_TOKENS[END_ID],
        model_max_length=max_tokens,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)


class TemplateTokenizer:
    """A ``tokenizers`` tokenizer behind the interface the prompt template expects.

    It gives the ids that the transformers tokenizer gives, about ten times faster on short texts: sampling contexts
    calls it several hundred times a step.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._marked = tokenizer
        self._plain = Tokenizer.from_str(tokenizer.to_str())
        self._plain.encode_special_tokens = True
        self._encode = lru_cache(maxsize=50_000)(self._encode_uncached)

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": list(self._encode(text, bool(options.get("split_special_tokens"))))}

    def decode(self, token_ids: list[int], **options: Any) -> str:
        return str(self._marked.decode(token_ids, skip_special_tokens=bool(options.get("skip_special_tokens"))))

    def _encode_uncached(self, text: str, plain: bool) -> tuple[int, ...]:
        tokenizer = self._plain if plain else self._marked
        return tuple(tokenizer.encode(text, add_special_tokens=False).ids)


def load_template_tokenizer(folder: Path) -> TemplateTokenizer:
    """The tokenizer saved in ``folder`` by ``save_tokenizer``."""
    path = folder / "tokenizer.json"
    vocabulary = json.loads(path.read_text(encoding="utf-8"))
    # A saved file may carry truncation or padding set by whoever used it last; neither belongs to the vocabulary.
    vocabulary["truncation"] = vocabulary["padding"] = None
    return TemplateTokenizer(Tokenizer.from_str(json.dumps(vocabulary)))
