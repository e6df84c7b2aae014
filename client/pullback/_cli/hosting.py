"""models, describe, graph, load, unload, upload, ping."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from typing import Any

from pullback._cli.connecting import LOADING, UPLOADING, connected
from pullback._cli.describing import described, stated
from pullback._cli.tables import columns, cut, print_json, say, sized, width
from pullback._cli.usage import UsageError
from pullback._info import ModelInfo


def models(arguments: argparse.Namespace) -> None:
    """What the server hosts."""
    with connected(arguments) as client:
        found = client.models()
    if arguments.json:
        print_json([_summary(model) for model in found])
        return
    if not found:
        say(f"{client.target} hosts no models")
        return
    rows: list[tuple[str, ...]] = [("MODEL", "VERSION", "STATE", "PARAMETERS", "DERIVATIVES", "DESCRIPTION")]
    rows += [_row(model) for model in found]
    lines = columns(rows).splitlines()
    # A description is the last column; a program that reads a pipe gets all of it.
    say("\n".join(cut(line, width()) for line in lines) if sys.stdout.isatty() else "\n".join(lines))
    for model in found:
        for one in model.version_statuses:
            if one.state != "ready" or one.reason:
                say(f"{model.name} version {one.version} is {stated(one)}")
        if not model.version_statuses and model.state != "ready":
            say(f"{model.name} is {stated(model)}")


def _row(model: ModelInfo) -> tuple[str, ...]:
    description = " ".join(model.description.split())
    if model.state != "ready":
        return (model.name, model.version or "-", model.state, "-", "-", description)
    orders = "any order" if model.max_order is None else f"order {model.max_order}"
    forward = ", jvp" if model.forward_mode else ""
    return (model.name, model.version, model.state, f"{model.parameter_count:,}", orders + forward, description)


def describe(arguments: argparse.Namespace) -> None:
    """A model's signature, and how to call it."""
    with connected(arguments) as client:
        info = client.model(arguments.model, arguments.version).info
    if arguments.json:
        print_json(asdict(info))
    else:
        say(described(info))


def graph(arguments: argparse.Namespace) -> None:
    """A model's autograd graph."""
    if arguments.json and arguments.output:
        raise UsageError("--json prints to stdout; leave --output out, or --json")
    with connected(arguments) as client:
        model = client.model(arguments.model, arguments.version)
        found = model.graph(train=arguments.mode == "train", max_nodes=arguments.max_nodes)
    if arguments.json:
        print_json(asdict(found))
    elif arguments.output:
        found.save(arguments.output)
    else:
        print(found.dot(), end="")
    if found.truncated:
        print(f"pullback: {found!r}: the graph has more nodes; see --max-nodes", file=sys.stderr)


def load(arguments: argparse.Namespace) -> None:
    """Loads a model."""
    with connected(arguments) as client:
        info = client.load_model(arguments.model, arguments.version, timeout=arguments.timeout or LOADING)
    _print_loaded(info, arguments)


def unload(arguments: argparse.Namespace) -> None:
    """Takes a model out of service."""
    with connected(arguments) as client:
        client.unload_model(arguments.model, arguments.version, delete_uploads=arguments.delete_uploads)
    if arguments.json:
        print_json({"name": arguments.model, "version": arguments.version or "", "unloaded": True})
    else:
        version = f" version {arguments.version}" if arguments.version else ""
        say(f"{arguments.model}{version} is unloaded")


def upload(arguments: argparse.Namespace) -> None:
    """Makes a new version."""
    progress = _Progress() if sys.stderr.isatty() else None
    try:
        with connected(arguments) as client:
            info = client.upload_weights(
                arguments.model,
                arguments.file,
                arguments.version,
                arguments.architecture_version,
                timeout=arguments.timeout or UPLOADING,
                progress=progress,
            )
    finally:
        if progress is not None:
            progress.clear()
    _print_loaded(info, arguments)


def ping(arguments: argparse.Namespace) -> None:
    """Whether the server serves."""
    with connected(arguments) as client:
        # The first opens the connection.
        client.ping()
        seconds = client.ping()
    if arguments.json:
        print_json({"target": client.target, "serving": True, "seconds": seconds})
    else:
        print(f"{client.target} is serving: {seconds * 1e3:.2f} ms")


def _print_loaded(info: ModelInfo, arguments: argparse.Namespace) -> None:
    if arguments.json:
        print_json(asdict(info))
        return
    revision = f" revision {info.revision}" if info.revision else ""
    places = f" on {'; '.join(map(str, info.placements))}" if info.placements else ""
    say(f"{info.name} version {info.version}{revision} is {stated(info)}{places}")
    for check in info.checks:
        if check.outcome not in ("passed", "skipped"):
            say(f"  {check}")


class _Progress:
    """A bar on stderr, drawn at most ten times a second."""

    def __init__(self) -> None:
        self._drawn = -1.0

    def __call__(self, sent: int, total: int) -> None:
        now = time.monotonic()
        if now - self._drawn < 0.1 and sent < total:
            return
        self._drawn = now
        share = sent / max(total, 1)
        told = "checking and loading" if sent == total else f"{sized(sent)} of {sized(total)}"
        print(f"\r\x1b[K[{'#' * int(30 * share):<30}] {share:4.0%}  {told}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Takes the bar away."""
        if self._drawn >= 0:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _summary(model: ModelInfo) -> dict[str, Any]:
    """What `models` knows of a model: all but its parameters."""
    fields = asdict(model)
    del fields["parameters"]
    return fields
