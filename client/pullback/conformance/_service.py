"""Checks of what surrounds the calls: health, reflection, deadlines, many callers, ids, limits."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pullback.conformance._bytes import field
from pullback.conformance._check import Absent, Mismatch, Skip, expect, expect_equal, of_server
from pullback.conformance._numbers import same
from pullback.conformance._refusal import refuses, well
from pullback.conformance._stream import Session
from pullback.conformance._subject import House, Subject
from pullback.conformance._wire import Refused
from pullback_wire import GRADIENT_METHODS, MODEL_METHODS, REQUEST_ID_KEY, SESSION_SERVICE, TIMINGS_KEY, Reason

_HEALTH = "/grpc.health.v1.Health/Check"
_REFLECTION = tuple(
    f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo" for version in ("v1", "v1alpha")
)
_SERVING = b"\x08\x01"
#: Largest message that is sent to see it refused.
_MOST = 64 << 20
CALLERS = 16


@of_server(
    "health.serving", "grpc.health.v1 says SERVING of the server, of each service and of each model that is ready."
)
def serving(house: House) -> None:
    services = {method.service for method in (*GRADIENT_METHODS.values(), *MODEL_METHODS.values())}
    ready = [subject.name for subject in house.subjects if not subject.problem]
    for name in ["", *sorted(services), *ready]:
        asked = f"health of {name!r}"
        try:
            answer, _ = house.wire.call(_HEALTH, field(1, name.encode()) if name else b"", asked)
        except Refused as refused:
            if refused.code == "UNIMPLEMENTED":
                raise Absent("grpc.health.v1 is UNIMPLEMENTED") from None
            raise
        expect_equal(answer, _SERVING, f"SERVING for {name!r}:")
    try:
        house.wire.call(_HEALTH, field(1, b"no-such-service-conformance"), "health of what is not there")
    except Refused as refused:
        expect(refused.code in ("NOT_FOUND", "PERMISSION_DENIED"), "NOT_FOUND", refused.words)
    else:
        raise Mismatch("NOT_FOUND", "an answer")


@of_server("reflection.services", "Reflection, where there is one, lists the three services.")
def reflection(house: House) -> None:
    import grpc

    for path in _REFLECTION:
        house.wire.say(f"list_services of {path}")
        call = house.wire.channel.stream_stream(path)(
            iter([field(7, b"*")]), timeout=house.wire.timeout, metadata=house.wire.metadata
        )
        try:
            answer = next(call)
            break
        except (grpc.RpcError, StopIteration) as error:
            if not isinstance(error, grpc.RpcError) or error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                raise Mismatch("a list of services, or UNIMPLEMENTED", str(error)) from None
    else:
        raise Absent("grpc.reflection is UNIMPLEMENTED")
    services = {method.service for method in (*GRADIENT_METHODS.values(), *MODEL_METHODS.values())} | {SESSION_SERVICE}
    missing = [name for name in sorted(services) if field(1, name.encode()) not in answer]
    expect_equal(missing, [], "services that are missing from the list:")


@of_server("service.deadline", "A call whose time is up is DEADLINE_EXCEEDED, and the server is well afterwards.")
def deadline(house: House) -> None:
    what = house.plain.draft("Evaluate", note="with a deadline of 0.1 ms")
    for _ in range(5):
        try:
            house.wire.ask(what, timeout=1e-4)
        except Refused as refused:
            expect_equal(refused.code, "DEADLINE_EXCEEDED", "status code")
    well(house)


@of_server("service.concurrency", "Sixteen callers at once get each their own answer.")
def concurrency(house: House) -> None:
    subject = house.plain

    def scaled(caller: int) -> dict[str, np.ndarray]:
        return {
            name: np.asarray(array * (1 - caller / 64)).astype(array.dtype) if name in subject.wrt else array
            for name, array in subject.inputs.items()
        }

    alone = [subject.vjp(scaled(caller)) for caller in range(CALLERS)]
    # Without a seed a server may compute them together; a model that draws random numbers needs one all the same.
    seeded: dict[str, Any] = {} if _draws(subject, alone[0], scaled(0)) else {"seed": None}

    def ask(caller: int) -> tuple[dict[str, np.ndarray | None], str]:
        return subject.vjp(scaled(caller), **seeded), house.wire.asked

    distinct = {np.asarray(next(iter(one.values()))).tobytes() for one in alone}
    with ThreadPoolExecutor(CALLERS) as pool:
        for _ in range(3):
            for (found, asked), right in zip(pool.map(ask, range(CALLERS)), alone, strict=True):
                house.wire.say(asked)
                same(found, right, subject.tolerance, "one of sixteen callers' gradient")
    if len(distinct) == 1:
        raise Skip("all were right, but the plainest model's gradient does not depend on its input")


def _draws(subject: Subject, right: dict[str, np.ndarray | None], inputs: dict[str, np.ndarray]) -> bool:
    """Whether a gradient is another one without a seed, twice: once may be a server's mistake."""
    for _ in range(2):
        try:
            same(subject.vjp(inputs, seed=None), right, subject.tolerance, "")
        except Mismatch:
            continue
        return False
    return True


