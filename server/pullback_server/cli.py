"""`pullback-server`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import subprocess
import sys
from importlib.metadata import version
from typing import Any

from pydantic import ValidationError
from pydantic_settings import CliApp

from pullback_server import checking
from pullback_server.app import App, prepare_process, settle_process
from pullback_server.config import Config
from pullback_server.fleet import StartError
from pullback_server.rpc import new_key

_USAGE = """\
usage: pullback-server serve [FILE_OR_MODULE...] [options]   serve models
       pullback-server check PATH [options]                  load models as a server would, and tell what was found
       pullback-server export SOURCE[:NAME] [options]        make a .pt2 of a model, if its gradients survive that
       pullback-server key NAME [options]                    make a key for administrative calls
       pullback-server --version

Each has --help. Options of serve have environment twins: --metrics-port is PULLBACK_METRICS_PORT.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit status: 0 stopped as asked, 1 could not serve, 2 bad usage."""
    args = sys.argv[1:] if argv is None else argv
    if args[:1] == ["serve"]:
        return _serve(args[1:])
    if args[:1] == ["check"]:
        return _check(args[1:])
    if args[:1] == ["export"]:
        # In a process of its own: this one loads no torch.
        command = [sys.executable, "-W", "ignore::FutureWarning:torch", "-W", "ignore::FutureWarning:copyreg"]
        return subprocess.call([*command, "-m", "pullback_server.engine.exporting", *args[1:]])
    if args[:1] == ["key"]:
        return _key(args[1:])
    if args in (["--version"], ["version"]):
        print(f"pullback-server {version('pullback')}")
        return 0
    if args in (["--help"], ["-h"], ["help"]):
        print(_USAGE, end="")
        return 0
    print(_USAGE, end="", file=sys.stderr)
    return 2


def _serve(args: list[str]) -> int:
    try:
        config = CliApp.run(Config, cli_args=args)
    except ValidationError as error:
        for problem in error.errors():
            print(f"pullback-server: {_explain(dict(problem))}", file=sys.stderr)
        return 2
    if not config.models and config.repository is None:
        print("pullback-server: no models: name at least one FILE_OR_MODULE, or a --repository", file=sys.stderr)
        return 2
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    prepare_process()
    try:
        asyncio.run(_run(config))
    except (StartError, OSError) as error:
        print(f"pullback-server: {error}", file=sys.stderr)
        return 1
    return 0


def _check(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="pullback-server check",
        description="Loads models as a server would, each in its turn in a process apart, and prints what the gate "
        "found out, which orders of derivative are promised, how requests are merged, memory, and the time of one "
        "gradient. Exits with 1 if any of them would not be served.",
    )
    parser.add_argument("path", help="a repository, a model's folder in it, a Python file, a module, entry-point:NAME")
    parser.add_argument("--device", default="cpu", help="cpu, cuda:INDEX, auto [cpu]")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for one version [600]")
    parser.add_argument("--json", action="store_true", help="print JSON")
    chosen = parser.parse_args(args)
    logging.basicConfig(level="ERROR", format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        return asyncio.run(checking.check(chosen.path, chosen.device, chosen.timeout, chosen.json))
    except (StartError, checking.CheckError, OSError) as error:
        print(f"pullback-server: {error}", file=sys.stderr)
        return 1


def _key(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="pullback-server key",
        description="Prints a fresh key on stderr, once, and its entry for the file of --admin-keys, which holds only "
        "the key's hash, on stdout: pullback-server key ci --rights load >> keys.toml",
    )
    parser.add_argument("name", help="whose key it is, for the log")
    parser.add_argument("--rights", default="load,upload", help="of: load, upload [load,upload]")
    parser.add_argument(
        "--models", default="*", help="globs of the models it is good for, with commas between them [*]"
    )
    chosen = parser.parse_args(args)
    try:
        key, entry = new_key(chosen.name, chosen.rights.split(","), chosen.models.split(","))
    except ValueError as error:
        parser.error(str(error))
    print(f"the key, which nobody can tell you again: {key}", file=sys.stderr)
    print(entry, end="")
    return 0


def _explain(problem: dict[str, Any]) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    return f"--{name.replace('_', '-')}: {problem['msg']} (got {problem['input']!r})"


async def _run(config: Config) -> None:
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    app = App(config)
    starting = asyncio.create_task(app.start())
    asking = asyncio.create_task(asked.wait())
    # A signal while models load must not wait for them.
    await asyncio.wait([starting, asking], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.wait([starting])
        return
    asking.cancel() if starting.exception() else None
    await starting
    settle_process()
    await asking
    logging.getLogger(__name__).info("stopping: running calls get %.0f s to end", config.grace)
    await app.stop(config.grace)


if __name__ == "__main__":
    sys.exit(main())
