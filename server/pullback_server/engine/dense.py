"""Dense derivatives: Jacobians and Hessians, by rows in chunks."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from pullback_server.engine._dtypes import differentiable, name_of
from pullback_server.engine.backward import Rows, check_unused, gradients
from pullback_server.engine.call import Call
from pullback_server.engine.cotangents import implicit
from pullback_server.engine.results import EngineResult, Results
from pullback_server.engine.second import first_backward
from pullback_server.faults import Fault
from pullback_server.job import BlockRef
from pullback_wire import Reason

#: Most rows in one vectorised backward, and most bytes of its cotangents and gradients.
_CHUNK_ROWS = 256
_CHUNK_BYTES = 64 << 20


def _refuse_complex(tensor: torch.Tensor, field: str, what: str) -> None:
    if tensor.is_complex():
        raise Fault(
            Reason.COMPLEX_UNSUPPORTED,
            f"{what} is {name_of(tensor.dtype)}; dense derivatives of complex tensors are not defined here: use "
            "ComputeVjp or ComputeJvp, or give the model real views (torch.view_as_real)",
            field,
        )


def _check_wrt(call: Call) -> list[torch.Tensor]:
    if not call.job.wrt:
        raise Fault(Reason.NOT_DIFFERENTIABLE, "wrt names nothing: no input is floating-point", "wrt")
    values = call.wrt_values()
    for wrt, value in zip(call.job.wrt, values, strict=True):
        _refuse_complex(value, f"wrt[{wrt.label}]", f"wrt[{wrt.label}]")
    return values


def jacobian(call: Call, results: Results) -> EngineResult:
    """outputs, and a block for each pair of differentiable output and `wrt`."""
    job = call.job
    _check_wrt(call)
    fw = call.forward()
    rows = {name: tensor for name, tensor in fw.outputs.items() if differentiable(tensor.dtype)}
    if not any(tensor.requires_grad for tensor in rows.values()):
        kinds = ", ".join(f"{name!r} is {name_of(tensor.dtype)}" for name, tensor in fw.outputs.items())
        raise Fault(
            Reason.NOT_DIFFERENTIABLE,
            f"no output can be differentiated: {kinds}; and none has a graph that leads to a tensor requiring grad",
            "function",
        )
    for name, tensor in rows.items():
        _refuse_complex(tensor, "function", f"the output {name!r}")
    total = sum(results.bytes_of(column, row.numel() * column.numel()) for row in rows.values() for column in fw.wrt)
    results.check_size(fw.outputs, ())
    results.refuse_over(total + _output_bytes(call, results, fw.outputs), ", a Jacobian,")
    begin = time.perf_counter()
    found = {
        name: full(call, tensor, fw.wrt, 1) if tensor.requires_grad else [None] * len(fw.wrt)
        for name, tensor in rows.items()
    }
    used = [next((b for b in column if b is not None), None) for column in zip(*found.values(), strict=True)]
    check_unused(call, used)
    results.examine(call.hosted, fw.outputs.values(), others=[block for blocks in found.values() for block in blocks])
    results.outcome.blocks = [
        BlockRef(name, wrt.label, None if block is None else results.add(name, block))
        for name, blocks in found.items()
        for wrt, block in zip(job.wrt, blocks, strict=True)
    ]
    results.add_outputs(fw.outputs)
    call.timings["backward"] = time.perf_counter() - begin
    return results.finish()


def _output_bytes(call: Call, results: Results, outputs: dict[str, torch.Tensor]) -> int:
    return sum(results.bytes_of(tensor) for tensor in outputs.values()) if call.job.return_outputs else 0


def full(call: Call, output: torch.Tensor, wrt: Sequence[torch.Tensor], order: int) -> list[torch.Tensor | None]:
    """All rows of d output / d wrt, each block of shape output's + wrt's. None: unused."""
    count = output.numel()
    if count == 0 or not wrt:
        single = gradients(call, [output], wrt, [torch.zeros_like(output)], order=order, retain=True)
        return [None if g is None else g.new_zeros((*output.shape, *stand.shape)) for g, stand in zip(single, wrt)]  # noqa: B905
    width = output.itemsize * count + sum(stand.itemsize * stand.numel() for stand in wrt)
    chunk = max(1, min(count, _CHUNK_ROWS, _CHUNK_BYTES // max(width, 1)))
    compute = Rows(call, [output], wrt, order)
    blocks: list[torch.Tensor | None] = [None] * len(wrt)
    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        unit = torch.zeros(stop - start, count, dtype=output.dtype, device=output.device)
        unit[torch.arange(stop - start), torch.arange(start, stop)] = 1
        for index, piece in enumerate(compute([unit.reshape((stop - start, *output.shape))])):
            if piece is None:
                continue
            block = blocks[index]
            if block is None:
                # Written part by part: joining the parts would take twice the memory.
                block = blocks[index] = piece.new_zeros((count, *wrt[index].shape))
            block[start:stop] = piece.detach()
    return [
        None if block is None else block.reshape((*output.shape, *stand.shape))
        for block, stand in zip(blocks, wrt, strict=True)
    ]


def hessian(call: Call, results: Results) -> EngineResult:
    """outputs, the gradient, and a block for each ordered pair of `wrt`."""
    job = call.job
    values = _check_wrt(call)
    sizes = [value.numel() for value in values]
    total = sum(results.bytes_of(value, sum(sizes) * value.numel() + value.numel()) for value in values)
    results.refuse_over(total, f", a Hessian by {sum(sizes)} numbers,")
    fw = call.forward(watch=True)
    for name, tensor in fw.outputs.items():
        if differentiable(tensor.dtype):
            _refuse_complex(tensor, "function", f"the output {name!r}")
    pull = implicit(call, fw)
    fw = pull.fw
    results.refuse_over(total + _output_bytes(call, results, fw.outputs), ", a Hessian and outputs,")
    begin = time.perf_counter()
    one = pull.cotangents[0].requires_grad_()
    found, _ = first_backward(call, fw, pull.outputs, [one], proof=True)
    check_unused(call, found)
    outcome = results.outcome
    used = [index for index, gradient in enumerate(found) if gradient is not None]
    stands = [fw.wrt[index] for index in used]
    seconds: list[torch.Tensor | None] = []
    for index, gradient in enumerate(found):
        row = job.wrt[index].label
        outcome.gradients.append(results.grad(row, gradient))
        blocks: dict[int, torch.Tensor | None] = {}
        if gradient is not None and gradient.requires_grad:
            blocks = dict(zip(used, full(call, gradient, stands, 2), strict=True))
            seconds += blocks.values()
        for other, stand in enumerate(fw.wrt):
            block = blocks.get(other)
            if block is None and gradient is not None and other in used:
                # Both are used, and their mixed derivative vanishes.
                block = stand.new_zeros((*gradient.shape, *stand.shape))
            name = job.wrt[other].label
            outcome.blocks.append(BlockRef(row, name, None if block is None else results.add(row, block)))
    results.examine(call.hosted, fw.outputs.values(), found, seconds)
    results.add_outputs(fw.outputs)
    call.timings["backward"] = time.perf_counter() - begin
    return results.finish()
