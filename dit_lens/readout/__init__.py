"""Reading a model: heat maps and heads, sinks and massive activations, text layers, dictionaries; weights and circuits.

from dit_lens import readout
maps = readout.heatmap(model, "red circle is above blue square", ["circle", "square"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hooked_models.lazy_imports import attach

if TYPE_CHECKING:
    from .concepts import concept_attention
    from .heat_maps import heatmap
    from .massive import massive_activations
    from .sinks import attention_sinks

__all__ = ["attention_sinks", "concept_attention", "heatmap", "massive_activations"]

__getattr__, __dir__ = attach(
    __name__,
    {
        "attention_sinks": "sinks:attention_sinks",
        "concept_attention": "concepts:concept_attention",
        "heatmap": "heat_maps:heatmap",
        "massive_activations": "massive:massive_activations",
    },
)
