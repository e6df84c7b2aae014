"""Every tensor operation of the table against torch, value and gradients; and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.unit.tape_jobs import F64, Session, close, real, refused

from pullback_server.engine.operations import _CODE
from pullback_wire import Reason
from pullback_wire.operations import OPERATIONS

Tensor = torch.Tensor
F = torch.nn.functional

UNARY = {
    name: getattr(torch, name, None) or getattr(F, name)
    for name in [
        "neg",
        "abs",
        "sign",
        "square",
        "exp",
        "expm1",
        "sin",
        "cos",
        "tan",
        "atan",
        "sinh",
        "cosh",
        "tanh",
        "sigmoid",
        "relu",
        "softplus",
        "silu",
        "erf",
        "conj",
        "real",
        "angle",
        "isfinite",
        "isnan",
        "logical_not",
        "floor",
        "ceil",
        "round",
        "clone",
        "zeros_like",
        "ones_like",
    ]
}
POSITIVE = {name: getattr(torch, name) for name in ("sqrt", "rsqrt", "reciprocal", "log", "log1p")}
SMALL = {name: getattr(torch, name) for name in ("asin", "acos")}

#: Operation, shapes of its tensors, options as they travel, and what torch does.
Case = tuple[str, list[tuple[int, ...]], dict[str, Any], Callable[..., Tensor]]
CASES: list[Case] = [
    *((name, [(2, 3)], {}, code) for name, code in UNARY.items()),
    *((name, [(2, 3), (3,)], {}, getattr(torch, name)) for name in ("add", "sub", "mul", "div", "maximum", "minimum")),
    *((name, [(2, 3), (2, 1)], {}, getattr(torch, name)) for name in ("eq", "ne", "lt", "le", "gt", "ge")),
    *((name, [(2, 3), (2, 3)], {}, getattr(torch, name)) for name in ("logical_and", "logical_or")),
    ("add", [(2,)], {"other": 2}, lambda x: x + 2),
    ("mul", [(2,)], {"other": {"complex": [1, 2]}}, lambda x: x * (1 + 2j)),
    ("div", [(2,)], {"other": {"float": "inf"}}, lambda x: x / float("inf")),
    ("lt", [(2,)], {"other": 0}, lambda x: x < 0),
    ("pow", [(2,)], {"exponent": 3}, lambda x: x**3),
    ("matmul", [(2, 3), (3, 4)], {}, torch.matmul),
    ("matmul", [(3,), (5, 3, 2)], {}, torch.matmul),
    ("gelu", [(3,)], {}, F.gelu),
    ("gelu", [(3,)], {"approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh")),
    *(
        (name, [(2, 3)], options, lambda x, n=name, o=options: getattr(torch, n)(x, **({"dim": None} | o)))
        for name in ("sum", "mean", "std", "var", "argmax", "argmin")
        for options in ({}, {"dim": 1}, {"dim": -1, "keepdim": True})
    ),
    *(
        (name, [(2, 3)], options, lambda x, n=name, o=options: getattr(torch, n)(x, **o))
        for name in ("amax", "amin", "all", "any")
        for options in ({}, {"dim": 1}, {"dim": 0, "keepdim": True})
    ),
    ("sum", [(2, 3)], {"dim": [0, 1], "keepdim": True}, lambda x: x.sum((0, 1), True)),
    ("sum", [(2, 3)], {"keepdim": True}, lambda x: x.sum((0, 1), True)),
    ("amax", [(2, 3)], {"dim": None, "keepdim": True}, lambda x: x.amax((0, 1), True)),
    ("std", [(2, 3)], {"dim": 1, "correction": 0}, lambda x: x.std(1, correction=0)),
    ("var", [(2, 3)], {"correction": 0}, lambda x: x.var(correction=0)),
    ("norm", [(2, 3)], {}, lambda x: torch.linalg.norm(x)),
    ("norm", [(2, 3)], {"ord": 1, "dim": 1, "keepdim": True}, lambda x: torch.linalg.norm(x, 1, 1, True)),
    ("norm", [(2, 3)], {"ord": {"float": "inf"}, "dim": 0}, lambda x: torch.linalg.norm(x, float("inf"), 0)),
    ("logsumexp", [(2, 3)], {"dim": 1}, lambda x: x.logsumexp(1)),
    ("logsumexp", [(2, 3)], {"dim": [0, 1], "keepdim": True}, lambda x: x.logsumexp((0, 1), True)),
    ("softmax", [(2, 3)], {"dim": 0}, lambda x: x.softmax(0)),
    ("log_softmax", [(2, 3)], {"dim": 1}, lambda x: x.log_softmax(1)),
    ("cumsum", [(2, 3)], {"dim": 1}, lambda x: x.cumsum(1)),
    ("clamp", [(5,)], {"min": -0.1}, lambda x: x.clamp(min=-0.1)),
    ("clamp", [(5,)], {"min": -0.1, "max": 0.2}, lambda x: x.clamp(-0.1, 0.2)),
    ("clamp", [(5,)], {"min": None, "max": 0.2}, lambda x: x.clamp(max=0.2)),
    ("clamp", [(5,), (5,)], {}, lambda x, low: torch.clamp(x, low)),
    ("reshape", [(2, 3)], {"shape": [3, -1]}, lambda x: x.reshape(3, -1)),
    ("expand", [(2, 1)], {"shape": [4, -1, 3]}, lambda x: x.expand(4, -1, 3)),
    ("permute", [(2, 3, 4)], {"dims": [2, 0, 1]}, lambda x: x.permute(2, 0, 1)),
    ("transpose", [(2, 3)], {"dim0": 0, "dim1": -1}, lambda x: x.transpose(0, -1)),
    ("flatten", [(2, 3, 4)], {}, lambda x: x.flatten()),
    ("flatten", [(2, 3, 4)], {"start_dim": 1}, lambda x: x.flatten(1)),
    ("squeeze", [(1, 3, 1)], {}, lambda x: x.squeeze()),
    ("squeeze", [(1, 3, 1)], {"dim": 0}, lambda x: x.squeeze(0)),
    ("squeeze", [(1, 3, 1)], {"dim": [0, 2]}, lambda x: x.squeeze((0, 2))),
    ("unsqueeze", [(3,)], {"dim": -1}, lambda x: x.unsqueeze(-1)),
    ("index", [(3, 4, 5)], {"items": [1]}, lambda x: x[1]),
    ("index", [(3, 4, 5)], {"items": ["...", {"slice": [None, None, 2]}]}, lambda x: x[..., ::2]),
    ("index", [(3, 4)], {"items": [None, {"slice": [1, None, None]}, -1]}, lambda x: x[None, 1:, -1]),
    ("cat", [(2, 3), (1, 3)], {}, lambda *t: torch.cat(t)),
    ("cat", [(2, 3), (2, 1)], {"dim": 1}, lambda *t: torch.cat(t, 1)),
    ("stack", [(3,), (3,)], {"dim": 1}, lambda *t: torch.stack(t, 1)),
    ("to", [(3,)], {"dtype": "float32"}, lambda x: x.to(torch.float32)),
    ("to", [(3,)], {"dtype": "int64"}, lambda x: x.to(torch.int64)),
]


def check(name: str, values: list[Tensor], options: dict[str, Any], code: Callable[..., Tensor]) -> None:
    s = Session()
    names = OPERATIONS[name].tensors
    handles = [s.leaf(value) for value in values]
    named: Any = dict(zip(names, handles, strict=False)) if names and name != "index" else handles
    y = s._call(_operation(name, options), named)
    leaves = [value.clone().requires_grad_() for value in values]
    expected = code(*leaves)
    record = s.records[0]
    assert record.requires_grad == expected.requires_grad and record.shape == tuple(expected.shape)
    assert s.get(y).dtype == expected.dtype
    close(s.get(y), expected.detach().resolve_conj())
    if expected.requires_grad:
        v = torch.randn(expected.shape, dtype=expected.dtype)
        found = s.grads(y, handles, [v], create_graph=True, allow_unused=True)
        derived = torch.autograd.grad(expected, leaves, v, create_graph=True, allow_unused=True)
        for handle, tensor in zip(found, derived, strict=True):
            if tensor is not None:
                close(s.get(handle), tensor.detach(), 1e-6 if name == "to" else 1e-10)


def _operation(name: str, options: dict[str, Any]) -> Any:
    from pullback_server import ops

    return ops.Operation(name, options)


@pytest.mark.parametrize(("name", "shapes", "options", "code"), CASES, ids=lambda v: "" if callable(v) else str(v)[:30])
def test_the_answer_is_torchs(name: str, shapes: Any, options: Any, code: Any) -> None:
    torch.manual_seed(3)
    check(name, [real(*shape) for shape in shapes], options, code)


@pytest.mark.parametrize("name", POSITIVE)
def test_of_positive_numbers(name: str) -> None:
    check(name, [real(4).abs() + 0.1], {}, POSITIVE[name])


@pytest.mark.parametrize("name", SMALL)
def test_of_small_numbers(name: str) -> None:
    check(name, [real(4).tanh() * 0.9], {}, SMALL[name])


@pytest.mark.parametrize("name", ["real", "imag", "conj", "abs", "angle", "exp"])
def test_of_complex_numbers(name: str) -> None:
    check(name, [torch.randn(3, dtype=torch.complex128)], {}, getattr(torch, name))


def test_numbers_on_either_side() -> None:
    s = Session()
    value = real(3).abs() + 1
    x = s.leaf(value)
    for name, expected in {
        "sub": 2 - value,
        "div": 2 / value,
        "add": 2 + value,
        "mul": 2 * value,
        "lt": torch.as_tensor(2) < value,
    }.items():
        close(s.get(s.op(name, named={"other": x}, input=2)), expected)
    close(s.get(s.op("pow", named={"exponent": x}, input=2)), 2**value)
    close(s.get(s.op("pow", named={"input": x, "exponent": s.put(value)})), value**value)
    mask = s.op("gt", named={"input": x}, other=1.5)
    close(s.get(s.op("where", named={"condition": mask, "input": x}, other=0.0)), torch.where(value > 1.5, value, 0.0))
    chosen = s.op("where", named={"condition": mask, "input": x, "other": s.op("neg", x)})
    close(s.get(chosen), torch.where(value > 1.5, value, -value))


def test_detach_and_aliases() -> None:
    s = Session()
    x = s.leaf(real(3))
    y = s.op("detach", x)
    assert not s.records[0].requires_grad
    z = s.op("mul", x, y)
    close(s.get(s.grad(s.op("sum", z), x)), s.get(x))


def test_index_by_tensors() -> None:
    s = Session()
    value = real(4, 5)
    x = s.leaf(value)
    rows, mask = torch.tensor([0, -1, 2, 2]), value[0] > 0
    items = [{"tensor": "rows"}, {"slice": [1, 3, None]}]
    y = s.op("index", named={"input": x, "rows": s.put(rows)}, items=items)
    a = value.clone().requires_grad_()
    close(s.get(y), value[rows, 1:3])
    v = real(4, 2)
    close(s.get(s.grad(y, x, [v])), torch.autograd.grad(a[rows, 1:3], a, v)[0])
    y = s.op("index", named={"input": x, "mask": s.put(mask)}, items=["...", {"tensor": "mask"}])
    close(s.get(y), value[..., mask])
    with refused(Reason.VALUE_OUT_OF_RANGE, "4"):
        s.op("index", named={"input": x, "rows": torch.tensor([4])}, items=items)
    with refused(Reason.BAD_OPERAND, "rows"):
        s.op("index", named={"input": x}, items=items)
    with refused(Reason.BAD_OPERAND, "spare"):
        s.op("index", named={"input": x, "spare": rows}, items=[0])
    with refused(Reason.BAD_OPTION, "items"):
        s.op("index", x, items=[{"slice": [0]}])
    with refused(Reason.BAD_OPTION):
        s.op("index", x, items=[0, 0, 0])
    with refused(Reason.BAD_OPTION):
        s.op("index", x, items=[17])


def test_in_place() -> None:
    s = Session()
    value, other = real(3), real(3)
    for name, expected in {
        "add_": value + other,
        "sub_": value - other,
        "mul_": value * other,
        "div_": value / other,
        "copy_": other,
    }.items():
        x = s.put(value)
        s.in_place(name, x, other)
        assert [record.handle for record in s.records] == [x]
        close(s.get(x), expected)
    x = s.put(value)
    s.in_place("zero_", x)
    close(s.get(x), torch.zeros(3, dtype=F64))
    with refused(Reason.BAD_OPERAND, "changes"):
        s.in_place("zero_", value)
    with refused(Reason.BAD_OPERAND, "[3]", "[2]"):
        s.in_place("add_", x, real(2))
    with refused(Reason.NOT_DIFFERENTIABLE, "int64"):
        s.in_place("requires_grad_", s.put(torch.arange(2)))
    with refused(Reason.BAD_OPERAND, "float64", "int64"):
        s.in_place("add_", s.put(torch.arange(3)), value)
    s.op("neg", x)


def test_refusals() -> None:
    s = Session()
    x, y = s.leaf(real(2, 3)), s.leaf(real(4))
    with refused(Reason.OPERATION_NOT_FOUND, "'nag'", "'neg'"):
        s._call(_operation("nag", {}), [x])
    with refused(Reason.BAD_OPERAND, "[2, 3]", "[4]"):
        s.op("add", x, y)
    with refused(Reason.BAD_OPERAND, "[2, 3]", "[4]"):
        s.op("matmul", x, y)
    with refused(Reason.BAD_OPERAND, "int64", "float64"):
        s.op("matmul", s.put(torch.ones(2, 2, dtype=torch.int64)), x)
    with refused(Reason.BAD_OPTION, "keepdims", "'keepdim'"):
        s.op("sum", x, keepdims=True)
    with refused(Reason.BAD_OPTION, "dim"):
        s.op("softmax", x)
    with refused(Reason.BAD_OPTION, "dim", "[2, 3]"):
        s.op("sum", x, dim=5)
    with refused(Reason.BAD_OPTION, "[7]"):
        s.op("reshape", x, shape=[7])
    with refused(Reason.BAD_OPTION, "float65"):
        s.op("to", x, dtype="float65")
    with refused(Reason.BAD_OPTION):
        s.op("sum", x, dim={"slice": [0]})
    with refused(Reason.BAD_OPTION):
        s.op("sum", x, dim=1 << 70)
    with refused(Reason.BAD_OPTION):
        s.op("add", named={"input": x}, other="one")
    with refused(Reason.BAD_OPERAND, "other"):
        s.op("add", x)
    with refused(Reason.BAD_OPERAND, "number"):
        s._call(_operation("add", {"input": 1, "other": 2}), {})
    with refused(Reason.BAD_OPERAND, "wat"):
        s.op("add", named={"input": x, "wat": y})
    with refused(Reason.BAD_OPERAND):
        s.op("neg", x, y)
    with refused(Reason.BAD_OPERAND):
        s.op("cat")


def test_absurd_sizes_are_refused_before_they_are_tried() -> None:
    s = Session(budget=1 << 20)
    x = s.leaf(real(1))
    column, row = s.op("expand", x, shape=[300, 1]), s.op("expand", x, shape=[1, 300])
    for refusing in (
        lambda: s.op("expand", x, shape=[1 << 40]),
        lambda: s.op("matmul", s.op("expand", x, shape=[100_000, 1]), s.op("expand", x, shape=[1, 100_000])),
        lambda: s.op("add", s.op("expand", x, shape=[100_000, 1]), s.op("expand", x, shape=[1, 100_000])),
        lambda: s.op("index", named={"input": row, "i": torch.zeros(1000, dtype=torch.int64)}, items=[{"tensor": "i"}]),
        lambda: s.op("stack", *[s.op("expand", x, shape=[100_000])] * 3),
    ):
        with refused(Reason.SESSION_BUDGET, "bytes"):
            refusing()
    s.op("add", column, row)


def test_what_takes_no_memory_of_its_own_needs_no_room() -> None:
    s = Session(budget=10_000)
    x = s.leaf(real(30, 40))
    for view in (s.op("transpose", x, dim0=0, dim1=1), s.op("reshape", x, shape=[-1]), s.op("index", x, items=[3])):
        s.op("sum", view)
    s.op("mean", x, dim=0)
    s.op("expand", s.op("index", x, items=[0]), shape=[30, 40])
    s.in_place("add_", x, x, no_grad=True)
    with refused(Reason.SESSION_BUDGET, "10000"):
        s.op("exp", x)


def test_every_operation_of_the_table_is_there() -> None:
    assert set(_CODE) == set(OPERATIONS)
    tried = {case[0] for case in CASES} | set(POSITIVE) | set(SMALL) | {"imag", "where", "detach"}
    assert tried | {name for name, operation in OPERATIONS.items() if operation.in_place} == set(OPERATIONS)
