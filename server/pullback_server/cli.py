"""`pullback-server`."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from importlib.metadata import version
from typing import Any

from pydantic import ValidationError
from pydantic_settings import CliApp

from pullback_server.app import App, prepare_process, settle_process
from pullback_server.config import Config
from pullback_server.fleet import StartError

_USAGE = """\
usage: pullback-server serve FILE_OR_MODULE... [options]
       pullback-server --version

`pullback-server serve --help` lists the options. Each has an environment twin: --metrics-port is PULLBACK_METRICS_PORT.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit status: 0 stopped as asked, 1 could not serve, 2 bad usage."""
    args = sys.argv[1:] if argv is None else argv
    if args[:1] == ["serve"]:
        return _serve(args[1:])
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
