"""One run of a hosted model in a session: its graph goes through the caller's tensors and stays."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from pullback_server.engine._dtypes import WIRE
from pullback_server.engine.call import Again, model_error, out_of_memory, text_of
from pullback_server.engine.flatten import flatten
from pullback_server.engine.guards import (
    Randomness,
    Witness,
    compiled_code_as_written,
    plain_kernels,
    without_cudnn,
)
from pullback_server.engine.hosted import HostedModel, same
from pullback_server.engine.losses import PreparedLoss
from pullback_server.engine.places import in_loss, inside
from pullback_server.engine.recomputing import Unrepeatable, repeatable
from pullback_server.engine.replica import Stage
from pullback_server.engine.tape_state import PLAIN, Held, Lineage, merged
from pullback_server.faults import Fault, listed
from pullback_wire import Reason

Named = Mapping[str, Held]


@dataclass
class Run:
    """What to run a model with."""

    inputs: Named
    parameters: Named
    targets: Named
    loss: PreparedLoss | None
    train: bool
    seed: int | None
    fast: bool
    no_grad: bool
    #: Whether its nodes are to know which module made them.
    notes: bool = False
    #: Whether the model hung hooks on anything, whatever came of the call.
    hung: bool = False


class Overwritten(Exception):
    """The model wrote into tensors that the session holds."""

    def __init__(self, helds: list[Held], message: str) -> None:
        super().__init__(message)
        self.helds = helds
        self.message = message


def run_model(hosted: HostedModel, run: Run) -> tuple[dict[str, torch.Tensor], Lineage]:
    """The outputs, with their graph, and what is known of it. Raises Fault, Again, Overwritten."""
    if run.train:
        hosted.check_train()
    hosted.watch_parameters(run.train)
    wrote_before = hosted.writes_parameters
    randomness = Randomness(run.seed, hosted.device, not hosted.stock)
    try:
        randomness.begin()
        try:
            outputs, witness, apart = _forward(hosted, run, randomness)
        finally:
            randomness.end()
    finally:
        hosted.restore_state()
    if hosted.spoilt or hosted.writes_parameters != wrote_before:
        raise Again
    targets = {name: held.tensor for name, held in run.targets.items()}
    if run.loss is not None:
        grad_mode = contextlib.nullcontext() if not run.no_grad else torch.no_grad()
        with grad_mode, in_loss(hosted, run.loss.loss.name, run.notes) as tell:
            outputs = {"loss": run.loss.apply(outputs, targets, hosted.owner)}
            tell(outputs)
    outputs = {name: _sendable(name, tensor, hosted.owner) for name, tensor in outputs.items()}
    return outputs, _lineage(hosted, run, outputs, witness, apart)


def _lineage(
    hosted: HostedModel, run: Run, outputs: Mapping[str, torch.Tensor], witness: Witness, apart: bool
) -> Lineage:
    if not any(tensor.requires_grad for tensor in outputs.values()):
        return PLAIN
    found = merged(
        held.lineage
        for group in (run.inputs, run.parameters, run.targets)
        for held in group.values()
        if held.tensor.requires_grad
    )
    found = merged([found, Lineage(labels=frozenset([(hosted.registration.name, hosted.health)]))])
    if hosted.stock:
        return found
    own = frozenset([hosted])
    hooked = own if witness.hooks or run.hung or hosted.hooked else frozenset()
    return merged([found, Lineage(own, hooked, 0, run.fast, own if apart else frozenset())])


def _sendable(name: str, tensor: torch.Tensor, owner: str) -> torch.Tensor:
    """An output as a handle can stand for it. Raises Fault (MODEL_ERROR)."""
    if tensor.layout is not torch.strided:
        try:
            tensor = tensor.to_dense()
        except (RuntimeError, NotImplementedError) as error:
            raise Fault(
                Reason.MODEL_ERROR,
                f"{owner} returned {name!r} in the layout {tensor.layout}, which cannot travel: {error}",
            ) from error
    if tensor.is_inference():
        tensor = tensor.clone()
    if tensor.dtype not in WIRE:
        raise Fault(Reason.MODEL_ERROR, f"{owner} returned {name!r} as {tensor.dtype}, which cannot travel")
    return tensor


def _kernels(hosted: HostedModel, run: Run, stage: Stage) -> contextlib.AbstractContextManager[object]:
    """The kernels that have the derivatives that may be asked for."""
    plain = not run.fast and not run.no_grad
    uncompiled = hosted.compiled and stage.changes
    if not (plain or hosted.without_cudnn or uncompiled):
        return contextlib.nullcontext()
    if plain and not hosted.without_cudnn:
        return plain_kernels()
    stack = contextlib.ExitStack()
    if hosted.without_cudnn:
        stack.enter_context(without_cudnn())
    if plain:
        stack.enter_context(plain_kernels())
    elif uncompiled:
        stack.enter_context(compiled_code_as_written())
    return stack


class _Watched:
    """The session's tensors as a model gets to see them, and whether it leaves them as they were."""

    def __init__(self, copies: bool) -> None:
        self.copies = copies
        self._lent: list[tuple[str, Held, torch.Tensor, int]] = []

    def lend(self, name: str, held: Held) -> torch.Tensor:
        tensor = held.tensor
        if self.copies:
            tensor = tensor.clone()
        elif not tensor.requires_grad:
            # A model may ask its input to require grad; that must not stick. A view, not detach(): what is written to
            # the session's tensor later, autograd must find in the model's outputs that are views of it.
            tensor = tensor.view_as(tensor)
        self._lent.append((name, held, tensor, tensor._version))
        return tensor

    def written(self) -> dict[str, Held]:
        return {name: held for name, held, tensor, version in self._lent if tensor._version != version}

    def changed(self) -> bool:
        """Whether copies are not what they are copies of; writes through `.data` or numpy leave no other trace."""
        return any(not same(tensor.detach(), held.tensor.detach()) for _, held, tensor, _ in self._lent)

    def holds(self, outputs: Iterable[torch.Tensor]) -> bool:
        """Whether some outputs lie in the memory of what was lent."""
        lent = {tensor.untyped_storage()._cdata for _, _, tensor, _ in self._lent}
        return any(one.layout is torch.strided and one.untyped_storage()._cdata in lent for one in outputs)


