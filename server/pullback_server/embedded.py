"""`Server`: a whole server inside a notebook or a test."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from pullback_server.app import App
from pullback_server.config import Config
from pullback_server.hosting import Registration
from pullback_server.hosting.spec import registrations_of


class Server:
    """Serves models from this process: front in a thread, models in worker processes.

    models: files ("models.py"), modules (imported, or by name), and objects decorated with @model, which are carried
    to the workers by cloudpickle. That is for code you trust, on this machine.
    settings: as the flags of `pullback-server serve` (with underscores). Unlike there, the ports default to free ones.

        with Server(my_model) as server:
            client = pullback.connect(server.target)

    Raises, from `start` or on entering: StartError when a model cannot be loaded, OSError when a port is taken,
    TypeError for what registers no model, pydantic.ValidationError for a wrong setting.
    """

    def __init__(self, *models: object, **settings: Any) -> None:
        sources: list[str] = []
        self._registrations: list[Registration] = []
        for model in models:
            if isinstance(model, str | Path):
                sources.append(str(model))
            elif isinstance(model, ModuleType):
                sources.append(_source(model))
            elif found := registrations_of(model):
                self._registrations += found
            else:
                raise TypeError(f'{model!r} registers no model; decorate it with @pullback_server.model("name")')
        if not sources and not self._registrations and settings.get("repository") is None:
            raise TypeError("a server needs at least one model")
        self._config = Config(models=sources, **{"port": 0, "metrics_port": 0, **settings})
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None
        self._app: App | None = None

    @property
    def port(self) -> int:
        """The gRPC port."""
        return self._app.port if self._app else 0

    @property
    def metrics_port(self) -> int:
        """The HTTP port of /metrics, /livez and /readyz."""
        return self._app.metrics_port if self._app else 0

    @property
    def target(self) -> str:
        """What `pullback.connect` takes."""
        host = self._config.host
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    def start(self) -> Server:
        """Returns when every worker holds every model and calls are answered."""
        if self._thread is not None:
            raise RuntimeError("this server was started already")
        self._thread = threading.Thread(target=self._loop.run_forever, name="pullback-server", daemon=True)
        self._thread.start()
        try:
            self._app = self._on_loop(self._begin())
        except BaseException:
            self._end()
            raise
        return self

    def stop(self, grace: float = 5.0) -> None:
        """Ends calls within `grace` seconds, then the workers and the thread. Stopping twice is harmless."""
        app, self._app = self._app, None
        if app is not None:
            self._on_loop(app.stop(grace))
            self._end()

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def _begin(self) -> App:
        app = App(self._config, self._registrations)
        await app.start()
        return app

    def _on_loop(self, work: Any) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C while models load: the work must not go on behind the user's back.
            future.cancel()
            raise

    def _end(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
            self._loop.close()


def _source(module: ModuleType) -> str:
    """A module of a package by its name, a lone one by its file, which a worker finds wherever it lies."""
    file = getattr(module, "__file__", None)
    return module.__name__ if module.__package__ or not file else str(file)
