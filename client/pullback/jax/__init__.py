"""A hosted model as a JAX function: grad, jvp, hessian, jit, vmap and their compositions work on it.

    import jax
    import pullback as pb
    from pullback.jax import remote_function

    energy = remote_function(pb.connect("localhost:8470").model("energy"))
    value, gradient = jax.jit(jax.value_and_grad(energy))(positions)

The one part of the client that needs jax.
"""

try:
    import jax as _jax  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("pullback.jax needs jax: pip install 'pullback[jax]'", name="jax") from error

from pullback.jax._function import RemoteFunction, remote_function

__all__ = ["RemoteFunction", "remote_function"]
