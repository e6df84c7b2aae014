"""examples/models/heat.py against the same equations assembled and solved in another way."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import lil_matrix
from scipy.sparse.linalg import spsolve

FILE = Path(__file__).parents[2] / "examples" / "models" / "heat.py"


@pytest.fixture(scope="module")
def heat() -> Any:
    found = importlib.util.spec_from_file_location("heat", FILE)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def temperature(heat: Any, copper: np.ndarray, power: float = 1.0, blur: float = 0.0) -> torch.Tensor:
    numbers = [torch.tensor(one, dtype=torch.float64) for one in (power, blur)]
    found: torch.Tensor = heat.heat(torch.from_numpy(copper), *numbers)
    return found


def test_the_field_solves_the_heat_equation(heat: Any) -> None:
    rows, columns = 8, 12
    copper = np.random.default_rng(0).random((rows, columns))
    k = 1 + (heat.COPPER - 1) * copper**3
    matrix = lil_matrix((copper.size, copper.size))
    for i in range(rows):
        for j in range(columns):
            here = i * columns + j
            for r, c in ((i + 1, j), (i, j + 1)):
                if r < rows and c < columns:
                    there, passes = r * columns + c, 2 * k[i, j] * k[r, c] / (k[i, j] + k[r, c])
                    matrix[here, here] += passes
                    matrix[there, there] += passes
                    matrix[here, there] -= passes
                    matrix[there, here] -= passes
            if j == 0 and i < rows // 8:
                matrix[here, here] += 2 * k[i, j]
    wanted = spsolve(matrix.tocsr(), np.full(copper.size, 1 / columns**2)).reshape(rows, columns)
    found = temperature(heat, copper, 3.0).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-10)
    # All the heat leaves through the window.
    leaving = (2 * k[: rows // 8, 0] * found[: rows // 8, 0]).sum()
    assert leaving == pytest.approx(rows / columns, rel=1e-10)


def test_blur_moves_copper_and_keeps_it_where_it_is_even(heat: Any) -> None:
    even = np.full((6, 8), 0.3)
    np.testing.assert_allclose(temperature(heat, even, 1.0, 1.0), temperature(heat, even, 1.0, 0.0), rtol=1e-12)
    dot = np.zeros((6, 8))
    dot[3, 4] = 1
    assert not np.allclose(temperature(heat, dot, 1.0, 1.0), temperature(heat, dot, 1.0, 0.0))
