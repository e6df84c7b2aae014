"""What the programs of the gallery share: their arguments, the server they call, and how their pictures look.

options = arguments(__doc__, __file__)
with connected(options, "digits-conv") as client:
    ...
picture, axes = panels(1, 3)
save(picture, options)
"""

import argparse
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

import pullback as pb

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

DEFAULT_TARGET = "localhost:8470"
#: Colours that can be told apart, by colour-blind people too (Okabe and Ito, 2008).
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777"

plt.rcParams.update(
    {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.labelsize": 9,
        "font.size": 9,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "lines.linewidth": 1.4,
        "image.interpolation": "nearest",
        "axes.prop_cycle": matplotlib.cycler(color=[BLUE, ORANGE, GREEN, RED, GREY]),
    }
)


def arguments(doc: str | None, file: str, **switches: str) -> argparse.Namespace:
    """Reads the command line: `.target`, `.small` (True: CI's size), `.output` (where the picture goes).

    doc, file: __doc__ and __file__ of the program. switches: more flags without values, with their help.
    """
    name = Path(file).stem
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--target",
        default=os.environ.get("PULLBACK_TARGET") or DEFAULT_TARGET,
        help="address of the server [env PULLBACK_TARGET; now %(default)s]",
    )
    parser.add_argument("--small", action="store_true", help="less of everything, in seconds")
    output = Path(file).resolve().parents[1] / "out" / f"{name}.png"
    parser.add_argument("--output", type=Path, default=output, help="where the picture goes [out/%(prog)s.png]")
    parser.prog = name
    for switch, text in switches.items():
        parser.add_argument(f"--{switch}", action="store_true", help=text)
    return parser.parse_args()


@contextmanager
def connected(options: argparse.Namespace, *models: str) -> Iterator[pb.Client]:
    """A client of the server at `options.target`, which serves these models. Ends the program where there is none."""
    with pb.connect(options.target) as client:
        try:
            client.ping(timeout=5)
            ready = {info.name for info in client.models(timeout=10) if info.state == "ready"}
        except pb.PullbackError as error:
            absent = isinstance(error, pb.errors.Unavailable) and not isinstance(error, pb.errors.NotReady)
            why = "" if absent else f" ({error.message})"
            raise SystemExit(f"no server at {options.target}{why}: start one with `make serve-examples`") from None
        if missing := sorted({*models} - ready):
            raise SystemExit(
                f"the server at {options.target} does not serve {', '.join(missing)}: use that of `make serve-examples`"
            )
        yield client


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Handwritten digits: images [n, 8, 8] float32 in [0, 1] and labels [n] int64, for training and held out.

    They are split as where `digits-conv` was trained, so that the last two are new to it.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images, labels = (data.images / 16).astype(np.float32), data.target.astype(np.int64)
    x, held_x, y, held_y = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    return x, y, held_x, held_y


def panels(rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of 900 x 450 pixels and its axes, as of pyplot.subplots."""
    return plt.subplots(rows, columns, **{"figsize": (9, 4.5), "layout": "constrained", **options})


def show(axes: Any, image: np.ndarray, title: str = "", **options: Any) -> None:
    """One small image on axes without ticks; `options` as of imshow."""
    axes.imshow(image, **{"cmap": "gray_r", **options})
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=8)
    axes.spines[:].set_visible(False)


def save(figure: Figure, options: argparse.Namespace) -> None:
    """Writes the picture with a palette of 256 colours, which makes it small, and says where."""
    raw = io.BytesIO()
    figure.savefig(raw, dpi=100, format="png")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.open(raw).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(options.output, optimize=True)
    plt.close(figure)
    print(f"picture {options.output}")
