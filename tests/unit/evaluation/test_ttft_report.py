import pytest

from blockrag.evaluation.plots import plot_rows
from blockrag.evaluation.ttft_grpc import LABELS, ReportRow, make_row, rate_notes


def test_ratios_are_taken_within_a_repeat() -> None:
    # The machine was half as fast in the second repeat: the ratio of medians would not see 2.
    row = make_row("grpc", "block_l1", 512, [20.0, 40.0, 21.0], [10.0, 20.0, 10.0])
    assert row == ReportRow("grpc", "block_l1", 512, 20.0, 21.0, 40.0, 3, 2.0)


def test_without_a_base_there_is_no_ratio() -> None:
    assert make_row("model", "full", 512, [20.0], None).ratio_to_none is None


def test_times_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        make_row("grpc", "full", 512, [1.0, 2.0], [1.0])


def test_the_plot_is_a_picture() -> None:
    rows = [
        ReportRow(path, state, size, 1.0, 2.0 + size / 100, 3.0, 20, 1.0)
        for path in ("model", "grpc")
        for state in LABELS
        for size in (512, 1024)
    ]
    assert plot_rows(rows, "a title").startswith(b"\x89PNG")


def test_what_chunks_make_of_the_rates() -> None:
    assert rate_notes(8) == ["with chunks of 8 tokens, rate 8 is everything compressed, rate 16 is not reachable"]
    assert rate_notes(16) == ["with chunks of 16 tokens, rate 16 is everything compressed"]
    assert rate_notes(32) == []
