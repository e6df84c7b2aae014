"""What an exception out of a session's backward means, in the terms of the contract."""

from __future__ import annotations

from pullback_server.engine.backward import NO_FORMULA
from pullback_server.engine.call import model_error, text_of
from pullback_server.engine.recomputing import Unrepeatable
from pullback_server.engine.tape_state import Lineage
from pullback_server.faults import Fault
from pullback_wire import Reason


def explained(error: BaseException, lineage: Lineage, first: bool) -> Fault:
    """The fault for an exception. first: whether only first derivatives are concerned."""
    text = text_of(error)
    owner = " or ".join(sorted(hosted.owner for hosted in lineage.models)) or "the graph"
    if isinstance(error, Warning) and any(part in text for part in NO_FORMULA):
        return Fault(Reason.NOT_DIFFERENTIABLE, f"{owner} cannot be differentiated: {text}", "outputs")
    if isinstance(error, Unrepeatable):
        # Not learned: it may be the caller who changed it, and nobody's activations are kept for that.
        return Fault(
            Reason.MODIFIED_IN_PLACE,
            f"a tensor that the backward computes a part of {owner} with, which keeps no activations, was changed in "
            "place after the forward",
            "outputs",
        )
    if not lineage.models and isinstance(error, Exception) and not isinstance(error, RuntimeError):
        return Fault(Reason.BAD_OPERAND, f"torch's backward raised {type(error).__name__}: {text}", "outputs")
    if not isinstance(error, RuntimeError):
        return model_error(owner, error)
    if "Trying to backward through the graph a second time" in text:
        return Fault(
            Reason.GRAPH_FREED,
            "the graph, or a part of it, was freed by an earlier backward: say retain_graph=True in every backward but "
            "the last one, or run the forward again",
            "outputs",
        )
    if "modified by an inplace operation" in text:
        # torch's hint is for who runs it.
        text = text.partition(" Hint:")[0]
        return Fault(
            Reason.MODIFIED_IN_PLACE,
            f"a tensor that the backward needs was changed in place after the forward: {text}",
            "outputs",
        )
    if any(part in text for part in NO_FORMULA):
        if first:
            return Fault(Reason.NOT_DIFFERENTIABLE, f"{owner} cannot be differentiated: {text}", "outputs")
        return Fault(
            Reason.ORDER_UNAVAILABLE,
            f"{owner} has no derivative of this order: {text}; gradients without create_graph, of what is no gradient "
            "itself, are available",
            "outputs",
        )
    if "use_reentrant" in text:
        return Fault(
            Reason.UNSUPPORTED_BY_MODEL,
            f"{owner} runs under torch.utils.checkpoint with use_reentrant=True, which torch.autograd.grad cannot "
            "differentiate; its author can say use_reentrant=False",
        )
    if "grad" in text and ("Mismatch in shape" in text or "dtype" in text) and not lineage.models:
        return Fault(Reason.BAD_COTANGENT, text, "grad_outputs")
    if not lineage.models:
        return Fault(Reason.BAD_OPERAND, f"torch's backward raised {type(error).__name__}: {text}", "outputs")
    return model_error(owner, error)
