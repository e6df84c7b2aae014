"""Vector-Jacobian products."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from pullback_server.engine.backward import Rows, check_unused, gradients
from pullback_server.engine.call import Call, Forward
from pullback_server.engine.cotangents import cotangents
from pullback_server.engine.results import EngineResult, Results
from pullback_server.faults import Fault
from pullback_wire import Reason


def vjp(call: Call, results: Results) -> EngineResult:
    """outputs, J^H v."""
    fw = call.forward()
    pull = cotangents(call, fw)
    fw = pull.fw
    results.check_size(fw.outputs, fw.wrt, pull.count or 1)
    begin = time.perf_counter()
    if pull.count is None:
        found = gradients(call, pull.outputs, fw.wrt, pull.cotangents)
    else:
        found = Rows(call, pull.outputs, fw.wrt)(pull.cotangents)
    results.examine(call.hosted, fw.outputs.values(), found)
    finish_vjp(call, results, fw, found, pull.count)
    call.timings["backward"] = time.perf_counter() - begin
    return results.finish()


def finish_vjp(
    call: Call, results: Results, fw: Forward, found: Sequence[torch.Tensor | None], count: int | None = None
) -> None:
    """Fills in a VJP's results from its gradients. Raises Fault."""
    check_unused(call, found)
    outcome = results.outcome
    if call.job.max_norm is not None:
        found, outcome.norms = clip(found, call.job.max_norm, count)
    outcome.gradients = [results.grad(wrt.label, gradient) for wrt, gradient in zip(call.job.wrt, found, strict=True)]
    results.add_outputs(fw.outputs)


def clip(
    found: Sequence[torch.Tensor | None], max_norm: float, count: int | None
) -> tuple[list[torch.Tensor | None], list[float]]:
    """As torch.nn.utils.clip_grad_norm_, for each cotangent. Returns the scaled gradients and the norms before."""
    if not max_norm >= 0:
        raise Fault(Reason.BAD_OPTION, f"max_norm is {max_norm}, expected 0 or more", "max_norm")
    rows = 1 if count is None else count
    dense = [g if g is None or g.layout is torch.strided else g.to_dense() for g in found]
    squares = torch.zeros(rows, dtype=torch.float64)
    for gradient in dense:
        if gradient is not None:
            wide = gradient.float() if gradient.itemsize < 4 else gradient
            flat = wide.reshape(rows, gradient.numel() // rows) if gradient.numel() else wide.new_zeros(rows, 0)
            squares = squares.to(gradient.device) + torch.linalg.vector_norm(flat, dim=1).double().square()
    norms = squares.sqrt()
    scale = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    clipped: list[torch.Tensor | None] = []
    for gradient in dense:
        if gradient is None:
            clipped.append(None)
            continue
        real = gradient.dtype.to_real() if gradient.dtype.is_complex else gradient.dtype
        factor = scale.to(device=gradient.device, dtype=real)
        clipped.append(gradient * (factor[0] if count is None else factor.reshape(-1, *[1] * (gradient.ndim - 1))))
    return clipped, norms.tolist()
