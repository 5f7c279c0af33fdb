from hypothesis import given
from hypothesis import strategies as st

from blockrag.training.adaptation.contexts import OverlapFilter

WORDS = [f"word{number}" for number in range(60)]


def test_a_shared_run_is_found_whatever_its_case_and_marks() -> None:
    shares = OverlapFilter([" ".join(WORDS[:30])])
    assert shares("Before it: " + ", ".join(WORDS[5:25]).upper() + "!")
    assert not shares(" ".join(WORDS[30:]))
    assert not shares(" ".join(WORDS[20:31])), "eleven words are no run"


@given(st.integers(0, 40), st.integers(0, 20), st.integers(0, 20))
def test_a_run_of_sixteen_words_is_found_wherever_it_stands(start: int, before: int, after: int) -> None:
    shares = OverlapFilter([" ".join(WORDS)], length=12, stride=5)
    run = WORDS[start : start + 16]
    text = " ".join(["before"] * before + run + ["after"] * after)
    assert shares(text)


def test_without_texts_nothing_is_shared() -> None:
    assert not OverlapFilter([])(" ".join(WORDS))
