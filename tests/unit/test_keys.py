import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.keys import KeyMaker
from blockrag.types import FULL, BlockForm

_TOKENS = st.lists(st.integers(min_value=0, max_value=2**32 - 1), max_size=40)
_MAKER = KeyMaker(bundle_fingerprint="f" * 64, secret=b"a secret of the server")


@given(_TOKENS, _TOKENS)
def test_keys_are_equal_exactly_for_equal_tokens(first: list[int], second: list[int]) -> None:
    keys_equal = _MAKER.block_key("public", first) == _MAKER.block_key("public", second)
    assert keys_equal == (first == second)


@given(_TOKENS)
def test_tenants_never_share_a_key(tokens: list[int]) -> None:
    assert _MAKER.block_key("one", tokens) != _MAKER.block_key("two", tokens)


@given(_TOKENS)
def test_bundle_and_secret_are_part_of_the_key(tokens: list[int]) -> None:
    keys = {
        KeyMaker(fingerprint, secret).block_key("public", tokens)
        for fingerprint in ("f1", "f2")
        for secret in (b"s1", b"s2")
    }
    assert len(keys) == 4


def test_keys_are_stable_across_processes() -> None:
    # A changed key silently empties every cache: change this value only together with the key's version.
    assert _MAKER.block_key("public", [1, 2, 3]) == "2a01d8f1f46ba4151aea3ede752e26ceb0b2676b"


def test_secret_is_not_printed() -> None:
    assert "secret" not in repr(_MAKER)


_COMPRESSING = KeyMaker("f" * 64, b"a secret of the server", "c" * 40)
_FORMS = (FULL, BlockForm("compressed", 8), BlockForm("compressed", 16), BlockForm("chunks", 8))


@given(_TOKENS)
def test_each_form_of_a_block_has_a_key_of_its_own(tokens: list[int]) -> None:
    assert len({_COMPRESSING.block_key("public", tokens, form) for form in _FORMS}) == len(_FORMS)


def test_compression_changes_no_key_of_a_full_block() -> None:
    assert _COMPRESSING.block_key("public", [1, 2, 3]) == _MAKER.block_key("public", [1, 2, 3])


def test_other_compression_is_another_key_of_compressed_blocks_only() -> None:
    other = KeyMaker("f" * 64, b"a secret of the server", "d" * 40)
    differing = [form for form in _FORMS if other.block_key("t", [1], form) != _COMPRESSING.block_key("t", [1], form)]
    assert differing == list(_FORMS[1:])


def test_a_bundle_that_does_not_compress_has_no_such_keys() -> None:
    with pytest.raises(ValueError, match="compressed-8"):
        _MAKER.block_key("public", [1], BlockForm("compressed", 8))


@pytest.mark.parametrize(("kind", "chunk_tokens"), [("full", 8), ("compressed", 0), ("chunks", -1)])
def test_forms_that_cannot_be(kind: str, chunk_tokens: int) -> None:
    with pytest.raises(ValueError, match=kind):
        BlockForm(kind, chunk_tokens)  # type: ignore[arg-type]


def test_a_forms_name_and_size() -> None:
    assert [str(form) for form in _FORMS] == ["full", "compressed-8", "compressed-16", "chunks-8"]
    assert [form.size(17) for form in _FORMS] == [17, 3, 2, 3]
