"""The next paragraph's log-perplexity: what is lost when the paragraphs before it are compressed.

Source: REFRAG (arXiv 2509.01092, section on continual pre-training): the same target after no context, after all of
it and after compressed context, and the share of the gap between the first two that each recovers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import numpy as np

from blockrag.budget import composed_slots, expand_at_rate
from blockrag.evaluation.compression_scores import (
    COMPRESSED,
    FULL,
    NO_CONTEXT,
    UNCOMPRESSED,
    Cell,
    TextLosses,
    TextRun,
)
from blockrag.evaluation.compression_selectors import Asked, Selectors
from blockrag.evaluation.options import CompressionOptions
from blockrag.modeling.bundle import Bundle
from blockrag.modeling.refrag.policy_features import policy_ranks
from blockrag.training.refrag.composed import ComposedPrompt
from blockrag.training.refrag.contexts import Branch
from blockrag.training.refrag.policy_contexts import PolicyReader
from blockrag.training.refrag.texts import PassageSource, read_texts, text_start

TEXT_SELECTORS = ("random", "high perplexity", "low perplexity")
"""Rules that need no question; a text's last paragraphs first is ``retrieval`` with the nearest ranked best."""


def plan_text_cells(selectors: Selectors, rates: Sequence[float], chunk_tokens: int) -> list[Cell]:
    """Cells of next-paragraph prediction: every policy, and the rules that need no question."""
    cells = [NO_CONTEXT, FULL, Cell(UNCOMPRESSED, 1.0)]
    names = (*selectors.policies, *TEXT_SELECTORS, "retrieval")
    for rate in sorted(set(rates)):
        if 1 < rate < chunk_tokens:
            cells += [Cell(name, rate) for name in names]
    if chunk_tokens > 1:
        cells.append(Cell(COMPRESSED, float(chunk_tokens)))
    return cells


def predict_paragraphs(
    options: CompressionOptions,
    bundle: Bundle,
    reader: PolicyReader,
    selectors: Selectors,
    cells: Sequence[Cell],
    progress: Callable[[int, int], None] | None = None,
) -> TextRun:
    """Losses of ``options.paragraphs`` targets of ``options.text`` in every cell.

    Raises SetupError for a bad file or too short texts.
    """
    assert options.text is not None
    tokenizer = bundle.load_tokenizer()
    source = PassageSource(read_texts([options.text]), tokenizer, bundle.template, bundle.passage_tokens)
    instruction = bundle.template.instruction_ids(tokenizer)
    random = Random(options.seed)
    count = options.paragraphs
    found = {
        cell: TextLosses(np.zeros(count), np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64))
        for cell in cells
    }
    target_tokens = np.zeros(count, dtype=np.int64)
    for number in range(count):
        drawn = source.draw(options.context + 1, random, least=options.context + 1)
        *passages, target = drawn
        start = min(text_start(drawn[0], drawn[1:]), len(target) - 1)
        branch = Branch(list(target[:start]), list(target[start:]))
        target_tokens[number] = len(branch.answer)
        _measure(number, passages, branch, instruction, reader, selectors, found)
        if progress is not None:
            progress(number + 1, count)
    return TextRun(found, target_tokens)


def _measure(
    number: int,
    passages: Sequence[Sequence[int]],
    branch: Branch,
    instruction: Sequence[int],
    reader: PolicyReader,
    selectors: Selectors,
    found: dict[Cell, TextLosses],
) -> None:
    context = reader.capture(instruction, passages)
    sizes, k = [len(passage) for passage in passages], context.chunk_tokens
    selectors.asked = Asked(number, np.concatenate(reader.chunk_losses(passages)))
    question = reader.compressor.embed([branch.prompt])[0].cpu()
    embeddings = [one.cpu() for one in context.embeddings]
    # nothing was retrieved: the paragraph nearest to the target counts as the best, as in training
    ranks = policy_ranks(False, range(len(passages)))
    chosen = {
        name: selectors.rate(name, passages, embeddings, branch.prompt, question, ranks)
        for name in {cell.selector for cell in found}
        if name in selectors.names
    }
    either = np.zeros(context.chunks, dtype=np.float32)
    prompts: dict[Cell, ComposedPrompt] = {}
    for cell, losses in found.items():
        losses.tokens[number] = context.tokens
        if cell == NO_CONTEXT:
            prompts[cell] = context.without_passages(branch)
        elif cell != FULL:
            mask = expand_at_rate(chosen.get(cell.selector, either), sizes, k, cell.rate)
            losses.slots[number] = composed_slots(sizes, mask, k)
            prompts[cell] = context.prompt(branch, mask)
    tokens = len(branch.answer)
    for cell, nats in zip(prompts, reader.prompt_losses(context, list(prompts.values())).tolist(), strict=True):
        found[cell].nats[number] = nats * tokens
    if FULL in found:
        found[FULL].slots[number] = context.tokens
        found[FULL].nats[number] = reader.whole_loss(instruction, passages, branch) * tokens
