"""Measurements of gradwatch; each file is a program: `python -m benchmarks.detection`."""
