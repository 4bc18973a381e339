"""Questions to ask of a hooked text-to-image model. See `hooked_models` for the models.

Names are imported on first use, so that `dit-lens --help` need not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hooked_models.lazy_imports import attach, redirect

if TYPE_CHECKING:
    from . import planted, readout, remote, stats, store, sweep, viz
    from . import task as scenes
    from .graph import attribution, faithfulness
    from .graph import path_patching as patching
    from .intervene import ablation, blocks, steering
    from .intervene.interventions import Add, Intervention, Replace, Scale
    from .readout import circuits, screening, synopsis
    from .task import detection, evaluation
    from .text import prompts, variance

__all__ = [
    "Add",
    "Intervention",
    "Replace",
    "Scale",
    "ablation",
    "attribution",
    "blocks",
    "circuits",
    "detection",
    "evaluation",
    "faithfulness",
    "patching",
    "planted",
    "prompts",
    "readout",
    "remote",
    "scenes",
    "screening",
    "stats",
    "steering",
    "store",
    "sweep",
    "synopsis",
    "variance",
    "viz",
]

_MODULES = {
    "ablation": "intervene.ablation",
    "attribution": "graph.attribution",
    "blocks": "intervene.blocks",
    "circuits": "readout.circuits",
    "detection": "task.detection",
    "evaluation": "task.evaluation",
    "faithfulness": "graph.faithfulness",
    "patching": "graph.path_patching",
    "prompts": "text.prompts",
    "scenes": "task",
    "screening": "readout.screening",
    "steering": "intervene.steering",
    "synopsis": "readout.synopsis",
    "variance": "text.variance",
}
"""Public module → where it is."""

__getattr__, __dir__ = attach(
    __name__,
    {
        **_MODULES,
        **{
            name: name
            for name in ("planted", "readout", "remote", "stats", "store", "sweep", "viz")
        },
        **{
            name: f"intervene.interventions:{name}"
            for name in ("Add", "Intervention", "Replace", "Scale")
        },
    },
)

redirect(
    __name__,
    {
        **_MODULES,
        "edge_graph": "graph.edge_graph",
        "edits": "intervene.edits",
        "group_attention": "readout.group_attention",
        "image_groups": "task.image_groups",
        "interventions": "intervene.interventions",
        "nodes": "graph.nodes",
        "paired_runs": "runs.gradients",
        "repeated_runs": "runs.repeated_runs",
        "scenes.evaluation": "task.evaluation",
        "scenes.rendering": "task.rendering",
        "scenes.sampling": "task.sampling",
        "scenes.scene": "task.scene",
        "scenes.templates": "task.captions",
        "scenes.trios": "task.trios",
        "shards": "store",
        "shipped": "intervene.portable_ops",
        "sweep.treatments": "sweep.conditions",
        "training.caption_grammar": "training.t5.grammar",
        "training.text_encoder": "training.t5.pretrain",
        "training.text_probes": "text.probes",
        "verification": "graph.verification",
    },
)
