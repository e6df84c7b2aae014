"""`Function`: a hosted function of what varies, everything else being fixed; and the two roads to it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pullback import errors
from pullback._arrays import Array
from pullback._fork import gate
from pullback._loss import Loss

if TYPE_CHECKING:
    from pullback._held import Held
    from pullback._model import RemoteModel

#: Kinds of arrays that a function has.
INPUT, PARAMETER, TARGET = "input", "param", "target"
#: Arrays by kind and name.
Named = Sequence[tuple[tuple[str, str], Array]]

#: What is fixed stays on the server from so many bytes on, instead of being sent with each call.
_RESIDENT_BYTES = 1 << 20
#: How often a session may fail at what a stateless call can do, until none is tried any more.
_PATIENCE = 3

T = TypeVar("T")


class Function:
    """A hosted function. version: and revision, as they must be. fixed: by kind, without the loss's own tensors.

    Pickles; safe in many threads and in forked children. calls: how many were made, by kind.
    """

    def __init__(
        self,
        model: RemoteModel,
        version: tuple[str, int],
        loss: Loss | None,
        fixed: Mapping[str, Mapping[str, Array]],
        train: bool,
        seed: int | None,
        timeout: float | None,
    ) -> None:
        self.model = model
        self.version = version
        self.loss = loss
        self.fixed = fixed
        self.train = train
        self.seed = seed
        self.timeout = timeout
        self._begin()

    def _begin(self) -> None:
        self.calls: Counter[str] = Counter()
        #: Whether so much is fixed that sessions are the better road for all calls.
        self.is_resident = sum(array.nbytes for _, array in self.every_fixed()) >= _RESIDENT_BYTES
        self._held: Held | None = None
        self._patience = _PATIENCE
        # By generation, so that no fork can leave one locked.
        self._locks: dict[int, threading.Lock] = {}

    def __getstate__(self) -> dict[str, Any]:
        names = ("model", "version", "loss", "fixed", "train", "seed", "timeout")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def every_fixed(self) -> Named:
        """What is fixed, the loss's own tensors too."""
        found = [((kind, name), array) for kind, arrays in self.fixed.items() for name, array in arrays.items()]
        own = self.loss.tensors if self.loss is not None else {}
        return [*found, *(((TARGET, name), array) for name, array in own.items())]

    def check(self, version: str, revision: int) -> None:
        """Raises Aborted where another version answers than the one that began: it is another function."""
        if version and (version, revision) != self.version:
            begun, now = (
                f"version {v}" + (f" (revision {r})" if r else "") for v, r in (self.version, (version, revision))
            )
            raise errors.Aborted(
                f"model {self.model.name!r}: the objective was made for {begun}, and {now} answers: values of the two "
                "are not one function's; make a new objective, or name a version in client.model(name, version)"
            )

    def count(self, what: str) -> None:
        """A call is made."""
        with self._lock():
            self.calls[what] += 1

    def stateless(self, method: str, varying: Named, *arguments: Any, **options: Any) -> Any:
        """What a method of the model returns: `arguments` come after the inputs. Raises PullbackError."""
        self.count("vjp" if method == "value_and_grad" else method)
        given = {kind: dict(self.fixed[kind]) for kind in (INPUT, PARAMETER)}
        for (kind, name), array in varying:
            given[kind][name] = array
        result = getattr(self.model, method)(
            given[INPUT],
            *arguments,
            loss=self.loss,
            targets=self.fixed[TARGET],
            parameters=given[PARAMETER],
            train=self.train,
            seed=self.seed,
            timeout=self.timeout,
            **options,
        )
        if hasattr(result, "model_version"):
            self.check(result.model_version, result.model_revision)
        else:
            # Bare outputs do not say. The signature is known, unless an answer came from another version than it.
            info = self.model._caller.signature(self.timeout)
            self.check(info.version, info.revision)
        return result

    def in_session(self, what: Callable[[Held], T]) -> T | None:
        """What `what` returns; None: no session can do it now, and a stateless call may. Raises PullbackError."""
        for _ in range(2):
            if not self._patience:
                return None
            held = self._hold()
            try:
                return what(held)
            except (errors.Unimplemented, errors.PermissionDenied):
                # To have sessions: a stateless call tells whether it is the model.
                self._patience = 0
            except errors.SessionLost:
                held.lose()
            except errors.ResourceExhausted:
                # Perhaps because of the graphs that are kept.
                held.forget_graphs()
        self._patience = max(self._patience - 1, 0)
        return None

    def _hold(self) -> Held:
        from pullback._held import Held

        with self._lock():
            if self._held is None:
                self._held = Held(self)
            return self._held

    def _lock(self) -> threading.Lock:
        return self._locks.setdefault(gate.generation, threading.Lock())