def _forward(hosted: HostedModel, run: Run, randomness: Randomness) -> tuple[dict[str, torch.Tensor], Witness, bool]:
    given = {**run.inputs, **run.parameters}
    circumstances = run.train, run.no_grad, tuple((name, held.tensor.requires_grad) for name, held in given.items())
    # The first time in each circumstances, what the model does to what it is given is looked at on copies.
    first = circumstances not in hosted.spared
    inputs = _Watched(hosted.writes_inputs or first)
    parameters = _Watched(hosted.writes_parameters)
    before = {name: held.tensor.detach().clone() for name, held in run.parameters.items()} if first else {}
    natural = hosted.needs_natural and not run.no_grad
    arguments, keywords = hosted.binding.arrange({name: inputs.lend(name, held) for name, held in run.inputs.items()})
    swaps = _swaps(hosted, run, parameters, natural)
    torch._C._set_grad_enabled(not run.no_grad)
    stage = Stage(hosted, swaps, run.train)
    witness = Witness()
    watching = contextlib.nullcontext() if hosted.stock or run.no_grad else witness.watching()
    randomness.restart()
    try:
        again = repeatable() if hosted.recomputes else contextlib.nullcontext()
        with (
            hosted.precision(),
            _kernels(hosted, run, stage),
            stage.code() as code,
            again,
            watching,
            inside(hosted, code, (arguments, keywords, swaps), run.notes) as tell,
        ):
            result = code(*arguments, **keywords)
            tell(result)
    except Fault:
        raise
    except BaseException as error:
        if not out_of_memory(error):
            _explain(hosted, error, inputs, parameters, natural or run.no_grad)
        _check_untouched(hosted, inputs, parameters)
        raise
    finally:
        # Whatever the model left.
        torch._C._set_grad_enabled(True)
        run.hung |= stage.hooks
    _check_untouched(hosted, inputs, parameters)
    outputs = flatten(result, hosted.registration.outputs, hosted.owner)
    stage.check(list(outputs.values()))
    if first:
        hosted.spared.add(circumstances)
        hosted.writes_inputs |= inputs.changed()
        for name, value in before.items():
            given_one = run.parameters[name].tensor.detach()
            if not hosted.writes_parameters and not same(given_one, value):
                given_one.data.copy_(value)
                hosted.writes_parameters = True
        if inputs.holds(outputs.values()) and not hosted.writes_inputs:
            # Views of what it was given are views of the session's tensors, now as ever after.
            raise Again
    return outputs, witness, stage.apart


