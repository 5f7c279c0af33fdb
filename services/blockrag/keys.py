"""Keys of block KV: two requests share an entry exactly when the key's inputs are equal.

Inputs: the block's token ids, its form, the bundle's fingerprint (weights with PEAR folded, dtype, template) and the
tenant's salt. The salt is made by the server from a secret, so a tenant can neither guess nor reach another's entries.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

BlockForm = Literal["full"]
"""``full``: one slot per token."""

_KEY_BYTES = 20


@dataclass(frozen=True)
class KeyMaker:
    """Makes keys for one bundle.

    Pure and deterministic across processes and machines for equal ``bundle_fingerprint`` and ``secret``.
    """

    bundle_fingerprint: str
    secret: bytes = field(repr=False)

    def block_key(self, tenant: str, token_ids: Sequence[int], form: BlockForm = "full") -> str:
        """Key of one block, 40 hex digits.

        ``token_ids`` in [0, 2**32); their number is part of the key, so no block's key equals its prefix's.
        """
        digest = hashlib.blake2b(digest_size=_KEY_BYTES, key=self._salt(tenant), person=b"blockrag-kv-1")
        for part in (self.bundle_fingerprint, form, str(len(token_ids))):
            digest.update(len(part).to_bytes(4, "little"))
            digest.update(part.encode())
        digest.update(np.asarray(token_ids, dtype="<u4").tobytes())
        return digest.hexdigest()

    def _salt(self, tenant: str) -> bytes:
        return hmac.new(self.secret, tenant.encode(), hashlib.sha256).digest()
