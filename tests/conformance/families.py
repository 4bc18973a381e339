"""Write docs/families.md, families × tools, from the tests of every family: `python -m
tests.conformance.families`.

A column is a test of `test_every_family*`, a row one of the tiny pipelines that it runs on, and a
number the reason why a family cannot have a tool, which the test expects to be raised or to hold.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

from hooked_models import families

from ..hooked_models.tiny_pipelines import PIPELINES
from . import family_cases as cases
from . import test_every_family as tests
from . import test_every_family_calls as calls
from . import test_every_family_experiments as experiments
from . import test_every_family_paths as paths
from . import test_every_family_weights as weights

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
TOOLS = {
    "images, inert hooks": tests.test_images_are_bitwise_the_pipelines_with_hooks_that_look,
    "bfloat16": tests.test_images_in_bfloat16_are_bitwise_the_pipelines,
    "branches": tests.test_both_branches_make_up_the_guided_output,
    "residual streams": tests.test_a_block_scaled_by_a_torch_hook,
    "heads": tests.test_a_head_switched_off_by_a_torch_hook,
    "forks": tests.test_a_fork_is_bitwise_a_full_run,
    "caches": tests.test_a_cache_has_what_the_transformer_returns,
    "one branch alone": tests.test_an_edit_stays_in_its_branch,
    "identity edits": tests.test_identity_edits_change_nothing,
    "every action": tests.test_every_action,
    "words": tests.test_a_word_knocked_out,
    "sweeps": tests.test_a_sweeps_cell_is_a_run_of_its_own,
    "workers": experiments.test_a_clusters_worker_gives_cells_as_alone,
    "unequal prompts": experiments.test_prompts_of_unequal_length_are_as_alone,
    "search": experiments.test_a_searchs_scores_and_effects,
    "ablation": experiments.test_ablations_by_hand,
    "ablation_effects": experiments.test_ablation_effects_are_those_of_runs_with_hooks,
    "estimates": tests.test_an_estimate_is_the_size_of_the_cache,
    "heads=, patterns=": tests.test_chosen_heads_and_summaries_are_those_of_the_whole_cache,
    "out=": tests.test_a_cache_on_disk_is_the_one_in_memory,
    "at(step)": tests.test_transformer_lens_patches_a_view_of_one_step,
    "bind": calls.test_transformer_lens_patches_one_call,
    "paths in a call": calls.test_paths_and_scores_of_one_call,
    "gradients": tests.test_gradients_are_autograds,
    "attribution": tests.test_attribution_is_first_order_patching,
    "path patching": tests.test_a_path_patch_is_the_patch_by_hand,
    "direct paths": paths.test_a_direct_path_is_that_of_torchs_hooks,
    "edges": paths.test_edges_between_blocks,
    "sums of paths": paths.test_direct_effects_add_up,
    "hook_text": paths.test_the_text_that_enters,
    "paths from text": paths.test_paths_from_the_text,
    "steering": paths.test_steering_in_text_space,
    "swaps and doses": experiments.test_relations_swapped_in_text_space,
    "screening, circuits of weights": weights.test_screening_and_circuits_of_weights,
    "synopsis": tests.test_a_synopsis_is_the_patterns_sums,
}
"""Column → the test that establishes it."""
INTRODUCTION = """# Every family and every tool

`HookedTextToImage.from_pipeline(pipe)` and `from_pretrained(folder or hub id)` open any of these pipelines; the same tools run on
all of them. The table is written from `tests/conformance/test_every_family*.py` (`python -m tests.conformance.families`): a ✓ is a
test that passes on a tiny random pipeline of the family, on a CPU in float32. No real weights were run.

- *images, inert hooks*, *bfloat16*: bitwise the plain pipeline's; GLM-Image's with the same image tokens, which are drawn for each
  row alone, and which the pipeline draws for one prompt so, for a batch from its first generator. *forks*: bitwise a full run with the same hooks.
