"""Measure and apply, per framework."""
