"""Whether an exported model has the derivatives of the original: both are run at random points and held together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from pullback_server.engine._dtypes import differentiable, name_of
from pullback_server.engine.closeness import distance
from pullback_server.engine.flatten import flatten
from pullback_server.engine.guards import plain_kernels
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.samples import sample
from pullback_server.engine.tripwire import is_foreign, nodes, title
from pullback_server.job import SpecRecord

Tensors = dict[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]

#: How far apart two tensors may be, relative to the norm of the original's, by the bytes of a real number.
_TOLERANCE = {1: 0.5, 2: 5e-2, 4: 1e-4, 8: 1e-10}


class Differs(Exception):
    """What the export computes otherwise than the original."""


@dataclass
class Compared:
    """What was compared, and what was met on the way.

    precision: torch's name of it; empty: each model's own. second: why second derivatives were not; empty: they were.
    functions: autograd.Functions behind the original's outputs.
    """

    points: int = 0
    precision: str = ""
    second: str = ""
    functions: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        what = "outputs, VJPs and HVPs" if not self.second else "outputs and VJPs"
        late = f" (not HVPs: {self.second})" if self.second else ""
        return (
            f"{what} by inputs and parameters were compared with the original's at {self.points} random points in "
            f"{self.precision or 'its own precision'}{late}"
        )


@dataclass
class _Values:
    """Everything that one model gave at one point, by what it is; what an output does not depend on is left out."""

    first: Tensors
    second: Tensors
    failure: str = ""


def compare(
    original: HostedModel, export: HostedModel, records: list[SpecRecord], points: Sequence[Shapes], found: Compared
) -> None:
    """Compares two models at a random point for each of some shapes; in double precision where both can be copied.

    found: what is learned goes there, also before it fails. Raises Differs.
    """
    _check_names(original, export)
    pair, wide = (original, export), False
    try:
        twins = (original.widened(), export.widened())
        _with_default(torch.float64, lambda: _values(twins[1], _inputs(records, points[0], 0, True), 0))
    # Whatever the models' own copying raises, or a graph that names its types.
    except Exception:
        pass
    else:
        pair, wide = twins, True
    found.precision = "float64" if wide else ""
    for number, shapes in enumerate(points):
        dtype = torch.float64 if wide else torch.get_default_dtype()
        _with_default(dtype, lambda shapes=shapes, number=number: _at(pair, records, shapes, number, wide, found))  # type: ignore[misc]
        found.points += 1


def _with_default(dtype: torch.dtype, work: Callable[[], object]) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with plain_kernels():
            work()
    finally:
        torch.set_default_dtype(before)


def _check_names(original: HostedModel, export: HostedModel) -> None:
    names = [{name: (p.shape, p.dtype) for name, p in one.parameters.items()} for one in (original, export)]
    if names[0] != names[1]:
        odd = sorted(name for name in names[0].keys() | names[1].keys() if names[0].get(name) != names[1].get(name))
        raise Differs(f"its parameters are not those of the original: {', '.join(map(repr, odd[:10]))}")


def _inputs(records: list[SpecRecord], shapes: Shapes, number: int, wide: bool) -> Tensors:
    return sample(records, shapes, torch.Generator().manual_seed(number + 1), wide=wide)


def _at(
    pair: tuple[HostedModel, HostedModel],
    records: list[SpecRecord],
    shapes: Shapes,
    number: int,
    wide: bool,
    found: Compared,
) -> None:
    inputs = _inputs(records, shapes, number, wide)
    expected = _values(pair[0], inputs, number, found.functions)
    try:
        came = _values(pair[1], inputs, number)
    except Exception as error:
        raise Differs(f"it raises {type(error).__name__}: {error}, and the original does not") from error
    _check_equal(expected.first, came.first)
    if failure := expected.failure or came.failure:
        found.second = found.second or failure
    else:
        _check_equal(expected.second, came.second)


def _values(hosted: HostedModel, inputs: Tensors, number: int, functions: list[str] | None = None) -> _Values:
    """Outputs, J^H v, and the derivatives of <J^H v, t>, by everything, for random v and t. Raises what code raises."""
    wrt: Tensors = {}
    given: Tensors = {}
    for name, tensor in inputs.items():
        given[name] = tensor.clone()
        if differentiable(tensor.dtype):
            wrt[f"input {name!r}"] = given[name].requires_grad_()
    parameters = {name: p for name, p in hosted.parameters.items() if differentiable(p.dtype)}
    undo = hosted.let_require_grad(dict.fromkeys(parameters, True))
    wrt |= {f"parameter {name!r}": p for name, p in parameters.items()}
    try:
        torch.manual_seed(number)
        arguments, keywords = hosted.binding.arrange(given)
        outputs = flatten(hosted.code(*arguments, **keywords), hosted.registration.outputs, hosted.owner)
        if functions is not None:
            functions += [
                t for node in nodes(outputs.values()) if is_foreign(node) and (t := title(node)) not in functions
            ]
        return _derived(outputs, wrt, torch.Generator().manual_seed(number))
    finally:
        undo()
        hosted.restore_state()


def _derived(outputs: Tensors, wrt: Tensors, generator: torch.Generator) -> _Values:
    first = {f"output {name!r}": tensor.detach() for name, tensor in outputs.items()}
    ends = {name: tensor for name, tensor in outputs.items() if tensor.requires_grad}
    v = {name: _normal(tensor, generator).requires_grad_() for name, tensor in ends.items()}
    t = {name: _normal(tensor, generator) for name, tensor in wrt.items()}
    if not ends:
        return _Values(first, {})
    pulled = _grad(ends, wrt, v)
    first |= {f"gradient by {name}": tensor.detach() for name, tensor in pulled.items()}
    dependent = {name: tensor for name, tensor in pulled.items() if tensor.requires_grad}
    if not dependent:
        return _Values(first, {})
    try:
        again = _grad(dependent, wrt | {f"cotangent {name!r}": one for name, one in v.items()}, t)
    except RuntimeError as error:
        return _Values(first, {}, str(error).partition("\n")[0])
    return _Values(first, {f"second derivative by {name}": tensor.detach() for name, tensor in again.items()})


def _grad(ends: Tensors, wrt: Tensors, v: Tensors) -> Tensors:
    found = torch.autograd.grad(
        list(ends.values()), list(wrt.values()), [v[name] for name in ends], create_graph=True, allow_unused=True
    )
    return {name: tensor for name, tensor in zip(wrt, found, strict=True) if tensor is not None}


def _normal(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


def _check_equal(expected: Tensors, came: Tensors) -> None:
    """Raises Differs naming the tensor that is farthest away, and its worst element."""
    worst, words = 1.0, ""
    for name in expected.keys() | came.keys():
        left, right = expected.get(name), came.get(name)
        if left is None or right is None:
            # What does not depend on something has a derivative of zero by it.
            one = left if left is not None else right
            assert one is not None
            left, right = (torch.zeros_like(one) if side is None else side for side in (left, right))
        if left.shape != right.shape or left.dtype != right.dtype:
            raise Differs(
                f"{name} is {name_of(right.dtype)} {list(right.shape)}, and of the original "
                f"{name_of(left.dtype)} {list(left.shape)}"
            )
        width = left.itemsize // (2 if left.is_complex() else 1)
        gap = distance(right, left) / (_TOLERANCE[width] if differentiable(left.dtype) else 1e-30)
        if not gap <= worst:
            worst, words = gap, _told(name, left, right)
    if words:
        raise Differs(words)


def _told(name: str, expected: torch.Tensor, came: torch.Tensor) -> str:
    wide = torch.complex128 if expected.is_complex() else torch.float64
    gaps = (came.to(wide) - expected.to(wide)).abs().nan_to_num(nan=float("inf"))
    place = int(gaps.argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(place), expected.shape)]
    a, b = (one.reshape(-1)[place].item() for one in (came, expected))
    return f"{name} differs, most at {index}: {a:.6g} in the export, {b:.6g} in the original"
