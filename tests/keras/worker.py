"""One worker of a TensorFlow training with several: `python -m tests.keras.worker INDEX PORTS RUN_DIR RESULT`.

`fit` of Keras 3 does not run under `MultiWorkerMirroredStrategy` (keras-team/keras#20585), so the loop is its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

STEPS, SHARE = 6, 2


def main(index: int, ports: str, run_dir: str, result: str) -> None:
    """Train on this worker's share of each batch; one of the batches is poisoned on worker 1 alone."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports.split(",")]}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})
    import keras
    import numpy as np
    import tensorflow as tf

    import gradwatch as gw
    from tests.keras.training import data, dense

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = dense(optimizer=keras.optimizers.SGD(0.05))
    optimizer = model.optimizer

    def replica(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y)) / strategy.num_replicas_in_sync
        grads = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
        optimizer.apply(grads, model.trainable_variables)
        return loss

    @tf.function  # type: ignore[untyped-decorator]  # TensorFlow has no types
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return strategy.reduce("SUM", strategy.run(replica, args=(x, y)), axis=None)

    x, y = data(STEPS * 2 * SHARE)
    if index == 1:
        y[3 * 2 * SHARE + SHARE] = np.nan
    actions = [gw.SkipStep(), gw.Clip(max_norm=0.5)]
    watcher = gw.watch(model, optimizer, run_dir=run_dir, actions=actions)
    for number in range(STEPS):
        mine = slice((2 * number + index) * SHARE, (2 * number + index + 1) * SHARE)
        watcher.log(loss=float(step(tf.constant(x[mine]), tf.constant(y[mine]))))
    watcher.close()
    findings = [[finding.rule, finding.first_step] for finding in watcher.findings]
    weights = [weight.tolist() for weight in model.get_weights()]
    Path(result).write_text(json.dumps({"weights": weights, "findings": findings, "errors": watcher.faults.messages}))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
