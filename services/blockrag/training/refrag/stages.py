"""What each stage learns from and is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from blockrag.modeling.template import PromptTemplate
from blockrag.training.adaptation.rows import Row, data_files, hold_out_rows, read_rows
from blockrag.training.adaptation.samples import SampleLimits, SampleSource
from blockrag.training.refrag.config import RefragConfig
from blockrag.training.refrag.opening import Start
from blockrag.training.refrag.samples import NextPassage, Questions, Reconstruction, RowContexts, SampleMaker
from blockrag.training.refrag.scores import ProbeGroup, question_probes, reconstruction_probes, text_probes
from blockrag.training.refrag.texts import PassageSource, Text, hold_out, read_texts

_MAX_PROMPT = 4096


@dataclass(frozen=True)
class StageData:
    """Texts and questions, read and checked."""

    texts: tuple[Sequence[Text], Sequence[Text]]
    """To train on, and held out."""
    rows: tuple[Sequence[Row], Sequence[Row]]


@dataclass(frozen=True)
class StagePlan:
    """A stage's samples."""

    maker: SampleMaker
    probes: list[ProbeGroup]


def load_data(config: RefragConfig) -> StageData:
    """Read what ``config`` names. Raises SetupError naming the file and the problem."""
    texts = read_texts(config.text) if config.text else []
    rows = read_rows(config.data) if config.data and config.stage == "tune" else []
    return StageData(
        texts=hold_out(texts) if texts else ((), ()), rows=hold_out_rows(rows, config.dev_samples, config.seed)
    )


def files_of(config: RefragConfig) -> list[Path]:
    """Every file that the stage's samples depend on."""
    return data_files(config.text) + data_files(config.data)


def plan_stage(config: RefragConfig, start: Start, data: StageData, tokenizer: PreTrainedTokenizerFast) -> StagePlan:
    """Samples and held-out samples of ``config.stage``."""
    template, k = start.bundle.template, start.chunk_tokens
    instruction = template.instruction_ids(tokenizer)

    def passages(texts: Sequence[Text]) -> PassageSource:
        return PassageSource(texts, tokenizer, template, start.bundle.passage_tokens)

    train, held = data.texts
    if config.stage == "reconstruction":
        prompt = template.final_ids(tokenizer, "")
        learning = Reconstruction(passages(train), instruction, prompt, config, k)
        return StagePlan(learning, reconstruction_probes(learning, passages(held), config.dev_samples))
    following = NextPassage(passages(train), instruction, config, k) if train else None
    probes = []
    if train:
        measured = NextPassage(passages(held), instruction, config, k)
        probes = text_probes(measured, config.dev_samples, k)
    if config.stage != "tune":
        assert following is not None
        return StagePlan(following, probes)
    if data.rows[1]:
        dev = _row_contexts(config, start, data.rows[1], tokenizer, template, f"{config.seed}/dev")
        contexts = [dev.context(number) for number in range(len(data.rows[1]))]
        probes += question_probes(contexts, instruction, k, "rows")
    source = _row_contexts(config, start, data.rows[0], tokenizer, template, config.seed)
    return StagePlan(Questions(source, following, instruction, config, k), probes)


def _row_contexts(
    config: RefragConfig,
    start: Start,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerFast,
    template: PromptTemplate,
    seed: int | str,
) -> RowContexts:
    limits = SampleLimits(
        min_passages=1,
        max_passages=config.max_passages,
        passage_tokens=start.bundle.passage_tokens,
        max_tokens=min(_MAX_PROMPT, start.bundle.max_context_tokens),
        refusal_share=0.1,
    )
    # rows differ in length, and the step alone must say which it takes: counted by the longest they may be
    longest = config.max_passages * start.bundle.passage_tokens
    return RowContexts(SampleSource(rows, tokenizer, template, limits, seed), max(1, config.tokens_per_step // longest))
