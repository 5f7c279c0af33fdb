"""Refusing at once instead of queueing."""

from __future__ import annotations

import contextlib

import pytest

from blockrag.errors import OverloadedError
from blockrag.gateway.admission import Admission


def test_one_too_many_is_refused_with_a_hint_and_places_come_back() -> None:
    admission = Admission("answers are in progress", 2)
    with admission.slot(), admission.slot():
        assert admission.running == 2
        with pytest.raises(OverloadedError, match="2 answers are in progress") as refused, admission.slot():
            pass
        assert 50 <= refused.value.retry_after_ms <= 5_000
        assert admission.running == 2
    assert admission.running == 0


def test_a_failing_request_gives_its_place_back() -> None:
    admission = Admission("answers are in progress", 1)
    with contextlib.suppress(ValueError), admission.slot():
        raise ValueError
    with admission.slot():
        assert admission.running == 1


def test_the_hint_follows_how_long_requests_take() -> None:
    admission = Admission("answers are in progress", 1)
    for _ in range(200):
        with admission.slot():
            pass
    with admission.slot(), pytest.raises(OverloadedError) as refused, admission.slot():
        pass
    assert refused.value.retry_after_ms == 50


def test_one_tenant_does_not_keep_the_others_out() -> None:
    admission = Admission("documents are being received", 3, 2)
    with admission.slot("acme"), admission.slot("acme"):
        with pytest.raises(OverloadedError, match="2 documents are being received for acme"), admission.slot("acme"):
            pass
        with admission.slot("umbrella"):
            assert admission.running == 3
    with admission.slot("acme"):
        assert admission.running == 1
