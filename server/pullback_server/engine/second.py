"""Derivatives that need the graph of a gradient: Hessian-vector products, and the JVP by two backwards."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from pullback_server.engine.backward import check_unused, gradients
from pullback_server.engine.call import Call, Forward, refs_by_name
from pullback_server.engine.cotangents import Pull, check_like, cotangents
from pullback_server.engine.results import EngineResult, Results
from pullback_server.engine.tripwire import Tripwire
from pullback_server.faults import Fault
from pullback_server.job import Job
from pullback_wire import Reason


def tangents(call: Call) -> dict[int, torch.Tensor]:
    """The tangents, by the index in `wrt` of what they move. Raises Fault."""
    refs = refs_by_name("tangents", call.job.tangents)
    found = {}
    for index, (wrt, like) in enumerate(zip(call.job.wrt, call.wrt_values(), strict=True)):
        ref = refs.pop(wrt.label, None)
        if ref is not None:
            found[index] = check_like(call, ref, like, "tangents", "what it moves,")
    for name in refs:
        raise Fault(Reason.BAD_NAME, f"tangents[{name}] moves nothing that wrt names", f"tangents[{name}]")
    return found


def hooked(call: Call) -> bool:
    """Whether hooks hang on parameters that the call differentiates by."""
    own = call.hosted.parameters
    return any(wrt.place == "param" and bool(own[wrt.name]._backward_hooks) for wrt in call.job.wrt)


def first_backward(
    call: Call, fw: Forward, outputs: Sequence[torch.Tensor], values: Sequence[torch.Tensor], *, proof: bool
) -> tuple[list[torch.Tensor | None], Tripwire]:
    """J^H v with its graph, under the tripwire. `values` require grad. Raises Fault."""
    wire = Tripwire(call.hosted, outputs, fw.witness, hooked=hooked(call), proof=proof, composed=call.loss is not None)
    with wire.armed():
        found = gradients(call, outputs, fw.wrt, values, order=2, create=True)
    wire.check_gradients(found)
    return found, wire


def along(
    call: Call,
    found: Sequence[torch.Tensor | None],
    moved: Mapping[int, torch.Tensor],
    by: Sequence[torch.Tensor],
) -> list[torch.Tensor | None]:
    """d Re<J^H v, t> / d by. None where it is zero everywhere."""
    pairs = [
        (gradient, moved[index])
        for index, gradient in enumerate(found)
        # What does not require grad although v does is a constant: zero, or the tripwire would have gone off.
        if index in moved and gradient is not None and gradient.requires_grad
    ]
    if not pairs:
        return [None] * len(by)
    # In torch's convention the gradient of Re<g, t> with respect to g is t, for complex numbers too.
    return gradients(call, [g for g, _ in pairs], by, [t for _, t in pairs], order=2)


def hvp(call: Call, results: Results) -> EngineResult:
    """outputs, J^H v, d Re<J^H v, t>/dx and, when asked for, J t."""
    job = call.job
    moved = tangents(call)
    pull = cotangents(call, call.forward(watch=True))
    check_hvp_size(job, results, pull)
    begin = time.perf_counter()
    # A leaf even where two outputs were given one tensor.
    values = [value.detach().requires_grad_() for value in pull.cotangents]
    found, _ = first_backward(call, pull.fw, pull.outputs, values, proof=True)
    check_unused(call, found)
    derived = along(call, found, moved, [*pull.fw.wrt, *values])
    results.examine(call.hosted, pull.fw.outputs.values(), found, derived)
    finish_hvp(job, results, pull, found, derived)
    call.timings["backward"] = time.perf_counter() - begin
    return results.finish()


def check_hvp_size(job: Job, results: Results, pull: Pull) -> None:
    """Raises Fault (RESULT_TOO_LARGE) before an HVP's derivatives are computed."""
    extra = pull.cotangents if job.return_cotangent_derivatives else []
    results.check_size(pull.fw.outputs, [*pull.fw.wrt, *pull.fw.wrt, *extra])


