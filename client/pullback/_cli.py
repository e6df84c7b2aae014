"""`pullback`: asks a server what it hosts and whether it is well, and changes what it hosts."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import pullback
from pullback._info import ModelInfo
from pullback._tables import columns, described, sized, stated

_DEFAULT_TARGET = "localhost:8470"
#: Seconds that calls may take where --timeout is not given.
_QUICK, _LOADING, _UPLOADING = 30.0, 600.0, 3600.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit status: 0 done, 1 failed (a sentence on stderr); exits 2 on bad usage."""
    arguments = _parser().parse_args(argv, argparse.Namespace(**_defaults()))
    try:
        with _connect(arguments) as client:
            run: Callable[[pullback.Client, argparse.Namespace], None] = arguments.run
            run(client, arguments)
        # Here rather than at exit, where a closed pipe could no longer be answered for.
        sys.stdout.flush()
    except BrokenPipeError:
        # `pullback models | head`: whoever read has read enough. Nothing more may be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    # ImportError: pictures need a package of their own.
    except (pullback.PullbackError, OSError, ValueError, ImportError) as error:
        print(f"pullback: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _connect(arguments: argparse.Namespace) -> pullback.Client:
    tls = None
    if arguments.tls or arguments.tls_ca or arguments.tls_cert or arguments.tls_key or arguments.tls_server_name:
        tls = pullback.TLS(
            ca=arguments.tls_ca,
            cert=arguments.tls_cert,
            key=arguments.tls_key,
            server_name=arguments.tls_server_name,
        )
    return pullback.connect(
        arguments.target,
        tls=tls,
        timeout=arguments.timeout or _QUICK,
        name="pullback-cli",
        token=arguments.token,
        allow_plaintext_token=arguments.allow_plaintext_token,
    )


def _models(client: pullback.Client, arguments: argparse.Namespace) -> None:
    models = client.models()
    if arguments.json:
        _print_json([_summary(model) for model in models])
        return
    if not models:
        print(f"{client.target} hosts no models")
        return
    rows: list[tuple[str, ...]] = [("MODEL", "VERSION", "STATE", "PARAMETERS", "DERIVATIVES", "DESCRIPTION")]
    rows += [_row(model) for model in models]
    print(columns(rows))
    for model in models:
        for one in model.version_statuses:
            if one.state != "ready" or one.reason:
                print(f"{model.name} version {one.version} is {stated(one)}")
        if not model.version_statuses and model.state != "ready":
            print(f"{model.name} is {stated(model)}")


def _row(model: ModelInfo) -> tuple[str, ...]:
    if model.state != "ready":
        return (model.name, model.version or "-", model.state, "-", "-", model.description)
    orders = "any order" if model.max_order is None else f"order {model.max_order}"
    forward = ", jvp" if model.forward_mode else ""
    return (
        model.name,
        model.version,
        model.state,
        f"{model.parameter_count:,}",
        orders + forward,
        model.description,
    )


def _describe(client: pullback.Client, arguments: argparse.Namespace) -> None:
    info = client.model(arguments.model, arguments.version).info
    if arguments.json:
        _print_json(asdict(info))
    else:
        print(described(info))


def _graph(client: pullback.Client, arguments: argparse.Namespace) -> None:
    if arguments.json and arguments.output:
        raise ValueError("--json prints to stdout; leave --output out, or --json")
    model = client.model(arguments.model, arguments.version)
    graph = model.graph(train=arguments.mode == "train", max_nodes=arguments.max_nodes)
    if arguments.json:
        _print_json(asdict(graph))
    elif arguments.output:
        graph.save(arguments.output)
    else:
        print(graph.dot(), end="")
    if graph.truncated:
        print(f"pullback: {graph!r}: the graph has more nodes; see --max-nodes", file=sys.stderr)


def _load(client: pullback.Client, arguments: argparse.Namespace) -> None:
    info = client.load_model(arguments.model, arguments.version, timeout=arguments.timeout or _LOADING)
    _print_loaded(info, arguments)


def _unload(client: pullback.Client, arguments: argparse.Namespace) -> None:
    client.unload_model(arguments.model, arguments.version, delete_uploads=arguments.delete_uploads)
    if arguments.json:
        _print_json({"name": arguments.model, "version": arguments.version or "", "unloaded": True})
    else:
        version = f" version {arguments.version}" if arguments.version else ""
        print(f"{arguments.model}{version} is unloaded")


def _upload(client: pullback.Client, arguments: argparse.Namespace) -> None:
    progress = _Progress() if sys.stderr.isatty() else None
    try:
        info = client.upload_weights(
            arguments.model,
            arguments.file,
            arguments.version,
            arguments.architecture_version,
            timeout=arguments.timeout or _UPLOADING,
            progress=progress,
        )
    finally:
        if progress is not None:
            progress.clear()
    _print_loaded(info, arguments)


def _print_loaded(info: ModelInfo, arguments: argparse.Namespace) -> None:
    if arguments.json:
        _print_json(asdict(info))
        return
    revision = f" revision {info.revision}" if info.revision else ""
    places = f" on {'; '.join(map(str, info.placements))}" if info.placements else ""
    print(f"{info.name} version {info.version}{revision} is {stated(info)}{places}")
    for check in info.checks:
        if check.outcome not in ("passed", "skipped"):
            print(f"  {check}")


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


def _ping(client: pullback.Client, arguments: argparse.Namespace) -> None:
    # The first opens the connection.
    client.ping()
    seconds = client.ping()
    if arguments.json:
        _print_json({"target": client.target, "serving": True, "seconds": seconds})
    else:
        print(f"{client.target} is serving: {seconds * 1e3:.2f} ms")


def _summary(model: ModelInfo) -> dict[str, Any]:
    """What `models` knows of a model: all but its parameters."""
    fields = asdict(model)
    del fields["parameters"]
    return fields


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise ValueError
    return seconds


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *unused: Any) -> None:
        print(f"pullback {pullback.__version__}")
        parser.exit()


