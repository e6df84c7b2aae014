"""Requests that were valid once: messages with other fields, payloads and bytes, and sessions in another order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from pullback_wire import PAYLOADS_FIELD, WireError, decode, encode
from pullback_wire.v1 import session_service_pb2 as pb

_INTEGERS = (0, 1, 2, 3, 5, 64, 65, 255, 256, 1 << 16, 1 << 20, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**60, 2**62,
             2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
_FLOATS = (0.0, -0.0, 1.0, -1.0, 5e-324, 1e308, 2.0**53, float("nan"), float("inf"), float("-inf"))
_STRINGS = ("", " ", "\0", "x", "y", "output", "input:x", "param:*", "target:input", "*", "?[", "cube", "mixed",
            "small", "words", "raises", "mse_loss", "cross_entropy", "1", "2", "../..", "\U0001f4a5", "a" * 300,
            "[" * 100, "add", "index", "expand", "{}", '{"shape":[1048576,1048576,1048576]}',
            '{"items":[[0,9223372036854775807]]}',
            '{"dim":-9223372036854775808}')  # fmt: skip
_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_HEADER_WORDS = (b"F64", b"F32", b"BF16", b"F8_E4M3", b"F4", b"C64", b"BOOL", b"dtype", b"shape", b"data_offsets",
                 b"weight", b"bias", b"__metadata__", b"[", b"]", b"{", b"}", b"null", b"\x00", b"\xff", b'"', b":",
                 b"1e400")  # fmt: skip
#: Elements of a repeated field at most, and bytes of a payload: enough to be wrong, not to be slow.
_MANY, _LONG = 300, 1 << 16


def mutated(data: bytes, message_type: type[Message], rng: random.Random) -> bytes:
    """One request, changed: in its fields and payloads as a rule, in its bytes now and then."""
    if rng.random() < 0.2:
        return garbled(data, rng)
    try:
        message, payloads = decode(message_type, data)
    except (WireError, DecodeError):
        return garbled(data, rng)
    held: list[Any] = list(payloads)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if held and rng.random() < 0.25:
            _change_payloads(held, rng)
        else:
            change(message, rng)
    found = encode(message.SerializeToString(), held)
    return garbled(found, rng) if rng.random() < 0.1 else found


def change(message: Message, rng: random.Random) -> None:
    """Changes one field, somewhere in a message."""
    fields = [one for one in message.DESCRIPTOR.fields if one.number != PAYLOADS_FIELD]
    # What is there is more interesting than what is not.
    present = [field for field, _ in message.ListFields() if field.number != PAYLOADS_FIELD]
    if not fields:
        return
    field = rng.choice(present) if present and rng.random() < 0.75 else rng.choice(fields)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        _change_map(getattr(message, field.name), rng)
    elif field.is_repeated:
        _change_list(getattr(message, field.name), field, rng)
    elif field.message_type is not None:
        if rng.random() < 0.15:
            message.ClearField(field.name)
        else:
            inner = getattr(message, field.name)
            inner.SetInParent()
            change(inner, rng)
    elif rng.random() < 0.15:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _value(field, getattr(message, field.name), rng))


def _change_map(entries: Any, rng: random.Random) -> None:
    if entries and rng.random() < 0.3:
        entries.clear()
        return
    key = rng.choice(_STRINGS)
    try:
        entries[key] = rng.choice(_STRINGS)
    except (TypeError, ValueError):
        # A map of messages (Struct): its values are made by asking for them.
        change(entries[key], rng)


def _change_list(elements: Any, field: FieldDescriptor, rng: random.Random) -> None:
    kind = rng.randrange(6)
    if kind == 0:
        del elements[:]
    elif kind == 1 and len(elements):
        del elements[rng.randrange(len(elements))]
    elif kind == 2 and len(elements):
        # The same once more, or very often.
        one = elements[rng.randrange(len(elements))]
        elements.extend([one] * rng.choice((1, 1, 2, _MANY)))
    elif kind == 3 and len(elements) > 1:
        held = list(elements)
        rng.shuffle(held)
        if field.message_type is not None:
            held = [type(one).FromString(one.SerializeToString()) for one in held]
        del elements[:]
        elements.extend(held)
    elif field.message_type is not None:
        change(rng.choice(elements) if len(elements) and rng.random() < 0.8 else elements.add(), rng)
    else:
        at = rng.randrange(len(elements)) if len(elements) and rng.random() < 0.7 else None
        value = _value(field, elements[at] if at is not None else None, rng)
        if at is None:
            elements.append(value)
        else:
            elements[at] = value


def _value(field: FieldDescriptor, present: Any, rng: random.Random) -> Any:
    kind = field.cpp_type
    if kind in _RANGES:
        low, high = _RANGES[kind]
        value = rng.choice(_INTEGERS) * rng.choice((1, 1, -1))
        if isinstance(present, int) and rng.random() < 0.4:
            value = present + rng.choice((-1, 1, 2))
        return min(max(value, low), high)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return not present
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return rng.choice(_FLOATS)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return garbled(present or b"", rng)
    if present and rng.random() < 0.3:
        return present[: rng.randrange(len(present))] + rng.choice(("", "*", "x", "\0"))
    return rng.choice(_STRINGS)


def _change_payloads(payloads: list[Any], rng: random.Random) -> None:
    at = rng.randrange(len(payloads))
    kind = rng.randrange(5)
    if kind == 0:
        del payloads[at]
    elif kind == 1:
        payloads.insert(at, payloads[at])
    elif kind == 2:
        payloads[at] = bytes(payloads[at])[: rng.randrange(len(payloads[at]) + 1)]
    elif kind == 3:
        payloads[at] = bytes(payloads[at]) + rng.randbytes(rng.choice((1, 8, _LONG)))
    else:
        # The right length, with NaN, infinities and numbers out of any range.
        payloads[at] = rng.randbytes(len(payloads[at]))


def garbled(data: bytes, rng: random.Random) -> bytes:
    """Bytes with some flipped, cut, doubled, or others among them."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        kind, at = rng.randrange(5), rng.randrange(len(found) + 1)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[at:] = b""
        elif kind == 2:
            found[at:at] = found[at : at + rng.randrange(64)]
        elif kind == 3:
            found[at:at] = rng.randbytes(rng.randrange(1, 16))
        else:
            # A varint that claims a length.
            found[at:at] = b"\xff" * rng.randrange(1, 10) + b"\x7f"
    return bytes(found)


