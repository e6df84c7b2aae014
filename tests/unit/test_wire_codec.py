"""numpy <-> wire: every dtype, every layout, every contradiction."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pullback_wire import DTYPES, TensorReader, TensorWriter, WireError, decode, dtype_name, encode_message, wire_dtype
from pullback_wire.dtypes import dtype_number
from pullback_wire.v1 import gradient_service_pb2 as pb
from pullback_wire.v1 import tensor_pb2

shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


def travel(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    writer = TensorWriter()
    request = pb.EvaluateRequest(inputs=[writer.add("x", array)])
    read, payloads = decode(pb.EvaluateRequest, encode_message(request, writer.payloads))
    reader = TensorReader(payloads)
    result = reader.array(read.inputs[0], "inputs[0]")
    reader.finish()
    return result


def random_bits(dtype: np.dtype[Any], shape: tuple[int, ...], seed: int) -> np.ndarray[Any, Any]:
    count = int(np.prod(shape))
    raw = np.random.default_rng(seed).integers(0, 256, count * dtype.itemsize, dtype=np.uint8)
    if dtype == np.bool_:
        raw &= 1
    return raw.view(dtype).reshape(shape)


def same_bits(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> bool:
    # Bits, since NaN payloads and signs travel too.
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()


@pytest.mark.parametrize("number", DTYPES, ids=dtype_name)
@given(shape=shapes, seed=st.integers(0, 2**32 - 1))
def test_every_dtype_and_shape(number: int, shape: tuple[int, ...], seed: int) -> None:
    array = random_bits(DTYPES[number], shape, seed)
    result = travel(array)
    assert same_bits(result, array)
    assert result.flags.writeable
    assert result.flags.aligned
    assert result.flags.owndata or result.base is None
    assert result.flags.c_contiguous


@pytest.mark.parametrize("number", DTYPES, ids=dtype_name)
@given(data=st.data())
def test_every_layout(number: int, data: st.DataObject) -> None:
    base = random_bits(DTYPES[number], data.draw(shapes), 7)
    axes = data.draw(st.permutations(range(base.ndim)))
    view = base.transpose(axes)
    if view.ndim:
        view = view[data.draw(hnp.basic_indices(view.shape, allow_newaxis=True, allow_ellipsis=True))]
    view = np.asarray(view)
    assert same_bits(travel(view), np.array(view, order="C"))


@pytest.mark.parametrize("code", ["i2", "u4", "i8", "f2", "f4", "f8", "c8", "c16"])
def test_big_endian_arrays_arrive_as_the_same_numbers(code: str) -> None:
    array = np.arange(12).reshape(3, 4).astype(">" + code)
    for view in (array, array.T, array[::-1, ::2]):
        result = travel(view)
        assert result.dtype.isnative
        np.testing.assert_array_equal(result, view)


def test_every_dtype_of_the_contract_is_carried() -> None:
    assert set(DTYPES) == set(tensor_pb2.Dtype.values()) - {tensor_pb2.DTYPE_UNSPECIFIED}
    for number, dtype in DTYPES.items():
        assert wire_dtype(dtype) == number
        assert dtype_number(dtype_name(number)) == number
    assert DTYPES[tensor_pb2.DTYPE_BFLOAT16] == ml_dtypes.bfloat16


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([object()]), np.array(["2026-01-01"], "M8[D]")])
def test_what_cannot_travel_is_named(array: np.ndarray[Any, Any]) -> None:
    with pytest.raises(ValueError, match="cannot travel"):
        TensorWriter().add("x", array)


def claim(payloads: list[bytes], **tensor: Any) -> None:
    TensorReader([memoryview(payload) for payload in payloads]).claim(tensor_pb2.Tensor(**tensor), "inputs[0]")


F32 = tensor_pb2.DTYPE_FLOAT32


@pytest.mark.parametrize(
    ("payloads", "tensor", "field", "words"),
    [
        ([b"1234"], {"dtype": 99, "shape": [1]}, "inputs[0].dtype", "unknown(99)"),
        ([b"1234"], {"shape": [1]}, "inputs[0].dtype", "unspecified"),
        ([b"1234"], {"dtype": F32, "shape": [2]}, "inputs[0]", "needs 8 bytes, its payload has 4"),
        ([b"12345"], {"dtype": F32, "shape": [1]}, "inputs[0]", "needs 4 bytes, its payload has 5"),
        ([b"1234"], {"dtype": F32, "shape": [-1]}, "inputs[0].shape", "is -1, expected 0 or more"),
        ([b""], {"dtype": F32, "shape": [-1, 0]}, "inputs[0].shape", "is -1"),
        ([b""], {"dtype": F32, "shape": [2**62, 2**62]}, "inputs[0].shape", "more elements than can be addressed"),
        ([b""], {"dtype": F32, "shape": [2**32, 2**32, 4]}, "inputs[0].shape", "more elements"),
        ([b""], {"dtype": F32, "shape": [0, 2**62]}, "inputs[0].shape", "more elements"),
        ([b""], {"dtype": F32, "shape": [1] * 65}, "inputs[0].shape", "65 axes"),
        ([b"1234"], {"dtype": F32, "shape": [1], "payload": 1}, "inputs[0].payload", "is 1, the message has 1"),
        ([], {"dtype": F32, "shape": [0]}, "inputs[0].payload", "has 0 payloads"),
    ],
)
def test_contradictions_name_the_field(payloads: list[bytes], tensor: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(WireError) as caught:
        claim(payloads, **tensor)
    assert caught.value.field == field
    assert words in str(caught.value)


def test_a_payload_belongs_to_one_tensor() -> None:
    reader = TensorReader([memoryview(b"1234"), memoryview(b"")])
    reader.claim(tensor_pb2.Tensor(dtype=F32, shape=[1]), "inputs[0]")
    with pytest.raises(WireError, match="another tensor"):
        reader.claim(tensor_pb2.Tensor(dtype=F32, shape=[1]), "inputs[1]")
    with pytest.raises(WireError, match=r"payloads\[1\] belongs to no tensor"):
        reader.finish()
