"""`ModelGraph`: a model's autograd graph as a server draws it, and pictures of it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pullback_wire import dtype_name
from pullback_wire.v1 import model_service_pb2 as pb

_KINDS = {
    pb.GRAPH_NODE_KIND_INPUT: "input",
    pb.GRAPH_NODE_KIND_PARAMETER: "parameter",
    pb.GRAPH_NODE_KIND_OPERATION: "operation",
    pb.GRAPH_NODE_KIND_OUTPUT: "output",
}
#: Fill and line of each kind of node: light enough for black text, and told apart without colours by their shapes.
_LOOKS = {
    "input": {"shape": "ellipse", "fillcolor": "#d7e8fb", "color": "#2f6fb3"},
    "parameter": {"shape": "note", "fillcolor": "#e3f3dd", "color": "#4b8b3b"},
    "operation": {"shape": "box", "fillcolor": "#ffffff", "color": "#5b6470"},
    "output": {"shape": "ellipse", "fillcolor": "#fbe6c9", "color": "#b3721d"},
}
#: Grounds of modules inside one another, from the outermost on.
_GROUNDS = ("#f6f7f9", "#eceff3", "#e2e6ec", "#d8dde5")
_FORMATS = ("svg", "png", "pdf")
_TEXTS = ("dot", "gv")


@dataclass(frozen=True)
class GraphNode:
    """A node of an autograd graph.

    id: what edges call it.
    kind: "input", "parameter", "operation" or "output".
    name: of an operation torch's name of its backward, e.g. "AddmmBackward0"; else the tensor's.
    module: path of the module that ran the operation, or holds the parameter; "" for the model itself.
    dtype, shape: of the tensor, or of the operation's first result, for the sample that was used; None: not known.
    """

    id: int
    kind: str
    name: str
    module: str
    dtype: str | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelGraph:
    """What a backward of a model walks, got from `RemoteModel.graph`. Notebooks show it as a picture.

    nodes: inputs and parameters, then operations so that each comes after what it was made from, then outputs.
    edges: pairs (source, target) of ids: the result of one goes into the other.
    truncated: whether the graph has more nodes than these.
    """

    model: str
    version: str
    nodes: tuple[GraphNode, ...]
    edges: tuple[tuple[int, int], ...]
    truncated: bool

    def __repr__(self) -> str:
        more = ", truncated" if self.truncated else ""
        return (
            f"<ModelGraph of {self.model!r} version {self.version}: {len(self.nodes)} nodes, {len(self.edges)} edges"
            f"{more}>"
        )

    def dot(self) -> str:
        """The graph in Graphviz's DOT language, modules as clusters.

        Raises ImportError where the graphviz package is missing (pip install 'pullback[graph]').
        """
        return str(self._digraph().source)

    def svg(self) -> str:
        """The picture, as an SVG document. Raises as `render`."""
        return self.render("svg").decode()

    def render(self, format: str) -> bytes:
        """The picture as "svg", "png" or "pdf".

        Raises ValueError for another format, ImportError where the graphviz package is missing, FileNotFoundError where
        Graphviz's program `dot` is.
        """
        if format not in _FORMATS:
            raise ValueError(f"format is {format!r}, expected one of {', '.join(_FORMATS)}")
        digraph, graphviz = self._digraph(), _graphviz()
        try:
            picture: bytes = digraph.pipe(format=format, quiet=True)
        except graphviz.ExecutableNotFound as error:
            raise FileNotFoundError(
                "the program `dot` of Graphviz is not on the PATH; install it (Debian: apt install graphviz), or take "
                "the DOT text"
            ) from error
        except graphviz.CalledProcessError as error:
            raise OSError(f"Graphviz's dot failed: {error}") from error
        return picture

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the picture (.svg, .png, .pdf) or the text (.dot, .gv) to a file. Raises as `render`, and OSError."""
        target = Path(path)
        suffix = target.suffix.lower().removeprefix(".")
        if suffix not in (*_FORMATS, *_TEXTS):
            known = ", ".join(f".{one}" for one in (*_FORMATS, *_TEXTS))
            raise ValueError(f"{os.fspath(path)!r} has no suffix that says what to write; expected one of {known}")
        # Before the file is opened: a failure must not leave an empty one.
        data = self.dot().encode() if suffix in _TEXTS else self.render(suffix)
        target.write_bytes(data)

    def _repr_svg_(self) -> str | None:
        try:
            return self.svg()
        except (ImportError, OSError):
            # The notebook falls back to the text.
            return None

    def _digraph(self) -> Any:
        graphviz = _graphviz()
        title = f"{self.model} version {self.version}" + (" (cut off)" if self.truncated else "")
        digraph = graphviz.Digraph(
            "model",
            graph_attr={"label": graphviz.escape(title), "labelloc": "t", "rankdir": "TB", "fontname": "Helvetica"},
            node_attr={"style": "filled", "fontname": "Helvetica", "fontsize": "11", "margin": "0.12,0.06"},
            edge_attr={"color": "#5b6470", "arrowsize": "0.7"},
        )
        root = _Module("")
        for node in self.nodes:
            root.at(node.module.split(".") if node.module else []).nodes.append(node)
        _draw(digraph, root, 0)
        for source, target in self.edges:
            digraph.edge(str(source), str(target))
        return digraph


@dataclass
class _Module:
    """The nodes of a module, and the modules inside."""

    path: str
    nodes: list[GraphNode] = field(default_factory=list)
    inside: dict[str, _Module] = field(default_factory=dict)

    def at(self, names: list[str]) -> _Module:
        found = self
        for name in names:
            found = found.inside.setdefault(name, _Module(f"{found.path}.{name}".removeprefix(".")))
        return found


def _graphviz() -> Any:
    """The package, which only drawing needs. Raises ImportError."""
    try:
        import graphviz  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            "drawing a graph needs the graphviz package: pip install 'pullback[graph]'", name="graphviz"
        ) from error
    return graphviz


def _draw(into: Any, module: _Module, depth: int) -> None:
    graphviz = _graphviz()
    for node in module.nodes:
        lines = [node.name]
        if node.dtype is not None:
            lines.append(f"{node.dtype}{list(node.shape)}")
        into.node(str(node.id), "\\n".join(map(graphviz.escape, lines)), **_LOOKS[node.kind])
    for inner in module.inside.values():
        with into.subgraph(name=f"cluster_{inner.path}") as cluster:
            cluster.attr(
                label=graphviz.escape(inner.path),
                style="rounded,filled",
                color="#9aa5b4",
                fillcolor=_GROUNDS[min(depth, len(_GROUNDS) - 1)],
                fontname="Helvetica",
                fontsize="12",
            )
            _draw(cluster, inner, depth + 1)


def model_graph(model: str, found: pb.GetModelGraphResponse) -> ModelGraph:
    """From the server's answer."""
    return ModelGraph(
        model,
        found.version,
        tuple(
            GraphNode(
                node.id,
                _KINDS.get(node.kind, "operation"),
                node.name,
                node.module,
                dtype_name(node.dtype) if node.dtype else None,
                tuple(node.shape),
            )
            for node in found.nodes
        ),
        tuple((edge.source, edge.target) for edge in found.edges),
        found.truncated,
    )
