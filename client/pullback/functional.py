"""torch.nn.functional's losses and activations, for tensors whose graph a server holds.

    loss = pb.functional.cross_entropy(model(x), target)
    loss.backward()

Losses have torch's arguments, names and defaults. Tensor arguments are Tensors, arrays, numbers or lists.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from pullback._operations import FUNCTIONS

#: torch's signatures. `*` divides tensor arguments from options.
_LOSSES = """
binary_cross_entropy(input, target, weight=None, *, reduction='mean')
binary_cross_entropy_with_logits(input, target, weight=None, *, reduction='mean', pos_weight=None)
cosine_embedding_loss(input1, input2, target, *, margin=0, reduction='mean')
cross_entropy(input, target, weight=None, *, ignore_index=-100, reduction='mean', label_smoothing=0.0)
ctc_loss(log_probs, targets, input_lengths, target_lengths, *, blank=0, reduction='mean', zero_infinity=False)
gaussian_nll_loss(input, target, var, *, full=False, eps=1e-06, reduction='mean')
hinge_embedding_loss(input, target, *, margin=1.0, reduction='mean')
huber_loss(input, target, *, reduction='mean', delta=1.0, weight=None)
kl_div(input, target, *, reduction='mean', log_target=False)
l1_loss(input, target, *, reduction='mean', weight=None)
linear_cross_entropy(input, linear_weight, target, *, linear_bias=None, weight=None, reduction='mean', ignore_index=None, label_smoothing=0.0)
margin_ranking_loss(input1, input2, target, *, margin=0, reduction='mean')
mse_loss(input, target, *, reduction='mean', weight=None)
multi_margin_loss(input, target, *, p=1, margin=1.0, weight=None, reduction='mean')
multilabel_margin_loss(input, target, *, reduction='mean')
multilabel_soft_margin_loss(input, target, weight=None, *, reduction='mean')
nll_loss(input, target, weight=None, *, ignore_index=-100, reduction='mean')
poisson_nll_loss(input, target, *, log_input=True, full=False, eps=1e-08, reduction='mean')
smooth_l1_loss(input, target, *, reduction='mean', beta=1.0)
soft_margin_loss(input, target, *, reduction='mean')
triplet_margin_loss(anchor, positive, negative, *, margin=1.0, p=2, eps=1e-06, swap=False, reduction='mean')
triplet_margin_with_distance_loss(anchor, positive, negative, *, margin=1.0, swap=False, reduction='mean')
"""  # noqa: E501
#: Tensor arguments that stand among the options.
_LATE_TENSORS = frozenset({"weight", "pos_weight", "linear_bias"})
_ACTIVATIONS = ("relu", "softplus", "silu", "gelu", "sigmoid", "tanh", "softmax", "log_softmax")


def _loss(line: str) -> Callable[..., Any]:
    name, _, arguments = line.rstrip(")").partition("(")
    positional, _, keywords = arguments.partition(" *,")
    parameters = [
        *_parameters(positional, inspect.Parameter.POSITIONAL_OR_KEYWORD),
        *_parameters(keywords, inspect.Parameter.KEYWORD_ONLY),
    ]
    signature = inspect.Signature(parameters)
    tensors = {one.name for one in parameters if one.kind is not one.KEYWORD_ONLY} | _LATE_TENSORS

    def loss(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = {key: value for key, value in bound.arguments.items() if value is not None}
        return _run(name, {key: given.pop(key) for key in list(given) if key in tensors}, given)

    loss.__name__ = loss.__qualname__ = name
    loss.__doc__ = f"torch.nn.functional.{name}, run on the server. Returns a Tensor."
    loss.__signature__ = signature  # type: ignore[attr-defined]
    return loss


def _parameters(text: str, kind: Any) -> Iterator[inspect.Parameter]:
    for one in filter(None, map(str.strip, text.split(","))):
        name, _, default = one.partition("=")
        yield inspect.Parameter(name, kind, default=ast.literal_eval(default) if default else inspect.Parameter.empty)


def _run(name: str, tensors: dict[str, Any], options: dict[str, Any]) -> Any:
    from pullback._apply import Arguments, choose_session, run
    from pullback._loss import Loss
    from pullback._tensor import Tensor

    session = choose_session([one for one in tensors.values() if isinstance(one, Tensor)])
    arguments = Arguments(session)
    operands = {key: arguments.operand(value, f"{name}: {key}") for key, value in tensors.items()}
    first = next(iter(operands))
    inputs = {first: operands.pop(first)}
    ((_, made),) = run(session, arguments, Loss(name, **options), inputs, targets=operands)
    return made


for _line in _LOSSES.strip().splitlines():
    _made = _loss(_line)
    globals()[_made.__name__] = _made
for _name in _ACTIVATIONS:
    globals()[_name] = FUNCTIONS[_name]

__all__ = sorted([*(_line.partition("(")[0] for _line in _LOSSES.strip().splitlines()), *_ACTIVATIONS])


def __getattr__(name: str) -> Callable[..., Any]:
    raise AttributeError(
        f"pullback.functional has no {name!r}; it has {', '.join(__all__)}; operations are methods of tensors"
    )
