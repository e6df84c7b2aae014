"""FastAPI and uvicorn: torch.save and torch.load make and read the bodies."""

import io
import sys

import torch
import uvicorn
import workload
from fastapi import FastAPI, Request, Response

# user code
app = FastAPI()


def body(value: object) -> Response:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return Response(buffer.getvalue(), media_type="application/octet-stream")


@app.post("/vjp/{function}")
async def vjp(function: str, request: Request) -> Response:
    sent = torch.load(io.BytesIO(await request.body()))
    return body(workload.vjp(function, sent["x"], sent["v"]))


# end


@app.post("/evaluate/{function}")
async def evaluate(function: str, request: Request) -> Response:
    return body(workload.forward(function, torch.load(io.BytesIO(await request.body()))))


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
