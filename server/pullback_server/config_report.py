"""`pullback-server config`: what the server would run with, and where each value comes from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pydantic_settings import BaseSettings, CliApp, PydanticBaseSettingsSource

from pullback_server.config import Config
from pullback_server.faults import nearest

MASK = "***"
#: Names under which people keep what nobody else should read.
_SECRET = re.compile(r"secret|passw|token|key|credential|auth|connection_string|signature|^sas", re.IGNORECASE)

#: Variables of the client.
_OF_CLIENTS = {"PULLBACK_TARGET", "PULLBACK_TOKEN"}

#: What pydantic-settings calls where values come from, and what we do.
_FLAG, _ENVIRONMENT, _FILE = "CliSettingsSource", "EnvSettingsSource", "ConfigFile"


def report(args: list[str], *, as_json: bool) -> str:
    """The effective configuration for the flags of `serve`, with secrets masked.

    As text it is a file that --config takes, but for what is masked.

    Raises ConfigFileError, pydantic.ValidationError.
    """
    config, sources = _traced(args)
    shown = {name: masked(name, getattr(config, name)) for name in Config.model_fields if name != "config"}
    told = {name: _told(name, sources, config) for name in shown}
    if as_json:
        found = {name: {"value": value, "source": told[name]} for name, value in shown.items()}
        return json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    lines = [
        f"# {name} is not set" if value is None else f"{name} = {_toml(value)}  # {told[name]}"
        for name, value in shown.items()
    ]
    return "\n".join(lines) + "\n"


def masked(name: str, value: Any) -> Any:
    """A value without what nobody else should read.

    That is passwords and signatures in URLs, and options that are called like secrets.
    """
    if isinstance(value, Mapping):
        return {
            key: MASK if _SECRET.search(key) and inner is not None else masked(key, inner)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [masked(name, one) for one in value]
    if isinstance(value, str) and "://" in value:
        parts = urlsplit(value)
        if "@" in parts.netloc:
            parts = parts._replace(netloc=f"{MASK}@{parts.netloc.rpartition('@')[2]}")
        # Where signed URLs have their signature.
        return urlunsplit(parts._replace(query=re.sub(r"=[^&]*", f"={MASK}", parts.query)))
    return value


def strangers(environment: Mapping[str, str]) -> list[str]:
    """A sentence for each variable that looks like an option and is none."""
    known = {f"PULLBACK_{name.upper()}" for name in Config.model_fields} | _OF_CLIENTS
    return [
        f"{name} in the environment is no option; {nearest(name, known)}"
        for name in sorted(environment)
        if name.startswith("PULLBACK_") and name.upper() not in known
    ]


def _traced(args: list[str]) -> tuple[Config, dict[str, dict[str, Any]]]:
    """The configuration, and what each source says."""
    said: dict[str, dict[str, Any]] = {}

    class Recorder(PydanticBaseSettingsSource):
        """The last source: says nothing, and sees what the others said."""

        def get_field_value(self, field: object, field_name: str) -> tuple[Any, str, bool]:
            raise NotImplementedError

        def __call__(self) -> dict[str, Any]:
            said.update(self.settings_sources_data)
            return {}

    class Traced(Config):
        __doc__ = Config.__doc__

        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *sources: PydanticBaseSettingsSource, **named: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (*super().settings_customise_sources(settings_cls, *sources, **named), Recorder(settings_cls))

    return CliApp.run(Traced, cli_args=args), said


def _told(name: str, sources: Mapping[str, Mapping[str, Any]], config: Config) -> str:
    if name in sources.get(_FLAG, {}):
        return "flag"
    if name in sources.get(_ENVIRONMENT, {}):
        return f"environment PULLBACK_{name.upper()}"
    if name in sources.get(_FILE, {}):
        return f"file {config.config}"
    return "default"


def _toml(value: Any) -> str:
    """JSON's scalars and lists are TOML's as well; its objects are not."""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{json.dumps(key)} = {_toml(one)}" for key, one in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    return json.dumps(value, ensure_ascii=False)
