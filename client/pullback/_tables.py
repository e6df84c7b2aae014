"""Plain text for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pullback._info import ModelInfo, VersionInfo


def columns(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Rows of equal length as left-aligned columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(indent + line.rstrip() for line in lines)


def described(info: ModelInfo) -> str:
    """A model's whole signature."""
    orders = "any order" if info.max_order is None else f"up to order {info.max_order}"
    jvp = "available" if info.forward_mode else "not available"
    axis = "not declared" if info.batch_axis is None else str(info.batch_axis)
    facts = _identity(info)
    if info.state != "ready":
        parts = [info.name, columns(facts, "  ")]
        return "\n".join(parts + _section("versions", _versions(info)))
    facts += [
        ("gradients", f"{orders}; jvp {jvp}"),
        ("evidence", info.order_evidence or "none given"),
        ("batch axis", axis),
        ("merging", _merging(info)),
        ("placements", "; ".join(map(str, info.placements)) or ", ".join(info.devices) or "none"),
    ]
    if info.memory_bytes:
        facts.append(("memory", sized(info.memory_bytes)))
    if info.gradient_seconds is not None:
        facts.append(("time of a vjp", f"{info.gradient_seconds * 1e3:.3g} ms"))
    if info.plan:
        facts.append(("compiled plan", info.plan))
    if info.hard_timeout is not None:
        facts.append(("hard limit", f"{info.hard_timeout:g} s"))
    parts = [info.name + (f": {info.description}" if info.description else ""), columns(facts, "  ")]
    parts += _section("inputs", info.inputs)
    parts += _section("outputs", info.outputs or ["not known before a call"])
    if info.parameters:
        parts += _section(f"parameters ({info.parameter_count:,} elements)", info.parameters)
    parts += _section("losses", info.losses)
    parts += _section("checks at load", info.checks)
    parts += _section("limits", info.limits)
    if len(info.version_statuses) > 1:
        parts += _section("versions", _versions(info))
    return "\n".join(parts)


def _identity(info: ModelInfo) -> list[tuple[str, str]]:
    """Which model it is, and how it is."""
    version = f"{info.version} (of {', '.join(info.versions)})" if len(info.versions) > 1 else info.version or "none"
    facts = [("version", version), ("state", stated(info))]
    if info.revision:
        facts.append(("revision", str(info.revision)))
    if info.source:
        facts.append(("source", info.source))
    if info.digest:
        facts.append(("digest", f"sha256 {info.digest}"))
    return facts


def stated(one: ModelInfo | VersionInfo) -> str:
    """A state and its reason, on one line."""
    reason = " ".join((one.state_reason if isinstance(one, ModelInfo) else one.reason).split())
    return f"{one.state}: {reason}" if reason else one.state


def _versions(info: ModelInfo) -> list[str]:
    return [f"{one.version}: {stated(one)}" for one in info.version_statuses]


def sized(count: int) -> str:
    """A number of bytes: "512 bytes", "3.0 MiB"."""
    size, units = float(count), ["KiB", "MiB", "GiB", "TiB"]
    if count < 1024:
        return f"{count} bytes"
    while size >= 1024 and units:
        size, unit = size / 1024, units.pop(0)
    return f"{size:.1f} {unit}"


def _merging(info: ModelInfo) -> str:
    rows = f"up to {info.max_batch_rows} rows at once" if info.max_batch_rows > 1 else "calls are computed one by one"
    return f"{rows}; {info.batch_evidence}" if info.batch_evidence else rows


def _section(title: str, items: Iterable[object]) -> list[str]:
    return [f"  {title}", *(f"    {item}" for item in items)] if items else []
