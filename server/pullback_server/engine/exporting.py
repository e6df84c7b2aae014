"""Makes a .pt2 file of a registered Python model, if that computes what the model computes: outputs and derivatives.

torch.export keeps what a forward does, and drops what else there is to a model: backwards of its own
(autograd.Function), hooks, torch.inference_mode. Where that changes a derivative, no file is made.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pullback_server.engine.export_check import Compared, Differs, Shapes, compare
from pullback_server.engine.exported import EXTRA, load_exported
from pullback_server.engine.guards import Ambience
from pullback_server.engine.hosted import HostedModel, build
from pullback_server.engine.samples import choices, sample, shapes
from pullback_server.faults import listed
from pullback_server.hosting.loading import LoadError, load_source
from pullback_server.hosting.options import Options
from pullback_server.hosting.spec import Registration, TensorSpec
from pullback_server.job import SpecRecord

_CPU = torch.device("cpu")
_INSTEAD = (
    'Serve its Python source instead: put the file into the model\'s version in the repository (kind = "python"), with '
    "its weights as weights.safetensors"
)


class NotExported(Exception):
    """Why there is no file."""


def find(source: str) -> Registration:
    """The model of "SOURCE" or "SOURCE:NAME"; the name may be left out where there is one. Raises LoadError."""
    prefix = "entry-point:" if source.startswith("entry-point:") else ""
    where, _, name = source.removeprefix(prefix).partition(":")
    there = load_source(prefix + where)
    found = [one for one in there if not name or one.name == name]
    if not found:
        raise LoadError(f"{where}: no model {name!r} is registered in it, only {listed([one.name for one in there])}")
    if len({one.name for one in found}) > 1:
        names = listed([one.name for one in found])
        raise LoadError(f"{where}: several models are registered in it: {names}; say which: {where}:NAME")
    return max(found, key=lambda one: int(one.version))


def export(registration: Registration, output: Path, dynamic: Sequence[str], samples: int) -> list[str]:
    """Writes the file, and returns what there is to say about it. Raises NotExported, LoadError; then none is left."""
    # How it is run is the exported model's own affair.
    plain = replace(registration, options=Options(), inputs=_named(registration, dynamic), batch_axis=None)
    with Ambience():
        hosted = build(plain, _CPU)
        for name, parameter in hosted.parameters.items():
            # Kernels without derivatives are taken where nothing requires grad.
            parameter.requires_grad_(hosted.natural[name])
        records, points = _points(hosted, samples)
        program, notes = _program(hosted, records, points[0])
        fixed = bool(notes)
        if fixed:
            points = [points[0]] * samples
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as folder:
            draft = Path(folder) / "model.pt2"
            _save(program, draft, {})
            compared = _check(plain, draft, records, points)
            _save(program, draft, _told(registration, records, points[0] if fixed else None, compared))
            load_exported(registration.name, draft, f"model {registration.name!r}", _CPU)
            draft.replace(output)
    optional = [name for name in hosted.binding.names if name not in {record.name for record in records}]
    if optional:
        notes.append(f"what may be left out is left out: {listed(optional)}")
    return [*notes, f"{output}: {compared}"]


def _named(registration: Registration, dynamic: Sequence[str]) -> dict[str, TensorSpec]:
    """The specs, with the axes named that the command line names. Raises NotExported."""
    inputs = dict(registration.inputs)
    for one in dynamic:
        place, _, symbol = one.partition("=")
        name, _, axis = place.rpartition(".")
        spec = inputs.get(name)
        if spec is None or spec.shape is None or not axis.isdecimal() or not symbol.isidentifier():
            raise NotExported(f"--dynamic {one}: expected INPUT.AXIS=NAME, of an input whose shape is declared")
        if int(axis) >= len(spec.shape):
            raise NotExported(f"--dynamic {one}: {name!r} has {len(spec.shape)} axes")
        shape = list(spec.shape)
        shape[int(axis)] = symbol
        inputs[name] = replace(spec, shape=tuple(shape))
    return inputs


def _points(hosted: HostedModel, samples: int) -> tuple[list[SpecRecord], list[Shapes]]:
    """The inputs to export with, and shapes with which the model runs, for each point. Raises NotExported."""
    if not choices(hosted):
        raise NotExported(
            f"{hosted.owner}: not every input declares its shape: inputs={{'x': spec('float32', ['batch', 3])}}"
        )
    records = choices(hosted)[0]
    found: list[Shapes] = []
    failure = "no free extents fit"
    for one in shapes(records):
        try:
            arguments, keywords = hosted.binding.arrange(sample(records, one, torch.Generator().manual_seed(0)))
            with torch.no_grad():
                hosted.code(*arguments, **keywords)
            found.append(one)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        finally:
            hosted.restore_state()
    if not found:
        raise NotExported(f"{hosted.owner}: no sample input made the model run ({failure})")
    return records, list(islice((found[index % len(found)] for index in range(samples)), samples))


def _program(
    hosted: HostedModel, records: list[SpecRecord], one: Shapes
) -> tuple[torch.export.ExportedProgram, list[str]]:
    """The exported program, and what there is to say of its shapes. Raises NotExported."""
    module = hosted.module or _as_module(hosted.code)
    arguments, keywords = hosted.binding.arrange(sample(records, one, torch.Generator().manual_seed(0)))

    def attempt(dynamic: Any) -> torch.export.ExportedProgram:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(module, tuple(arguments), keywords, dynamic_shapes=dynamic)

    dims = {
        extent: torch.export.Dim(extent)
        for record in records
        for extent in record.shape or ()
        if isinstance(extent, str)
    }
    notes = []
    try:
        if dims and not hosted.binding.spread:
            try:
                return attempt(
                    {
                        record.name: {axis: dims[e] for axis, e in enumerate(record.shape or ()) if isinstance(e, str)}
                        for record in records
                    }
                ), []
            except Exception as error:
                notes.append(f"its extents are fixed, for with free ones torch.export fails: {_short(error)}")
        elif dims:
            notes.append("its extents are fixed, for it takes *args")
        return attempt(None), notes
    except Exception as error:
        raise NotExported(f"{hosted.owner}: torch.export fails: {_short(error)}. {_INSTEAD}") from error


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:500]}"


def _as_module(code: Any) -> nn.Module:
    kind = type("Function", (nn.Module,), {"forward": staticmethod(code)})
    found: nn.Module = kind()
    return found.eval()


def _save(program: torch.export.ExportedProgram, path: Path, told: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, path, extra_files={EXTRA: json.dumps(told)} if told else None)


def _check(registration: Registration, draft: Path, records: list[SpecRecord], points: Sequence[Shapes]) -> Compared:
    """Raises NotExported where the file computes something else."""
    owner = f"model {registration.name!r}"
    found = Compared()
    made = replace(load_exported(registration.name, draft, owner, _CPU), outputs=registration.outputs)
    try:
        compare(build(registration, _CPU), build(made, _CPU), records, points, found)
    except Differs as error:
        cause = (
            f"The likely cause: {listed(found.functions)}, whose own backward an export does not keep. "
            if found.functions
            else "The likely cause: what an export does not keep (hooks, torch.inference_mode, a custom backward). "
        )
        raise NotExported(
            f"{owner}: not exported, for it would compute something else: {error}. {cause}{_INSTEAD}"
        ) from error
    return found


def _told(
    registration: Registration, records: list[SpecRecord], fixed: Shapes | None, compared: Compared
) -> dict[str, Any]:
    """What the file says of itself. fixed: the only shapes it has."""
    try:
        own = version("pullback")
    except PackageNotFoundError:
        own = ""
    return {
        "mode": "eval",
        "compared": str(compared),
        "pullback": own,
        "torch": torch.__version__,
        "inputs": {
            record.name: {
                "shape": list(fixed[record.name] if fixed is not None else record.shape or ()),
                "low": record.minimum,
                "high": record.maximum,
            }
            for record in records
        },
        "outputs": registration.outputs,
        "batch_axis": None if fixed is not None else registration.batch_axis,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="pullback-server export", description=__doc__.partition("\n")[0])
    parser.add_argument("source", help="models.py, package.module or entry-point:NAME; :NAME chooses one of several")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="model.pt2")
    parser.add_argument(
        "--dynamic",
        action="append",
        default=[],
        metavar="INPUT.AXIS=NAME",
        help="an axis whose extent is free, besides those that the model's specs name; once for each",
    )
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="random points to compare at (3)")
    given = parser.parse_args(arguments)
    if given.samples < 1:
        parser.error("--samples: expected 1 or more")
    if given.output.suffix != ".pt2":
        parser.error("--output: expected a name that ends in .pt2")
    try:
        for line in export(find(given.source), given.output, given.dynamic, given.samples):
            print(line)
    except (LoadError, NotExported) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
