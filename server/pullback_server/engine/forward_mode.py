"""JVPs: forward mode where it computes the adjoint of reverse mode, else by two backwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from pullback_server.engine.call import Call, Forward
from pullback_server.engine.results import EngineResult, Results
from pullback_server.engine.second import hooked, push_twice, tangents
from pullback_server.engine.tripwire import has_hooks, is_foreign, lacks_adjoint, nodes
from pullback_server.faults import Fault
from pullback_wire import Reason


def jvp(call: Call, results: Results) -> EngineResult:
    """outputs, J t."""
    moved = movement(call)
    begin = time.perf_counter()
    outputs, pushed = push(call, moved, results.check_size)
    results.examine(call.hosted, outputs.values(), others=pushed.values())
    finish_jvp(results, outputs, pushed)
    call.timings["forward"] = time.perf_counter() - begin
    return results.finish()


def movement(call: Call) -> dict[int, torch.Tensor]:
    """The tangents of a JVP, by the index in `wrt` of what they move: of all of it. Raises Fault."""
    if not call.job.wrt:
        raise Fault(Reason.BAD_NAME, "tangents are missing: nothing moves", "tangents")
    moved = tangents(call)
    for index, wrt in enumerate(call.job.wrt):
        if index not in moved:
            raise Fault(Reason.BAD_NAME, f"tangents[{wrt.label}] is missing", "tangents")
    if call.hosted.no_jvp and not call.hosted.probing:
        raise Fault(
            Reason.ORDER_UNAVAILABLE, f"{call.hosted.owner} has no JVP{call.hosted.no_jvp.replace('; no JVP', '')}"
        )
    return moved


Pushed = tuple[dict[str, torch.Tensor], dict[str, "torch.Tensor | None"]]
CheckSize = Callable[[dict[str, torch.Tensor], Sequence[torch.Tensor]], None]


def push(call: Call, moved: Mapping[int, torch.Tensor], check_size: CheckSize) -> Pushed:
    """outputs, J t by output. `check_size` is told of the outputs, and of what is like the tangents. Raises Fault."""
    found = _forward_mode(call, moved) if call.hosted.forward_mode and not hooked(call) else None
    if found is None:
        fw = call.forward(watch=True)
        check_size(fw.outputs, [t for t in fw.outputs.values() if t.requires_grad])
        return fw.outputs, push_twice(call, fw, moved)
    outputs, pushed = found
    check_size(outputs, [t for t in pushed.values() if t is not None])
    return outputs, pushed


def finish_jvp(results: Results, outputs: dict[str, torch.Tensor], pushed: Mapping[str, torch.Tensor | None]) -> None:
    """Fills in a JVP's results."""
    results.outcome.gradients = [results.grad(name, tangent) for name, tangent in pushed.items()]
    results.add_outputs(outputs)


def _forward_mode(call: Call, moved: Mapping[int, torch.Tensor]) -> Pushed | None:
    """None where forward mode does not exist, or might be another derivative than reverse mode's.

    The primals require grad: only so is there a graph that shows what the function was made of, do conversions that
    lose tangents raise, and are outputs told apart that cannot be differentiated.
    """
    with forward_ad.dual_level():

        def dual(index: int, tensor: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = forward_ad.make_dual(tensor.detach().requires_grad_(), moved[index])  # type: ignore[no-untyped-call]
            return made

        try:
            fw = call.forward(dual, watch=True)
        except Fault:
            # Also when an operation has no formula. If it is the model's own error, reverse mode will meet it again.
            return None
        if not _trustworthy(fw):
            return None
        outputs, pushed = {}, dict[str, torch.Tensor | None]()
        for name, tensor in fw.outputs.items():
            primal, tangent = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
            if tensor.requires_grad and tangent is None:
                return None
            outputs[name] = primal.detach()
            pushed[name] = tangent.detach() if tangent is not None and tensor.requires_grad else None
        return outputs, pushed


def _trustworthy(fw: Forward) -> bool:
    """Whether forward mode went through every part of the function as reverse mode would.

    It passes through torch.no_grad, through autograd.grad inside the model, and by hooks; and a custom operator without
    a forward formula (torch.library, TorchScript) drops tangents without a word. Of torch's own, some differ.
    """
    if fw.witness.hooks or fw.witness.cuts:
        return False
    return all(
        not has_hooks(node) and not lacks_adjoint(node) and (not is_foreign(node) or _has_jvp(node))
        for node in nodes(fw.outputs.values())
    )


def _has_jvp(node: Any) -> bool:
    forward = getattr(type(node), "_forward_cls", None)
    return forward is not None and forward.jvp is not torch.autograd.Function.jvp
