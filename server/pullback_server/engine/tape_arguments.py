"""Arguments of a model's call in a session, held against what the model declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pullback_server import ops
from pullback_server.engine._dtypes import WIRE
from pullback_server.engine.call import check_parameter
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.losses import check_range
from pullback_server.engine.tape_state import Held, Operands
from pullback_server.faults import Fault
from pullback_server.hosting.checks import check_tensor
from pullback_server.job import TensorRef
from pullback_wire import Reason

Named = dict[str, Held]


def by_name(operands: Sequence[ops.Operand], what: str, source: Operands) -> Named:
    """Operands by name. Raises Fault, Dependency."""
    found: Named = {}
    for operand in operands:
        field = f"{what}[{operand.name}]"
        if operand.name in found:
            raise Fault(Reason.BAD_NAME, f"{field} is given twice", field)
        found[operand.name] = source.take(operand, field)
    return found


def model_inputs(hosted: HostedModel, operands: Sequence[ops.Operand], source: Operands) -> Named:
    """A model's inputs; operands without names are taken in the order of its code. Raises Fault."""
    if operands and not any(operand.name for operand in operands):
        names = hosted.binding.names
        if len(operands) > len(names):
            raise Fault(
                Reason.BAD_NAME, f"{hosted.owner} takes {len(names)} inputs, {len(operands)} are given", "inputs"
            )
        inputs = {name: source.take(operand, f"inputs[{name}]") for name, operand in zip(names, operands, strict=False)}
    else:
        inputs = by_name(operands, "inputs", source)
    hosted.binding.check(inputs)
    _check_specs(hosted, inputs)
    for name, (low, high) in hosted.ranges.items():
        if name in inputs:
            check_range(inputs[name].tensor, low, high, f"inputs[{name}]")
    return inputs


def model_parameters(hosted: HostedModel, operands: Sequence[ops.Operand], source: Operands) -> Named:
    """Parameters given for a call. Raises Fault."""
    given = by_name(operands, "parameters", source)
    for name, held in given.items():
        check_parameter(hosted, name, held.tensor)
        hosted.check_exchange(name)
    return given


def _check_specs(hosted: HostedModel, inputs: Mapping[str, Held]) -> None:
    extents: dict[str, tuple[int, str]] = {}
    for spec in hosted.specs:
        held = inputs.get(spec.name)
        if held is not None:
            tensor = held.tensor
            # What cannot travel has no number, and no spec can ask for it.
            ref = TensorRef(spec.name, WIRE.get(tensor.dtype, -1), tuple(tensor.shape), 0)
            check_tensor(spec, ref, "input", f"inputs[{spec.name}]", extents)
