"""The table [source] of `model.toml`: what a model is made from. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from pullback_server.hosting.manifest_paths import check_relative

Kind = Literal["python", "pt2", "torchscript", "entry-point"]

#: File of a source that names none, by its kind.
_FILES = {"python": "model.py", "pt2": "model.pt2", "torchscript": "model.pt"}
_PICKLES = (".pt", ".pth", ".bin")
_WEIGHTS = "weights.safetensors"

Text = Annotated[str, Field(min_length=1)]


class Table(BaseModel):
    """A table of the manifest: nothing in it is guessed at."""

    # Read as JSON, where strictness still takes arrays for tuples and objects for dataclasses.
    # Infinities ("seconds = inf") have no other spelling in JSON.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, serialize_by_alias=True, ser_json_inf_nan="constants"
    )


class Source(Table):
    """What a model is made from.

    kind: "python" unless `file` ends in .pt2 (pt2) or .pt (torchscript).
    file: relative to the version's directory; None: there is a `module` or an `entry_point`.
    module: importable, instead of a file.
    object: the factory or registered object in the file or module; None: the only one registered there.
    entry_point: its name in the group pullback.models.
    arguments: keyword arguments of the factory.
    weights: relative path; None: weights.safetensors if that is there.
    allow_pickle: whether weights may be a pickled state dict, to be read with torch.load(weights_only=True).
    """

    kind: Kind = "python"
    file: str | None = None
    module: Text | None = None
    object: Text | None = None
    entry_point: Text | None = None
    arguments: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None
    allow_pickle: bool = False

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        table: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        file = table.get("file")
        if "kind" not in table and isinstance(file, str):
            table["kind"] = {".pt2": "pt2", ".pt": "torchscript"}.get(Path(file).suffix, "python")
        kind = table.setdefault("kind", "python")
        if file is None and "module" not in table and isinstance(kind, str) and kind in _FILES:
            table["file"] = _FILES[kind]
        return table

    @field_validator("file", "weights")
    @classmethod
    def _inside(cls, path: str | None) -> str | None:
        if path is not None:
            check_relative(path)
        return path

    @field_validator("module", "object")
    @classmethod
    def _dotted(cls, name: str | None) -> str | None:
        if name is not None and not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"is {name!r}, expected a Python name")
        return name

    @field_validator("arguments")
    @classmethod
    def _keywords(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in arguments:
            if not name.isidentifier():
                raise ValueError(f"has the key {name!r}, expected names of the factory's parameters")
        return arguments

    @model_validator(mode="after")
    def _consistent(self) -> Source:
        raise_all([*self._of_kind(), *self._of_weights()])
        return self

    def _of_kind(self) -> Iterator[str]:
        keys = {"python": ("file", "module", "object", "arguments"), "entry-point": ("entry_point", "arguments")}
        for key in ("file", "module", "object", "entry_point", "arguments"):
            if getattr(self, key) and key not in keys.get(self.kind, ("file",)):
                yield f"{key} is {getattr(self, key)!r}, but a source of kind {self.kind!r} takes none"
        if self.kind == "entry-point" and not self.entry_point:
            yield "entry_point is missing, expected a name in the entry points' group pullback.models"
        if self.kind == "python" and self.file and self.module:
            yield f"module is {self.module!r} and file is {self.file!r}, expected one of them"
        suffix = {"python": ".py", "pt2": ".pt2"}.get(self.kind, "")
        if self.file and not self.file.endswith(suffix):
            yield f"file is {self.file!r}, expected a {suffix} file for the kind {self.kind!r}"

    def _of_weights(self) -> Iterator[str]:
        suffix = Path(self.weights or _WEIGHTS).suffix
        if suffix == ".safetensors":
            return
        if suffix not in _PICKLES:
            yield f"weights is {self.weights!r}, expected a .safetensors file"
        elif not self.allow_pickle:
            yield (
                f"weights is {self.weights!r}, expected a .safetensors file: a {suffix} file is a pickle, and a pickle "
                "can be made to run any program when it is read. Convert it "
                "(safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')), or, if you trust who made "
                "it, set allow_pickle = true: it is then read with torch.load(weights_only=True)"
            )

    def weights_in(self, directory: Path) -> Path | None:
        """Where the weights are in a staged version; None: it has none besides its source."""
        default = directory / _WEIGHTS
        return directory / self.weights if self.weights else default if default.is_file() else None


def raise_all(problems: list[str]) -> None:
    """Fails a validation for these problems of a table, if there are any; each begins with the key."""
    # Not a ValueError: its message would begin with pydantic's own words.
    if problems:
        raise PydanticCustomError("problems", "{text}", {"text": "\n".join(problems)})
