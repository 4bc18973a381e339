"""Reading a model: heat maps and heads, sinks and massive activations, text layers, dictionaries; weights and circuits.

from dit_lens import readout
maps = readout.heatmap(model, "red circle is above blue square", ["circle", "square"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hooked_models.lazy_imports import attach

if TYPE_CHECKING:
    from .heat_maps import heatmap

__all__ = ["heatmap"]

__getattr__, __dir__ = attach(__name__, {"heatmap": "heat_maps:heatmap"})
