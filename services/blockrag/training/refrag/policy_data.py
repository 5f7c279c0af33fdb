"""The data of a policy's training, read and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from blockrag.errors import SetupError
from blockrag.modeling.bundle import Bundle, file_sha256
from blockrag.modeling.refrag.policy_features import TokenTraits
from blockrag.training.adaptation.rows import Row, data_files, read_rows
from blockrag.training.adaptation.samples import SampleLimits, SampleSource
from blockrag.training.contexts import ContextSampler
from blockrag.training.data import ReaderData, load_reader_data
from blockrag.training.drafts import BatchShape
from blockrag.training.mixture import Mixture
from blockrag.training.passages import DecodingTokenizer
from blockrag.training.refrag.policy_config import PolicyTrainingConfig
from blockrag.training.refrag.policy_samples import PolicyContext, PolicySamples
from blockrag.training.refrag.texts import PassageSource, Text, hold_out, read_texts, reader_texts
from blockrag.training.tokenizer import load_template_tokenizer

_HELD_OUT_ROWS = 0.1
_MAX_PROMPT = 4096


@dataclass(frozen=True)
class PolicyData:
    """What a run learns from and is measured on."""

    samples: PolicySamples
    probes: Sequence[PolicyContext]
    """Held out, one target each."""
    digests: Mapping[str, str]
    """Of every file, by name."""


def load_policy_data(config: PolicyTrainingConfig, bundle: Bundle) -> PolicyData:
    """Read what ``config`` names. Raises SetupError naming the file and the problem."""
    traits = TokenTraits.of(bundle.load_tokenizer())
    digits = frozenset(np.flatnonzero(traits.digit).tolist())
    tokenizer = load_template_tokenizer(bundle.decoder_dir)  # the same ids, ten times faster
    reader = _reader_data(config.reader_data)
    texts = [*(read_texts(config.text) if config.text else []), *(reader_texts(reader) if reader else [])]
    train_texts, held_texts = hold_out(texts) if texts else ([], [])
    rows = read_rows(config.data) if config.data else []
    count = min(config.dev_contexts, int(_HELD_OUT_ROWS * len(rows)))
    chosen = set(Random(f"{config.seed}/held out").sample(range(len(rows)), count))
    train_rows = [row for number, row in enumerate(rows) if number not in chosen]
    sampler = ContextSampler(reader, tokenizer, bundle.template, Mixture()) if reader else None

    def samples(texts: Sequence[Text], rows: Sequence[Row], seed: int | str) -> PolicySamples:
        return PolicySamples(
            sampler=sampler,
            rows=_row_source(rows, config, bundle, tokenizer, seed) if rows else None,
            texts=PassageSource(texts, tokenizer, bundle.template, bundle.passage_tokens) if texts else None,
            template=bundle.template,
            tokenizer=tokenizer,
            text_share=config.chosen_text_share,
            max_passages=config.max_passages,
            passage_tokens=bundle.passage_tokens,
            questions=config.questions,
            ranked=config.query,
            digits=digits,
            seed=config.seed,
        )

    held = samples(held_texts, [rows[number] for number in sorted(chosen)], f"{config.seed}/dev")
    random = Random(f"{config.seed}/probes")
    probes: list[PolicyContext | None] = []
    if sampler is not None:
        shape = BatchShape(config.max_passages, bundle.passage_tokens)
        drawn = [one for found in sampler.probes(shape, config.dev_contexts, random).values() for one in found]
        probes += [held.of(context, context.branches[:1], random) for context in drawn]
    probes += [held.row(number, random) for number in range(len(chosen))]
    if held_texts and config.chosen_text_share > 0:
        probes += [held.text(random) for _ in range(config.dev_contexts)]
    return PolicyData(
        samples=samples(train_texts, train_rows, config.seed),
        probes=[probe for probe in probes if probe is not None],
        digests=_digests(config),
    )


def _reader_data(folder: Path | None) -> ReaderData | None:
    if folder is None:
        return None
    try:
        return load_reader_data(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SetupError(str(error)) from error


def _row_source(
    rows: Sequence[Row], config: PolicyTrainingConfig, bundle: Bundle, tokenizer: DecodingTokenizer, seed: int | str
) -> SampleSource:
    limits = SampleLimits(
        min_passages=1,
        max_passages=config.max_passages,
        passage_tokens=bundle.passage_tokens,
        max_tokens=min(_MAX_PROMPT, bundle.max_context_tokens),
        refusal_share=0.0,  # a refusal's likelihood says nothing of which chunks matter
    )
    return SampleSource(rows, tokenizer, bundle.template, limits, seed)


def _digests(config: PolicyTrainingConfig) -> dict[str, str]:
    files = [*data_files(config.text), *data_files(config.data)]
    if config.reader_data is not None:
        files += sorted(path for path in config.reader_data.glob("*/*.gz") if path.is_file())
    named = {f"{path.parent.name}/{path.name}": file_sha256(path) for path in files}
    if len(named) == len(files):
        return named
    everything = hashlib.sha256("".join(sorted(file_sha256(path) for path in files)).encode())
    return {"all files": everything.hexdigest()}