def _defaults() -> dict[str, Any]:
    return {
        "target": os.environ.get("PULLBACK_TARGET") or _DEFAULT_TARGET,
        "timeout": None,
        "token": None,
        "allow_plaintext_token": False,
        "json": False,
        "tls": False,
        "tls_ca": None,
        "tls_cert": None,
        "tls_key": None,
        "tls_server_name": None,
    }


def _parser() -> argparse.ArgumentParser:
    target = _defaults()["target"]
    # Suppressed, so that an option counts before the command as well as after it.
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--target", help=f"address of the server [env PULLBACK_TARGET; now {target}]")
    common.add_argument(
        "--timeout", type=_seconds, metavar="SECONDS", help="longest a call may take [30; load 600, upload 3600]"
    )
    common.add_argument(
        "--token",
        help="what the server knows you by; others on this machine can read command lines, so rather set the "
        "environment variable [env PULLBACK_TOKEN]",
    )
    common.add_argument(
        "--allow-plaintext-token", action="store_true", help="send it to another machine although nothing is encrypted"
    )
    common.add_argument("--json", action="store_true", help="print JSON")
    tls = common.add_argument_group("encryption")
    tls.add_argument("--tls", action="store_true", help="encrypt; implied by the options below")
    tls.add_argument("--tls-ca", metavar="FILE", help="PEM certificates that vouch for the server [public ones]")
    tls.add_argument("--tls-cert", metavar="FILE", help="this client's certificate, PEM")
    tls.add_argument("--tls-key", metavar="FILE", help="this client's private key, PEM")
    tls.add_argument("--tls-server-name", metavar="NAME", help="name that the server's certificate must carry")

    parser = argparse.ArgumentParser(
        prog="pullback",
        description="Asks a Pullback server what it hosts and whether it is well, and changes what it hosts.",
        parents=[common],
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    models = commands.add_parser("models", parents=[common], help="list the hosted models")
    models.set_defaults(run=_models)
    describe = commands.add_parser("describe", parents=[common], help="show a model's signature")
    describe.add_argument("model", metavar="MODEL")
    describe.add_argument("--version", "--model-version", default=None, metavar="VERSION", help="[the latest]")
    describe.set_defaults(run=_describe)
    graph = commands.add_parser("graph", parents=[common], help="draw a model's autograd graph")
    graph.add_argument("model", metavar="MODEL")
    graph.add_argument("--version", "--model-version", default=None, metavar="VERSION", help="[the latest]")
    graph.add_argument(
        "--output", "-o", default=None, metavar="FILE", help="what to write: .svg, .png, .pdf or .dot [DOT on stdout]"
    )
    graph.add_argument("--mode", choices=("eval", "train"), default="eval", help="how the model runs [eval]")
    graph.add_argument("--max-nodes", type=int, default=None, metavar="NODES", help="nodes at most [2000]")
    graph.set_defaults(run=_graph)
    load = commands.add_parser("load", parents=[common], help="load a model from the server's repository, or anew")
    load.add_argument("model", metavar="MODEL")
    load.add_argument("--version", default=None, metavar="VERSION", help="[what the model's version policy picks]")
    load.set_defaults(run=_load)
    unload = commands.add_parser("unload", parents=[common], help="take a model out of service")
    unload.add_argument("model", metavar="MODEL")
    unload.add_argument("--version", default=None, metavar="VERSION", help="[all]")
    unload.add_argument("--delete-uploads", action="store_true", help="also delete what was uploaded")
    unload.set_defaults(run=_unload)
    upload = commands.add_parser("upload", parents=[common], help="make a new version of a model with other weights")
    upload.add_argument("model", metavar="MODEL")
    upload.add_argument("file", metavar="FILE", help="the weights, a safetensors file")
    upload.add_argument("--version", required=True, metavar="VERSION", help="number of the version to create")
    upload.add_argument(
        "--architecture-version", default=None, metavar="VERSION", help="version whose code it gets [the latest]"
    )
    upload.set_defaults(run=_upload)
    ping = commands.add_parser("ping", parents=[common], help="ask whether the server serves, and how fast")
    ping.set_defaults(run=_ping)
    return parser


if __name__ == "__main__":
    sys.exit(main())
