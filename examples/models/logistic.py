"""Ridge-penalised logistic regression as a function of its weights.

Serve it with: pullback-server serve examples/models/logistic.py
"""

import torch

from pullback_server import model, spec


@model(
    "logistic",
    inputs={
        "weights": spec("float64", ["features"]),
        "data": spec("float64", ["rows", "features"]),
        "labels": spec("float64", ["rows"]),
    },
)
def logistic(weights: torch.Tensor, data: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of labels 0 and 1, with a ridge of 1/1000."""
    logits = data @ weights
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    return loss + 5e-4 * weights.square().sum()
