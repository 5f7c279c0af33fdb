from hypothesis import given
from hypothesis import strategies as st

from blockrag.keys import KeyMaker

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