- *residual streams*, *heads*: an `Intervention` equals the same edit made by a torch hook in diffusers' own module.
- *branches*: out = uncond + s · (cond − uncond); *one branch alone*: an edit of one leaves the other's prediction bitwise.
- *every action*, *words*: against functions and sums written out; *identity edits* change nothing.
- *sweeps*: a cell equals its own `run_with_hooks`. *workers*: also where a worker of a cluster (`executor="ray"`) has got the
  model and its cells through a pickle; FLUX.1 and Qwen-Image are swept on a Ray cluster as well. *unequal prompts*: and the run of its prompt alone.
- *search*: scores of `search` equal a change times autograd's slope, by hand.
- *ablation*: heads at a mean and hidden words equal hooks by hand. *ablation_effects*: each image is that of a run with hooks.
- *estimates*: bytes before a run equal those of its cache.
- *at(step)*, *bind*: TransformerLens' patching on one step, and on one denoiser call, over the positions of image, text or both.
  *paths in a call*: path patching and attribution between two calls.
- *steering*: vectors added to a word's text. *swaps and doses*: `swap_vectors` against means of the text that enters,
  `dose_response` against runs with these vectors.
- *gradients*: autograd through all later steps against finite differences.
- *attribution*, *path patching*, *paths from text*, *synopsis*: against gradients, patches and sums of patterns by hand.
- *direct paths*: one head with all else held, against torch's own hooks. *sums of paths*: direct effects add up to that of all at
  once, and to the whole difference of two runs where gates are equal.
- *edges*: between blocks, against the streams' scores as nodes, finite differences and exact patches.
- *screening, circuits of weights*: maps of positions and words, gains along an axis and head outputs, against the model's own
  scores; refused, with a reason that is tested too, where scores are not linear in the stream.
- *hook_text*: the text as it enters the denoiser, read and changed, against a hook on the transformer's arguments.
"""
PIXART = (
    "FLUX.3's is a modular pipeline in diffusers 0.42, whose own blocks run here one after the other; "
    "prompts are encoded as they are, without its upsampler.\n\n"
    "PixArt-α and PixArt-Σ have all of these and more (text encoders, edges, weights): "
    "[TransformerLens' tools](transformer_lens.md)."
)


NOT_OPENED = (
    "Text-to-image pipelines with a transformer that diffusers 0.42 lists in "
    "`AutoPipelineForText2Image`, and the first sentence of the error that opening one raises:"
)


def not_opened() -> list[str]:
    """A line for each of diffusers' pipelines whose transformer is of no known family."""
    found = []
    for pipeline in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values():
        part = inspect.signature(pipeline.__init__).parameters.get("transformer")
        if part is not None:
            try:
                families.check_known(inspect.formatannotation(part.annotation).rpartition(".")[2])
            except ValueError as error:
                found.append(f"`{pipeline.__name__}`: {str(error).partition('.')[0]}.")
    return sorted(found)


def page() -> str:
    """The page."""
    reasons: list[str] = []

    def cell(family: str, tool: str) -> str:
        reason = cases.UNABLE.get((family, tool))
        if reason is None:
            return "✓"
        reasons.extend([] if reason in reasons else [reason])
        return f"({reasons.index(reason) + 1})"

    rows = [["pipeline", *TOOLS], ["---"] * (len(TOOLS) + 1)]
    rows += [
        [name, *(cell(name, tool) for tool in TOOLS)]
        for name in PIPELINES
        if name not in cases.LEFT_OUT
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines += [
        "",
        *(f"({i}) {reason}." for i, reason in enumerate(reasons, start=1)),
        "",
        PIXART,
        "",
        "## In no family but PixArt",
        "",
    ]
    lines += [f"- {tool}: {reason}." for tool, (reason, _) in tests.NOWHERE.items()]
    lines += ["", "## Not opened", "", NOT_OPENED, ""]
    lines += [*(f"- {line}" for line in not_opened()), ""]
    return INTRODUCTION + "\n" + "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
