"""Readouts of heat maps, heads, sinks, massive activations, text layers, dictionaries, weights.

    from dit_lens import readout
    maps = readout.heatmap(model, "red circle is above blue square", ["circle", "square"])

Names are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hooked_models.lazy_imports import attach

if TYPE_CHECKING:
    from .concepts import concept_attention
    from .dictionaries import Dictionary, dictionary
    from .heat_maps import heatmap, text_attentions
    from .massive import massive_activations
    from .sinks import attention_sinks
    from .text_layers import diffusion_lens

__all__ = [
    "Dictionary",
    "attention_sinks",
    "concept_attention",
    "dictionary",
    "diffusion_lens",
    "heatmap",
    "massive_activations",
    "text_attentions",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "Dictionary": "dictionaries:Dictionary",
        "attention_sinks": "sinks:attention_sinks",
        "concept_attention": "concepts:concept_attention",
        "dictionary": "dictionaries:dictionary",
        "diffusion_lens": "text_layers:diffusion_lens",
        "heatmap": "heat_maps:heatmap",
        "massive_activations": "massive:massive_activations",
        "text_attentions": "heat_maps:text_attentions",
    },
)
