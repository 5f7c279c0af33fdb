"""A bundle that cannot compress, one that can, and a planner of it over blocks that are encoded here."""

from __future__ import annotations

import pytest

from blockrag.compressor.mixing import EmbeddingCache, Mixer
from blockrag.compressor.plans import Planner
from blockrag.compressor.rating import ChunkRater
from blockrag.keys import KeyMaker
from blockrag.modeling.bundle import Bundle, load_bundle
from tests.models import make_tiny_bundle
from tests.refrag_bundles import make_refrag_bundle
from tests.unit.compressor.planning import CHUNK, Decoder, Encoding, make_planner


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny"))


@pytest.fixture(scope="module")
def bundle(plain: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundle") / "compressing"
    return make_refrag_bundle(plain, out, width=16, chunk_tokens=CHUNK, decoder_width=32)


@pytest.fixture(scope="module")
def source(bundle: Bundle) -> Encoding:
    return Encoding(bundle)


@pytest.fixture
def planner(bundle: Bundle, source: Encoding) -> Planner:
    source.fetched.clear()
    keys = KeyMaker(bundle.fingerprint, b"secret", bundle.compression_fingerprint)
    mixer = Mixer(CHUNK, ChunkRater.load(bundle), EmbeddingCache(source, 2**20), keys)
    return make_planner(bundle, mixer, Decoder())
