"""From an outcome to a ModelInferResponse: names, datatypes, and the payloads in the order of the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pullback_server.faults import Fault, nearest
from pullback_server.fleet.seam import Buffer
from pullback_server.job import GradRef, Job, Outcome, TensorRef, split_id
from pullback_server.rpc.inference.translating import GRAD, HVP, JVP, Asked
from pullback_wire import Reason, dtype_name
from pullback_wire.inference import datatype_name
from pullback_wire.inference import open_inference_pb2 as pb

#: Number of raw_output_contents.
RAW = 6


def check_outputs(asked: Asked, job: Job) -> None:
    """Raises Fault (BAD_NAME) for a derivative that is wanted and will not be computed."""
    labels = {wrt.label: None for wrt in job.wrt}
    for prefix in (GRAD, HVP) if asked.transform else ():
        for name in asked.outputs:
            if name.startswith(prefix) and name.removeprefix(prefix) not in labels:
                known = [f"{prefix}{label}" for label in labels]
                raise Fault(Reason.BAD_NAME, f"there will be no output {name!r}; {nearest(name, known)}", "outputs")


def response(asked: Asked, job: Job, outcome: Outcome, payloads: Sequence[Buffer]) -> tuple[bytes, list[Buffer]]:
    """The message without contents, and these, for `RAW`.

    Raises Fault: BAD_NAME where an output is wanted that there is not, UNSUPPORTED_BY_MODEL for one of a dtype that the
    protocol does not have.
    """
    found = pb.ModelInferResponse(model_name=asked.name, model_version=split_id(job.version)[0], id=asked.id)
    known = _by_name(outcome)
    contents: list[Buffer] = []
    unused: list[str] = []
    for name in asked.outputs or known:
        if name not in known:
            raise Fault(Reason.BAD_NAME, f"there is no output {name!r}; {nearest(name, known)}", "outputs")
        ref = known[name]
        if ref is None:
            unused.append(name.partition(":")[2])
            continue
        found.outputs.append(
            pb.ModelInferResponse.InferOutputTensor(name=name, datatype=_datatype(name, ref), shape=ref.shape)
        )
        contents.append(payloads[ref.payload])
    if unused:
        # There is no tensor for what is not even zeros.
        found.parameters["unused"].string_param = ",".join(unused)
    for index, norm in enumerate(outcome.norms):
        found.parameters[f"norm:{index}" if job.batched else "norm"].double_param = norm
    return found.SerializeToString(), contents


def _by_name(outcome: Outcome) -> Mapping[str, TensorRef | None]:
    """Everything that was computed; None: the outputs do not depend on it."""
    found: dict[str, TensorRef | None] = {ref.name: ref for ref in outcome.outputs}
    derived: Sequence[tuple[str, Sequence[GradRef]]] = (
        (GRAD, outcome.gradients),
        (HVP, outcome.hvps),
        (JVP, outcome.cotangent_derivatives),
    )
    for prefix, refs in derived:
        for ref in refs:
            name = f"{prefix}{ref.name}"
            if name in found:
                raise Fault(
                    Reason.UNSUPPORTED_BY_MODEL,
                    f"the model has an output {name!r}, and so would be called what is computed; ask for it alone",
                    "outputs",
                )
            found[name] = ref.value
    return found


def _datatype(name: str, ref: TensorRef) -> str:
    try:
        return datatype_name(ref.dtype)
    except ValueError:
        raise Fault(
            Reason.UNSUPPORTED_BY_MODEL,
            f"output {name!r} is {dtype_name(ref.dtype)}, for which this protocol has no datatype; ask for the others, "
            "or call GradientService",
            "outputs",
        ) from None
