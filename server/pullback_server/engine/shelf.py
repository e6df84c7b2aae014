"""What a worker loads after its start, and forgets again: the front says what, and what others found out about it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import torch

from pullback_server.engine import operators
from pullback_server.engine.boot import gated, moving_limit, told
from pullback_server.engine.bystanders import Bystanders
from pullback_server.engine.core import Engine
from pullback_server.engine.records import cleaned, trace_of
from pullback_server.engine.surroundings import Surroundings, kept
from pullback_server.faults import listed
from pullback_server.hosting import Item, Registration
from pullback_server.hosting.loading import LoadError
from pullback_server.ipc.messages import Installed, NotInstalled
from pullback_server.job import Signature, Verdict

_log = logging.getLogger(__name__)


class Shelf:
    """The items of one worker.

    known: what its sources register, for uploads that have the architecture of one of these.
    allowance, gate: see `messages.Setup.memory_bytes` and `gate`.
    """

    def __init__(
        self, engine: Engine, known: Mapping[tuple[str, str], Registration], allowance: int | None, gate: bool
    ) -> None:
        self._engine = engine
        self._known = known
        self._allowance = allowance
        self._gate = gate
        self._items: dict[tuple[str, str], Item] = {}
        self._bystanders = Bystanders(engine)

    def load(self, number: int, item: Item, verdict: Verdict | None) -> Installed | NotInstalled:
        """Loads an item, or says why not; then nothing is left of it."""
        with moving_limit(self._engine.device, self._allowance):
            return self._loaded(number, item, verdict)

    def _loaded(self, number: int, item: Item, verdict: Verdict | None) -> Installed | NotInstalled:
        found = self._try(number, item, verdict)
        if isinstance(found, Installed):
            self._items[item.name, item.id] = item
        else:
            # Not before the exception has gone, which holds on to what was built.
            self._engine.unload(item.name, item.id)
            _sources().forget(item)
        self._bystanders.drop(item.name, item.id)
        # Every process starts torch at one and the same seed; but two workers' dropout must differ.
        torch.seed()
        return found

    def _try(self, number: int, item: Item, verdict: Verdict | None) -> Installed | NotInstalled:
        try:
            self._bystanders.watch()
            before = Surroundings()
            registration = _sources().registration_of(item, self._known, self._engine.device)
            with kept(item.owner):
                signature = self._engine.load(gated(registration, self._gate), verdict)
            operators.check(_sources().name_of(item))
            changed = self._bystanders.changed()
            if changed:
                before.restore()
                replaced = before.unpatch(all=True)
                raise LoadError(
                    f"{item.owner}: since it was loaded, {changed} computes something else"
                    f"{f', for {listed(replaced)} is another' if replaced else ''}; host it on a server of its own"
                )
            return Installed(number, signature, self._engine.verdict(item.name, item.id))
        # A model's code may raise anything, and may even exit; what served before goes on serving.
        except (Exception, SystemExit) as error:
            text = str(error) if isinstance(error, LoadError) else f"{item.owner} does not load: {told(error)}"
            return NotInstalled(number, cleaned(text), trace_of(error))

    def unload(self, model: str, id: str) -> None:
        """Forgets a model; nothing happens where it is not there."""
        item = self._items.pop((model, id), None)
        if item is not None:
            with moving_limit(self._engine.device, self._allowance):
                self._engine.unload(model, id)
                _sources().forget(item)

    def load_all(
        self, items: Sequence[tuple[Item, Verdict | None]], begins: Callable[[Item], None]
    ) -> tuple[list[Signature], list[tuple[str, str, str]]]:
        """Loads several: their signatures, and what was not loaded and why, by model and id.

        begins: called before each.
        """
        signatures, failed = [], []
        for item, verdict in items:
            begins(item)
            found = self.load(0, item, verdict)
            if isinstance(found, Installed):
                signatures.append(found.signature)
            else:
                _log.error("%s\n%s", found.message, found.traceback)
                failed.append((item.name, item.id, found.message))
        return signatures, failed


def _sources() -> ModuleType:
    # A worker that is given no items needs no manifests, and none of what reads them.
    from pullback_server.engine import sources

    return sources