def safetensors(data: bytes, rng: random.Random) -> bytes:
    """A file of tensors with other words and numbers in its header, whose length is right as a rule."""
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    kind = rng.randrange(4)
    if kind == 0 and header:
        header = header.replace(rng.choice(_HEADER_WORDS), rng.choice(_HEADER_WORDS), 1)
    elif kind == 1:
        digits = [at for at, byte in enumerate(header) if chr(byte).isdigit()]
        if digits:
            at = rng.choice(digits)
            header = header[:at] + str(rng.choice(_INTEGERS) * rng.choice((1, -1))).encode() + header[at + 1 :]
    elif kind == 2:
        header = garbled(header, rng)
    else:
        body = garbled(body, rng)
    claimed = len(header) if rng.random() < 0.9 else rng.choice(_INTEGERS)
    return claimed.to_bytes(8, "little") + header + body


def session(frames: Sequence[bytes], rng: random.Random) -> list[bytes]:
    """A session's frames, changed, lost, doubled, in another order, and with others among them."""
    found = list(frames)
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        kind, at = rng.randrange(6), rng.randrange(len(found)) if found else 0
        if kind == 0 and found:
            del found[at]
        elif kind == 1 and found:
            found.insert(rng.randrange(len(found) + 1), found[at])
        elif kind == 2 and found:
            other = rng.randrange(len(found))
            found[at], found[other] = found[other], found[at]
        elif kind == 3:
            found.insert(rng.randrange(len(found) + 1), _made_up(rng))
        elif found:
            # Not its opening as a rule: what follows a wrong one is not looked at.
            at = max(at, 1) if rng.random() < 0.9 and len(found) > 1 else at
            found[at] = mutated(found[at], pb.SessionRequest, rng)
    return found


def _made_up(rng: random.Random) -> bytes:
    """A frame that belongs to no op."""
    number = rng.choice(_INTEGERS) * rng.choice((1, -1))
    size = min(max(number, -(2**63)), 2**63 - 1)
    transfer = rng.choice((0, 1, 1, 2, 3, 2**64 - 1))
    frame, payloads = rng.choice(
        (
            (pb.SessionRequest(heartbeat=pb.Heartbeat()), ()),
            (pb.SessionRequest(heartbeat=pb.Heartbeat()), (b"x",)),
            (pb.SessionRequest(credit=pb.Credit(bytes=size)), ()),
            (pb.SessionRequest(close=pb.CloseSession()), ()),
            (pb.SessionRequest(op=rng.choice(_INTEGERS)), ()),
            (pb.SessionRequest(open=pb.OpenSession(credit_bytes=size, chunk_threshold=-size - 1)), ()),
            (pb.SessionRequest(chunk=pb.Chunk(transfer=transfer, offset=0, size=size)), (rng.randbytes(8),)),
            (pb.SessionRequest(chunk=pb.Chunk(transfer=transfer, offset=8, size=16)), (rng.randbytes(8),)),
            (pb.SessionRequest(chunk=pb.Chunk(transfer=transfer, offset=size, size=size)), ()),
            (
                pb.SessionRequest(op=rng.choice(_INTEGERS), release_only=pb.ReleaseOp(), release=[1, 2**63, 2**64 - 1]),
                (),
            ),
        )
    )
    return encode(frame.SerializeToString(), payloads)
