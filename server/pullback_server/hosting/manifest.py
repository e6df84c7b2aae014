"""`model.toml`: what an operator says of a model in a repository. Free of torch; travels to workers as JSON."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from pullback_server.hosting.gate import Gate
from pullback_server.hosting.loading import LoadError
from pullback_server.hosting.manifest_problems import problems_of
from pullback_server.hosting.manifest_source import Source, Table, Text, raise_all
from pullback_server.hosting.options import Options
from pullback_server.hosting.spec import TensorSpec

#: Bytes that a manifest may have.
LONGEST = 1 << 20
#: Problems that are told of one manifest.
_TOLD = 10

Count = Annotated[int, Field(ge=1)]


class RepositoryError(LoadError):
    """What lies in a model repository cannot be used; the message names the file, and the key or the cause."""


class Input(Table):
    """See `TensorSpec`."""

    dtype: str | None = None
    shape: tuple[int | str, ...] | None = None
    low: int | float | None = None
    high: int | float | None = None

    @field_validator("dtype")
    @classmethod
    def _known(cls, dtype: str | None) -> str | None:
        TensorSpec(dtype=dtype)
        return dtype

    @field_validator("shape")
    @classmethod
    def _extents(cls, shape: tuple[int | str, ...] | None) -> tuple[int | str, ...] | None:
        TensorSpec(shape=shape)
        return shape

    @field_validator("low", "high")
    @classmethod
    def _finite(cls, bound: float | None) -> float | None:
        if bound is not None and not math.isfinite(bound):
            raise ValueError(f"is {bound}, expected a finite number; without the key, there is no bound")
        return bound

    @model_validator(mode="after")
    def _ordered(self) -> Input:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low is {self.low}, expected at most high, which is {self.high}")
        return self


class Versions(Table):
    """Which of the versions that are there are served: the N latest, all, or those named."""

    latest: Count | None = None
    all: bool | None = None
    # What has gone through a validator of our own is no JSON any more, in which a tuple is an array.
    specific: Annotated[tuple[Count, ...], Field(min_length=1, strict=False)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _default(cls, given: Any) -> Any:
        return given if not isinstance(given, dict) or any(v is not None for v in given.values()) else {"latest": 1}

    @model_validator(mode="after")
    def _one(self) -> Versions:
        given = [key for key in ("latest", "all", "specific") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given, expected exactly one of latest, all, specific")
        if self.all is False:
            raise ValueError("all is false, expected true, or another of latest, specific")
        return self


class Manifest(Table):
    """What `model.toml` says; `Registration` and `Options` tell what it means.

    Equal to what its own JSON is parsed to. name: as the directory is called, if given.
    """

    name: str | None = None
    description: str = ""
    batch_axis: Annotated[int, Field(ge=0)] | None = None
    outputs: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    source: Source = Field(default_factory=Source)
    inputs: dict[Text, Input] = Field(default_factory=dict)
    running: Options = Field(default_factory=Options, alias="options")
    gate: Gate = Field(default_factory=Gate)
    versions: Versions = Field(default_factory=Versions)

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        problems = []
        if self.outputs and len(set(self.outputs)) < len(self.outputs):
            problems.append(f"outputs is {list(self.outputs)!r}, expected names that differ")
        if self.running.micro_batch is not None and self.batch_axis is None:
            problems.append("options.micro_batch needs a batch_axis")
        raise_all(problems)
        return self

    def options(self) -> Options:
        """How the model is run."""
        return self.running

    def specs(self) -> dict[str, TensorSpec]:
        """Specs by input name."""
        return {name: TensorSpec(one.dtype, one.shape, one.low, one.high) for name, one in self.inputs.items()}

    def gate_of(self) -> Gate:
        """What must be shown of the model before it is served."""
        return self.gate

    def picked(self, available: Iterable[str]) -> list[str]:
        """Those of the versions that are to be served, lowest number first; what is not there is left out."""
        ordered = sorted(set(available), key=int)
        if self.versions.specific is not None:
            return [version for version in ordered if int(version) in self.versions.specific]
        return ordered if self.versions.latest is None else ordered[-self.versions.latest :]


def check_length(raw: bytes, where: str) -> None:
    """Raises RepositoryError for a manifest that is longer than any."""
    if len(raw) > LONGEST:
        raise RepositoryError(f"{where}: has more than {LONGEST} bytes, expected a manifest")


def read_manifest(text: str, where: str, name: str) -> Manifest:
    """The manifest of the model `name`, whose directory is called so.

    Raises RepositoryError; each line of its message names the file (`where`), the key, what was expected and what came.
    """
    try:
        data = tomllib.loads(text.removeprefix("\ufeff"))
    except tomllib.TOMLDecodeError as error:
        # Python tells the position, except of an end that comes too early.
        lines = text.split("\n")
        end = f"at line {len(lines)}, column {len(lines[-1]) + 1}, the end of the file"
        raise RepositoryError(f"{where}: not TOML: {str(error).replace('at end of document', end)}") from None
    except RecursionError:
        raise RepositoryError(f"{where}: not TOML: nested too deeply") from None
    dates = list(_dates(data, ()))
    problems = [f"{key} is a date or time, expected none: no key takes one" for key in dates]
    if not dates:
        try:
            manifest = Manifest.model_validate_json(json.dumps(data))
        except ValidationError as error:
            problems = problems_of(error, data, Manifest)
        else:
            if manifest.name in (None, name):
                return manifest
    if data.get("name", name) != name:
        problems.append(f"name is {data['name']!r}, expected {name!r} as its directory is called, or no such key")
    more = len(problems) - _TOLD
    if more > 0:
        problems[_TOLD:] = [f"and {more} more problem{'s' if more > 1 else ''}"]
    raise RepositoryError("\n".join(f"{where}: {problem}" for problem in problems))


def _dates(value: object, path: tuple[str, ...]) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _dates(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _dates(inner, (*path, str(index)))
    elif not isinstance(value, str | int | float):
        yield ".".join(path)
