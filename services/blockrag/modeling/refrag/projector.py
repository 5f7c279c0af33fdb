"""The projector φ: from a chunk's embedding to an input embedding of the decoder.

Source: REFRAG (arXiv 2509.01092, section 2): a two-layer MLP; its activation is unspecified there, GELU here.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blockrag.errors import BundleError
from blockrag.modeling.loading import check_finite

_NAMES = {"first.weight": 2, "first.bias": 1, "second.weight": 2, "second.bias": 1}


class Projector(nn.Module):
    """Linear, GELU, Linear; float32."""

    def __init__(self, encoder_width: int, decoder_width: int, hidden: int | None = None) -> None:
        """``hidden`` is the width between the layers; None: the decoder's."""
        super().__init__()
        self.first = nn.Linear(encoder_width, hidden or decoder_width)
        self.second = nn.Linear(hidden or decoder_width, decoder_width)

    @property
    def encoder_width(self) -> int:
        return self.first.in_features

    @property
    def decoder_width(self) -> int:
        return self.second.out_features

    def forward(self, embeddings: Tensor) -> Tensor:
        """Chunk embeddings [..., encoder_width] to input embeddings [..., decoder_width]."""
        projected: Tensor = self.second(nn.functional.gelu(self.first(embeddings)))
        return projected

    def save(self, path: str | Path) -> None:
        """Write the weights as safetensors."""
        tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, path, metadata={"format": "pt"})

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu") -> Projector:
        """Read what ``save`` wrote, in evaluation mode. Raises BundleError for a damaged file, NaN or infinity."""
        where = Path(path)
        try:
            tensors = load_file(where)
        except (OSError, SafetensorError) as error:
            raise BundleError(f"{where}: the projector does not load: {error}") from error
        if {name: tensor.ndim for name, tensor in tensors.items()} != _NAMES:
            raise BundleError(f"{where}: no projector of two layers: {', '.join(sorted(tensors)) or 'empty'}")
        check_finite(where, tensors.items())
        hidden, encoder_width = tensors["first.weight"].shape
        projector = cls(encoder_width, tensors["second.weight"].shape[0], hidden)
        try:
            projector.load_state_dict(tensors)
        except RuntimeError as error:
            raise BundleError(f"{where}: the projector's layers do not fit each other: {error}") from error
        return projector.eval().to(device)
