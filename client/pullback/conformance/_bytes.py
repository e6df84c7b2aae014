"""Checks of the bytes: unknown fields, fields in any order, payloads anywhere, tensors in any order, small shapes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pullback.conformance._arrays import drawn, rng
from pullback.conformance._check import Skip, of_server
from pullback.conformance._draft import Draft
from pullback.conformance._numbers import same
from pullback.conformance._subject import House, Subject
from pullback.conformance._wire import Refused
from pullback_wire import DTYPES, PAYLOADS_FIELD

#: A field number that no message of the contract has.
_UNKNOWN = 19


def varint(value: int) -> bytes:
    """As protobuf writes a number."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, body: bytes) -> bytes:
    """A length-delimited field."""
    return varint(number << 3 | 2) + varint(len(body)) + body


def fields(data: bytes) -> list[bytes]:
    """The top-level fields of a message, each with its tag."""
    found = []
    at = 0

    def number() -> int:
        nonlocal at
        result = shift = 0
        while True:
            byte = data[at]
            at += 1
            result |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return result

    while at < len(data):
        start = at
        kind = number() & 7
        length = number() if kind == 2 else 0
        if kind == 0:
            number()
        at += length + {1: 8, 5: 4}.get(kind, 0)
        found.append(data[start:at])
    return found


def _vjp(subject: Subject, note: str = "") -> Draft:
    return subject.draft("ComputeVjp", cotangents=subject.cotangents, wrt=subject.wrt, note=note)


def _answers_alike(house: House, note: str, data: bytes) -> None:
    subject = house.plain
    right = house.wire.ask(_vjp(subject))
    found = house.wire.ask(_vjp(subject, note), data=data)
    same(found.outputs(), right.outputs(), subject.tolerance, "output")
    same(found.gradients(), right.gradients(), subject.tolerance, "gradient")


@of_server("wire.unknown_fields", "Fields that a server does not know are ignored, as protobuf has it.")
def unknown_fields(house: House) -> None:
    what = _vjp(house.plain)
    strange = field(_UNKNOWN, b"from a later version") + varint(_UNKNOWN + 1 << 3) + varint(300)
    _answers_alike(house, "with unknown fields at the end", what.encode() + strange)
    _answers_alike(house, "with unknown fields at the beginning", strange + what.encode())
    inside = Draft(what.method, type(what.message).FromString(what.message.SerializeToString()), what.payloads)
    inside.message.function.MergeFromString(field(_UNKNOWN, b"later"))
    inside.message.inputs[0].MergeFromString(field(_UNKNOWN, b"later"))
    _answers_alike(house, "with unknown fields in the function and in a tensor", inside.encode())


@of_server("wire.payload_order", "payloads may stand before the other fields or between them; their own order counts.")
def payload_order(house: House) -> None:
    what = _vjp(house.plain)
    header = fields(what.message.SerializeToString())
    payloads = [field(PAYLOADS_FIELD, bytes(payload)) for payload in what.payloads]
    _answers_alike(house, "with payloads before all other fields", b"".join([*payloads, *header]))
    mixed: list[bytes] = []
    for index in range(max(len(header), len(payloads))):
        mixed += [*payloads[index : index + 1], *header[index : index + 1]]
    _answers_alike(house, "with payloads between the other fields", b"".join(mixed))


@of_server("wire.field_order", "Other fields come in any order too, as protobuf allows.")
def field_order(house: House) -> None:
    what = _vjp(house.plain)
    header = fields(what.message.SerializeToString())
    payloads = [field(PAYLOADS_FIELD, bytes(payload)) for payload in what.payloads]
    tags: dict[bytes, list[bytes]] = {}
    for one in header:
        tags.setdefault(one[:1], []).append(one)
    turned = [one for tag in reversed(tags) for one in tags[tag]]
    _answers_alike(house, "with fields from the highest number to the lowest", b"".join([*payloads, *turned]))


@of_server("wire.payload_index", "A tensor's bytes are the payload that its index names, wherever that stands.")
def payload_index(house: House) -> None:
    what = _vjp(house.plain, "with payloads in reverse")
    last = len(what.payloads) - 1
    if not last:
        raise Skip("the request has one payload")
    for name in ("inputs", "cotangents"):
        for tensor in getattr(what.message, name):
            tensor.payload = last - tensor.payload
    what.payloads.reverse()
    _answers_alike(house, what.note, what.encode())


@of_server("wire.tensor_order", "Inputs and cotangents are matched by name, not by their place.")
def tensor_order(house: House) -> None:
    subject = house.among(lambda one: len(one.inputs) > 1 and bool(one.wrt), "has two inputs and a VJP")
    right = subject.vjp()
    turned = dict(reversed(subject.inputs.items()))
    same(subject.vjp(turned), right, subject.tolerance, "gradient")
    cotangents = dict(reversed(subject.cotangents.items()))
    same(subject.vjp(turned, cotangents=cotangents), right, subject.tolerance, "gradient")


@of_server("wire.shapes", "0-d tensors and tensors of no elements travel like others.")
def shapes(house: House) -> None:
    seen = []
    for shape in ((), (0,), (0, 3), (2, 0, 3), (1, 1, 1)):
        found = _computed(house, shape)
        if found is not None:
            seen.append(found)
    if not seen:
        raise Skip("no hosted model takes such shapes (session.tensors looks at the bytes all the same)")


def _computed(house: House, shape: Sequence[int]) -> Subject | None:
    """The first model of one input of any shape that takes this one; its gradient has the input's shape."""
    for subject in house.subjects:
        specs = [spec for spec in subject.model.inputs if not spec.optional]
        if subject.problem or len(specs) != 1 or not (specs[0].any_shape and subject.wrt):
            continue
        name = specs[0].name
        x = {name: drawn(rng(shape), DTYPES[specs[0].dtype or 13], shape)}
        try:
            outputs = subject.evaluate(x)
            cotangents = {key: np.ones_like(outputs[key]) for key in subject.cotangents}
            found = subject.vjp(x, cotangents=cotangents)
        except (Refused, KeyError) as refused:
            # What its own code does not take is no fault of the server's.
            if isinstance(refused, Refused) and refused.reason not in ("MODEL_ERROR", "UNUSED_INPUT"):
                raise
            continue
        same({name: found[name]}, {name: _shaped(found[name], x[name])}, 1.0, "gradient")
        return subject
    return None


def _shaped(found: np.ndarray | None, like: np.ndarray) -> np.ndarray:
    """What was found where it has the right shape, else something that has."""
    return found if found is not None and found.shape == like.shape else np.zeros_like(like)
