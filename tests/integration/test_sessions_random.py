"""Random programs on tensors, run by local torch and by a server step by step, and held against each other.

A program is a list of steps over numbered tensors. It is drawn with torch's side at hand (so that most steps make
sense), and can be replayed with steps left out, which is how a failing one is made small before it is shown.

PULLBACK_RANDOM_PROGRAMS=5000 PULLBACK_RANDOM_SEED=1 hunts; without them the suite runs a few that are always the same.
"""

from __future__ import annotations

import gc
import os
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import session_models

import pullback as pb
from pullback import errors
from pullback_server import Server

COUNT = int(os.environ.get("PULLBACK_RANDOM_PROGRAMS", "300"))
SEED = int(os.environ.get("PULLBACK_RANDOM_SEED", "0"))

# What torch says, and what must be said here instead of InternalError or ModelError.
SAYINGS = [
    ("backward through the graph a second time", errors.GraphFreed),
    ("modified by an inplace operation", errors.ModifiedInPlace),
    ("does not require grad and does not have a grad_fn", errors.NotDifferentiable),
    ("One of the differentiated Tensors does not require grad", errors.NotDifferentiable),
    ("appears to not have been used in the graph", (errors.UnusedInput, errors.NotDifferentiable)),
    ("grad can be implicitly created only for", errors.MissingCotangent),
    ("Mismatch in shape", (errors.BadCotangent, errors.NotDifferentiable)),
]


class Local:
    """torch's side."""

    where, cat, stack = staticmethod(torch.where), staticmethod(torch.cat), staticmethod(torch.stack)
    functional = torch.nn.functional
    grad = staticmethod(torch.autograd.grad)
    backward = staticmethod(torch.autograd.backward)

    def __init__(self) -> None:
        self.built: dict[str, Any] = {}

    def model(self, name: str) -> Any:
        if name not in self.built:
            self.built[name] = session_models.local(name)
        return self.built[name]

    def outputs(self, found: Any) -> list[Any]:
        if isinstance(found, dict):
            found = list(found.values())
        if isinstance(found, tuple | list):
            return [leaf for one in found for leaf in self.outputs(one)]
        return [found]

    def parameters(self, name: str) -> list[Any]:
        return list(self.model(name).parameters())

    def constant(self, array: Any) -> Any:
        return torch.tensor(array)

    def leaf(self, array: Any, requires_grad: bool) -> Any:
        return torch.tensor(array).requires_grad_(requires_grad)

    def mode(self, no_grad: bool) -> Any:
        return torch.no_grad() if no_grad else torch.enable_grad()

    def to(self, x: Any, dtype: str) -> Any:
        return x.to(getattr(torch, dtype))


class Remote:
    """The client's side."""

    where, cat, stack = staticmethod(pb.where), staticmethod(pb.cat), staticmethod(pb.stack)
    functional = pb.functional
    grad = staticmethod(pb.autograd.grad)
    backward = staticmethod(pb.autograd.backward)

    def __init__(self, client: pb.Client, session: pb.Session) -> None:
        self.client, self.session = client, session
        # Without this the hosted parameters would get no gradients, as documented.
        self.taken = self.parameters("linear")

    def model(self, name: str) -> Any:
        return self.client.model(name)

    def outputs(self, found: Any) -> list[Any]:
        return list(found.values()) if isinstance(found, dict) else [found]

    def parameters(self, name: str) -> list[Any]:
        return list(self.client.model(name).parameters(self.session))

    def constant(self, array: Any) -> Any:
        return array

    def leaf(self, array: Any, requires_grad: bool) -> Any:
        return self.session.tensor(array, requires_grad=requires_grad)

    def mode(self, no_grad: bool) -> Any:
        return pb.no_grad() if no_grad else pb.enable_grad()

    def to(self, x: Any, dtype: str) -> Any:
        return x.to(dtype)


# The operations. Each has how many tensors it takes, what it does on either side, and what else it draws.


@dataclass(frozen=True)
class Op:
    arity: int
    run: Callable[..., Any]
    draw: Callable[..., Any] = lambda rng, *tensors: ()
    weight: float = 1.0


def an_axis(rng: random.Random, x: torch.Tensor) -> tuple[Any, ...]:
    return (rng.randrange(-x.ndim, x.ndim) if x.ndim else 0,)


