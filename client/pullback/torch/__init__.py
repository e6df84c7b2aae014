"""A hosted model as a torch module: its forward runs on the server, and gradients of any order flow through it.

    import pullback as pb
    from pullback.torch import RemoteModule

    client = pb.connect("localhost:8470")
    net = nn.Sequential(nn.Linear(8, 3), RemoteModule(client.model("small")), nn.Linear(2, 1))
    net(x).sum().backward()

`pullback.torch.func` has torch.func's transforms, each as stateless calls. The one part of the client that needs torch.
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("pullback.torch needs torch: pip install 'pullback[torch]'", name="torch") from error

from pullback.torch import func
from pullback.torch._module import RemoteModule

__all__ = ["RemoteModule", "func"]
