"""gradwatch: the flight recorder and autopilot of a training run."""

__version__ = "0.1.0"
