"""How an operator lets a model run: under autocast, and with activations that the backward computes again."""

from __future__ import annotations

import contextlib
import types
import warnings
from fnmatch import fnmatchcase

import torch
from torch import nn

from pullback_server.engine.recomputing import recomputing
from pullback_server.engine.scripted import Scripted
from pullback_server.faults import listed
from pullback_server.hosting import Registration
from pullback_server.hosting.loading import LoadError

_AS_IT_IS = contextlib.nullcontext()
#: What torch.compile puts between a module and those inside it.
_COMPILED = "_orig_mod"
_RECURRENT = ("aten.lstm", "aten.gru", "aten.rnn_")


def autocast_dtype(registration: Registration, device: torch.device) -> torch.dtype | None:
    """What the forward is cast to. Raises LoadError where the device cannot."""
    name = registration.options.autocast
    if name is None:
        return None
    dtype: torch.dtype = getattr(torch, name)
    try:
        # torch only warns where it cannot, and goes on without.
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            with autocast(dtype, device):
                pass
    except (RuntimeError, UserWarning) as error:
        raise LoadError(f"model {registration.name!r}: there is no autocast to {name} on {device}: {error}") from error
    return dtype


def autocast(dtype: torch.dtype | None, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Around a forward, and not around a backward; None: nothing.

    Without torch's cache, which would hand one call the casts of another's parameters.
    """
    return _AS_IT_IS if dtype is None else torch.autocast(device.type, dtype, cache_enabled=False)


def is_recurrent(module: nn.Module | None) -> bool:
    """Whether a saved graph runs torch's recurrent operations, which cuDNN has kernels for."""
    graphs = [] if module is None else [child for child in module.modules() if isinstance(child, torch.fx.GraphModule)]
    names = [str(node.target) for child in graphs for node in child.graph.nodes]
    if isinstance(module, Scripted):
        names += [kind.replace("::", ".") for kind in module.kinds()]
    return any(name.startswith(_RECURRENT) for name in names)


def checkpoint_modules(registration: Registration, module: nn.Module) -> None:
    """Lets the forwards of the modules that the options name run under torch.utils.checkpoint.

    Of modules within one another the outermost, for what is inside is computed again with it. Names, and what else
    there is to see of a module, stay: it becomes one of a subclass, of which a deep copy is one as well.

    Raises LoadError.
    """
    globs = registration.options.checkpoint
    if not globs:
        return
    owner = f"model {registration.name!r}"
    known = _named(module)
    chosen: dict[str, nn.Module] = {}
    for glob in globs:
        matching = {name: child for name, child in known.items() if fnmatchcase(name, glob)}
        running = {name: child for name, child in matching.items() if type(child).forward is not nn.Module.forward}
        if not matching:
            raise LoadError(f"{owner}: checkpoint={glob!r} matches no module; it has {listed(known) or 'none'}")
        if not running:
            raise LoadError(
                f"{owner}: checkpoint={glob!r} matches {listed(matching)}, which is only a list of others; "
                f"for those say {next(iter(matching)) + '.*'!r}"
            )
        chosen |= running
    for name, child in chosen.items():
        if not any(name.startswith(f"{other}.") for other in chosen):
            _let_recompute(owner, name, child)


def _named(module: nn.Module) -> dict[str, nn.Module]:
    """The modules inside one, by name; those that torch.compile made, by what they are made of."""
    found = {}
    for path, child in module.named_modules():
        name = ".".join(part for part in path.split(".") if part != _COMPILED)
        if name and not hasattr(child, _COMPILED):
            found[name] = child
    return found


def _let_recompute(owner: str, name: str, module: nn.Module) -> None:
    kind = type(module)
    why = ""
    if isinstance(module, torch.jit.ScriptModule):
        why = "it is TorchScript"
    elif "forward" in vars(module):
        why = "its forward is not its class's, but its own"
    else:
        try:
            own = {
                "forward": recomputing(kind.forward, f"{owner}: its module {name!r}", module),
                "__module__": kind.__module__,
                "__doc__": kind.__doc__,
            }
            made = types.new_class(kind.__name__, (kind,), exec_body=lambda namespace: namespace.update(own))
            # Not by nn.Module's own, which the class may have overridden.
            object.__setattr__(module, "__class__", made)
        # Its class may have a say in what subclasses it has.
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
    if why:
        raise LoadError(f"{owner}: its module {name!r} cannot be checkpointed: {why}")
