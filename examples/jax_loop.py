"""JAX without Keras: the compiled step returns the norms, `Watcher.observe` takes them."""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import gradwatch as gw

digits = load_digits()
x, y = jnp.asarray(digits.data / 16.0), jnp.asarray(digits.target)
first, second = jax.random.split(jax.random.key(0))
weights = {
    "hidden": {"kernel": jax.random.normal(first, (64, 32)) * 0.2, "bias": jnp.zeros(32)},
    "output": {"kernel": jax.random.normal(second, (32, 10)) * 0.2, "bias": jnp.zeros(10)},
}


def loss_of(weights, x, y):
    """Cross-entropy of a network with one hidden layer."""
    hidden = jax.nn.relu(x @ weights["hidden"]["kernel"] + weights["hidden"]["bias"])
    logits = hidden @ weights["output"]["kernel"] + weights["output"]["bias"]
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y])


@jax.jit
def step(weights, x, y):
    """One step of gradient descent, and the norm of each gradient."""
    loss, grads = jax.value_and_grad(loss_of)(weights, x, y)
    norms = jnp.stack([jnp.linalg.norm(grad) for grad in jax.tree.leaves(grads)])
    return jax.tree.map(lambda w, g: w - 0.5 * g, weights, grads), loss, norms


leaves = jax.tree.leaves_with_path(weights)
depth = {layer: i for i, layer in enumerate(weights)}
parameters = [
    gw.Parameter(f"{path[0].key}.{path[1].key}", shape=leaf.shape, layer=path[0].key, depth=depth[path[0].key])
    for path, leaf in leaves
]
with gw.Watcher(parameters, framework="jax", run_dir="runs/jax") as watcher:
    for rows in np.random.default_rng(0).integers(len(x), size=(60, 64)):
        weights, loss, norms = step(weights, x[rows], y[rows])
        watcher.observe(grad_norm=np.asarray(norms), loss=float(loss))

print(gw.load("runs/jax").summary())
