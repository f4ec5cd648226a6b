"""Remedies for a torch model that a user applies by hand, or that the action `Restructure` applies."""

from gradwatch.remedies.initialization import initialize
from gradwatch.remedies.network import Change
from gradwatch.remedies.structure import insert_norm, mend_output, replace_activation

__all__ = ["Change", "initialize", "insert_norm", "mend_output", "replace_activation"]
