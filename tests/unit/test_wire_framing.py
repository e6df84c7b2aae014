"""The hand-made framing against protobuf itself."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from pullback_wire import WireError, decode, encode_message
from pullback_wire.framing import split
from pullback_wire.v1 import gradient_service_pb2 as pb
from pullback_wire.v1 import session_service_pb2 as session

texts = st.text(max_size=20)
blobs = st.lists(st.binary(max_size=300), max_size=5)


def a_request(model: str, wrt: list[str]) -> pb.ComputeVjpRequest:
    request = pb.ComputeVjpRequest(wrt=wrt, max_norm=0.5, allow_unused=True)
    request.function.model = model
    request.function.seed = 2**64 - 1
    return request


@given(texts, st.lists(texts, max_size=4), blobs)
def test_what_we_write_protobuf_reads(model: str, wrt: list[str], payloads: list[bytes]) -> None:
    request = a_request(model, wrt)
    read = pb.ComputeVjpRequest.FromString(encode_message(request, payloads))
    assert list(read.payloads) == payloads
    del read.payloads[:]
    assert read == request


@given(texts, st.lists(texts, max_size=4), blobs)
def test_what_protobuf_writes_we_read(model: str, wrt: list[str], payloads: list[bytes]) -> None:
    request = a_request(model, wrt)
    whole = pb.ComputeVjpRequest()
    whole.CopyFrom(request)
    whole.payloads.extend(payloads)
    read, views = decode(pb.ComputeVjpRequest, whole.SerializeToString())
    assert [bytes(view) for view in views] == payloads
    assert read == request


@given(blobs, blobs)
def test_fields_may_come_in_any_order(early: list[bytes], late: list[bytes]) -> None:
    # upb writes fields it does not know after payloads; concatenated messages are one message in protobuf.
    first = encode_message(pb.EvaluateRequest(), early)
    second = encode_message(a_request("m", ["x"]), late)
    read, views = decode(pb.ComputeVjpRequest, first + second)
    assert [bytes(view) for view in views] == early + late
    assert read == a_request("m", ["x"])


def test_payloads_are_views_not_copies() -> None:
    data = encode_message(pb.EvaluateRequest(), [b"abc" * 100])
    _, (view,) = decode(pb.EvaluateRequest, data)
    assert view.obj is data


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_like_protobuf_or_read_like_it(data: bytes) -> None:
    try:
        expected = pb.ComputeHvpRequest.FromString(data)
    except DecodeError:
        expected = None
    try:
        read, views = decode(pb.ComputeHvpRequest, data)
    except WireError:
        return
    # Stricter than protobuf is fine, laxer is not.
    assert expected is not None
    assert [bytes(view) for view in views] == list(expected.payloads)
    del expected.payloads[:]
    assert read.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


@given(st.integers(0, 400))
def test_every_truncation_is_refused_or_ends_between_fields(at: int) -> None:
    data = encode_message(a_request("model", ["x", "fc.*"]), [b"12345678", b"x" * 300])[:at]
    try:
        whole = pb.ComputeVjpRequest.FromString(data)
    except DecodeError:
        with pytest.raises(WireError):
            decode(pb.ComputeVjpRequest, data)
    else:
        assert [bytes(view) for view in decode(pb.ComputeVjpRequest, data)[1]] == list(whole.payloads)


@pytest.mark.parametrize(
    "data",
    [
        b"\xa2\x06\x05abc",  # payload longer than what is left
        b"\xa2\x06\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # length of more than 64 bits
        b"\xa2\x06\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # length of 2**63 - 1
        b"\xff" * 12,
        b"\x0b",  # group
        b"\x09abc",  # fixed64 cut short
        b"\x80",
    ],
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(WireError):
        split(data)


def test_payloads_is_the_highest_field_of_every_message_that_has_one() -> None:
    carriers = [
        message
        for file in (pb, session)
        for message in file.DESCRIPTOR.message_types_by_name.values()
        if "payloads" in message.fields_by_name
    ]
    assert len(carriers) >= 14
    for message in carriers:
        assert message.fields_by_name["payloads"].number == 100 == max(field.number for field in message.fields)
