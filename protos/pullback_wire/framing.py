"""Protobuf messages whose `payloads` never pass through protobuf.

A message that carries tensors has one field `repeated bytes payloads` with the highest field number. Writing, the
payloads are appended to the serialised rest by hand, in one join. Reading, the top-level fields are walked, payloads
taken as views and the small rest given to protobuf. The bytes are valid protobuf either way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

#: Number of the `payloads` field in every message that has one.
PAYLOADS_FIELD = 100
#: What a request may have, so that reading it costs no more than a few times its bytes: fields, payloads included, and
#: bytes besides payloads.
MAX_FIELDS = 1 << 17
MAX_DESCRIPTION = 4 << 20

_LENGTH_DELIMITED = 2

M = TypeVar("M", bound=Message)
Buffer = bytes | bytearray | memoryview


class WireError(ValueError):
    """The bytes are not a message of the expected type, or a tensor in it contradicts itself.

    `field` names the faulty field, e.g. "inputs[0].shape"; empty when the message as a whole is meant.
    """

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


_PAYLOADS_TAG = _varint(PAYLOADS_FIELD << 3 | _LENGTH_DELIMITED)


def encode(header: bytes, payloads: Iterable[Buffer], field: int = PAYLOADS_FIELD) -> bytes:
    """Joins a serialised message and its payloads into one message.

    Each payload must be a contiguous buffer of bytes (format "B"). The payloads are copied exactly once. field: number
    of theirs.
    """
    parts: list[Buffer] = [header]
    tag = _PAYLOADS_TAG if field == PAYLOADS_FIELD else _varint(field << 3 | _LENGTH_DELIMITED)
    for payload in payloads:
        parts.append(tag + _varint(len(payload)))
        parts.append(payload)
    return b"".join(parts)


def nested(number: int, header: bytes, payloads: Iterable[Buffer], field: int) -> bytes:
    """What to give to `encode` as a header, with the same payloads and their `field`, for a message whose field of this
    number is the message that `encode` would make of `header`.
    """
    tag = len(_varint(field << 3))
    size = len(header) + sum(tag + len(_varint(len(payload))) + len(payload) for payload in payloads)
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(size) + header


def encode_message(message: Message, payloads: Iterable[Buffer]) -> bytes:
    """`encode` of a message that is not serialised yet."""
    return encode(message.SerializeToString(), payloads)


def _read_varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
        shift += 7
        if shift > 63:
            raise WireError("not a protobuf message: a varint is longer than 10 bytes")


def walk(data: bytes | memoryview, most: int | None = None) -> Iterator[tuple[int, int, int, int]]:
    """The top-level fields of a message: of each its number, where it begins, where its body begins (-1: it is not
    length-delimited), and where it ends, which may be behind the message's end.

    Raises WireError where they cannot be walked, or are more than `most`.
    """
    end = len(data)
    left = end if most is None else most
    at = 0
    try:
        while at < end:
            start = at
            if not left:
                raise WireError(f"the message has more than {most} fields")
            left -= 1
            key, at = _read_varint(data, at)
            wire_type = key & 7
            body = -1
            if wire_type == _LENGTH_DELIMITED:
                length, at = _read_varint(data, at)
                body, at = at, at + length
            elif wire_type == 0:
                _, at = _read_varint(data, at)
            elif wire_type == 1:
                at += 8
            elif wire_type == 5:
                at += 4
            else:
                raise WireError(f"not a protobuf message: wire type {wire_type} at byte {start}")
            yield key >> 3, start, body, at
    except IndexError:
        raise WireError("not a protobuf message: it ends inside a field") from None
    if at > end:
        raise WireError("not a protobuf message: it ends inside a field")


def split(data: bytes, *, bounded: bool = False) -> tuple[bytes, list[memoryview]]:
    """Splits a message into what is not `payloads` and views of its payloads, in order; copies no payload.

    Fields may come in any order, as protobuf allows. bounded: hold it to MAX_FIELDS and MAX_DESCRIPTION.

    Raises WireError where the top-level fields cannot be walked, or are too many or too large.
    """
    view = memoryview(data)
    end = len(data)
    rest: list[memoryview] = []
    payloads: list[memoryview] = []
    kept_from = 0
    for number, start, body, at in walk(data, MAX_FIELDS if bounded else None):
        if number == PAYLOADS_FIELD and body >= 0:
            if at > end:
                raise WireError(f"payload {len(payloads)} claims {at - body} bytes, {end - body} are left", "payloads")
            if kept_from < start:
                rest.append(view[kept_from:start])
            payloads.append(view[body:at])
            kept_from = at
    if kept_from < end:
        rest.append(view[kept_from:end])
    if bounded and (size := sum(map(len, rest))) > MAX_DESCRIPTION:
        raise WireError(f"besides payloads the message has {size} bytes, at most {MAX_DESCRIPTION} are allowed")
    return (bytes(rest[0]) if len(rest) == 1 else b"".join(rest)), payloads


def decode(message_type: type[M], data: bytes, *, bounded: bool = False) -> tuple[M, Sequence[memoryview]]:
    """Parses a message and gives its payloads as read-only views into `data`. bounded: as in `split`.

    Raises WireError when the bytes are not such a message.
    """
    header, payloads = split(data, bounded=bounded)
    return parse(message_type, header), payloads


def parse(message_type: type[M], header: bytes) -> M:
    """Parses what `split` found besides payloads. Raises WireError when the bytes are not such a message."""
    try:
        return message_type.FromString(header)
    except DecodeError as error:
        raise WireError(f"not a {message_type.DESCRIPTOR.full_name}: {error}") from None
