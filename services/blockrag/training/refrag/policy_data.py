"""The data of a policy's training, read and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from blockrag.modeling.bundle import Bundle, file_sha256
from blockrag.training.adaptation.rows import Row, data_files, hold_out_rows, read_rows
from blockrag.training.adaptation.samples import SampleLimits, SampleSource
from blockrag.training.passages import DecodingTokenizer
from blockrag.training.refrag.policy_config import PolicyTrainingConfig
from blockrag.training.refrag.policy_samples import PolicyContext, PolicySamples
from blockrag.training.refrag.texts import PassageSource, Text, hold_out, read_texts

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
    tokenizer = bundle.load_tokenizer()
    texts = read_texts(config.text) if config.text else []
    train_texts, held_texts = hold_out(texts) if texts else ([], [])
    rows = read_rows(config.data) if config.data else []
    train_rows, held_rows = hold_out_rows(rows, config.dev_samples, config.seed)

    def samples(texts: Sequence[Text], rows: Sequence[Row], seed: int | str) -> PolicySamples:
        return PolicySamples(
            rows=_row_source(rows, config, bundle, tokenizer, seed) if rows else None,
            texts=PassageSource(texts, tokenizer, bundle.template, bundle.passage_tokens) if texts else None,
            template=bundle.template,
            tokenizer=tokenizer,
            text_share=config.chosen_text_share,
            max_passages=config.max_passages,
            ranked=config.query,
            seed=config.seed,
        )

    held = samples(held_texts, held_rows, f"{config.seed}/dev")
    random = Random(f"{config.seed}/probes")
    probes = [held.asked(number, random) for number in range(len(held_rows))]
    if held_texts and config.chosen_text_share > 0:
        probes += [held.text(random) for _ in range(config.dev_samples)]
    return PolicyData(
        samples=samples(train_texts, train_rows, config.seed),
        probes=[probe for probe in probes if probe is not None],
        digests=_digests(config),
    )


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
    named = {f"{path.parent.name}/{path.name}": file_sha256(path) for path in files}
    if len(named) == len(files):
        return named
    everything = hashlib.sha256("".join(sorted(file_sha256(path) for path in files)).encode())
    return {"all files": everything.hexdigest()}
