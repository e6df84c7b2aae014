"""`no_grad`, `enable_grad` and `detect_anomaly` as decorators, of all kinds of functions, and across contexts."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import AsyncGenerator, Generator
from typing import Any

import pytest

import pullback as pb
from pullback.autograd import detect_anomaly, is_anomaly_enabled


def on() -> tuple[bool, bool]:
    return pb.is_grad_enabled(), is_anomaly_enabled()


@pb.no_grad()
@detect_anomaly()
def plain(depth: int = 2) -> tuple[bool, bool]:
    """Documented."""
    return plain(depth - 1) if depth else on()


@pb.no_grad()
@detect_anomaly()
async def waits() -> list[tuple[bool, bool]]:
    found = [on()]
    await asyncio.sleep(0)
    with pb.enable_grad():
        await asyncio.sleep(0)
        found.append(on())
    return [*found, on()]


@pb.no_grad()
@detect_anomaly()
def yields(found: list[Any]) -> Generator[Any, Any, str]:
    try:
        found.append((on(), (yield on())))
        try:
            yield on()
        except ValueError as error:
            found.append((on(), str(error)))
        yield on()
    finally:
        found.append(on())
    return "done"


@pb.no_grad()
@detect_anomaly()
async def streams(found: list[Any]) -> AsyncGenerator[Any, Any]:
    try:
        found.append((on(), (yield on())))
        await asyncio.sleep(0)
        try:
            yield on()
        except ValueError as error:
            found.append((on(), str(error)))
        yield on()
    finally:
        found.append(on())


INSIDE, OUTSIDE = (False, True), (True, False)


def test_a_function() -> None:
    assert plain() == INSIDE and on() == OUTSIDE
    assert (plain.__name__, plain.__doc__) == ("plain", "Documented.")


def test_an_async_function() -> None:
    async def main() -> None:
        assert inspect.iscoroutinefunction(waits)
        for found in await asyncio.gather(*(waits() for _ in range(3))):
            assert found == [INSIDE, (True, True), INSIDE]
        assert await waits() == [INSIDE, (True, True), INSIDE] and on() == OUTSIDE

    asyncio.run(main())


def test_a_generator_as_torchs() -> None:
    torch = pytest.importorskip("torch")

    @torch.no_grad()
    def theirs() -> Generator[bool, None, None]:
        yield torch.is_grad_enabled()

    mine, other = yields([]), theirs()
    assert (next(mine), next(other)) == (INSIDE, False)
    assert on() == OUTSIDE and torch.is_grad_enabled()

    found: list[Any] = []
    generator = yields(found)
    assert next(generator) == INSIDE and on() == OUTSIDE
    assert generator.send(3) == INSIDE and on() == OUTSIDE
    assert generator.throw(ValueError("thrown")) == INSIDE and on() == OUTSIDE
    with pytest.raises(StopIteration) as stopped:
        next(generator)
    assert stopped.value.value == "done" and on() == OUTSIDE
    assert found == [(INSIDE, 3), (INSIDE, "thrown"), INSIDE]

    closed: list[Any] = []
    generator = yields(closed)
    next(generator)
    generator.close()
    assert closed == [INSIDE] and on() == OUTSIDE
    with pytest.raises(KeyError):
        next(fresh := yields([]))
        fresh.throw(KeyError("not caught"))
    assert on() == OUTSIDE


def test_an_async_generator() -> None:
    async def main() -> None:
        found: list[Any] = []
        generator = streams(found)
        assert await anext(generator) == INSIDE and on() == OUTSIDE
        assert await generator.asend(3) == INSIDE and on() == OUTSIDE
        assert await generator.athrow(ValueError("thrown")) == INSIDE and on() == OUTSIDE
        assert [one async for one in generator] == [] and on() == OUTSIDE
        assert found == [(INSIDE, 3), (INSIDE, "thrown"), INSIDE]
        closed: list[Any] = []
        generator = streams(closed)
        await anext(generator)
        await generator.aclose()
        assert closed == [INSIDE] and on() == OUTSIDE

    asyncio.run(main())


def test_a_block_that_ends_in_another_context() -> None:
    def fixture() -> Generator[None, None, None]:
        with pb.no_grad():
            yield

    generator = fixture()
    context = contextvars.copy_context()
    context.run(next, generator)
    assert not context.run(pb.is_grad_enabled)
    contextvars.copy_context().run(next, generator, None)
    assert pb.is_grad_enabled()
