"""A model's whole signature, for people."""

from __future__ import annotations

from collections.abc import Iterable

from pullback._cli.example import example
from pullback._cli.tables import columns, duration, sized
from pullback._info import ModelInfo, VersionInfo

#: Parameters that are listed; of a large model there are hundreds.
_LISTED = 40


def described(info: ModelInfo) -> str:
    """All that is known of a model."""
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
        facts.append(("time of a vjp", duration(info.gradient_seconds)))
    if info.plan:
        facts.append(("compiled plan", info.plan))
    if info.hard_timeout is not None:
        facts.append(("hard limit", f"{info.hard_timeout:g} s"))
    first, *more = [line.strip() for line in info.description.strip().splitlines()] or [""]
    parts = [info.name + (f": {first}" if first else ""), *(f"  {line}".rstrip() for line in more)]
    parts.append(columns(facts, "  "))
    parts += _section("inputs", info.inputs)
    parts += _section("outputs", info.outputs or ["not known before a call"])
    parts += _section("for example", [example(info)])
    if info.parameters:
        listed: list[object] = [*info.parameters[:_LISTED]]
        if len(info.parameters) > _LISTED:
            listed.append(f"... and {len(info.parameters) - _LISTED:,} more, which --json has")
        parts += _section(f"parameters ({info.parameter_count:,} elements)", listed)
    parts += _section("checks at load", info.checks)
    parts += _section("limits", info.limits)
    if len(info.version_statuses) > 1:
        parts += _section("versions", _versions(info))
    parts += _section("losses", info.losses)
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


def _merging(info: ModelInfo) -> str:
    rows = f"up to {info.max_batch_rows} rows at once" if info.max_batch_rows > 1 else "calls are computed one by one"
    return f"{rows}; {info.batch_evidence}" if info.batch_evidence else rows


def _section(title: str, items: Iterable[object]) -> list[str]:
    return [f"  {title}", *(f"    {item}" for item in items)] if items else []
