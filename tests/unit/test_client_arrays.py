"""What users pass as a tensor arrives as what they meant, and comes back bit by bit."""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.client_server import Fake, serving

import pullback as pb
from pullback._arrays import as_array
from pullback_wire import DTYPES


@pytest.fixture(scope="module")
def echo() -> Iterator[pb.RemoteModel]:
    with serving(Fake()) as fake, pb.connect(fake.target) as client:
        yield client.model("echo")


def bits(array: np.ndarray[Any, Any]) -> bytes:
    """Little-endian C-order bytes, so that NaNs compare too."""
    dtype = array.dtype.newbyteorder("<") if array.dtype.byteorder == ">" else array.dtype
    return np.ascontiguousarray(array.astype(dtype)).tobytes()


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Every dtype and byte order; 0-d to 4-d, empty, transposed, sliced, reversed, broadcast."""
    dtype = draw(st.sampled_from(sorted(DTYPES.values(), key=lambda one: one.name)))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = int(np.prod(shape, dtype=np.int64))
    raw = rng.integers(0, 2 if dtype == np.bool_ else 256, size=(count, dtype.itemsize), dtype=np.uint8)
    array = raw.reshape(-1).view(dtype).reshape(shape)
    if draw(st.booleans()) and dtype.isbuiltin and dtype.itemsize > 1:
        array = array.astype(dtype.newbyteorder(">"))
    layout = draw(st.sampled_from(["plain", "transposed", "sliced", "reversed", "broadcast", "read-only"]))
    if layout == "transposed":
        array = array.T
    elif layout == "sliced" and array.ndim:
        array = array[..., ::2]
    elif layout == "reversed" and array.ndim:
        array = array[::-1]
    elif layout == "broadcast":
        array = np.broadcast_to(array, (3, *array.shape))
    elif layout == "read-only":
        array.flags.writeable = False
    return array


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(array=arrays())
def test_any_array_comes_back_bit_by_bit(echo: pb.RemoteModel, array: np.ndarray[Any, Any]) -> None:
    back = echo.evaluate(array)
    assert back.shape == array.shape
    assert back.dtype == array.dtype.newbyteorder("=")
    assert bits(back) == bits(array)
    assert back.flags.writeable and back.flags.aligned and back.flags.owndata


@pytest.mark.parametrize(
    ("value", "dtype", "shape"),
    [
        (1.5, np.float32, ()),
        (2, np.int64, ()),
        (True, np.bool_, ()),
        (1j, np.complex64, ()),
        ([1.5, 2], np.float32, (2,)),
        ([[1, 2], [3, 4]], np.int64, (2, 2)),
        ([True, False], np.bool_, (2,)),
        ([], np.float32, (0,)),
        ([[], []], np.float32, (2, 0)),
        (np.float64(1.5), np.float64, ()),
        ([np.float64(1.5), 2.0], np.float64, (2,)),
        (np.float16(1.5), np.float16, ()),
        (np.int8(1), np.int8, ()),
        (np.bool_(True), np.bool_, ()),
        (np.float64([1.5]), np.float64, (1,)),
        (ml_dtypes.bfloat16(1.5), ml_dtypes.bfloat16, ()),
    ],
)
def test_python_values_become_what_torch_makes_of_them(
    echo: pb.RemoteModel, value: Any, dtype: Any, shape: tuple[int, ...]
) -> None:
    back = echo.evaluate(value)
    assert back.dtype == np.dtype(dtype)
    assert back.shape == shape
    np.testing.assert_array_equal(back, np.asarray(value, dtype=dtype))


@pytest.mark.parametrize(
    ("value", "kind", "sentence"),
    [
        (np.array([1, "a"], dtype=object), TypeError, "x has dtype object"),
        (np.array(["a"]), TypeError, "x has dtype"),
        (np.array(["2020-01-01"], dtype="datetime64[D]"), TypeError, "x has dtype datetime64"),
        (np.zeros(2, dtype=[("a", "f4")]), TypeError, "x has dtype"),
        (np.zeros(2, dtype=np.longdouble), TypeError, "x has dtype"),
        (np.ma.masked_array([1.0, 2.0], mask=[True, False]), TypeError, "masked"),
        ("text", TypeError, "x is a str"),
        (b"bytes", TypeError, "x is a bytes"),
        ({"a": 1.0}, TypeError, "x is a dict"),
        (None, TypeError, "x is a NoneType"),
        (object(), TypeError, "x is a object"),
        ({1.0, 2.0}, TypeError, "x is a set"),
        (["a"], TypeError, "x has dtype"),
        ([1.0, None], TypeError, "x has dtype object"),
        ([[1.0], [1.0, 2.0]], ValueError, "x is a list that makes no array"),
        (2**63, ValueError, "beyond int64"),
        ([2**70], ValueError, "beyond int64"),
    ],
)
def test_what_is_no_tensor_is_refused(value: Any, kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        as_array(value, "x")


def test_a_plain_array_is_not_copied_before_it_is_sent() -> None:
    array = np.arange(6.0).reshape(2, 3)
    assert np.shares_memory(as_array(array, "x"), array)


def test_what_numpy_can_read_is_read() -> None:
    class Foreign:
        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray[Any, Any]:
            return np.arange(3, dtype=np.float16)

    assert as_array(Foreign(), "x").dtype == np.float16


class TestTorch:
    """Tensors of a torch that is loaded anyway."""

    @pytest.fixture(autouse=True)
    def torch(self) -> Any:
        return pytest.importorskip("torch")

    @pytest.mark.parametrize(
        "name",
        [
            "bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "bfloat16",
            "float32", "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
            "float8_e5m2fnuz", "float8_e8m0fnu",
        ],
    )  # fmt: skip
    def test_dtypes(self, torch: Any, echo: pb.RemoteModel, name: str) -> None:
        tensor = torch.tensor([[0.0, 1.0], [2.0, 4.0]]).to(getattr(torch, name))
        for one in (tensor, tensor.T, tensor[:, 1], tensor[0, 0], tensor[:0]):
            back = echo.evaluate(one)
            assert back.dtype.name == name
            assert back.shape == tuple(one.shape)
            np.testing.assert_array_equal(back.astype(np.complex128), one.to(torch.complex128).numpy(force=True))

    def test_requires_grad_conjugate_and_negative_views(self, torch: Any, echo: pb.RemoteModel) -> None:
        z = torch.tensor([1 + 2j, 3 - 1j], requires_grad=True)
        np.testing.assert_array_equal(echo.evaluate(z.conj()), np.array([1 - 2j, 3 + 1j], dtype=np.complex64))
        np.testing.assert_array_equal(echo.evaluate(z.conj().imag), np.array([-2, 1], dtype=np.float32))
        np.testing.assert_array_equal(echo.evaluate(torch.nn.Parameter(torch.ones(2))), np.ones(2, np.float32))

    def test_several_tensors_are_several_inputs(self, torch: Any, echo: pb.RemoteModel) -> None:
        with pytest.raises(pb.errors.BadName, match="2 inputs are given"):
            echo.evaluate([torch.ones(2), torch.ones(2)])

    def test_a_dtype_of_results(self, torch: Any) -> None:
        from pullback._arrays import result_dtype
        from pullback_wire.v1 import tensor_pb2

        assert result_dtype(torch.bfloat16) == tensor_pb2.DTYPE_BFLOAT16
        assert result_dtype(torch.float64) == tensor_pb2.DTYPE_FLOAT64
        with pytest.raises(ValueError, match="result_dtype"):
            result_dtype(torch.int32)

    @pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
    @pytest.mark.parametrize("make", ["sparse", "complex32", "meta"])
    def test_tensors_without_a_numpy_twin_are_refused(self, torch: Any, make: str) -> None:
        tensor = {
            "sparse": lambda: torch.eye(2).to_sparse(),
            "complex32": lambda: torch.ones(2, dtype=torch.complex32),
            "meta": lambda: torch.ones(2, device="meta"),
        }[make]()
        with pytest.raises(TypeError, match="x is a torch tensor"):
            as_array(tensor, "x")
