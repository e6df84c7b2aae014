"""What tensors can do: Python's operators, indexing, and a method for each operation of the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from pullback._arrays import tensor_dtype
from pullback._operations import FUNCTIONS, assign, index, operate

if TYPE_CHECKING:
    from pullback._tensor import Tensor


class Methods:
    """The operations of a tensor."""

    __slots__ = ()

    if TYPE_CHECKING:
        # Methods made of the table below.
        def __getattr__(self, name: str) -> Callable[..., Any]: ...
        def __add__(self, other: Any) -> Tensor: ...
        def __radd__(self, other: Any) -> Tensor: ...
        def __sub__(self, other: Any) -> Tensor: ...
        def __rsub__(self, other: Any) -> Tensor: ...
        def __mul__(self, other: Any) -> Tensor: ...
        def __rmul__(self, other: Any) -> Tensor: ...
        def __truediv__(self, other: Any) -> Tensor: ...
        def __rtruediv__(self, other: Any) -> Tensor: ...
        def __matmul__(self, other: Any) -> Tensor: ...
        def __rmatmul__(self, other: Any) -> Tensor: ...
        def __pow__(self, other: Any) -> Tensor: ...
        def __rpow__(self, other: Any) -> Tensor: ...
        def __lt__(self, other: Any) -> Tensor: ...
        def __le__(self, other: Any) -> Tensor: ...
        def __gt__(self, other: Any) -> Tensor: ...
        def __ge__(self, other: Any) -> Tensor: ...
        def __and__(self, other: Any) -> Tensor: ...
        def __or__(self, other: Any) -> Tensor: ...
        def __iadd__(self, other: Any) -> Tensor: ...
        def __isub__(self, other: Any) -> Tensor: ...
        def __imul__(self, other: Any) -> Tensor: ...
        def __itruediv__(self, other: Any) -> Tensor: ...
        def __eq__(self, other: Any) -> Tensor: ...  # type: ignore[override]
        def __ne__(self, other: Any) -> Tensor: ...  # type: ignore[override]

    # ---- shape and size

    def size(self, dim: int | None = None) -> Any:
        """The shape, or the extent of one axis."""
        return self.shape if dim is None else self.shape[dim]  # type: ignore[index]

    def dim(self) -> int:
        """How many axes it has."""
        return len(self.shape)  # type: ignore[arg-type]

    def numel(self) -> int:
        """How many elements it has."""
        count = 1
        for extent in self.shape:  # type: ignore[attr-defined]
            count *= extent
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        itemsize: int = self.dtype.itemsize  # type: ignore[attr-defined]
        return self.numel() * itemsize

    def __len__(self) -> int:
        shape: tuple[int, ...] = self.shape  # type: ignore[assignment]
        if not shape:
            raise TypeError("len() of a 0-d tensor")
        return shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[position] for position in range(len(self)))

    def __getitem__(self, key: Any) -> Tensor:
        return index(self, key)  # type: ignore[arg-type]

    def __setitem__(self, key: Any, value: Any) -> None:
        for one in key if isinstance(key, tuple) else (key,):
            if not (one is None or one is Ellipsis or isinstance(one, slice | int | np.integer)):
                raise TypeError("items of a tensor are set by ints and slices alone; use pb.where(mask, value, x)")
        assign(self[key], value)

    @property
    def T(self) -> Tensor:
        """Its transpose: the axes in reverse order."""
        axes = tuple(range(len(self.shape)))[::-1]  # type: ignore[arg-type]
        return FUNCTIONS["permute"](self, axes)  # type: ignore[no-any-return]

    @property
    def mT(self) -> Tensor:
        """The transpose of its last two axes."""
        return self.transpose(-2, -1)  # type: ignore[no-any-return]

    def t(self) -> Tensor:
        """The transpose of a matrix; a vector stays as it is."""
        return self.T

    def view(self, *shape: Any) -> Tensor:
        """As reshape."""
        return self.reshape(*shape)  # type: ignore[no-any-return]

    def view_as(self, other: Any) -> Tensor:
        """Reshaped as another tensor."""
        return self.reshape(tuple(other.shape))  # type: ignore[no-any-return]

    def ravel(self) -> Tensor:
        """As flatten()."""
        return self.flatten()  # type: ignore[no-any-return]

    def expand_as(self, other: Any) -> Tensor:
        """Expanded to the shape of another tensor."""
        return self.expand(tuple(other.shape))  # type: ignore[no-any-return]

    # ---- values

    def __bool__(self) -> bool:
        if self.numel() != 1:
            raise ValueError(f"the truth value of a tensor of {self.numel()} elements is ambiguous")
        return bool(self._number())

    def __float__(self) -> float:
        return float(self._number())

    def __int__(self) -> int:
        return int(self._number())

    def __complex__(self) -> complex:
        return complex(self._number())

    def __index__(self) -> int:
        value = self._number()
        if not isinstance(value, int):
            raise TypeError("only an integer tensor of one element can be an index")
        return int(value)

    def __format__(self, spec: str) -> str:
        return format(self._number(), spec) if spec and self.numel() == 1 else format(repr(self), spec)

    # ---- operators

    def __hash__(self) -> int:
        return id(self)

    def __pos__(self) -> Any:
        return self

    def __neg__(self) -> Any:
        return self.neg()

    def __abs__(self) -> Any:
        return self.abs()

    def __invert__(self) -> Any:
        return self.logical_not()

    # ---- torch's other names

    def max(self, *args: Any, **kwargs: Any) -> Tensor:
        """The largest element. Along an axis: use amax and argmax."""
        return _extreme(self, "amax", "argmax", args, kwargs)  # type: ignore[no-any-return]

    def min(self, *args: Any, **kwargs: Any) -> Tensor:
        """The smallest element. Along an axis: use amin and argmin."""
        return _extreme(self, "amin", "argmin", args, kwargs)  # type: ignore[no-any-return]

    @property
    def real(self) -> Any:
        """The real part; a tensor that is not complex is its own."""
        return FUNCTIONS["real"](self) if _may_be_complex(self) else self

    @property
    def imag(self) -> Any:
        """The imaginary part of a complex tensor."""
        return FUNCTIONS["imag"](self)

    def conj(self) -> Any:
        """The complex conjugate; a tensor that is not complex is its own."""
        return FUNCTIONS["conj"](self) if _may_be_complex(self) else self

    def to(self, dtype: Any) -> Any:
        """Converted to another dtype: numpy's, torch's, or a name. What has it already is returned itself."""
        wanted, known = tensor_dtype(dtype), self.known_dtype
        # numpy takes None for float64.
        return self if known is not None and known == wanted else FUNCTIONS["to"](self, wanted)

    def type_as(self, other: Any) -> Tensor:
        """Converted to the dtype of another tensor."""
        return self.to(other.dtype)  # type: ignore[no-any-return]


def _may_be_complex(tensor: Any) -> bool:
    """Whether it is complex, or in a pipelined session may turn out to be."""
    dtype = tensor.known_dtype
    return dtype is None or dtype.kind == "c"


def _extreme(tensor: Any, name: str, place: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args or kwargs:
        raise TypeError(f"along an axis use {name}(dim) for the values and {place}(dim) for where they are")
    return operate(name, {"input": tensor}, {})


def _acceptable(value: Any) -> bool:
    return hasattr(value, "__array__") or isinstance(value, bool | int | float | complex | list | tuple)


def _binary(name: str, first: str, second: str, swapped: bool) -> Callable[[Any, Any], Any]:
    def operator(self: Any, other: Any) -> Any:
        if not _acceptable(other):
            return NotImplemented
        left, right = (other, self) if swapped else (self, other)
        return operate(name, {first: left, second: right}, {})

    return operator


def _install() -> None:
    """Hangs the table's functions onto the class."""
    for name, made in FUNCTIONS.items():
        if not hasattr(Methods, name) and name != "requires_grad_":
            setattr(Methods, name, made)
    pairs = {"add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "matmul": "matmul"}
    for python, name in pairs.items():
        setattr(Methods, f"__{python}__", _binary(name, "input", "other", False))
        setattr(Methods, f"__r{python}__", _binary(name, "input", "other", True))
    for python, swapped in (("__pow__", False), ("__rpow__", True)):
        setattr(Methods, python, _binary("pow", "input", "exponent", swapped))
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        setattr(Methods, f"__{name}__", _binary(name, "input", "other", False))
    for python, name in (("and", "logical_and"), ("or", "logical_or")):
        setattr(Methods, f"__{python}__", _binary(name, "input", "other", False))
    for python, name in (("iadd", "add_"), ("isub", "sub_"), ("imul", "mul_"), ("itruediv", "div_")):
        setattr(Methods, f"__{python}__", _binary(name, "input", "other", False))
    for name, dtype in (
        ("half", "float16"),
        ("bfloat16", "bfloat16"),
        ("float", "float32"),
        ("double", "float64"),
        ("long", "int64"),
        ("int", "int32"),
        ("bool", "bool"),
    ):
        setattr(Methods, name, _converting(name, dtype))
    for other, name in (
        ("absolute", "abs"),
        ("divide", "div"),
        ("multiply", "mul"),
        ("subtract", "sub"),
        ("mm", "matmul"),
        ("bmm", "matmul"),
        ("dot", "matmul"),
        ("arcsin", "asin"),
        ("arccos", "acos"),
        ("arctan", "atan"),
        ("clip", "clamp"),
    ):
        setattr(Methods, other, FUNCTIONS[name])


def _converting(name: str, dtype: str) -> Callable[[Any], Any]:
    def convert(self: Any) -> Any:
        return self.to(dtype)

    convert.__name__, convert.__doc__ = name, f"Converted to {dtype}."
    return convert


_install()