def finish_hvp(
    job: Job,
    results: Results,
    pull: Pull,
    found: Sequence[torch.Tensor | None],
    derived: Sequence[torch.Tensor | None],
) -> None:
    """Fills in an HVP's results. derived: by what `wrt` stands for, then by the cotangents; None: zero."""
    outcome = results.outcome
    labels = [wrt.label for wrt in job.wrt]
    outcome.gradients = [results.grad(label, g) for label, g in zip(labels, found, strict=True)]
    count = len(labels)
    outcome.hvps = [
        results.grad(label, None if gradient is None else torch.zeros_like(stand) if h is None else h)
        for label, gradient, stand, h in zip(labels, found, pull.fw.wrt, derived[:count], strict=True)
    ]
    if job.return_cotangent_derivatives:
        outcome.cotangent_derivatives = [
            results.grad(name, torch.zeros_like(value) if pushed is None else pushed)
            for name, value, pushed in zip(pull.names, pull.cotangents, derived[count:], strict=True)
        ]
    results.add_outputs(pull.fw.outputs)


#: How far <J^H v, t> and <v, J t> may lie apart, relative to |J t|, by the bytes of a real number.
_TOLERANCE = {2: 0.1, 4: 1e-3, 8: 1e-7}


def push_twice(call: Call, fw: Forward, moved: Mapping[int, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """J t by output as the derivative of <J^H v, t> with respect to v. None: not differentiable.

    That is right because J^H v is linear in v. A backward that is not torch's own need not be (one that clips gradients
    is not), or may have lost a part of v; both show in that <J^H v, t> and <v, J t> differ for a random v.

    Raises Fault (ORDER_UNAVAILABLE).
    """
    pushed: dict[str, torch.Tensor | None] = dict.fromkeys(fw.outputs)
    names = [name for name, tensor in fw.outputs.items() if tensor.requires_grad]
    if not names:
        return pushed
    outputs = [fw.outputs[name] for name in names]
    values = [_random_like(tensor).requires_grad_() for tensor in outputs]
    found, wire = first_backward(call, fw, outputs, values, proof=False)
    derived = [
        torch.zeros_like(value) if push is None else push
        for value, push in zip(values, along(call, found, moved, values), strict=True)
    ]
    if not wire.clean:
        _check_linear(call, found, moved, values, derived)
    pushed.update(zip(names, derived, strict=True))
    return pushed


def _random_like(tensor: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator(tensor.device).manual_seed(tensor.numel())
    dtype = tensor.dtype if tensor.itemsize > 1 else torch.float32
    return torch.randn(tensor.shape, generator=generator, dtype=dtype, device=tensor.device).to(tensor.dtype)


def _check_linear(
    call: Call,
    found: Sequence[torch.Tensor | None],
    moved: Mapping[int, torch.Tensor],
    values: Sequence[torch.Tensor],
    derived: Sequence[torch.Tensor],
) -> None:
    pulled = sum(_inner(gradient, moved[i]) for i, gradient in enumerate(found) if i in moved and gradient is not None)
    pushed = sum(_inner(value, push) for value, push in zip(values, derived, strict=True))
    size = sum(_inner(push, push) for push in derived) ** 0.5
    width = min(tensor.itemsize // (2 if tensor.is_complex() else 1) for tensor in [*derived, *moved.values()])
    if not abs(pulled - pushed) <= _TOLERANCE.get(width, 0.1) * (size + abs(pulled)):
        raise Fault(
            Reason.ORDER_UNAVAILABLE,
            f"{call.hosted.owner} has no JVP: it has a backward (of its own and without jvp, or one that torch has "
            "wrong) that is not linear in the gradient it is given, or cannot be differentiated by it (<J^H v, t> is "
            f"{pulled:.6g}, <v, J t> {pushed:.6g})",
        )


def _inner(a: torch.Tensor, b: torch.Tensor) -> float:
    """Re<a, b>, in double precision."""
    a, b = a.detach().to_dense(), b.detach().to_dense()
    wide = torch.complex128 if a.is_complex() else torch.float64
    return float(torch.vdot(a.to(wide).reshape(-1), b.to(wide).reshape(-1)).real)
