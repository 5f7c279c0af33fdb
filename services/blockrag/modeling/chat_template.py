"""Prompt templates for checkpoints that were made elsewhere.

A template made here uses only tokens that the checkpoint has. A chat checkpoint keeps its own turns: the instruction
block opens the user's turn and the final block closes it, so that the passages' blocks stand in between and hold
nothing but text.

A chat template that writes the date gets the one that it has for who knows none (Llama 3's), or else ``DATE``: the
instruction block is cached and counted by fingerprints, so it says the same every day, on whatever day it is made.
"""

from __future__ import annotations

import logging
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from blockrag.errors import BundleError
from blockrag.modeling.files import read_json
from blockrag.modeling.template import INSTRUCTION, PromptTemplate

REFUSAL = "not in the passages"
PASSAGE = "Title: {title}\n{text}\n\n"
QUESTION = "Question: {question}"

# Text that no chat template changes, and that says where a turn's content stands.
_USER, _ASSISTANT = "USERCONTENT", "ASSISTANTCONTENT"
DATE = datetime(2025, 1, 1)
"""What chat templates are told that ask for the date and have none of their own."""
# A moment that differs from it in every part that a template may write.
_OTHER = datetime(2032, 11, 29, 17, 58, 49)
_logger = logging.getLogger(__name__)
# A chat template's only clock is the function strftime_now. This one, put before the template, takes the time from a
# dictionary; it ends with an expression, because a line break after a statement is dropped.
_CLOCK = (
    "{%- macro strftime_now(format) %}{% set told = namespace(text=format) %}"
    "{% for part, value in moment_for_template.items() %}{% set told.text = told.text | replace(part, value) %}"
    "{% endfor %}{{ told.text }}{% endmacro %}{{ '' }}"
)
_NO_CLOCK = "{%- set strftime_now = no_such_function_for_template %}{{ '' }}"


def read_template(path: Path) -> PromptTemplate:
    """A template from a JSON file. Raises BundleError naming the file and what it must hold."""
    return PromptTemplate.from_dict(read_json(path), path)


def default_template(tokenizer: PreTrainedTokenizerFast) -> PromptTemplate:
    """A template for a checkpoint by its tokenizer: its chat turns where it has any, else plain text.

    Raises BundleError where the tokenizer has no token that ends an answer.
    """
    if tokenizer.chat_template:
        return _chat_template(tokenizer)
    if not tokenizer.eos_token:
        raise BundleError("the tokenizer names no eos_token, so nothing could end an answer: give a template file")
    return PromptTemplate(
        instruction=_begin(tokenizer) + INSTRUCTION,
        passage=PASSAGE,
        final=QUESTION + "\nAnswer:",
        answer_prefix=" ",
        end=str(tokenizer.eos_token),
        refusal=REFUSAL,
    )


def _begin(tokenizer: PreTrainedTokenizerFast) -> str:
    """The text of the BOS token where the checkpoint is used to one: where its tokenizer puts it by itself."""
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a")["input_ids"][:1] != [bos]:
        return ""
    return str(tokenizer.bos_token)


def _chat_template(tokenizer: PreTrainedTokenizerFast) -> PromptTemplate:
    user = {"role": "user", "content": _USER}
    asked = _render(tokenizer, [user], add_generation_prompt=True)
    opening, found, closing = asked.partition(_USER)
    answered = _render(tokenizer, [user, {"role": "assistant", "content": _ASSISTANT}], add_generation_prompt=False)
    _, answer_found, after = answered.partition(_ASSISTANT)
    special = sorted(tokenizer.all_special_tokens + list(tokenizer.get_added_vocab()), key=len, reverse=True)
    end = re.search("|".join(map(re.escape, special)), after) if special else None
    if not found or not answer_found or not (end or tokenizer.eos_token):
        raise BundleError("the chat template shows no turns to put passages into: give a template file")
    return PromptTemplate(
        # what renders a chat adds BOS itself where the checkpoint is used to one
        instruction=opening + INSTRUCTION,
        passage=PASSAGE,
        final=QUESTION + closing,
        answer_prefix="" if closing[-1:].isspace() or not closing else _answer_prefix(answered),
        end=end.group() if end else str(tokenizer.eos_token),
        refusal=REFUSAL,
    )


def _answer_prefix(answered: str) -> str:
    before = answered.partition(_ASSISTANT)[0]
    return before[len(before.rstrip(" ")) :]


def _render(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], **options: Any) -> str:
    told = _render_at(DATE, tokenizer, messages, options)
    if told == _render_at(_OTHER, tokenizer, messages, options):
        return told
    try:
        told = _render_with(_NO_CLOCK, {}, tokenizer, messages, options)
        known = "the date that it has for who knows none"
    except BundleError:
        known = f"{DATE:%d %B %Y}"
    _logger.warning("the chat template writes the current date; the bundle's instruction says %s, every day", known)
    return told


def _render_at(
    moment: datetime, tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], options: dict[str, Any]
) -> str:
    parts = [f"%{letter}" for letter in "aAwdbBmyYHIMpSfjUWcxXGuVe"] + ["%-d", "%-m", "%-I", "%-H"]
    values = {"moment_for_template": {part: moment.strftime(part) for part in parts}}
    return _render_with(_CLOCK, values, tokenizer, messages, options)


def _render_with(
    clock: str,
    values: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict[str, str]],
    options: dict[str, Any],
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                chat_template=clock + tokenizer.get_chat_template(),
                tokenize=False,
                enable_thinking=False,  # models that think first are told not to; other templates ignore the name
                **values,
                **options,
            )
        )
    except Exception as error:  # templates are programs; jinja raises what they raise
        raise BundleError(f"the tokenizer's chat template fails: {error}; give a template file") from error
