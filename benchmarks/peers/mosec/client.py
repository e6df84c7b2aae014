"""The client of the mosec server: httpx and msgpack."""

import httpx
import msgpack
import numpy as np

PACKAGES = ["mosec", "httpx", "torch"]


class Client:
    def __init__(self, address: str) -> None:
        # user code
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{address}", timeout=60)

    def post(self, path: str, **arrays: np.ndarray) -> dict:
        shapes = {name: array.shape for name, array in arrays.items()}
        sent = {name: array.tobytes() for name, array in arrays.items()}
        answer = self.http.post(path, content=msgpack.packb({**sent, "shapes": shapes}))
        answer.raise_for_status()
        return msgpack.unpackb(answer.content)

    # end

    def vjp(self, x: np.ndarray, v: np.ndarray, function: str = "mlp") -> tuple[np.ndarray, np.ndarray]:
        # user code
        result = self.post(f"/vjp/{function}", x=x, v=v)
        y, gradient = (np.frombuffer(result[name], np.float32) for name in ("y", "gradient"))
        return y.reshape(len(x), -1), gradient.reshape(x.shape)
        # end

    def echo(self, x: np.ndarray) -> np.ndarray:
        return np.frombuffer(self.post("/evaluate/identity", x=x)["y"], np.float32)
