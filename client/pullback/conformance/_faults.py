"""Checks of errors: what is wrong with the bytes, with a tensor, with who asks; and what a model's own code raises."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pullback.conformance._check import Mismatch, Skip, expect, expect_equal, of_model, of_server
from pullback.conformance._draft import Draft
from pullback.conformance._refusal import check_refusal, refused, refuses, vjp_of
from pullback.conformance._subject import House, Subject
from pullback.conformance._wire import Refused
from pullback_wire import GRADIENT_METHODS, MODEL_METHODS, Reason
from pullback_wire.v1 import model_service_pb2

ADMINISTRATIVE = ("LoadModel", "UnloadModel")
GARBAGE = b"\xff\xff\xff\xff\x07garbage that is no protobuf message"


@of_server("errors.malformed", "Bytes that are no such message are MALFORMED_REQUEST, of every method.")
def malformed(house: House) -> None:
    for method in (*GRADIENT_METHODS.values(), *MODEL_METHODS.values()):
        asked = f"{method.name} with bytes that are no protobuf message"
        try:
            house.wire.call(method.path, GARBAGE, asked)
        except Refused as error:
            # Whether the caller may administer can be answered before anything is read.
            closed = (Reason.ADMIN_DISABLED, Reason.PERMISSION_DENIED) if method.name in ADMINISTRATIVE else ()
            if error.code != "UNIMPLEMENTED":
                check_refusal(error, Reason.MALFORMED_REQUEST, *closed)
        else:
            raise Mismatch("MALFORMED_REQUEST", "an answer", asked)
    what = _evaluate(house.plain, "cut off inside a payload")
    refused(house, what, Reason.MALFORMED_REQUEST, Reason.BAD_TENSOR, data=what.encode()[:-3])


def _evaluate(subject: Subject, note: str = "", inputs: Any = None) -> Draft:
    return subject.draft("Evaluate", inputs, note=note)


@of_server(
    "errors.tensors",
    "A tensor whose dtype, shape, byte count or payload contradict each other is BAD_TENSOR; the field is named.",
)
def tensors(house: House) -> None:
    subject = house.plain

    def shape(*extents: int) -> Callable[[Draft], None]:
        def change(what: Draft) -> None:
            del what.message.inputs[0].shape[:]
            what.message.inputs[0].shape.extend(extents)

        return change

    def set_(**values: int) -> Callable[[Draft], None]:
        def change(what: Draft) -> None:
            for name, value in values.items():
                setattr(what.message.inputs[0], name, value)

        return change

    def payload(edit: Callable[[bytes], bytes]) -> Callable[[Draft], None]:
        def change(what: Draft) -> None:
            what.payloads[0] = edit(bytes(what.payloads[0]))

        return change

    wrong: list[tuple[str, Callable[[Draft], None]]] = [
        ("with a payload that is a byte short", payload(lambda data: data[:-1])),
        ("with a payload that is a byte long", payload(lambda data: data + b"\0")),
        ("with a negative extent", shape(-3, -4)),
        ("with extents whose product overflows", shape(2**62, 2**62)),
        ("with a shape of more elements than there are bytes", shape(2**40)),
        ("with a dtype that does not exist", set_(dtype=77)),
        ("with no dtype", set_(dtype=0)),
        ("with a payload index out of range", set_(payload=2**32 - 1)),
        ("without payloads", lambda what: what.payloads.clear()),
        ("with the transfer of a session", set_(transfer=1)),
    ]
    for note, change in wrong:
        what = _evaluate(subject, note)
        change(what)
        refused(house, what, Reason.BAD_TENSOR, field="inputs[0]")
    what = _evaluate(subject, "with a payload that belongs to no tensor")
    what.payloads.append(b"\0" * 8)
    refused(house, what, Reason.BAD_TENSOR, field=f"payloads[{len(what.payloads) - 1}]")


@of_server("errors.shared_payload", "Each payload belongs to exactly one tensor.")
def shared_payload(house: House) -> None:
    subject = house.plain
    what = vjp_of(subject, note="with a cotangent that refers to the first input's payload")
    what.message.cotangents[0].payload = what.message.inputs[0].payload
    what.message.cotangents[0].ClearField("shape")
    what.message.cotangents[0].shape.extend(what.message.inputs[0].shape)
    what.message.cotangents[0].dtype = what.message.inputs[0].dtype
    refused(house, what, Reason.BAD_TENSOR)


@of_model(
    "errors.signature", "An input of another dtype, rank or extent than the signature's is BAD_TENSOR, which says both."
)
def signature(subject: Subject) -> None:
    subject.computes()
    seen = 0
    for index, spec in enumerate(subject.model.inputs):
        array = subject.inputs.get(spec.name)
        if array is None:
            continue
        if spec.dtype:
            other = np.dtype("float32") if array.dtype != np.float32 else np.dtype("float64")
            _refuses_input(subject, spec.name, array.real.astype(other), [spec.name, str(other), str(array.dtype)])
            seen += 1
        if not spec.any_shape:
            more = np.zeros((*array.shape, 1), array.dtype)
            _refuses_input(subject, spec.name, more, [spec.name, str(list(more.shape))])
            seen += 1
            for axis, dim in enumerate(spec.shape):
                if dim.WhichOneof("extent") == "size" and index < 4:
                    shape = [*array.shape[:axis], dim.size + 1, *array.shape[axis + 1 :]]
                    if math.prod(shape) < 1 << 20:
                        _refuses_input(subject, spec.name, np.zeros(shape, array.dtype), [spec.name, str(shape)])
    if not seen:
        raise Skip("its signature declares neither dtypes nor shapes")


def _refuses_input(subject: Subject, name: str, array: np.ndarray, says: list[str]) -> None:
    # In the order of the request, which is what the field's index counts.
    what = _evaluate(subject, "with an input that does not fit", {**subject.inputs, name: array})
    place = list(subject.inputs).index(name)
    refuses(lambda: subject.wire.ask(what), Reason.BAD_TENSOR, asked=what.words, field=f"inputs[{place}]", says=says)


@of_model("errors.symbols", "Free extents of one name must be equal within a call.")
def symbols(subject: Subject) -> None:
    subject.computes()
    first: dict[str, str] = {}
    for spec in subject.model.inputs:
        if spec.any_shape or spec.name not in subject.inputs:
            continue
        for axis, dim in enumerate(spec.shape):
            if dim.WhichOneof("extent") == "symbol" and first.setdefault(dim.symbol, spec.name) != spec.name:
                array = subject.inputs[spec.name]
                longer = np.concatenate([array, np.take(array, [0], axis)], axis)
                _refuses_input(subject, spec.name, longer, [spec.name, dim.symbol])
                return
    raise Skip("no two of its inputs share a free extent")


@of_model("errors.model", "What a model's own code raises is MODEL_ERROR, and ends nothing but the call.")
def model_error(subject: Subject) -> None:
    if subject.refusal is None or not subject.problem:
        raise Skip("its code does not fail")
    if subject.refusal.reason != "MODEL_ERROR":
        if subject.refusal.reason in ("OUT_OF_MEMORY", "HARD_TIMEOUT"):
            raise Skip(f"it is refused with {subject.refusal.reason}")
        check_refusal(subject.refusal, Reason.BAD_TENSOR, Reason.VALUE_OUT_OF_RANGE, Reason.MODEL_ERROR)
    check_refusal(subject.refusal, Reason[subject.refusal.reason])


@of_server(
    "errors.administrative",
    "What administers is refused where it is not enabled, and finds no model that is not there.",
)
def administrative(house: House) -> None:
    for name in ADMINISTRATIVE:
        request = MODEL_METHODS[name].request(name="no-such-model-conformance")
        try:
            house.wire.model(name, request)
        except Refused as error:
            if error.code == "UNIMPLEMENTED":
                continue
            check_refusal(
                error,
                Reason.ADMIN_DISABLED,
                Reason.PERMISSION_DENIED,
                Reason.MODEL_NOT_FOUND,
                Reason.NOT_IN_REPOSITORY,
                Reason.UNAUTHENTICATED,
            )
        else:
            raise Mismatch("a refusal", "an answer")


@of_server(
    "errors.credentials",
    "A call without credentials, or with such as are not known, is UNAUTHENTICATED where some are needed.",
)
def credentials(house: House) -> None:
    if not house.token:
        raise Skip("no token was given (--token), so that nothing can be said of others")
    method = MODEL_METHODS["ListModels"]
    request = model_service_pb2.ListModelsRequest().SerializeToString()
    for metadata in ((), (("authorization", "Bearer no-such-token"),)):
        try:
            house.wire.call(method.path, request, f"ListModels with {metadata or 'no token'}", metadata=metadata)
        except Refused as error:
            check_refusal(error, Reason.UNAUTHENTICATED, Reason.PERMISSION_DENIED)
        else:
            # Anybody may be let in; somebody with a wrong token is somebody else's.
            expect(not metadata, "UNAUTHENTICATED for a token that nobody has", "an answer")


@of_server(
    "errors.metadata",
    "Metadata that cannot be are BAD_OPTION: a priority that is none, an id of more than 128 characters.",
)
def metadata(house: House) -> None:
    what = _evaluate(house.plain)
    for key, value in (("pullback-priority", "urgent"), ("pullback-request-id", "x" * 200)):
        more = (*house.wire.metadata, (key, value))
        refuses(
            lambda more=more: house.wire.ask(what, metadata=more),  # type: ignore[misc]
            Reason.BAD_OPTION,
            asked=f"{what.words}; with the metadata {key}: {value[:20]}",
            says=[key],
        )
    expect_equal(house.wire.ask(what).message.model_version != "", True, "a version afterwards:")
