"""What an operator can set. One declaration gives flags, their environment twins, the keys of a file, and the help."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

#: An empty one is a mistake, such as a variable that was never set, and must not pass for one that is left out.
_Given = Annotated[str, Field(min_length=1)]


class ConfigFileError(Exception):
    """A file of options that cannot be read; the message names it and what is wrong."""


class ConfigFile(PydanticBaseSettingsSource):
    """The file that a flag or the environment names, which hence come before it."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Not asked for: the file is read as a whole."""
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        """Raises ConfigFileError."""
        path = self.current_state.get("config")
        if not path:
            return {}
        try:
            found = tomllib.loads(Path(path).read_text())
        except OSError as error:
            raise ConfigFileError(f"config {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigFileError(f"config {path}: {error}") from error
        if "config" in found:
            raise ConfigFileError(f"config {path}: 'config' cannot name another file")
        return found


class Config(BaseSettings):
    """Serves the models that Python files or modules register with @model."""

    model_config = SettingsConfigDict(
        env_prefix="PULLBACK_",
        cli_prog_name="pullback-server serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_show_env_vars=True,
        extra="forbid",
    )

    config: _Given | None = Field(
        None,
        description="TOML file of these options, named as here with underscores; flags and the environment come first",
    )

    models: CliPositionalArg[Annotated[list[str], NoDecode]] = Field(
        [],
        description="Python files (models.py) or importable modules (package.models) that register models; "
        "in the environment separated by commas",
    )
    repository: _Given | None = Field(
        None,
        description="model repository: a folder, or any URL that fsspec knows (s3://..., gs://...), with "
        "NAME/model.toml and NAME/VERSION/",
    )
    repository_mode: Literal["none", "poll", "explicit"] = Field(
        "none",
        description="none: its models are loaded at the start; poll: changes are followed; explicit: only what "
        "--load-model and LoadModel name is loaded",
    )
    repository_poll_seconds: float = Field(15.0, gt=0, description="seconds between looks, in mode poll")
    repository_settle_seconds: float = Field(
        2.0,
        ge=0,
        description="for how long a version's files must have been the same before it is loaded, in mode poll",
    )
    repository_options: dict[str, Any] = Field(
        {}, description="JSON: options of fsspec for the repository, e.g. of s3fs"
    )
    load_model: Annotated[list[str], NoDecode] = Field(
        [],
        description="in mode explicit: a model, or MODEL:VERSION, to load at the start; in the environment separated "
        "by commas",
    )
    exit_on_error: bool = Field(True, description="do not start when a model of the repository cannot be loaded")
    state_dir: _Given | None = Field(
        None, description="folder for copies of what is loaded [default: the system's folder for temporary files]"
    )
    uploads: _Given | None = Field(None, description="folder for weights that callers upload [default: they may not]")
    max_upload_bytes: int = Field(16 << 30, ge=8, description="largest upload")
    max_uploads_bytes: int = Field(64 << 30, ge=8, description="largest sum of the uploads that are kept")
    gate: bool = Field(True, description="check gradients when models are loaded, where a model does not say itself")
    host: str = Field("127.0.0.1", description="address to listen on, for gRPC and metrics")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8470, description="gRPC port; 0 picks a free one")
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        9470, description="HTTP port of /metrics, /livez, /readyz and the page for people; 0 picks a free one"
    )
    health_port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        None,
        description="plaintext gRPC port for probes alone, with the services 'liveness' and 'readiness'; open from the "
        "beginning [default: none]",
    )
    insecure: bool = Field(
        False, description="allow an address that others can reach without TLS, where something else protects it"
    )
    tls_cert: _Given | None = Field(None, description="PEM certificate chain; read anew when it changes")
    tls_key: _Given | None = Field(None, description="PEM private key of the certificate; read anew when it changes")
    tls_client_ca: _Given | None = Field(
        None,
        description="PEM certificates that vouch for clients, who then need one for gRPC, and may have one on the "
        "metrics port; read anew when it changes",
    )
    metrics_tls: bool = Field(False, description="the metrics port speaks HTTPS, with the same certificate")
    principals: _Given | None = Field(
        None,
        description="TOML file that says who may do what, by bearer token, JWT or client certificate; read anew when "
        "it changes [default: everybody may call, nobody may administer]",
    )
    reflection: bool = Field(True, description="offer gRPC reflection, to those who may call")
    page: bool = Field(True, description="offer the page for people on the metrics port")
    max_metadata_bytes: int = Field(16 << 10, ge=4 << 10, description="largest metadata of a call")
    max_connections: int = Field(16384, ge=1, description="connections at once; more are closed")
    max_connection_streams: int = Field(1024, ge=1, description="calls and sessions at once on one connection")
    max_connection_age_seconds: float | None = Field(
        None,
        gt=0,
        description="after which a connection is told to go, so that clients rebalance; its calls and sessions go on "
        "to their end [default: never]",
    )
    devices: str = Field(
        "auto",
        description="'auto' (each CUDA device, else one CPU worker), 'cpu:4' (four workers), 'cuda', 'cuda:0,cuda:1'",
    )
    threads: int | None = Field(None, ge=1, description="torch threads of a CPU worker [default: cores / workers]")
    max_message_bytes: int = Field(
        256 << 20, ge=1 << 10, le=(2 << 30) - 1, description="largest request, and largest results of one call"
    )
    max_calls: int = Field(1024, ge=1, description="calls in flight; more are refused with OVERLOADED")
    max_bytes: int = Field(4 << 30, ge=1, description="tensor bytes in flight; more are refused with OVERLOADED")
    max_model_calls: int | None = Field(None, ge=1, description="calls in flight for one model [default: no limit]")
    max_model_bytes: int | None = Field(
        None, ge=1, description="tensor bytes in flight for one model [default: no limit]"
    )
    max_caller_calls: int | None = Field(None, ge=1, description="calls in flight of one caller [default: no limit]")
    max_caller_bytes: int | None = Field(
        None, ge=1, description="tensor bytes in flight of one caller [default: no limit]"
    )
    max_queue_seconds: float | None = Field(
        None, gt=0, description="longest a call may wait for a worker [default: until its deadline]"
    )
    caller_weights: Annotated[dict[str, Annotated[float, Field(gt=0)]], NoDecode] = Field(
        {},
        description="shares of the workers' time by caller (metadata pullback-caller), 1 for those not named; "
        "JSON, or caller=weight, in the environment separated by commas",
    )
    batching: bool = Field(True, description="merge requests of several callers, where a model's rows are independent")
    shadow_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of merged computations of which one member is computed alone as well, and compared",
    )
    hard_timeout: float = Field(
        600.0, gt=0, description="seconds of computing after which a call costs its worker, unless its model says"
    )
    quarantine_seconds: float = Field(
        300.0, ge=0, description="for how long a call that has killed two workers is refused"
    )
    worker_memory_bytes: int | None = Field(
        None, ge=1 << 20, description="bytes a worker may allocate besides its models [default: what the device has]"
    )
    float32_precision: str = Field(
        "highest",
        pattern="^(highest|high|medium)$",
        description="of float32 matrix products: highest (IEEE), high (TF32 on CUDA) or medium (bfloat16)",
    )
    max_cotangents: int = Field(4096, ge=1, description="cotangents in one batched call")
    max_call_seconds: float = Field(600.0, gt=0, description="longest a call may take, whatever deadline it brings")
    session_bytes: int | None = Field(
        None,
        ge=1,
        description="bytes that the tensors and graphs of one session may hold [default: a quarter of the worker's "
        "share of its device's memory]",
    )
    session_idle_seconds: float = Field(600.0, gt=0, description="a session without an op for this long is ended")
    session_heartbeat_seconds: float = Field(
        60.0, ge=1, description="a session whose client sends nothing for this long, no heartbeat either, is ended"
    )
    load_timeout: float = Field(600.0, gt=0, description="seconds in which a worker must have loaded its models")
    drain_seconds: float = Field(
        5.0,
        ge=0,
        description="seconds for which calls are still answered after SIGTERM while the probes already say not ready, "
        "so that balancers turn away",
    )
    grace: float = Field(20.0, ge=0, description="seconds that running calls and sessions get to end after that")
    gradient_health: bool = Field(
        True, description="count norms, zeros, NaN and infinities of gradients and outputs, by model"
    )
    gradient_health_cost: float = Field(
        0.02,
        ge=0,
        le=1,
        description="share of a worker's time that may go into that: of small models' calls in quick succession only "
        "some are looked at; 0: there is no limit, each is",
    )
    tracing: bool = Field(
        False, description="OpenTelemetry traces, configured by the standard OTEL_* variables; needs pullback[otel]"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what is logged")
    log_format: Literal["console", "json"] = Field("console", description="how it is written, on stderr")
    access_log: bool = Field(False, description="log a line for each call, and for each session at its end")

    # The command line joins several with commas on their way here.

    @field_validator("models", "load_model", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            return json.loads(value)
        return [part.strip() for part in value.split(",") if part.strip()]

    @field_validator("caller_weights", mode="before")
    @classmethod
    def _paired(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        found: dict[str, object] = {}
        rest = value.strip(" ,")
        while rest:
            if rest.startswith("{"):
                told, end = json.JSONDecoder().raw_decode(rest)
                found |= told
                rest = rest[end:].lstrip(" ,")
                continue
            pair, _, rest = rest.partition(",")
            caller, equals, weight = pair.rpartition("=")
            if not equals:
                raise ValueError("expected caller=weight, several with commas between them, or JSON")
            found[caller.strip()] = weight.strip()
            rest = rest.lstrip(" ,")
        return found

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What comes first wins; flags stand before all of these."""
        return init_settings, env_settings, ConfigFile(settings_cls)
