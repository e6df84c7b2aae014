"""One call: its tensors, checked, and the function it differentiates."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from pullback_server.engine import losses
from pullback_server.engine._dtypes import describe, differentiable
from pullback_server.engine._names import unknown_name
from pullback_server.engine.flatten import flatten
from pullback_server.engine.guards import Randomness, Witness
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.places import in_loss, inside
from pullback_server.engine.plan import Variant
from pullback_server.engine.recomputing import Unrepeatable, repeatable
from pullback_server.faults import Fault
from pullback_server.job import Job, TensorRef, Wrt
from pullback_wire import Reason


class WritesInputs(Exception):
    """The inputs are no longer what was sent, and a forward must run again: send the job anew, with copy_inputs."""


class Again(Exception):
    """The call must be computed from the start, with what was learned about the model."""


@dataclass
class Forward:
    """A forward that was run: its outputs, and the tensors that stand for `wrt`, in order."""

    outputs: dict[str, torch.Tensor]
    wrt: list[torch.Tensor]
    witness: Witness = field(default_factory=Witness)


Wrap = Callable[[int, torch.Tensor], torch.Tensor]

_AS_IT_IS = contextlib.nullcontext()
#: What a call ends with where a compiled backward fails, among others.
_PERHAPS_THE_PLAN = (Reason.MODEL_ERROR, Reason.NOT_DIFFERENTIABLE)


def _leaf(_: int, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_()


def _parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    """What stands for a parameter in a module: its code may well ask whether it is one."""
    return torch.nn.Parameter(tensor.detach(), requires_grad=False)


class Call:
    """A job with its model. Everything that a forward needs is checked here, before the first one runs."""

    def __init__(self, job: Job, hosted: HostedModel, tensors: Sequence[torch.Tensor]) -> None:
        begin = time.perf_counter()
        self.job = job
        self.hosted = hosted
        self.device = hosted.device
        # What may run its forward more than once must find the original inputs each time.
        self.copies = job.copy_inputs or hosted.writes_inputs or job.kind == "jvp"
        self.forwards = 0
        self.timings: dict[str, float] = {}
        self._raw = tensors
        self._versions = [tensor._version for tensor in tensors]
        self.inputs = self._take("inputs", job.inputs)
        hosted.binding.check(self.inputs)
        if hosted.ranges:
            self._check_ranges()
        if job.train:
            hosted.check_train()
        self.parameters = self._take_parameters()
        self.targets = self._take("targets", job.targets)
        self.loss = losses.prepare(job.loss, self.targets) if job.loss is not None else None
        if self.loss is None and self.targets:
            raise Fault(Reason.BAD_NAME, f"targets[{next(iter(self.targets))}] was given without a loss", "targets")
        self._check_wrt()
        self._randomness = Randomness(job.seed, self.device, not hosted.stock)
        #: Takes back what the latest forward changed in the module; it stays until the derivatives are computed.
        self._undo: list[Callable[[], None]] = []
        #: The compiled code that the latest forward ran; None: it ran as it is written.
        self.variant: Variant | None = None
        self.timings["copy_in"] = time.perf_counter() - begin

    def __enter__(self) -> Self:
        self._randomness.begin()
        if self.job.train:
            self._leave_training = self.hosted.enter_training()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._take_back()
        if self.job.train:
            self._leave_training()
        self._randomness.end()
        self._judge_plan(error)

    def _judge_plan(self, error: BaseException | None) -> None:
        """After a call: whether the compiled plan is at fault for what went wrong. Raises Again to find out."""
        plan = self.hosted.plans
        if plan is None or plan.warming or isinstance(error, (Again, WritesInputs)):
            return
        if plan.suspect:
            why, plan.suspect = plan.suspect, ""
            # As it is written the model did it; otherwise the error is its own.
            if error is None:
                self.hosted.drop_plan(why)
        elif self.variant is not None and isinstance(error, Fault) and error.reason in _PERHAPS_THE_PLAN:
            plan.suspect = error.message
            raise Again from error

    def _take_back(self) -> None:
        while self._undo:
            self._undo.pop()()

    def tensor(self, ref: TensorRef) -> torch.Tensor:
        """A tensor of the request, on the device."""
        # A tensor of its own: a model may ask its input to require grad.
        found = self._raw[ref.payload].detach()
        return found if found.device == self.device else found.to(self.device, non_blocking=True)

    def _take(self, what: str, refs: Sequence[TensorRef]) -> dict[str, torch.Tensor]:
        taken = {ref.name: self.tensor(ref) for ref in refs}
        if len(taken) != len(refs):
            names = [ref.name for ref in refs]
            twice = next(name for name in names if names.count(name) > 1)
            raise Fault(Reason.BAD_NAME, f"{what}[{twice}] is given twice", f"{what}[{twice}]")
        return taken

    def _take_parameters(self) -> dict[str, torch.Tensor]:
        job, hosted = self.job, self.hosted
        if not job.parameters:
            return {}
        taken = self._take("parameters", job.parameters)
        for name, tensor in taken.items():
            check_parameter(hosted, name, tensor)
            self._check_replaceable(name)
        return taken

    def _check_replaceable(self, name: str) -> None:
        """Raises Fault where the model's code would not find what stands for a parameter."""
        self.hosted.check_exchange(name)
        if name in self.hosted.kept:
            raise Fault(
                Reason.UNSUPPORTED_BY_MODEL,
                f"nothing can stand in for the parameter {name!r} of {self.hosted.owner}, which keeps it in "
                f"{self.hosted.kept[name].place} as well; its author can look it up in its module when it is used",
            )

    def _check_ranges(self) -> None:
        for name, (low, high) in self.hosted.ranges.items():
            if name in self.inputs:
                losses.check_range(self.inputs[name], low, high, f"inputs[{name}]")

    def _check_wrt(self) -> None:
        hosted = self.hosted
        places: dict[str, Mapping[str, torch.Tensor]] = {
            "input": self.inputs,
            "param": hosted.parameters,
            "target": self.targets,
        }
        for wrt in self.job.wrt:
            field_name = f"wrt[{wrt.label}]"
            known = places[wrt.place]
            if wrt.name not in known:
                if wrt.place == "param" and wrt.name in hosted.aliases:
                    first = hosted.aliases[wrt.name]
                    raise Fault(Reason.BAD_NAME, f"{field_name} is the same parameter as {first!r}", field_name)
                what = {"input": "input", "param": "parameter", "target": "target"}[wrt.place]
                raise unknown_name(
                    what, wrt.name, known, field_name, "the request" if what != "parameter" else hosted.owner
                )
            if not differentiable(known[wrt.name].dtype):
                raise Fault(
                    Reason.NOT_DIFFERENTIABLE,
                    f"{field_name} is {describe(known[wrt.name])}; only floating-point and complex tensors can be "
                    "differentiated by",
                    field_name,
                )

    def wrt_values(self) -> list[torch.Tensor]:
        """What `wrt` stands for, without any graph."""
        values = []
        for wrt in self.job.wrt:
            if wrt.place == "input":
                values.append(self.inputs[wrt.name])
            elif wrt.place == "target":
                values.append(self.targets[wrt.name])
            else:
                values.append(self.parameters.get(wrt.name, self.hosted.parameters[wrt.name]))
        return values

    def forward(self, wrap: Wrap | None = None, *, watch: bool = False, everything: bool = False) -> Forward:
        """Runs the function.

        wrap: makes the tensor that stands for a member of `wrt`, from its index and value; None: a leaf.
        watch: fills the result's witness.
        everything: parameters require grad as the factory had it, and all inputs do, so that the graph tells which
        outputs are differentiable at all.

        Raises Fault, WritesInputs, Again.
        """
        job, hosted = self.job, self.hosted
        begin = time.perf_counter()
        self._take_back()
        inputs, targets, given = self.inputs, self.targets, self.parameters
        if self.copies:
            inputs, targets, given = ({k: t.clone() for k, t in d.items()} for d in (inputs, targets, given))
        if everything:
            inputs = {
                name: _leaf(0, tensor) if differentiable(tensor.dtype) else tensor for name, tensor in inputs.items()
            }
        natural = hosted.needs_natural or everything
        swaps: dict[str, torch.Tensor] = {name: _parameter(tensor) for name, tensor in given.items()}
        if hosted.writes_parameters:
            swaps = {name: _parameter(own.clone()) for name, own in hosted.parameters.items()} | swaps
        requiring = dict(hosted.natural) if natural else {}
        if natural:
            for name, tensor in swaps.items():
                tensor.requires_grad_(hosted.natural[name])
        stand: list[torch.Tensor] = []
        variant = None if wrap or watch or swaps or natural else self._compiled()
        if variant is not None:
            inputs = {
                name: _leaf(0, tensor) if f"input:{name}" in variant.requiring else tensor
                for name, tensor in inputs.items()
            }
            requiring = {name: f"param:{name}" in variant.requiring for name in hosted.parameters}
        if job.wrt:
            inputs, targets = dict(inputs), dict(targets)
            for index, wrt in enumerate(job.wrt):
                stand.append(self._stand_in(index, wrt, wrap, inputs, targets, swaps, requiring))
        private = job.train or hosted.writes_buffers
        if swaps or private:
            self._undo.append(hosted.swap(swaps, private))
        if requiring:
            self._undo.append(hosted.let_require_grad(requiring))
        self._randomness.restart()
        self.forwards += 1
        self.variant = None
        arguments, keywords = hosted.binding.arrange(inputs)
        witness = Witness()
        try:
            with (
                hosted.precision(),
                repeatable() if hosted.recomputes else _AS_IT_IS,
                witness.watching() if watch else _AS_IT_IS,
                inside(hosted, hosted.code, (arguments, keywords, swaps)) as tell,
            ):
                if variant is None:
                    result = hosted.code(*arguments, **keywords)
                    tell(result)
                else:
                    result = self._run_compiled(variant, arguments, keywords)
        except BaseException as error:
            if not (out_of_memory(error) or isinstance(error, Again)):
                self._explain(error, natural)
            # There may be a second attempt.
            self._check_untouched()
            raise
        self._check_untouched()
        found = flatten(result, hosted.registration.outputs, hosted.owner)
        if variant is not None and hosted.plans is not None:
            found, undo = hosted.plans.kept(found, stand)
            self._undo += undo
        outputs = self.composed(found, targets)
        self.variant = variant
        self.timings["forward"] = self.timings.get("forward", 0.0) + time.perf_counter() - begin
        return Forward(outputs, stand, witness)

    def _compiled(self) -> Variant | None:
        """The compiled code that can compute this call, for a forward with nothing in the module's place."""
        job, hosted = self.job, self.hosted
        if hosted.plans is None or job.kind not in ("evaluate", "vjp") or job.batched or job.train:
            return None
        if job.detect_anomaly:
            return None
        if self.copies or hosted.writes_buffers:
            return None
        wanted = [f"{wrt.place}:{wrt.name}" for wrt in job.wrt if wrt.place != "target"]
        pulled: list[str] | None = None
        if job.loss is not None:
            pulled = list(job.loss.bindings.values()) or None
        elif job.cotangents and self.loss is None:
            pulled = [ref.name for ref in job.cotangents]
        return hosted.plans.find(self.inputs, wanted, pulled)

    def _run_compiled(self, variant: Variant, arguments: list[torch.Tensor], keywords: dict[str, torch.Tensor]) -> Any:
        """Raises Again to have the call computed as the model is written, where the compiled code raised."""
        plan = self.hosted.plans
        assert plan is not None
        try:
            return plan.run(variant, arguments, keywords)
        except Exception as error:
            if plan.warming or out_of_memory(error):
                raise
            plan.suspect = f"{type(error).__name__}: {text_of(error)}"
            raise Again from error

    def composed(
        self, outputs: dict[str, torch.Tensor], targets: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """What the function returns, from what the model returned. Raises Fault."""
        if self.loss is None:
            return outputs
        try:
            with in_loss(self.hosted, self.loss.loss.name) as tell:
                loss = self.loss.apply(outputs, targets, self.hosted.owner)
                tell(loss)
            return {"loss": loss}
        except Fault as fault:
            if fault.__cause__ is not None and out_of_memory(fault.__cause__):
                raise fault.__cause__ from None
            raise

    def _stand_in(
        self,
        index: int,
        wrt: Wrt,
        wrap: Wrap | None,
        inputs: dict[str, torch.Tensor],
        targets: dict[str, torch.Tensor],
        swaps: dict[str, torch.Tensor],
        requiring: dict[str, bool],
    ) -> torch.Tensor:
        """Puts what stands for one member of `wrt` in its place."""
        name = wrt.name
        if wrt.place == "param":
            own = self.hosted.parameters[name]
            if wrap is None and name not in swaps:
                requiring[name] = True
                return own
            self._check_replaceable(name)
            value = swaps.get(name, own).detach()
            tensor = _parameter(value).requires_grad_() if wrap is None else wrap(index, value)
            # What the model's author hung on the parameter belongs to its gradient, whatever its value.
            for hook in (own._backward_hooks or {}).values():
                tensor.register_hook(hook)  # type: ignore[no-untyped-call]
            swaps[name] = tensor
            return tensor
        place = inputs if wrt.place == "input" else targets
        tensor = (wrap or _leaf)(index, place[name])
        # A model that writes into its input must find a tensor that is no leaf.
        place[name] = tensor.clone() if self.copies and wrt.place == "input" else tensor
        return tensor

    def _check_untouched(self) -> None:
        """Raises WritesInputs when the model has written into what was sent."""
        if self.copies:
            return
        for tensor, version in zip(self._raw, self._versions, strict=True):
            if tensor._version != version:
                self.hosted.writes_inputs = True
                raise WritesInputs(f"{self.hosted.owner} writes into its inputs")

    def rerun(self) -> Exception:
        """What to raise so that the call is computed anew."""
        return Again() if self.copies else WritesInputs("the call must run again, from the original bytes")

    def _explain(self, error: BaseException, natural: bool) -> None:
        """Raises what the model's exception means."""
        hosted = self.hosted
        text = text_of(error)
        if not self.copies:
            if isinstance(error, RuntimeError) and "leaf Variable that requires grad" in text:
                hosted.writes_inputs = True
                raise WritesInputs(f"{hosted.owner} writes into its inputs") from error
            self._check_untouched()
        if isinstance(error, Unrepeatable):
            error.learn()
            raise self.rerun() from error
        if isinstance(error, RuntimeError) and "does not require grad" in text and not natural:
            hosted.needs_natural = True
            raise self.rerun() from error
        if isinstance(error, RuntimeError) and "is not differentiable with respect to" in text:
            raise Fault(Reason.NOT_DIFFERENTIABLE, f"{hosted.owner} cannot be differentiated: {text}") from error
        raise model_error(hosted.owner, error) from error


def text_of(error: BaseException) -> str:
    """What an exception says; it may be of a class whose own __str__ raises."""
    try:
        return str(error)
    except BaseException as another:
        return f"(its message cannot be shown: {type(another).__name__})"


#: What is said where memory ran out: by torch's own allocator, by C++, and by the libraries that torch calls.
_NO_MEMORY = ("can't allocate memory", "std::bad_alloc", "Cannot allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
#: The whole of what oneDNN says; more words mean something else.
_NO_MEMORY_OF_ONEDNN = ("could not create a primitive", "could not create a memory object")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on whatever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = text_of(error)
    return text in _NO_MEMORY_OF_ONEDNN or any(part in text for part in _NO_MEMORY)


def model_error(owner: str, error: BaseException) -> Fault:
    """The fault for an exception out of the model's code, forward or backward."""
    return Fault(Reason.MODEL_ERROR, f"{owner} raised {type(error).__name__}: {text_of(error)}")


def check_parameter(hosted: HostedModel, name: str, tensor: torch.Tensor) -> None:
    """Whether a tensor can stand in for a hosted parameter. Raises Fault."""
    where = f"parameters[{name}]"
    if name in hosted.aliases:
        first = hosted.aliases[name]
        raise Fault(Reason.BAD_NAME, f"{where} is the same parameter as {first!r}: use that name", where)
    if name not in hosted.parameters:
        raise unknown_name("parameter", name, hosted.parameters, where, hosted.owner)
    own = hosted.parameters[name]
    if tensor.shape != own.shape or tensor.dtype != own.dtype:
        raise Fault(
            Reason.BAD_TENSOR,
            f"{where} is {describe(tensor)}, expected {describe(own)}",
            f"{where}.shape" if tensor.shape != own.shape else f"{where}.dtype",
        )


def refs_by_name(what: str, refs: Sequence[TensorRef]) -> dict[str, TensorRef]:
    """Raises Fault when a name comes twice."""
    found: dict[str, Any] = {}
    for ref in refs:
        if ref.name in found:
            raise Fault(Reason.BAD_NAME, f"{what}[{ref.name}] is given twice", f"{what}[{ref.name}]")
        found[ref.name] = ref
    return found
