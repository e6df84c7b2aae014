"""Plain text for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pullback._info import ModelInfo


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
    state = f"{info.state}: {info.state_reason}" if info.state_reason else info.state
    facts = [
        ("version", f"{info.version} (of {', '.join(info.versions)})" if len(info.versions) > 1 else info.version),
        ("state", state),
        ("gradients", f"{orders}; jvp {jvp}"),
        ("evidence", info.order_evidence or "none given"),
        ("batch axis", axis),
        ("merging", _merging(info)),
        ("devices", ", ".join(info.devices) or "none"),
    ]
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
    return "\n".join(parts)


def _merging(info: ModelInfo) -> str:
    rows = f"up to {info.max_batch_rows} rows at once" if info.max_batch_rows > 1 else "calls are computed one by one"
    return f"{rows}; {info.batch_evidence}" if info.batch_evidence else rows


def _section(title: str, items: Iterable[object]) -> list[str]:
    return [f"  {title}", *(f"    {item}" for item in items)] if items else []
