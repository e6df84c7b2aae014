"""A function in a session of its own: what is fixed lies there, and graphs of gradients are kept for more products."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from pullback._anomaly import is_anomaly_enabled
from pullback._arrays import Array
from pullback._fork import gate
from pullback._frames import HandleInfo, Keep, Operand
from pullback._function import INPUT, PARAMETER, TARGET, Function, Named
from pullback._lineage import Ref
from pullback._residuals import number_among
from pullback._session import BLOCK, Pending, Session
from pullback_wire.v1 import function_pb2

#: Graphs that one thread keeps: of the point where it is, and of one that a solver tries and may step back from.
_GRAPHS = 2


@dataclass
class _Home:
    """A session, and the handles of what is fixed there."""

    session: Session
    refs: dict[tuple[str, str], Ref] = field(default_factory=dict)


@dataclass
class _Graph:
    """The graph of a gradient. gradients: None for those without a graph; outputs: held so that the graph stays."""

    session: Session
    leaves: list[Ref]
    outputs: list[Ref]
    gradients: list[Ref | None]


class Held:
    """The function on the server. Safe to use in many threads; a forked child opens a session of its own.

    Each method raises PullbackError: SessionLost, after which the next call opens another session.
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        self._fixed = function.every_fixed()
        #: By generation, so that no fork can leave a lock locked, or a parent's session in use.
        self._homes: dict[int, _Home] = {}
        self._locks: dict[int, threading.Lock] = {}
        #: Each thread's graphs, by the point that they are of, and the session that it used last.
        self._mine = threading.local()

    def evaluate(self, varying: Named) -> dict[str, Array]:
        """The outputs by name."""
        home = self._home()
        infos, _ = self._run(home, varying, None)
        return {info.name: _value(home.session, info) for info in infos}

    def value_and_gradient(self, key: bytes, varying: Named, second: bool) -> tuple[Array, list[Array]]:
        """The value of a real scalar function and its gradient by all that varies.

        key: names the point for `product`.
        second: whether the graph of the gradient is kept, for products.
        """
        home = self._home()
        session = home.session
        leaves = [Ref(session, session.new_handle()) for _ in varying]
        infos, outputs = self._run(home, varying, leaves)
        found = {info.name: _value(session, info) for info in infos}
        name = number_among(self._function.model.name, found)
        place = list(found).index(name)
        self._function.count("grad")
        pending = session.grad(
            [outputs[place].handle],
            [leaf.handle for leaf in leaves],
            create_graph=second,
            detect_anomaly=is_anomaly_enabled(),
            fetch=True,
        )
        made = pending.result()
        gradients = [Ref(session, info.handle) for info in made]
        if second:
            graphs = self._graphs()
            graphs[key] = _Graph(
                session,
                leaves,
                outputs,
                [ref if info.requires_grad else None for ref, info in zip(gradients, made, strict=True)],
            )
            while len(graphs) > _GRAPHS:
                graphs.popitem(last=False)
        return found[name], [_value(session, info) for info in made]

    def has_graph(self, key: bytes) -> bool:
        """Whether this thread has kept the gradient's graph of a point, and its session lives."""
        graph = self._graphs().get(key)
        home = self._homes.get(gate.generation)
        return graph is not None and home is not None and graph.session is home.session and home.session.usable

    def product(self, key: bytes, tangents: Sequence[Array]) -> list[Array | None]:
        """The derivative of <gradient, tangents> by all that varies, from a kept graph; None: it is constant in it."""
        graphs = self._graphs()
        graph = graphs[key]
        self._mine.session = graph.session
        graphs.move_to_end(key)
        given = [(ref.handle, t) for ref, t in zip(graph.gradients, tangents, strict=True) if ref is not None]
        if not given:
            return [None] * len(tangents)
        self._function.count("grad")
        pending = graph.session.grad(
            [handle for handle, _ in given],
            [leaf.handle for leaf in graph.leaves],
            [t for _, t in given],
            retain_graph=True,
            allow_unused=True,
            detect_anomaly=is_anomaly_enabled(),
            fetch=True,
        )
        infos = pending.result()
        made = [Ref(graph.session, info.handle) for info in infos if not info.unused]
        found = [None if info.unused else _value(graph.session, info) for info in infos]
        del made
        return found

    def forget_graphs(self) -> None:
        """Frees this thread's graphs."""
        self._graphs().clear()

    def lose(self) -> None:
        """Ends the session that this thread used last; the next call opens another one."""
        self.forget_graphs()
        lost: Session | None = getattr(self._mine, "session", None)
        with self._locks.setdefault(gate.generation, threading.Lock()):
            home = self._homes.get(gate.generation)
            # Another thread may have opened the next one by now.
            if home is not None and home.session is lost:
                del self._homes[gate.generation]
        if lost is not None:
            lost.close()

    def _home(self) -> _Home:
        with self._locks.setdefault(gate.generation, threading.Lock()):
            home = self._homes.get(gate.generation)
            if home is None or not home.session.usable or home.session.going_away:
                model, caller = self._function.model, self._function.model._caller
                session = Session(caller.transport, [(model.name, model.version)], timeout=self._function.timeout)
                # A session keeps the version that it was opened with, which its answers do not tell. The version was
                # known before it was opened; if it is the same after, it is the session's.
                try:
                    caller.forget()
                    info = caller.signature(self._function.timeout)
                    self._function.check(info.version, info.revision)
                except BaseException:
                    session.close()
                    raise
                home = self._homes[gate.generation] = _Home(session)
            self._mine.session = home.session
            return home

    def _graphs(self) -> OrderedDict[bytes, _Graph]:
        found: OrderedDict[bytes, _Graph] | None = getattr(self._mine, "graphs", None)
        if found is None:
            found = self._mine.graphs = OrderedDict()
        return found

    def _run(self, home: _Home, varying: Named, leaves: list[Ref] | None) -> tuple[list[HandleInfo], list[Ref]]:
        """The forward: its outputs, and what holds them. leaves: of what varies, None: no graph is recorded."""
        session = home.session
        arguments: dict[str, dict[str, Operand]] = {INPUT: {}, PARAMETER: {}, TARGET: {}}
        kept: dict[tuple[str, str], Ref] = {}
        for one, array in self._fixed:
            ref = home.refs.get(one)
            if ref is None:
                ref = kept[one] = Ref(session, session.new_handle())
                arguments[one[0]][one[1]] = Keep(array, ref.handle, False)
            else:
                arguments[one[0]][one[1]] = ref.handle
        for position, (one, array) in enumerate(varying):
            arguments[one[0]][one[1]] = array if leaves is None else Keep(array, leaves[position].handle, True)
        function = function_pb2.Function(
            model=self._function.model.name,
            version=self._function.model.version,
            detect_anomaly=is_anomaly_enabled(),
        )
        if self._function.loss is not None:
            function.loss.CopyFrom(self._function.loss.message())
        self._function.count("call")
        pending: Pending = session.call(
            function,
            arguments[INPUT],
            targets=arguments[TARGET],
            parameters=arguments[PARAMETER],
            handles=[session.new_handle(BLOCK)],
            train=self._function.train,
            seed=self._function.seed,
            no_grad=leaves is None,
            fetch=True,
        )
        infos = pending.result()
        # Not before the server is known to have them: another thread's op might get ahead of this one.
        home.refs.update(kept)
        return infos, [Ref(session, info.handle) for info in infos]


def _value(session: Session, info: HandleInfo) -> Array:
    # Values that are too large to come together come one by one.
    return info.value if info.value is not None else session.get([info.handle])[0]