def axis_and_keep(rng: random.Random, x: torch.Tensor) -> tuple[Any, ...]:
    if rng.random() < 0.3 or not x.ndim:
        return ()
    return (*an_axis(rng, x), rng.random() < 0.5)


def an_index(rng: random.Random, x: torch.Tensor) -> tuple[Any, ...]:
    kind = rng.randrange(8)
    if kind == 6 and x.ndim:
        # A mask of the leading axis.
        return (np.array([rng.random() < 0.6 for _ in range(x.shape[0])], bool),)
    items: list[Any] = []
    for extent in x.shape[: rng.randint(0, x.ndim)]:
        what = rng.randrange(5)
        if what == 0:
            items.append(None)
        if what <= 1 and extent:
            items.append(rng.randrange(-extent, extent))
        elif what == 2 and extent:
            items.append([rng.randrange(extent) for _ in range(rng.randint(1, 3))])
        else:
            start, stop = sorted((rng.randint(0, extent), rng.randint(0, extent)))
            items.append(slice(start, None if rng.random() < 0.3 else stop, rng.choice([None, 1, 2])))
    if kind == 7:
        items.append(Ellipsis)
    return (tuple(items),)


def a_place(rng: random.Random, x: torch.Tensor) -> tuple[Any, ...]:
    """An index that items can be set by: no lists, no masks."""
    while True:
        (index,) = an_index(rng, x)
        if isinstance(index, tuple) and not any(isinstance(item, list) for item in index):
            return (index,)


def a_shape(rng: random.Random, x: torch.Tensor) -> tuple[Any, ...]:
    n = x.numel()
    shapes = [(-1,) if n else (0,), (n,), (1, n), (n, 1), tuple(reversed(x.shape)), tuple(x.shape)]
    return (rng.choice(shapes),)


def a_number(rng: random.Random, *tensors: Any) -> tuple[Any, ...]:
    return (rng.choice([2, -1, 0.5, -1.5, 3, 1.25]),)


def a_constant(rng: random.Random, x: torch.Tensor) -> tuple[Any, ...]:
    shape = x.shape[rng.randint(0, x.ndim) :]
    dtype = str(x.dtype)[6:] if x.dtype.is_floating_point or x.is_complex() else "float64"
    return (np.asarray(np.random.default_rng(rng.randrange(1 << 30)).normal(size=tuple(shape))).astype(dtype),)


def a_permutation(rng: random.Random, x: torch.Tensor) -> tuple[Any, ...]:
    axes = list(range(x.ndim))
    rng.shuffle(axes)
    return (tuple(axes),)


def a_class(rng: random.Random, x: torch.Tensor) -> tuple[Any, ...]:
    shape = x.shape[:1] + x.shape[2:] if x.ndim > 1 else ()
    classes = x.shape[min(1, x.ndim - 1)] if x.ndim else 1
    return (np.random.default_rng(rng.randrange(1 << 30)).integers(0, max(classes, 1), tuple(shape)),)


def write(ns: Any, x: Any, value: Any, key: Any) -> None:
    x[key] = value


def augmented(sign: str) -> Callable[..., None]:
    def run(ns: Any, x: Any, other: Any) -> None:
        other = ns.constant(other) if isinstance(other, np.ndarray) else other
        if sign == "+":
            x += other
        elif sign == "-":
            x -= other
        elif sign == "*":
            x *= other
        else:
            x /= other

    return run


