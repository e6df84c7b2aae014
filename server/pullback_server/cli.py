"""`pullback-server`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from typing import Any

from pydantic import ValidationError
from pydantic_settings import CliApp, SettingsError

from pullback_server import checking, logs
from pullback_server.app import App, prepare_process, settle_process
from pullback_server.config import Config, ConfigFileError
from pullback_server.config_report import MASK, masked, report, strangers
from pullback_server.faults import nearest
from pullback_server.fleet import StartError
from pullback_server.rpc import new_key

logger = logging.getLogger(__name__)

#: Seconds that a second signal leaves for tidying up.
_AT_ONCE = 3.0

_USAGE = """\
usage: pullback-server serve [FILE_OR_MODULE...] [options]   serve models
       pullback-server check PATH [options]                  load models as a server would, and tell what was found
       pullback-server export SOURCE[:NAME] [options]        make a .pt2 of a model, if its gradients survive that
       pullback-server key NAME [options]                    make a token, and its entry for --principals
       pullback-server config [options of serve]             print what serve would run with, and where it is from
       pullback-server --version

Each has --help. Options of serve have environment twins (--metrics-port is PULLBACK_METRICS_PORT) and may stand in the
TOML file of --config (metrics_port = 9470). Flags come before the environment, and that before the file.
"""

_USAGE_CONFIG = """\
usage: pullback-server config [--json] [FILE_OR_MODULE...] [options of serve]

Prints the options that `pullback-server serve` would run with, given the same flags, environment and file, as TOML with
the source of each value: a file that --config takes. Secrets are masked.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Returns the exit status: 0 stopped as asked, 1 could not serve, 2 bad usage, 128 and the signal's number for a
    second signal, which does not wait.
    """
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
    if args[:1] == ["config"]:
        return _config(args[1:])
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
    except (ValidationError, ConfigFileError, SettingsError) as error:
        return _refused(error)
    for sentence in strangers(os.environ):
        print(f"pullback-server: {sentence}", file=sys.stderr)
    if not config.models and config.repository is None:
        print("pullback-server: no models: name at least one FILE_OR_MODULE, or a --repository", file=sys.stderr)
        return 2
    logs.configure(config.log_level, config.log_format)
    prepare_process()
    try:
        return asyncio.run(_run(config))
    except (StartError, OSError) as error:
        print(f"pullback-server: {error}", file=sys.stderr)
        return 1


def _config(args: list[str]) -> int:
    as_json = "--json" in args
    if "--help" in args or "-h" in args:
        print(_USAGE_CONFIG, end="")
        return 0
    try:
        print(report([arg for arg in args if arg != "--json"], as_json=as_json), end="")
    except (ValidationError, ConfigFileError, SettingsError) as error:
        return _refused(error)
    for sentence in strangers(os.environ):
        print(f"pullback-server: {sentence}", file=sys.stderr)
    return 0


def _refused(error: ValidationError | ConfigFileError | SettingsError) -> int:
    if isinstance(error, ValidationError):
        problems = [_explain(dict(one)) for one in error.errors()]
    elif isinstance(error, SettingsError) and (
        field := re.search(r'field "(\w+)" from source "EnvSettings', str(error))
    ):
        # Not with what was found there, which may be secret.
        problems = [f"PULLBACK_{field[1].upper()} in the environment is not the JSON that it should be"]
    else:
        problems = [str(error)]
    for problem in problems:
        print(f"pullback-server: {problem}", file=sys.stderr)
    return 2


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
        description="Prints a fresh token on stderr, once, and a principal's entry for the file of --principals, which "
        "holds only the token's hash, on stdout: pullback-server key ci --rights call,session >> principals.toml",
    )
    parser.add_argument("name", help="the principal's name")
    parser.add_argument(
        "--rights", default="call,session", help="of: call, session, upload, admin, metrics [call,session]"
    )
    parser.add_argument(
        "--models", default="*", help="globs of the models it is good for, with commas between them [*]"
    )
    for quota, kind, text in (
        ("calls_per_second", float, "calls and ops of sessions"),
        ("bytes_per_second", float, "bytes of requests and answers"),
        ("sessions", int, "sessions at once"),
        ("retained_bytes", int, "bytes that its sessions may hold"),
    ):
        option = f"--{quota.replace('_', '-')}"
        parser.add_argument(option, type=kind, metavar="NUMBER", help=f"{text} [no limit]", dest=quota)
    chosen = vars(parser.parse_args(args))
    name, rights, models = chosen.pop("name"), chosen.pop("rights").split(","), chosen.pop("models").split(",")
    try:
        token, entry = new_key(name, rights, models, {key: value for key, value in chosen.items() if value is not None})
    except ValueError as error:
        parser.error(str(error))
    print(f"the token, which nobody can tell you again: {token}", file=sys.stderr)
    print(entry, end="")
    return 0


def _explain(problem: dict[str, Any]) -> str:
    parts = [str(part) for part in problem["loc"]]
    name = ".".join(parts)
    if problem["type"] == "extra_forbidden" and len(parts) == 1:
        return f"there is no option {name}; {nearest(name, Config.model_fields)}"
    got = MASK if parts[:1] == ["repository_options"] else masked(parts[-1] if parts else "", problem["input"])
    return f"--{name.replace('_', '-')}: {problem['msg']} (got {got!r})"


async def _run(config: Config) -> int:
    """Serves until a signal asks to stop. Returns the exit status."""
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, signals.put_nowait, number)
    app = App(config)
    starting = asyncio.create_task(app.start())
    asked = asyncio.create_task(signals.get())
    # A signal while models load must not wait for them.
    await asyncio.wait([starting, asked], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        logger.info("stopping before the models were loaded")
        starting.cancel()
        await asyncio.wait([starting])
        return 0
    asked.cancel() if starting.exception() else None
    await starting
    settle_process()
    # Nobody turns calls to another server because somebody pressed Ctrl-C or closed a terminal.
    drain = config.drain_seconds if await asked == signal.SIGTERM else 0.0
    logger.info(
        "stopping: calls are taken for another %g s, and running ones then get %g s to end", drain, config.grace
    )
    stopping = asyncio.create_task(app.shut_down(drain, config.grace))
    again = asyncio.create_task(signals.get())
    await asyncio.wait([stopping, again], return_when=asyncio.FIRST_COMPLETED)
    if stopping.done():
        again.cancel()
        await stopping
        return 0
    logger.warning("a second signal: stopping at once")
    stopping.cancel()
    await asyncio.wait([stopping])
    # What hangs in there ends with the process: workers and memory are tied to it.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_AT_ONCE):
            await app.stop(0, at_once=True)
    return 128 + again.result()


if __name__ == "__main__":
    sys.exit(main())
