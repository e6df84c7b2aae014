"""Making the checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any

import numpy as np

from pullback.conformance._check import CHECKS, Absent, Check, Finding, Mismatch, Outcome, Skip, Verdict
from pullback.conformance._subject import House, Subject, discover
from pullback.conformance._wire import Metadata, Refused, Wire

#: The rooms of checks, in the order in which they are made.
_ROOMS = (
    "_contract",
    "_bytes",
    "_first",
    "_second",
    "_dense",
    "_composed",
    "_faults",
    "_fault_values",
    "_fault_names",
    "_session_life",
    "_sessions",
    "_fault_sessions",
    "_service",
)


class NotServing(Exception):
    """There is no server to check at the target, or none that lists its models, or hosts those that were asked for."""


def checks(only: Sequence[str] = (), skip: Sequence[str] = ()) -> list[Check]:
    """All checks whose id matches a glob of `only` (empty: all of them) and none of `skip`, in order."""
    for room in _ROOMS:
        import_module(f"pullback.conformance.{room}")
    return [
        check
        for check in CHECKS.values()
        if (not only or any(fnmatchcase(check.id, glob) for glob in only))
        and not any(fnmatchcase(check.id, glob) for glob in skip)
    ]


def run(
    target: str,
    *,
    models: Sequence[str] = (),
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    inputs: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    metadata: Metadata = (),
    credentials: Any = None,
    authority: str = "",
    timeout: float = 60.0,
    patience: float = 5.0,
) -> Iterator[Finding]:
    """Makes the checks, one after another, and gives what each found.

    models: globs of names; empty: all that are listed. only, skip: globs of ids of checks.
    inputs: by model and name, for models whose signature does not tell enough.
    metadata: sent with each call. credentials: of grpc, for TLS; authority: the name on the server's certificate.
    timeout: seconds for each call. patience: seconds that a check may wait for what takes its time.

    Raises NotServing where nothing answers, or a glob of `models` matches none.
    """
    wire = Wire(target, credentials, metadata, timeout, authority)
    try:
        try:
            listed, found = discover(wire, models, inputs or {})
            for glob in models:
                if not any(fnmatchcase(one.name, glob) for one in listed):
                    names = ", ".join(one.name for one in listed) or "none"
                    raise NotServing(f"{target} hosts no model {glob!r}; it has {names}")
            subjects = list(found)
        except (Refused, Mismatch) as error:
            raise NotServing(f"{target}: {error}") from None
        token = any(key == "authorization" for key, _ in metadata)
        house = House(wire, subjects, listed, patience, token)
        for check in checks(only, skip):
            yield Finding(check, list(_outcomes(check, house)))
    finally:
        wire.close()


def _outcomes(check: Check, house: House) -> Iterator[Outcome]:
    if not check.for_each_model:
        yield _outcome(check, house.wire, house, "")
        return
    if not house.subjects:
        yield Outcome(Verdict.SKIPPED, why="no model was chosen")
    for subject in house.subjects:
        yield _outcome(check, house.wire, subject, subject.name)


def _outcome(check: Check, wire: Wire, what: House | Subject, model: str) -> Outcome:
    import grpc

    wire.say("")
    try:
        check.run(what)
    except Skip as skip:
        return Outcome(Verdict.SKIPPED, model, str(skip))
    except Absent as absent:
        return Outcome(Verdict.ABSENT, model, str(absent))
    except Mismatch as wrong:
        return Outcome(
            Verdict.FAIL, model, expected=wrong.expected, received=wrong.received, asked=wrong.asked or wire.asked
        )
    except Refused as refused:
        return Outcome(Verdict.FAIL, model, expected="an answer", received=refused.words, asked=refused.asked)
    except Exception as error:
        # What only a server can cause that does not keep the contract: a name that it should have sent is missing, a
        # number is none that the contract knows, ... One such answer is no reason not to look at the others.
        said = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.RpcError) else f"{error!r}"
        return Outcome(
            Verdict.FAIL, model, expected="an answer that keeps the contract", received=said, asked=wire.asked
        )
    return Outcome(Verdict.PASS, model)
