"""`gradwatch.watch`: one line for any framework, by the type of the model."""

from __future__ import annotations

import sys
from typing import Any, Unpack

from gradwatch.errors import ModelError
from gradwatch.settings import Options, WatchOptions
from gradwatch.watcher import Watcher


def watch(model: Any, optimizer: Any = None, **settings: Unpack[WatchOptions]) -> Watcher:
    """Watch the training of a model.

    Records the gradient norm of every parameter at every optimizer step, looks for what goes wrong, and applies the
    actions that were asked for. Without actions the training stays bit-identical.

    Args:
        model: A `torch.nn.Module`, compiled or not, a DeepSpeed engine, or a Keras model.
        optimizer: One optimizer, a list of them, or None for every optimizer that holds parameters of the model.
        settings: `run_dir`, `actions`, `alerts`, `sinks`, `detectors` and the other fields of
            `gradwatch.watcher.Settings`; for PyTorch also `loss_fn`, a loss module whose output is the loss.

    Returns:
        A watcher, also a context manager. `log(loss=loss)` adds numbers, `close()` ends it.

    Raises:
        ModelError: The model or the optimizer cannot be watched.
        ConfigurationError: A setting breaks a rule.
        RunExistsError: There is a run at `run_dir`; say `resume=True` or `overwrite=True`.
        RunLockedError: Another process writes to `run_dir`.

    Examples:
        >>> import tempfile, torch
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with watch(model, optimizer, run_dir=tempfile.mkdtemp() + "/run") as watcher:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         loss = model(torch.ones(2, 3)).square().mean()
        ...         loss.backward()
        ...         optimizer.step()
        ...         watcher.log(loss=loss)
        >>> watcher.findings
        []
    """
    shared: Options = settings  # what only PyTorch knows, others refuse
    keras = sys.modules.get("keras")
    # On the PyTorch backend a Keras model is also a torch module, and may be trained by an optimizer of torch.
    if keras is not None and isinstance(model, keras.Model) and not hasattr(optimizer, "param_groups"):
        from gradwatch.integrations.keras_loop import watch_keras

        return watch_keras(model, optimizer, **shared)
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine):
        from gradwatch.integrations.deepspeed import DeepSpeedWatcher

        return DeepSpeedWatcher(model, **shared)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(model, torch.nn.Module):
        from gradwatch.integrations.torch_watch import watch_torch

        return watch_torch(model, optimizer, **settings)
    raise ModelError(f"'model' must be a torch.nn.Module or a Keras model: {type(model).__name__}")