@of_server(
    "service.request_id",
    "The request id that a call names comes back with its answer, and with its error; without, the server makes one.",
)
def request_id(house: House) -> None:
    what = house.plain.draft("Evaluate")
    named = (*house.wire.metadata, (REQUEST_ID_KEY, "conformance-1"))
    found = house.wire.ask(what, metadata=named).trailers.get(REQUEST_ID_KEY)
    if found is None:
        raise Absent("no request ids are told")
    expect_equal(found, "conformance-1", REQUEST_ID_KEY)
    expect(bool(house.wire.ask(what).trailers.get(REQUEST_ID_KEY)), f"a {REQUEST_ID_KEY} of the server's own", "none")
    what.message.function.version = "no-such-version"
    try:
        house.wire.ask(what, metadata=named)
    except Refused as refused:
        expect_equal(refused.metadata.get(REQUEST_ID_KEY), "conformance-1", f"{REQUEST_ID_KEY} of an error")
    else:
        raise Mismatch("VERSION_NOT_FOUND", "an answer")


@of_server(
    "service.timings", "With pullback-timings: 1 the trailers tell, as JSON, where the time went (a server may not)."
)
def timings(house: House) -> None:
    what = house.plain.draft("Evaluate")
    answer = house.wire.ask(what, metadata=(*house.wire.metadata, (TIMINGS_KEY, "1")))
    told = answer.trailers.get(TIMINGS_KEY)
    if told is None:
        raise Absent("no timings are told")
    found = json.loads(told)
    expect(found["seconds"] > 0 and isinstance(found["stages"], dict), "seconds and stages", told)
    expect(TIMINGS_KEY not in house.wire.ask(what).trailers, "none that were not asked for", "some")


@of_server(
    "service.too_large",
    "A message over the limit is RESOURCE_EXHAUSTED, which is not to be retried; the connection lives.",
)
def too_large(house: House) -> None:
    with Session(house.wire) as session:
        limit = session.opened.max_message_bytes
    if limit > _MOST:
        raise Skip(f"the limit is {limit} bytes, more than is sent to look at it")
    what = house.plain.draft("Evaluate", note=f"with {limit} bytes of an unknown field")
    try:
        house.wire.ask(what, data=what.encode() + field(19, b"\0" * limit))
    except Refused as refused:
        expect_equal(refused.code, "RESOURCE_EXHAUSTED", "status code")
        expect(refused.retry is None, "no RetryInfo", refused.retry)
    else:
        raise Mismatch("RESOURCE_EXHAUSTED", "an answer")
    well(house)


@of_server(
    "service.result_too_large", "A dense result over the limit is refused before it is computed: RESULT_TOO_LARGE."
)
def result_too_large(house: House) -> None:
    def grows(one: Subject) -> bool:
        specs = [spec for spec in one.model.inputs if not spec.optional]
        free = [dim for spec in specs for dim in spec.shape if dim.WhichOneof("extent") == "symbol"]
        return len(specs) == 1 and (specs[0].any_shape or len(free) == 1) and bool(one.wrt) and not one.complex

    subject = house.among(grows, "has one input of one free extent")
    (name,) = (spec.name for spec in subject.model.inputs if not spec.optional)
    array = subject.inputs[name]
    axis = 0
    for spec in subject.model.inputs:
        if spec.name == name and not spec.any_shape:
            axis = next(i for i, dim in enumerate(spec.shape) if dim.WhichOneof("extent") == "symbol")
    if not array.ndim:
        raise Skip("its input is 0-d")
    extent = 1 << 18
    long = np.repeat(np.take(array, [0], axis), extent // max(array.size // array.shape[axis], 1), axis)
    what = subject.draft("ComputeJacobian", {name: long}, wrt=[name], note="a Jacobian of 2 ** 36 elements or more")
    began = time.monotonic()
    refuses(
        lambda: house.wire.ask(what),
        Reason.RESULT_TOO_LARGE,
        Reason.OUT_OF_MEMORY,
        Reason.MODEL_ERROR,
        asked=what.words,
    )
    expect(time.monotonic() - began < house.wire.timeout, "an answer in time", "none")
    well(house)
