"""Sinks: the numbers of a run, mirrored live into other tools. Off unless asked for; training never waits for one."""

from gradwatch.sinks.base import Sink, checked_sinks
from gradwatch.sinks.mlflow import MLflow
from gradwatch.sinks.prometheus import Prometheus
from gradwatch.sinks.tensorboard import TensorBoard
from gradwatch.sinks.wandb import WandB

__all__ = ["MLflow", "Prometheus", "Sink", "TensorBoard", "WandB", "checked_sinks"]
