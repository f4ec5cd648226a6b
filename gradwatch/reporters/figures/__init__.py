"""Figures: each a function from what was measured to a matplotlib Figure, without pyplot."""

from gradwatch.reporters.figures.depth import depth_profile
from gradwatch.reporters.figures.distribution import distribution
from gradwatch.reporters.figures.heatmap import heatmap
from gradwatch.reporters.figures.ratio import update_ratio
from gradwatch.reporters.figures.remedy import before_after
from gradwatch.reporters.figures.saturation import saturation
from gradwatch.reporters.figures.timeline import timeline

__all__ = ["before_after", "depth_profile", "distribution", "heatmap", "saturation", "timeline", "update_ratio"]
