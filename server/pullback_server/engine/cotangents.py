"""What is pulled back: the cotangents of a call, held against its outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pullback_server.engine._dtypes import describe, differentiable, name_of
from pullback_server.engine._names import unknown_name
from pullback_server.engine.call import Call, Forward, refs_by_name
from pullback_server.faults import Fault, listed
from pullback_server.job import TensorRef
from pullback_wire import Reason


class Pull:
    """A forward, and cotangents for some of its outputs."""

    def __init__(self, fw: Forward, names: list[str], cotangents: list[torch.Tensor], count: int | None) -> None:
        self.fw = fw
        self.names = names
        self.outputs = [fw.outputs[name] for name in names]
        self.cotangents = cotangents
        #: Extent of the cotangents' leading axis; None: they have none.
        self.count = count


def _count(call: Call, refs: Sequence[TensorRef]) -> int | None:
    """K of batched cotangents."""
    if not call.job.batched:
        return None
    if not refs:
        raise Fault(
            Reason.BAD_COTANGENT, "cotangents_batched is set, but there are no cotangents", "cotangents_batched"
        )
    counts = {}
    for ref in refs:
        if not ref.shape:
            raise Fault(
                Reason.BAD_COTANGENT,
                f"cotangents[{ref.name}] has the shape [], expected a leading axis, as cotangents_batched is set",
                f"cotangents[{ref.name}].shape",
            )
        counts[ref.name] = ref.shape[0]
    (first, count), *others = counts.items()
    for name, other in others:
        if other != count:
            raise Fault(
                Reason.BAD_COTANGENT,
                f"cotangents[{name}] has {other} rows and cotangents[{first}] {count}, expected as many",
                f"cotangents[{name}].shape",
            )
    if count == 0:
        raise Fault(Reason.BAD_COTANGENT, "the cotangents have 0 rows, expected 1 or more", "cotangents")
    if count > call.job.max_cotangents:
        raise Fault(
            Reason.RESULT_TOO_LARGE,
            f"the cotangents have {count} rows, at most {call.job.max_cotangents} are allowed",
            "cotangents",
        )
    return count


def check_like(
    call: Call, ref: TensorRef, like: torch.Tensor, what: str, owner: str, lead: tuple[int, ...] = ()
) -> torch.Tensor:
    """The tensor of `ref`, which must be as `like`. Raises Fault (BAD_COTANGENT)."""
    tensor = call.tensor(ref)
    expected = lead + tuple(like.shape)
    if tuple(tensor.shape) != expected:
        raise Fault(
            Reason.BAD_COTANGENT,
            f"{what}[{ref.name}] has the shape {list(tensor.shape)}, expected {list(expected)}"
            f"{' (rows first)' if lead else ''} as {owner} {ref.name!r}",
            f"{what}[{ref.name}].shape",
        )
    if tensor.dtype != like.dtype:
        note = ""
        if like.dtype.is_complex != tensor.dtype.is_complex:
            kind = "complex" if like.dtype.is_complex else "real"
            note = f" (a {kind} tensor takes a {kind} one)"
        raise Fault(
            Reason.BAD_COTANGENT,
            f"{what}[{ref.name}] is {name_of(tensor.dtype)}, expected {name_of(like.dtype)} as {owner} "
            f"{ref.name!r}{note}",
            f"{what}[{ref.name}].dtype",
        )
    return tensor


def cotangents(call: Call, fw: Forward) -> Pull:
    """The cotangents of a call against its outputs. Raises Fault, and what `Call.forward` raises."""
    job = call.job
    if not job.wrt:
        raise Fault(Reason.NOT_DIFFERENTIABLE, "wrt names nothing: no input is floating-point or complex", "wrt")
    refs = refs_by_name("cotangents", job.cotangents) if len(job.cotangents) > 1 else None
    count = _count(call, job.cotangents)
    lead = () if count is None else (count,)
    names, values = [], []
    for ref in job.cotangents if refs is None else refs.values():
        output = fw.outputs.get(ref.name)
        field = f"cotangents[{ref.name}]"
        if output is None:
            owner = call.hosted.owner if call.loss is None else "a function with a loss"
            raise unknown_name("output", ref.name, fw.outputs, field, owner)
        if not differentiable(output.dtype):
            raise Fault(
                Reason.NOT_DIFFERENTIABLE,
                f"{field} is for an output of {describe(output)}, which cannot be differentiated",
                field,
            )
        values.append(check_like(call, ref, output, "cotangents", "the output", lead))
        names.append(ref.name)
    if not names:
        return implicit(call, fw)
    if not all(fw.outputs[name].requires_grad for name in names):
        fw = _everything(call, fw)
        for name in names:
            if not fw.outputs[name].requires_grad:
                raise Fault(
                    Reason.NOT_DIFFERENTIABLE,
                    f"the output {name!r} needs no grad: {call.hosted.owner} does not compute it differentiably",
                    f"cotangents[{name}]",
                )
    return Pull(fw, names, values, count)


def _everything(call: Call, fw: Forward) -> Forward:
    """Runs forward anew where a graph for `wrt` alone cannot tell "not differentiable" from "does not depend on it"."""
    if not call.copies:
        raise call.rerun()
    return call.forward(everything=True, watch=True)


def implicit(call: Call, fw: Forward) -> Pull:
    floating = [name for name, tensor in fw.outputs.items() if differentiable(tensor.dtype)]
    if not floating:
        raise Fault(
            Reason.NOT_DIFFERENTIABLE,
            f"no output is floating-point or complex: {_shown(fw)}",
            "cotangents",
        )
    if len(floating) > 1 or not fw.outputs[floating[0]].requires_grad:
        fw = _everything(call, fw)
        floating = [name for name, tensor in fw.outputs.items() if tensor.requires_grad]
    if not floating:
        raise Fault(
            Reason.NOT_DIFFERENTIABLE,
            f"no output needs grad: {call.hosted.owner} computes none of {listed(fw.outputs)} differentiably",
            "cotangents",
        )
    output = fw.outputs[floating[0]]
    if len(floating) > 1 or output.numel() != 1 or output.dtype.is_complex:
        raise Fault(
            Reason.MISSING_COTANGENT,
            f"cotangents are missing: they may be left out only where the one differentiable output is a real scalar, "
            f"but there is {_shown(fw)}",
            "cotangents",
        )
    return Pull(fw, floating, [torch.ones_like(output)], None)


def _shown(fw: Forward) -> str:
    return ", ".join(f"{name!r} {describe(tensor)}" for name, tensor in list(fw.outputs.items())[:8])
