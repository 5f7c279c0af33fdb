"""What decides a policy's training."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from blockrag.errors import SetupError
from blockrag.modeling.files import DEFAULT_BUNDLE, file_sha256
from blockrag.training.configuring import StagedConfig

if TYPE_CHECKING:
    from blockrag.modeling.refrag.policy import PolicyConfig

_HEAD = 32
"""Width of a policy's head."""


@dataclass(frozen=True)
class PpoSettings:
    """What decides an update."""

    draws: int = 8
    """Expansions drawn for each prompt; the more, the less noise in an advantage."""
    fractions: tuple[float, float] = (0.03, 0.5)
    """Smallest and largest share of a prompt's chunks to expand, drawn anew for each prompt; as many between 0.05 and
    0.1 as between 0.25 and 0.5."""
    clip: float = 0.2
    """How far an update may move the likelihood of a draw."""
    epochs: int = 2
    """Updates from the same draws; the clipping is for those after the first."""
    least_spread: float = 0.005
    """Nats added to a group's standard deviation: what differs less is rounding. The next paragraph's loss moves by
    about 0.01 with the choice of chunks, an answer's by 1."""

    def __post_init__(self) -> None:
        low, high = self.fractions
        if not 0 < low <= high <= 1:
            raise SetupError(f"fractions {self.fractions}: must rise within (0, 1]")
        if self.draws < 2 or self.epochs < 1 or self.clip <= 0 or self.least_spread <= 0:
            raise SetupError("an update needs at least two draws, one epoch, and positive clip and least_spread")


@dataclass(frozen=True, kw_only=True)
class PolicyTrainingConfig(StagedConfig):
    """A policy's training."""

    bundle: Path = DEFAULT_BUNDLE
    """A bundle with chunk compression; it is not changed."""
    policy: Literal["query", "blind"] = "query"
    """One that sees the question, or the paper's."""
    name: str = ""
    """Name of the policy in the bundle; default: query or blind. One of the same name is replaced."""
    data: tuple[Path, ...] = ()
    """JSONL(.gz) files of question rows, as ``adapt block`` reads them."""
    text_share: float | None = None
    """Share of contexts whose target is the next paragraph; None: 0.6, with the question in sight 0.2."""
    text_reward: Literal["label", "divergence"] = "label"
    """What a text's choice is rewarded by: the target's own likelihood, as published, or how little the predictions
    diverge from those after the uncompressed passages, which says the same with less noise."""
    policy_width: int = 64
    """Of the policy; it has a head per 32 and twice as many units inside its feed-forward layers. 64 rates 320 chunks
    in 1.2 ms on one core, 96 in 1.6."""
    start_from: Path | None = None
    """A policy's file to start from, after the parts it was trained with were tuned further; None: random weights."""
    contexts: int = 4
    """Contexts of a step: reading their blocks is what a step costs most, next to the draws."""
    max_passages: int = 10
    """Most passages of a context."""
    ppo: PpoSettings = field(default_factory=PpoSettings)
    imitation: float | None = None
    """Share of the budget in which the policy first learns to draw the chunks that hold the answers, without reading
    anything; None: 0.25 for one that sees the question, else 0, as published."""
    imitation_contexts: int = 4
    """Contexts of such a step."""
    learning_rate: float = 1e-3
    """Peak of AdamW's rate, after a warm-up; it falls with a cosine."""
    warmup_steps: int = 10
    """Steps until the learning rate is reached."""
    dev_samples: int = 48
    """Held-out questions, and as many texts, to measure on."""
    eval_steps: int = 100
    """Steps between two measurements; start and end are always measured."""
    checkpoint_steps: int = 25
    """Steps between two checkpoints: what a kill costs at most."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the frozen reader; the policy is in float32."""
    threads: int = 2
    """On a CPU: threads, each reading contexts of its own with one core."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_least(1, "contexts", "max_passages", "eval_steps", "checkpoint_steps", "threads")
        self.require_positive("learning_rate")
        self.require_share("text_share")
        width = self.policy_width
        self.require(width >= _HEAD and width % _HEAD == 0, "policy_width", f"must be a multiple of {_HEAD}")
        self.require(self.text_reward in ("label", "divergence"), "text_reward", "must be label or divergence")
        imitates = 0 <= self.chosen_imitation < 1 and self.imitation_contexts >= 1
        self.require(imitates, "imitation", "must be from 0 to below 1, with at least one context")
        if not (self.text or self.data):
            raise SetupError("a policy needs questions (--data), texts (--text) or both")

    @property
    def query(self) -> bool:
        """Whether the policy sees the question."""
        return self.policy == "query"

    @property
    def policy_name(self) -> str:
        return self.name or self.policy

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
        from blockrag.modeling.refrag.policy import PolicyConfig

        width = self.policy_width
        return PolicyConfig(encoder_width, self.query, width=width, heads=width // _HEAD, hidden=2 * width)

    def recipe(self) -> dict[str, Any]:
        """The values that decide the result, beside bundle and data."""
        names = (
            *("policy", "minutes", "steps", "contexts", "max_passages", "learning_rate", "warmup_steps"),
            *("dev_samples", "precision", "seed", "text_reward", "policy_width"),
        )
        chosen = {name: getattr(self, name) for name in names}
        start = file_sha256(self.start_from) if self.start_from is not None else ""
        imitation = {"start": start, "imitation": self.chosen_imitation, "imitation_contexts": self.imitation_contexts}
        return {**chosen, **imitation, "text_share": self.chosen_text_share, "ppo": asdict(self.ppo)}
