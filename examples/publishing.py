"""How a version comes into a model repository: written under a name that is ignored, then renamed.

A server that polls the repository (`--repository-mode poll`) never sees half of it, and serves it within seconds.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save


def next_version(model: Path) -> Path:
    """Where the version after those of a model (its directory in a repository) belongs; the first is 1."""
    numbers = [int(path.name) for path in model.iterdir() if path.is_dir() and path.name.isdecimal()]
    return model / str(max(numbers, default=0) + 1)


def publish(model: Path, weights: Mapping[str, np.ndarray[Any, Any]]) -> Path:
    """Writes weights, by the names of the model's parameters, as the next version of a model; returns where it is."""
    place = next_version(model)
    partial = place.with_name(f"{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    data = save({name: np.ascontiguousarray(weight) for name, weight in weights.items()})
    (partial / "weights.safetensors").write_bytes(data)
    return partial.rename(place)
