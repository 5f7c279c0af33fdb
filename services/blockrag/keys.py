"""Keys of cached blocks: two requests share an entry exactly when the key's inputs are equal.

Inputs: the block's token ids, its form, the bundle's fingerprint (weights with PEAR folded, dtype, template; for the
compressed forms its compression fingerprint, which counts the chunk encoder, the projector and the chunks' size too)
and the tenant's salt. The salt is made by the server from a secret, so a tenant can neither guess nor reach another's
entries.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from blockrag.types import FULL, BlockForm, BlockRequest

_KEY_BYTES = 20


@dataclass(frozen=True)
class KeyMaker:
    """Makes keys for one bundle.

    Pure and deterministic across processes and machines for equal fingerprints and ``secret``.
    """

    bundle_fingerprint: str
    secret: bytes = field(repr=False)
    compression_fingerprint: str = ""
    """Empty: the bundle has nothing to compress with."""

    def block_key(self, tenant: str, token_ids: Sequence[int] | NDArray[np.int32], form: BlockForm = FULL) -> str:
        """Key of one block in one form, 40 hex digits.

        ``token_ids`` in [0, 2**32); their number is part of the key, so no block's key equals its prefix's. Raises
        ValueError for a compressed form where the bundle has none.
        """
        fingerprint = self.bundle_fingerprint if form == FULL else self.compression_fingerprint
        if not fingerprint:
            raise ValueError(f"no key for the form {form}: the bundle does not compress")
        digest = hashlib.blake2b(digest_size=_KEY_BYTES, key=self._salt(tenant), person=b"blockrag-kv-1")
        for part in (fingerprint, str(form), str(len(token_ids))):
            digest.update(len(part).to_bytes(4, "little"))
            digest.update(part.encode())
        digest.update(np.asarray(token_ids, dtype="<u4").tobytes())
        return digest.hexdigest()

    def block_request(
        self,
        tenant: str,
        token_ids: Sequence[int] | NDArray[np.int32],
        form: BlockForm = FULL,
        *,
        collection: str,
        document_id: str,
        traceparent: str = "",
    ) -> BlockRequest:
        """Asks for one block in one form. Raises as ``block_key``."""
        ids = np.asarray(token_ids, dtype=np.int32)
        key = self.block_key(tenant, token_ids, form)
        return BlockRequest(key, ids, tenant, collection, document_id, traceparent, form)

    def _salt(self, tenant: str) -> bytes:
        return hmac.new(self.secret, tenant.encode(), hashlib.sha256).digest()
