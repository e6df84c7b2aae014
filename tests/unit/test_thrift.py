"""How often there is time to look: never more than the share, never a model for long without."""

from __future__ import annotations

import time

import pytest

from pullback_server.engine import thrift as module
from pullback_server.engine.thrift import Thrift


class Clock:
    """A clock that goes as it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)


def test_a_share_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, thrift = Clock(monkeypatch), Thrift(0.02)
    looking = looked = 0.0
    began = clock.now
    for _ in range(10_000):
        clock.now += 0.001
        if thrift.affords("small"):
            start = clock.now
            clock.now += 50e-6
            thrift.looked("small", start)
            looking += 50e-6
            looked += 1
    assert looked > 100
    # Half of the share is for sending and counting.
    assert looking / (clock.now - began) <= 0.0101


def test_a_large_model_is_always_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, thrift = Clock(monkeypatch), Thrift(0.02)
    for _ in range(100):
        assert thrift.affords("large")
        start = clock.now
        clock.now += 1e-4
        thrift.looked("large", start)
        clock.now += 0.02


def test_a_rare_model_is_not_starved_by_a_busy_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, thrift = Clock(monkeypatch), Thrift(0.02)
    seen = 0
    for call in range(20_000):
        clock.now += 0.001
        name = "rare" if call % 500 == 499 else "busy"
        if thrift.affords(name):
            seen += name == "rare"
            start = clock.now
            clock.now += 1e-4
            thrift.looked(name, start)
    # 40 calls in 20 s: each comes half a second after the one before.
    assert seen >= 15


def test_without_a_limit_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    thrift = Thrift(0)
    for _ in range(100):
        assert thrift.affords("any")
        thrift.looked("any", time.perf_counter() - 1)


def test_pieces_of_one_call_are_looked_at_all_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, thrift = Clock(monkeypatch), Thrift(0.02)
    for expected in (True, False):
        with thrift.for_all_pieces("any"):
            for _ in range(5):
                assert thrift.affords("any") is expected
                start = clock.now
                clock.now += 1e-3
                if expected:
                    thrift.looked("any", start)
    clock.now += 1.0
    assert thrift.affords("any")
