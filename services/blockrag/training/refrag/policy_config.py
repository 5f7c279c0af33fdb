"""What decides a policy's training."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from blockrag.errors import SetupError
from blockrag.modeling.bundle import file_sha256
from blockrag.modeling.refrag.policy import PolicyConfig
from blockrag.training.refrag.policy import PpoSettings

_HEAD = 32
"""Width of a policy's head."""


@dataclass(frozen=True)
class PolicyTrainingConfig:
    """A policy's training."""

    bundle: Path
    """A bundle with chunk compression; it is not changed."""
    out: Path
    """The bundle to make. The run itself lives beside it, in ``run_dir``."""
    query: bool = True
    """Whether the policy sees the question; else it is the paper's."""
    name: str = ""
    """Name of the policy in the bundle; empty: ``query`` or ``blind``. One of the same name is replaced."""
    text: tuple[Path, ...] = ()
    """JSONL(.gz) files of long texts, or directories of such."""
    data: tuple[Path, ...] = ()
    """JSONL(.gz) files of question rows, as ``adapt block`` reads them."""
    minutes: float | None = None
    """Time budget of the steps. Pauses and measurements do not count."""
    steps: int | None = None
    """Budget in steps, for runs that must be reproducible. Exactly one of ``minutes`` and ``steps`` is given."""
    text_share: float | None = None
    """Share of contexts whose target is the next paragraph; None: 0.6, with the question in sight 0.2."""
    text_reward: Literal["label", "divergence"] = "label"
    """What a text's choice is rewarded by: the target's own likelihood, as published, or how little the predictions
    diverge from those after the uncompressed passages, which says the same with less noise."""
    width: int = 64
    """Of the policy; it has a head per 32 and twice as many units inside its feed-forward layers. 64 rates 320 chunks
    in 1.2 ms on one core, 96 in 1.6."""
    start_from: Path | None = None
    """A policy's file to start from, after the parts it was trained with were tuned further; None: random weights."""
    contexts: int = 4
    """Contexts of a step: reading their blocks is what a step costs most, next to the draws."""
    max_passages: int = 10
    ppo: PpoSettings = field(default_factory=PpoSettings)
    imitation: float | None = None
    """Share of the budget in which the policy first learns to draw the chunks that hold the answers, without reading
    anything; None: 0.25 for one that sees the question, else 0, as published."""
    imitation_contexts: int = 4
    """Contexts of such a step."""
    learning_rate: float = 1e-3
    """Peak of AdamW's rate, after a warm-up; it falls with a cosine."""
    warmup_steps: int = 10
    dev_contexts: int = 48
    """Held-out questions, and as many texts, to measure on."""
    eval_steps: int = 100
    """Steps between two measurements; start and end are always measured."""
    checkpoint_steps: int = 25
    """Steps between two checkpoints: what a kill costs at most."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the frozen reader; the policy is in float32."""
    threads: int = 2
    """On a CPU: threads, each reading contexts of its own with one core."""
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise SetupError("give exactly one of minutes and steps")
        counts = ("contexts", "max_passages", "eval_steps", "checkpoint_steps", "threads")
        for name in counts:
            if getattr(self, name) < 1:
                raise SetupError(f"{name} {getattr(self, name)!r}: must be at least 1")
        if self.width < _HEAD or self.width % _HEAD:
            raise SetupError(f"width {self.width!r}: must be a multiple of {_HEAD}")
        if self.text_reward not in ("label", "divergence"):
            raise SetupError(f"text_reward {self.text_reward!r}: must be label or divergence")
        for name in ("minutes", "steps", "learning_rate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise SetupError(f"{name} {value!r}: must be positive")
        if not 0 <= self.chosen_imitation < 1 or self.imitation_contexts < 1:
            raise SetupError(f"imitation {self.imitation!r}: must be from 0 to below 1, with at least one context")
        if self.text_share is not None and not 0 <= self.text_share <= 1:
            raise SetupError(f"text_share {self.text_share!r}: must be from 0 to 1")
        if not (self.text or self.data):
            raise SetupError("a policy needs questions (--data), texts (--text) or both")

    @property
    def policy_name(self) -> str:
        return self.name or ("query" if self.query else "blind")

    @property
    def chosen_text_share(self) -> float:
        if self.text_share is not None:
            return self.text_share
        return 0.2 if self.query else 0.6

    @property
    def chosen_imitation(self) -> float:
        if self.imitation is not None:
            return self.imitation
        return 0.25 if self.query else 0.0

    def sizes(self, encoder_width: int) -> PolicyConfig:
        """Of the policy to train."""
        return PolicyConfig(
            encoder_width, self.query, width=self.width, heads=self.width // _HEAD, hidden=2 * self.width
        )

    @property
    def run_dir(self) -> Path:
        """Checkpoint, metrics.jsonl and run.json."""
        return self.out.parent / f"{self.out.name}.run"

    def recipe(self) -> dict[str, Any]:
        """The values that decide the result, beside bundle and data."""
        names = (
            *("query", "minutes", "steps", "contexts", "max_passages", "learning_rate", "warmup_steps"),
            *("dev_contexts", "precision", "seed", "text_reward", "width"),
        )
        chosen = {name: getattr(self, name) for name in names}
        start = file_sha256(self.start_from) if self.start_from is not None else ""
        imitation = {"start": start, "imitation": self.chosen_imitation, "imitation_contexts": self.imitation_contexts}
        return {**chosen, **imitation, "text_share": self.chosen_text_share, "ppo": asdict(self.ppo)}