UNARY = (
    "sin cos tanh sigmoid square neg exp softplus relu abs clone erf gelu silu sinh log1p sqrt reciprocal expm1 atan"
)
OPS: dict[str, Op] = {
    **{
        name: Op(
            1, lambda ns, x, name=name: getattr(x, name)() if hasattr(x, name) else getattr(ns.functional, name)(x)
        )
        for name in UNARY.split()
    },
    "detach": Op(1, lambda ns, x: x.detach(), weight=2),
    "add": Op(2, lambda ns, x, y: x + y, weight=4),
    "sub": Op(2, lambda ns, x, y: x - y, weight=2),
    "mul": Op(2, lambda ns, x, y: x * y, weight=4),
    "div": Op(2, lambda ns, x, y: x / (y * y + 1), weight=1),
    "matmul": Op(2, lambda ns, x, y: x @ y, weight=3),
    "maximum": Op(2, lambda ns, x, y: x.maximum(y)),
    "minimum": Op(2, lambda ns, x, y: x.minimum(y)),
    "where": Op(3, lambda ns, c, x, y: ns.where(c > 0, x, y)),
    "add_number": Op(1, lambda ns, x, a: x + a, a_number),
    "rsub_number": Op(1, lambda ns, x, a: a - x, a_number),
    "mul_number": Op(1, lambda ns, x, a: a * x, a_number),
    "pow_number": Op(1, lambda ns, x, a: x**a, lambda rng, x: (rng.choice([2, 3, 2.0, 0, 1]),)),
    "number_pow": Op(1, lambda ns, x: 2.0**x),
    "mul_constant": Op(1, lambda ns, x, a: x * ns.constant(a), a_constant, 2),
    "constant_sub": Op(1, lambda ns, x, a: ns.constant(a) - x, a_constant),
    "clamp": Op(1, lambda ns, x: x.clamp(-0.5, 1.0)),
    "to": Op(
        1, lambda ns, x, d: ns.to(x, d), lambda rng, x: (rng.choice(["float64", "float64", "float32", "complex128"]),)
    ),
    "real": Op(1, lambda ns, x: x.real),
    "imag": Op(1, lambda ns, x: x.imag),
    "conj": Op(1, lambda ns, x: x.conj()),
    "sum": Op(1, lambda ns, x, *a: x.sum(*a), axis_and_keep, 3),
    "mean": Op(1, lambda ns, x, *a: x.mean(*a), axis_and_keep),
    "amax": Op(1, lambda ns, x, *a: x.amax(*a), axis_and_keep),
    "var": Op(1, lambda ns, x: x.var()),
    "std": Op(1, lambda ns, x, d: x.std(d), an_axis),
    "norm": Op(1, lambda ns, x: x.norm()),
    "logsumexp": Op(1, lambda ns, x, d: x.logsumexp(d), an_axis),
    "softmax": Op(1, lambda ns, x, d: x.softmax(d), an_axis),
    "log_softmax": Op(1, lambda ns, x, d: x.log_softmax(d), an_axis),
    "cumsum": Op(1, lambda ns, x, d: x.cumsum(d), an_axis),
    "argmax": Op(1, lambda ns, x, d: x.argmax(d), an_axis),
    "gt": Op(2, lambda ns, x, y: x > y),
    "reshape": Op(1, lambda ns, x, s: x.reshape(s), a_shape, 2),
    "view": Op(1, lambda ns, x, s: x.view(*s), lambda rng, x: (tuple(x.shape),)),
    "transpose": Op(1, lambda ns, x, a, b: x.transpose(a, b), lambda rng, x: an_axis(rng, x) + an_axis(rng, x), 2),
    "T": Op(1, lambda ns, x: x.mT if len(x.shape) > 1 else x.T),
    "permute": Op(1, lambda ns, x, d: x.permute(*d), a_permutation),
    "flatten": Op(1, lambda ns, x: x.flatten()),
    "squeeze": Op(1, lambda ns, x: x.squeeze()),
    "unsqueeze": Op(1, lambda ns, x, d: x.unsqueeze(d), an_axis),
    "expand": Op(1, lambda ns, x, s: x.expand(*s), lambda rng, x: ((2, *x.shape),)),
    "index": Op(1, lambda ns, x, k: x[k], an_index, 4),
    "cat": Op(2, lambda ns, x, y: ns.cat([x, y, x]), weight=2),
    "stack": Op(2, lambda ns, x, y: ns.stack([x, y], dim=-1)),
    "grad_of": Op(1, lambda ns, x: x.grad, weight=1.5),
    # Models and losses.
    "same": Op(1, lambda ns, x: ns.model("same")(x), weight=2),
    "smooth": Op(1, lambda ns, x: ns.model("smooth")(x), weight=2),
    "glimpses": Op(1, lambda ns, x: ns.model("glimpses")(x), weight=2),
    "fork_two": Op(2, lambda ns, x, y: ns.model("fork_two")(x, y), weight=2),
    "writes_into_a_copy": Op(1, lambda ns, x: ns.model("writes_into_a_copy")(x)),
    "partly_cut": Op(1, lambda ns, x: ns.model("partly_cut")(x)),
    "square_any": Op(1, lambda ns, x: ns.model("square_any")(x)),
    "linear": Op(1, lambda ns, x: ns.model("linear")(x), weight=3),
    "mse_loss": Op(2, lambda ns, x, y: ns.functional.mse_loss(x, y), weight=2),
    "huber_loss": Op(2, lambda ns, x, y: ns.functional.huber_loss(x, y, reduction="sum")),
    "cross_entropy": Op(
        1, lambda ns, x, t: ns.functional.cross_entropy(x, ns.constant(t), reduction="none"), a_class, 1
    ),
    # In place.
    "add_": Op(2, lambda ns, x, y: x.add_(y) and None, weight=3),
    "mul_": Op(2, lambda ns, x, y: x.mul_(y) and None, weight=3),
    "copy_": Op(2, lambda ns, x, y: x.copy_(y) and None, weight=2),
    "zero_": Op(1, lambda ns, x: x.zero_() and None),
    "iadd": Op(1, augmented("+"), a_constant, 2),
    "isub": Op(1, augmented("-"), a_number),
    "imul": Op(1, augmented("*"), a_number),
    "idiv": Op(1, augmented("/"), a_number),
    "write": Op(2, write, lambda rng, x, y: a_place(rng, x), 3),
    "write_number": Op(1, lambda ns, x, k, a: write(ns, x, a, k), lambda rng, x: a_place(rng, x) + a_number(rng), 2),
    "requires_grad_": Op(1, lambda ns, x, on: x.requires_grad_(on) and None, lambda rng, x: (rng.random() < 0.8,)),
    "retain_grad": Op(1, lambda ns, x: x.retain_grad()),
    "clear_grad": Op(1, lambda ns, x: setattr(x, "grad", None)),
}
#: `and None` would ask an in-place result for its truth; these return nothing instead.
for _name in ("add_", "mul_", "copy_"):
    OPS[_name] = Op(2, lambda ns, x, y, name=_name: getattr(x, name)(y) is None or None, weight=OPS[_name].weight)