def _swaps(hosted: HostedModel, run: Run, given: _Watched, natural: bool) -> dict[str, torch.Tensor]:
    """What stands for parameters: those given, and others where the hosted ones cannot be used as they are."""
    swaps: dict[str, torch.Tensor] = {}
    if hosted.writes_parameters or natural:
        for name, own in hosted.parameters.items():
            value = own.detach().clone() if hosted.writes_parameters else own.detach()
            swaps[name] = torch.nn.Parameter(value, requires_grad=natural and hosted.natural[name])
    for name, held in run.parameters.items():
        tensor = given.lend(name, held)
        hooks = hosted.parameters[name]._backward_hooks
        if hooks and tensor.requires_grad:
            # What the model's author hung on the parameter belongs to its gradient, whatever its value.
            tensor = tensor.view_as(tensor)
            for hook in hooks.values():
                tensor.register_hook(hook)  # type: ignore[no-untyped-call]
        swaps[name] = tensor
    return swaps


def _check_untouched(hosted: HostedModel, inputs: _Watched, parameters: _Watched) -> None:
    """Notes what a model wrote into. Raises Overwritten where that was the session's."""
    lost: dict[str, Held] = {}
    if written := inputs.written():
        hosted.writes_inputs = True
        lost |= {} if inputs.copies else written
    if written := parameters.written():
        hosted.writes_parameters = True
        lost |= {} if parameters.copies else written
    if lost:
        raise Overwritten(
            list(lost.values()),
            f"{hosted.owner} wrote into what it was given as {listed(lost)}, which it had not done before: those "
            "tensors no longer hold what they did, and cannot be used; from now on it is given copies",
        )


def _explain(hosted: HostedModel, error: BaseException, inputs: _Watched, parameters: _Watched, natural: bool) -> None:
    """Raises what the model's exception means."""
    text = text_of(error)
    if isinstance(error, RuntimeError) and "leaf Variable that requires grad" in text:
        if not inputs.copies:
            _check_untouched(hosted, inputs, parameters)
            hosted.writes_inputs = True
            raise Again from error
        if not parameters.copies:
            hosted.writes_parameters = True
            raise Again from error
    _check_untouched(hosted, inputs, parameters)
    if isinstance(error, Unrepeatable):
        error.learn()
        raise Again from error
    if isinstance(error, RuntimeError) and "does not require grad" in text and not natural:
        hosted.needs_natural = True
        raise Again from error
    if isinstance(error, RuntimeError) and "is not differentiable with respect to" in text:
        raise Fault(Reason.NOT_DIFFERENTIABLE, f"{hosted.owner} cannot be differentiated: {text}") from error
    raise model_error(hosted.owner, error) from error


def as_handles(names: Sequence[str], handles: Sequence[int]) -> list[int]:
    """The handles of outputs: those that were given, and then the numbers that follow."""
    if not handles:
        return []
    return [handles[i] if i < len(handles) else handles[-1] + 1 + i - len(handles) for i in range(len(names))]
