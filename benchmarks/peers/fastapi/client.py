"""The client of the FastAPI server: httpx, which keeps its connection."""

import io

import httpx
import numpy as np
import torch

PACKAGES = ["fastapi", "uvicorn", "httpx", "torch"]


class Client:
    def __init__(self, address: str) -> None:
        # user code
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{address}", timeout=60)

    def post(self, path: str, value: object) -> object:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        answer = self.http.post(path, content=buffer.getvalue())
        answer.raise_for_status()
        return torch.load(io.BytesIO(answer.content))

    # end

    def vjp(self, x: np.ndarray, v: np.ndarray, function: str = "mlp") -> tuple[np.ndarray, np.ndarray]:
        # user code
        y, gradient = self.post(f"/vjp/{function}", {"x": torch.from_numpy(x), "v": torch.from_numpy(v)})
        return y.numpy(), gradient.numpy()
        # end

    def echo(self, x: np.ndarray) -> np.ndarray:
        return self.post("/evaluate/identity", torch.from_numpy(x)).numpy()
