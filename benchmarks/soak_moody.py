"""Models that behave as their input says. They load quickly, so that killed workers are soon replaced."""

import os
import signal
import time

import torch

from pullback_server import Batching, model, spec

ROWS = {"x": spec("float64", ["n", 3])}
BATCHING = Batching(max_rows=256)


@model("cube", inputs={"x": spec("float64", ["n"])})
def cube(x: torch.Tensor) -> torch.Tensor:
    """Cubes, each call alone."""
    return x**3


@model("rows", inputs=ROWS, batch_axis=0, batching=BATCHING)
def rows(x: torch.Tensor) -> torch.Tensor:
    """Cubes, for rows."""
    return x**3


@model("moody", inputs=ROWS, batch_axis=0, batching=BATCHING, hard_timeout=0.5)
def moody(x: torch.Tensor) -> torch.Tensor:
    """The same; but 13 raises, 666 takes the worker along, 999 never ends; 77 takes 64 MiB a row, 88 takes 512."""
    values = x.detach()
    if bool((values == 13).any()):
        raise ValueError("thirteen")
    if bool((values == 666).any()):
        os.kill(os.getpid(), signal.SIGKILL)
    while bool((values == 999).any()):
        time.sleep(0)
    greedy = int((values == 77).any(1).sum()) + 8 * int((values == 88).any(1).sum())
    return x**3 + x.new_zeros(greedy, 8 << 20).sum() if greedy else x**3