OPS["zero_"] = Op(1, lambda ns, x: x.zero_() is None or None)
OPS["requires_grad_"] = Op(1, lambda ns, x, on: x.requires_grad_(on) is None or None, OPS["requires_grad_"].draw)
IN_PLACE = {"add_", "mul_", "copy_", "zero_", "iadd", "isub", "imul", "idiv", "write", "write_number", "requires_grad_"}
MODELS = {"same", "smooth", "glimpses", "fork_two", "writes_into_a_copy", "partly_cut", "square_any", "linear"}
NAMES, WEIGHTS = list(OPS), [op.weight for op in OPS.values()]


@dataclass(frozen=True)
class Step:
    """What one step does; `result` is the first number of what it makes."""

    kind: str
    name: str
    operands: tuple[int, ...]
    arguments: Any
    result: int
    no_grad: bool = False
    look: bool = True


class Difference(Exception):
    """The two sides differ."""


@dataclass
class Machine:
    """Runs steps on both sides."""

    remote: Remote
    pipelined: bool
    local: Local = field(default_factory=Local)
    pairs: dict[int, tuple[torch.Tensor, pb.Tensor]] = field(default_factory=dict)
    over: bool = False
    raised: dict[str, int] = field(default_factory=dict)

    def run(self, step: Step) -> None:
        """One step. Raises Difference."""
        if any(number not in self.pairs for number in step.operands):
            return
        if step.kind == "drop":
            del self.pairs[step.operands[0]]
            gc.collect(0)
            return
        if step.kind == "leaf":
            array, requires_grad = step.arguments
            self.pairs[step.result] = self.local.leaf(array, requires_grad), self.remote.leaf(array, requires_grad)
            return
        if step.kind == "parameters":
            both = self.local.parameters(step.name), self.remote.parameters(step.name)
            for offset, pair in enumerate(zip(*both, strict=True)):
                self.pairs[step.result + offset] = pair
            return
        taken = self.taken() if step.kind == "backward" else []
        expected = self.attempt(self.local, 0, step)
        if isinstance(expected, Exception) and self.pipelined:
            self.over = step.kind == "backward"  # of which torch may have done a part
            return  # here it would fail later, and end the whole block
        found = self.attempt(self.remote, 1, step)
        self.judge(step, expected, found)
        if isinstance(found, Exception):
            self.over = not isinstance(expected, Exception)
        if isinstance(expected, Exception):
            self.raised[step.kind] = self.raised.get(step.kind, 0) + 1
            # A backward that failed halfway has freed some of the graph, and torch has accumulated what it had.
            if step.kind != "op" and any(
                text in str(expected) for text in ("second time", "inplace", "not have been used")
            ):
                self.over = True
            return
        if self.over:
            self.forget_forbidden()
            return
        if step.kind == "backward":
            # torch adds to x.grad in place, so what was taken of it before changes; here x.grad is another tensor then.
            self.pairs = {number: pair for number, pair in self.pairs.items() if number not in taken}
            self.compare_grads(step)
        else:
            for offset, (mine, theirs) in enumerate(zip(expected, found, strict=True)):
                if (mine is None) != (theirs is None):
                    raise Difference(f"{offset}: torch {mine}, pullback {theirs}")
                if mine is None:
                    continue
                if step.no_grad and mine.requires_grad and step.kind == "op":
                    continue  # a view: torch calls it a leaf, though nothing can be accumulated into it
                if any(mine is known for known, _ in self.pairs.values()):
                    close(mine, theirs)  # torch's result is the operand itself, pullback's always another tensor
                    continue
                self.compare(mine, theirs, step.look)
                self.pairs[step.result + offset] = mine, theirs
        if step.name in IN_PLACE:
            self.forget_forbidden()
            if step.name == "requires_grad_":
                # torch counts views that were made before as requiring grad, too.
                base = self.pairs[step.operands[0]][0]
                self.pairs = {number: pair for number, pair in self.pairs.items() if pair[0]._base is not base}
            for number, (mine, theirs) in list(self.pairs.items()):
                try:
                    self.compare(mine, theirs, step.look)
                except Difference as difference:
                    raise Difference(f"tensor {number} after {step.name}: {difference}") from None

    def taken(self) -> list[int]:
        """Numbers of tensors that are the `.grad` of others."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            grads = [mine.grad for mine, _ in self.pairs.values()]
        return [number for number, (mine, _) in self.pairs.items() if any(mine is one for one in grads)]

    def attempt(self, side: Any, which: int, step: Step) -> Any:
        operands = [self.pairs[number][which] for number in step.operands]
        try:
            with side.mode(step.no_grad), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if step.kind == "op":
                    found = OPS[step.name].run(side, *operands, *step.arguments)
                    return [one for one in side.outputs(found) if one is not None]
                options = dict(step.arguments)
                count, cotangents = options.pop("outputs"), options.pop("cotangents")
                given = None if cotangents is None else [v if v is None else side.constant(v) for v in cotangents]
                if step.kind == "backward":
                    inputs = {"inputs": operands[count:]} if len(operands) > count else {}
                    if which:
                        # torch's backward(inputs=) makes them retain their gradient from then on.
                        for one in operands[count:]:
                            if not one.is_leaf:
                                one.retain_grad()
                    if inputs and not which:
                        return self.only_inputs(side.backward, operands[:count], given, **options, **inputs)
                    return side.backward(operands[:count], given, **options, **inputs)
                if which == 0:
                    return self.only_grad(side.grad, operands[:count], operands[count:], given, **options)
                return list(side.grad(operands[:count], operands[count:], given, **options))
        except (RuntimeError, ValueError, TypeError, IndexError, errors.PullbackError) as error:
            return error

    def forget_forbidden(self) -> None:
        """Drops what torch itself no longer lets anybody look at: views made under no_grad, written to outside."""
        for number, (mine, _) in list(self.pairs.items()):
            try:
                mine.is_leaf  # noqa: B018
            except RuntimeError:
                del self.pairs[number]

    def only_inputs(self, backward: Any, *arguments: Any, inputs: list[Any], **options: Any) -> None:
        """torch's backward(inputs=) also fills `.grad` of others with retain_grad(), though it says otherwise."""
        others = [
            mine for mine, _ in self.pairs.values() if not mine.is_leaf and all(mine is not one for one in inputs)
        ]
        kept = [(mine, mine.grad) for mine in others]
        try:
            backward(*arguments, inputs=inputs, **options)
        finally:
            for mine, found in kept:
                mine.grad = found

    def only_grad(self, grad: Any, *arguments: Any, **options: Any) -> list[Any]:
        """torch.autograd.grad also fills `.grad` of tensors with retain_grad() (batched ones with is_grads_batched).

        torch's documentation has it that .grad stays as it is, and so it does here.
        """
        kept = [(mine, mine.grad) for mine, _ in self.pairs.values()]
        kept = [(mine, found if found is None else (found, found.detach().clone())) for mine, found in kept]
        try:
            # Independent of one another and of the cotangents, whose memory torch lets them share.
            return [
                one if one is None or one._is_view() or one.grad_fn else one.clone()
                for one in grad(*arguments, **options)
            ]
        finally:
            for mine, found in kept:
                if found is None or mine.grad is not found[0]:
                    mine.grad = None if found is None else found[0]

    def judge(self, step: Step, expected: Any, found: Any) -> None:
        mine, theirs = isinstance(expected, Exception), isinstance(found, Exception)
        if not mine and isinstance(found, errors.OrderUnavailable):
            self.over = True  # never wrong, only refused
            return
        if mine and not theirs and "input_is_complex == grad_is_complex" in str(expected):
            self.over = True  # torch's own fault: the derivative of x[i] = v for a complex x and a real number v
            return
        if mine and not theirs and "more than one element of the written-to tensor" in str(expected):
            self.over = True  # torch's gradients may be expanded; here each has memory of its own
            return
        if mine and not theirs and "vmap" in str(expected):
            self.over = True  # what vmap refuses is done one by one here
            return
        if mine and not theirs:
            raise Difference(f"torch raised {type(expected).__name__}: {str(expected)[:300]}; pullback did not")
        if theirs and not mine:
            raise Difference(f"pullback raised {type(found).__name__}: {found}; torch did not")
        if theirs:
            if isinstance(found, errors.InternalError | errors.SessionLost | errors.BadHandle) and not (
                isinstance(found, errors.ModelError) and (step.name in MODELS or "the graph raised" in str(found))
            ):
                raise Difference(f"torch: {expected}; pullback: {type(found).__name__}: {found}")
            for text, kind in SAYINGS:
                if text in str(expected) and not isinstance(found, (kind, errors.OrderUnavailable)):
                    raise Difference(f"torch: {expected}; pullback: {type(found).__name__}: {found}")

    def compare(self, mine: torch.Tensor, theirs: pb.Tensor, look: bool = True, count: int = 4) -> None:
        if self.pipelined and not look:
            return
        facts = [tuple(mine.shape), str(mine.dtype)[6:], mine.requires_grad, mine.is_leaf]
        others = [theirs.shape, str(theirs.dtype), theirs.requires_grad, theirs.is_leaf]
        if mine.requires_grad and not (mine.is_floating_point() or mine.is_complex()):
            count = 2  # torch's x[i] = v makes integers require grad where v is one number
        if facts[:count] != others[:count]:
            raise Difference(f"shape, dtype, requires_grad, is_leaf: torch {facts}, pullback {others}")
        if look:
            close(mine, theirs)

    def compare_grads(self, step: Step | None = None) -> None:
        for number, (mine, theirs) in list(self.pairs.items()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                one = mine.grad
            other = theirs.grad
            if (one is None) != (other is None):
                raise Difference(f"grad of {number}: torch {one}, pullback {other}")
            if one is not None:
                try:
                    # Whether what a tensor with retain_grad() accumulated keeps its graph is torch's own affair.
                    self.compare(one, other, count=4 if mine.is_leaf else 2)
                except Difference as difference:
                    raise Difference(f"grad of {number}: {difference}") from None

    def finish(self) -> None:
        if self.over:
            return  # the two have parted already
        for number, (mine, theirs) in self.pairs.items():
            try:
                self.compare(mine, theirs)
            except Difference as difference:
                raise Difference(f"tensor {number} at the end: {difference}") from None
        self.compare_grads()


def close(mine: torch.Tensor, theirs: pb.Tensor) -> None:
    one, other = mine.detach().resolve_conj().resolve_neg().numpy(), theirs.numpy()
    if one.dtype != other.dtype or one.shape != other.shape:
        raise Difference(f"torch {one.dtype}{one.shape}, pullback {other.dtype}{other.shape}")
    tolerance = 1e-4 if one.dtype in (np.float32, np.complex64) else 1e-9
    finite = np.abs(one[np.isfinite(one)]) if one.size else one
    with np.errstate(all="ignore"):
        if not np.allclose(
            one, other, rtol=tolerance, atol=tolerance * min(finite.max(initial=0), 1e6), equal_nan=True
        ):
            raise Difference(f"torch {one!r}, pullback {other!r}")


# Drawing.

SHAPES: list[tuple[int, ...]] = [(), (3,), (3,), (2, 3), (2, 3), (1, 3), (3, 3), (2, 1), (2, 3, 3), (0, 3)]
if COUNT > 1000:
    SHAPES.append((91, 3, 37))  # over 64 KiB, where values no longer come along


def draw_leaf(rng: random.Random, number: int) -> Step:
    numbers = np.random.default_rng(rng.randrange(1 << 30))
    shape = rng.choice(SHAPES)
    kind = rng.choice(["float64"] * 8 + ["float32", "complex128", "int64"])
    array: Any = numbers.normal(size=shape)
    if kind == "complex128":
        array = array + 1j * numbers.normal(size=shape)
    if kind == "int64":
        array = numbers.integers(-3, 4, shape)
    return Step("leaf", "", (), (np.asarray(array, kind), kind != "int64" and rng.random() < 0.7), number)


def draw_op(rng: random.Random, machine: Machine, number: int) -> Step | None:
    name = rng.choices(NAMES, WEIGHTS)[0]
    op = OPS[name]
    known = sorted(machine.pairs)
    # The newest are the likeliest: programs should go deep.
    operands = tuple(
        known[-1 - min(int(rng.expovariate(0.35)), len(known) - 1)] if rng.random() < 0.7 else rng.choice(known)
        for _ in range(op.arity)
    )
    tensors = [machine.pairs[one][0] for one in operands]
    if sum(tensor.numel() for tensor in tensors) > 300_000:
        return None
    try:
        arguments = op.draw(rng, *tensors)
    except (ValueError, IndexError):
        return None
    if name in {"mse_loss", "huber_loss"} and tensors[0].shape != tensors[1].shape:
        return None  # torch would broadcast with a warning; refused here
    no_grad = rng.random() < (0.35 if name in IN_PLACE else 0.06)
    return Step("op", name, operands, arguments, number, no_grad, rng.random() < 0.6)


def draw_derivative(rng: random.Random, machine: Machine, number: int) -> Step | None:
    known = sorted(machine.pairs)
    ends = [one for one in known if machine.pairs[one][0].grad_fn is not None] or known
    if rng.random() < 0.05:
        ends = known
    outputs = rng.sample(ends[-6:], min(len(ends[-6:]), rng.choice([1, 1, 1, 2])))
    candidates = [one for one in known if machine.pairs[one][0].requires_grad] or known
    inputs = rng.sample(candidates, min(len(candidates), rng.choice([1, 2, 2, 3])))
    if rng.random() < 0.03:
        inputs.append(rng.choice(known))
    kind = rng.choice(["backward", "grad", "grad"])
    batched = kind == "grad" and rng.random() < 0.12
    cotangents: list[Any] = []
    for one in outputs:
        tensor = machine.pairs[one][0]
        if tensor.numel() == 1 and not batched and not tensor.is_complex() and rng.random() < 0.7:
            cotangents.append(None)
            continue
        shape = (*((2,) if batched else ()), *tensor.shape)
        if rng.random() < 0.02:
            shape = (*shape, 2)
        value: Any = np.asarray(np.random.default_rng(rng.randrange(1 << 30)).normal(size=shape))
        if tensor.is_complex():
            value = value * (1 + 0.5j)
        cotangents.append(np.asarray(value, str(tensor.dtype)[6:]))
    options: dict[str, Any] = {"outputs": len(outputs), "cotangents": cotangents}
    if batched and any(one is None for one in cotangents):
        return None
    if all(one is None for one in cotangents) and rng.random() < 0.5:
        options["cotangents"] = None
    options["create_graph"] = rng.random() < 0.5
    options["retain_graph"] = rng.choice([None, True, True, True, False]) if not options["create_graph"] else None
    if kind == "grad":
        options["allow_unused"] = rng.random() < 0.8
        if batched:
            options["is_grads_batched"] = True
        # The gradient by an output is the cotangent's own memory in torch.
        inputs = [one for one in dict.fromkeys(inputs) if one not in outputs]
        if not inputs:
            return None
        operands = (*outputs, *inputs)
    else:
        # torch visits the nodes of other inputs, and may find them freed or changed, for no reason.
        inputs = [one for one in inputs if machine.pairs[one][0].is_leaf]
        operands = (*outputs, *(inputs if rng.random() < 0.3 else ()))
    return Step(kind, "", operands, options, number)


def draw(rng: random.Random, machine: Machine, steps: list[Step], length: int) -> None:
    """Draws and runs a program; `steps` holds what was run, also when that raises."""
    number = 0

    def do(step: Step | None) -> None:
        nonlocal number
        if step is not None:
            steps.append(step)
            number += 10
            machine.run(step)

    for _ in range(rng.randint(2, 4)):
        do(draw_leaf(rng, number))
    if rng.random() < 0.3:
        do(Step("parameters", "linear", (), (), number))
    for _ in range(length):
        chance = rng.random()
        if chance < 0.14:
            do(draw_derivative(rng, machine, number))
        elif chance < 0.17 and len(machine.pairs) > 3:
            do(Step("drop", "", (rng.choice(sorted(machine.pairs)),), (), number))
        else:
            do(draw_op(rng, machine, number))
        if machine.over:
            break
    machine.finish()


def attempt(client: pb.Client, steps: list[Step], pipelined: bool) -> str | None:
    """What is different in this program; None: nothing."""
    try:
        with client.session(pipelined=pipelined) as session:
            machine = Machine(Remote(client, session), pipelined)
            for step in steps:
                machine.run(step)
                if machine.over:
                    break
            machine.finish()
    except (Difference, errors.PullbackError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def smaller(client: pb.Client, steps: list[Step], pipelined: bool, message: str) -> tuple[list[Step], str]:
    """A program with fewer steps that fails in the same way."""
    kind = message.split(":")[0]
    for _ in range(3):
        before = len(steps)
        for position in range(len(steps) - 1, -1, -1):
            fewer = steps[:position] + steps[position + 1 :]
            found = attempt(client, fewer, pipelined)
            if found is not None and found.split(":")[0] == kind:
                steps, message = fewer, found
        if len(steps) == before:
            break
    return steps, message


def check(client: pb.Client, seed: int, length: int = 14) -> dict[str, int]:
    """Runs the program of this seed. Fails with one that is as small as possible."""
    rng = random.Random(seed)
    pipelined = rng.random() < 0.25
    steps: list[Step] = []
    machine = None
    try:
        with client.session(pipelined=pipelined) as session:
            machine = Machine(Remote(client, session), pipelined)
            draw(rng, machine, steps, length)
    except (Difference, errors.PullbackError) as error:
        message = f"{type(error).__name__}: {error}"
    else:
        return machine.raised
    steps, message = smaller(client, steps, pipelined, message)
    program = "\n".join(f"  {step}" for step in steps)
    raise AssertionError(f"seed {seed}, pipelined {pipelined}: {message}\n{program}")


@pytest.fixture(scope="module")
def client() -> Iterator[pb.Client]:
    torch.set_num_threads(1)
    models = Path(session_models.__file__)
    with Server(models, devices="cpu", threads=1) as server, pb.connect(server.target, timeout=60) as client:
        yield client


def test_random_programs(client: pb.Client) -> None:
    failures = []
    for seed in range(SEED, SEED + COUNT):
        try:
            check(client, seed)
        except AssertionError as error:
            failures.append(str(error))
            if len(failures) == int(os.environ.get("PULLBACK_RANDOM_FAILURES", "1")):
                break
    assert not failures, "\n\n".join(failures)
