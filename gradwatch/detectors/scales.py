"""The size of each layer's weights against that of its peers: one layer may begin far too large or too small."""

from __future__ import annotations

import math

import numpy as np

from gradwatch.detectors.base import RunContext
from gradwatch.detectors.memory import FloatArray, Kept, Mask, PerLayer, Remembers
from gradwatch.detectors.trend import median

#: Layers whose weights multiply a signal and are initialised in proportion to its width; no embeddings, no norms.
KINDS = ("Linear", "Conv", "Dense")
#: Fewer peers than this are no measure.
LEAST_PEERS = 3
#: How many times as large, or as small, as its peers a layer must be to stand out, and when it no longer does.
#: Output layers of policies begin 140 times smaller on purpose.
LARGE, STILL_LARGE = 30.0, 10.0
SMALL, STILL_SMALL = 1000.0, 30.0
#: Large weights matter where updates change them so many times less than those of the peers.
UNMOVED = 10.0
#: Weights that were too small have come back when they are within this factor, or when the loss has fallen.
ALIKE = 3.0


class Scales(Remembers):
    """The layer whose weights are out of scale, if any.

    The scale of a layer is the root mean square of its weights times the square root of their inputs: what a variance
    scaling initialisation (Glorot, He) makes alike in all layers.

    Attributes:
        scale: Of each layer at the last sample, shape (l,); NaN where the layer has none.
        odd: Name of the layer that stands out; empty where none does.
        factor: Its scale over the usual one.
        usual: The median scale; NaN with fewer than four layers.
    """

    scale = PerLayer(math.nan)
    odd = Kept("")
    factor = Kept(1.0)
    usual = Kept(math.nan)

    def prepare(self, context: RunContext) -> None:
        """See `Remembers.prepare`."""
        output = -1 if context.framework.startswith("keras") else 0
        is_matrix = [len(p.shape) >= 2 and p.size > 0 and any(k in p.kind for k in KINDS) for p in context.parameters]
        self._matrices: Mask = np.array(is_matrix, dtype=bool)
        outputs = [p.shape[output] if m else 1 for p, m in zip(context.parameters, is_matrix, strict=True)]
        self._per_output: FloatArray = 1 / np.sqrt(np.array(outputs, dtype=np.float64))

    def add(self, weights: FloatArray, ratios: FloatArray, *, is_learning: bool) -> None:
        """Take the sampled norms of the parameters, the update ratio of each layer, and whether the loss has fallen."""
        known = self._matrices & (weights > 0) & np.isfinite(weights)
        places, layers = self.context.layers.of_parameter[known], len(self.context.layers)
        self.scale = np.full(layers, math.nan)
        np.fmax.at(self.scale, places, weights[known] * self._per_output[known])
        peers = np.flatnonzero(~np.isnan(self.scale))
        if len(peers) <= LEAST_PEERS:
            self.odd, self.factor = "", 1.0
            return
        self.usual = median(self.scale[peers])
        factors = np.log(self.scale[peers] / self.usual)
        place = int(np.argmax(np.abs(factors)))
        layer, factor = int(peers[place]), float(np.exp(factors[place]))
        name = self.context.layers.names[layer]
        large, small = (STILL_LARGE, STILL_SMALL) if name == self.odd else (LARGE, SMALL)
        if name == self.odd and not is_learning:
            small = ALIKE
        is_small, is_large = factor * small < 1, factor > large
        stands_out = is_small or (is_large and ratios[layer] * UNMOVED < median(ratios[peers]))
        self.odd, self.factor = (name, factor) if stands_out else ("", 1.0)
