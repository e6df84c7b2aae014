"""`pullback-server check`: loads models as a server would, one after the other, and tells what was found out."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pullback_server.fleet import LocalFleet
from pullback_server.fleet.seam import LoadFailure
from pullback_server.hosting.items import Item
from pullback_server.hosting.manifest import RepositoryError
from pullback_server.hosting.repository import Repository
from pullback_server.job import Signature

_MARKS = {"passed": "ok", "declared": "declared", "noted": "noted", "skipped": "-"}


@dataclass(frozen=True)
class Report:
    """What came of one version. problem: why it would not be served; then there is no signature."""

    name: str
    version: str
    signature: Signature | None = None
    problem: str = ""


class CheckError(Exception):
    """What was to be checked cannot be found; the message names it."""


async def reports(path: str, device: str, seconds: float) -> AsyncIterator[Report]:
    """Checks what is at a path, in a process apart, one version after the other.

    path: a repository, a model's directory in one, a Python file, an importable module, or "entry-point:NAME".
    device: see fleet.devices.resolve; the first of these is used.
    seconds: that one version may take.

    Raises CheckError, StartError.
    """
    in_repository = "://" in path or await asyncio.to_thread(Path(path).is_dir)
    fleet = LocalFleet([] if in_repository else [path], devices=device, load_timeout=seconds, empty=True)
    with tempfile.TemporaryDirectory(prefix="pullback-check-") as copies:
        try:
            await fleet.prepare()
            if in_repository:
                found = await asyncio.to_thread(_items, path, Path(copies))
            else:
                found = _registered(await fleet.registered())
            for name, version, item in found:
                yield await _report(fleet, name, version, item)
                shutil.rmtree(Path(copies) / name, ignore_errors=True)
        finally:
            await fleet.close(0.0)


async def _report(fleet: LocalFleet, name: str, version: str, item: Item | str) -> Report:
    if isinstance(item, str):
        return Report(name, version, None, item)
    try:
        rehearsed = await fleet.rehearse(item)
    except LoadFailure as failure:
        return Report(name, version, None, str(failure))
    return Report(name, version, rehearsed.signature)


def _registered(names: Sequence[tuple[str, str]]) -> list[tuple[str, str, Item | str]]:
    return [(name, version, Item(name, version, 0, "", "", "", "", (name, version))) for name, version in names]


def _items(path: str, copies: Path) -> list[tuple[str, str, Item | str]]:
    """Every version that the policies pick, or what is wrong with it."""
    only = ""
    if "://" not in path and (Path(path) / "model.toml").is_file():
        path, only = str(Path(path).resolve().parent), Path(path).resolve().name
    try:
        repository = Repository(path)
        repository.check()
        scan = repository.scan()
    except RepositoryError as error:
        raise CheckError(str(error)) from error
    found: list[tuple[str, str, Item | str]] = []
    for name, model in scan.models.items():
        if only and name != only:
            continue
        if model.error is not None:
            found.append((name, "", str(model.error)))
        found += [(name, version, str(problem)) for version, problem in model.problems.items()]
        for version in model.manifest.picked(model.versions) if model.manifest is not None else []:
            found.append((name, version, _staged(repository, name, version, copies)))
    if not found:
        raise CheckError(f"{path}: there is no model")
    return found


def _staged(repository: Repository, name: str, version: str, copies: Path) -> Item | str:
    try:
        staged = repository.stage(name, version, copies / name / version)
    except RepositoryError as error:
        return str(error)
    return Item(name, version, 0, str(staged.directory), staged.manifest.model_dump_json(), staged.digest)


async def check(path: str, device: str, seconds: float, as_json: bool) -> int:
    """Prints what is found. Returns 1 if any of it would not be served, else 0. Raises CheckError, StartError."""
    found = [report async for report in reports(path, device, seconds)]
    if as_json:
        print(json.dumps([_as_json(report) for report in found], indent=2))
    else:
        print(_table(found))
    return int(any(report.problem for report in found))


def _as_json(report: Report) -> dict[str, object]:
    told: dict[str, object] = {"model": report.name, "version": report.version, "served": not report.problem}
    if report.signature is None:
        return told | {"problem": report.problem}
    signature = report.signature
    return told | {
        "source": signature.source,
        "orders": {
            "reverse": "any" if signature.orders.reverse < 0 else signature.orders.reverse,
            "forward": signature.orders.forward,
            "evidence": signature.orders.evidence,
        },
        "checks": {check.name: {"outcome": check.outcome, "detail": check.detail} for check in signature.checks},
        "batching": {"max_rows": signature.batch.max_rows, "evidence": signature.batch.evidence},
        "parameters": signature.parameter_count,
        "memory_bytes": signature.memory,
        "gradient_seconds": signature.gradient_seconds,
        "limits": signature.limits,
        "digest": signature.digest,
    }


def _table(found: Sequence[Report]) -> str:
    """A row for each version, and below it what does not fit into one."""
    head = ["model", "version", "source", "gradient", "second", "rows", "determinism", "purity", "orders", "batch"]
    head += ["parameters", "memory", "per gradient"]
    rows = [head, *(_row(report) for report in found)]
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(head))]
    lines = []
    for row, report in zip(rows, [None, *found], strict=True):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip())
        if report is not None:
            lines += _notes(report)
    good = sum(not report.problem for report in found)
    return "\n".join([*lines, "", f"{good} of {len(found)} would be served"])


def _row(report: Report) -> list[str]:
    if report.signature is None:
        return [report.name, report.version or "-", "REFUSED"]
    signature = report.signature
    checks = {check.name: _MARKS[check.outcome] for check in signature.checks}
    orders = "any" if signature.orders.reverse < 0 else str(signature.orders.reverse)
    return [
        report.name,
        report.version,
        signature.source,
        *(checks.get(name, "-") for name in ("gradient", "second", "rows", "determinism", "purity")),
        orders + (" + jvp" if signature.orders.forward else ""),
        f"<= {signature.batch.max_rows}" if signature.batch.max_rows else "-",
        f"{signature.parameter_count:,}",
        _bytes(signature.memory),
        f"{1000 * signature.gradient_seconds:.3g} ms" if signature.gradient_seconds else "-",
    ]


def _notes(report: Report) -> list[str]:
    if report.signature is None:
        return [f"    {line}" for line in report.problem.splitlines()]
    # One reason may stand for several checks.
    told: dict[str, list[str]] = {}
    for one in report.signature.checks:
        if one.outcome != "passed":
            told.setdefault(f"{one.outcome}: {one.detail}", []).append(one.name)
    return [f"    {', '.join(names)} {text}" for text, names in told.items()] + [
        f"    {limit}" for limit in report.signature.limits
    ]


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.3g} {unit}"
        number /= 1024
    raise AssertionError
