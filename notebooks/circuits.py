# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # The circuit of a relation: from a word to two places
#
# After Wang, Fan, Pan, *Circuit Mechanisms for Spatial Relation Generation in Diffusion
# Transformers* (arXiv 2601.06338): a *relation head* turns "above" into a label on image positions,
# and an *object head* reads that label to put each object there. Here on the bundled `rte-micro`;
# `python -m recipes.relation_heads` and `recipes.object_heads` have more images and controls.

# %% [markdown]
# Without the library, such as on Colab: there is no public address to install it from yet, so
# upload this notebook and the wheel that `python -m build` makes; the next cell installs it.

# %%
import importlib.util
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("dit_lens") is None:
    wheel = next(Path().glob("dit_lens-*.whl"), None) or sys.exit("Upload the wheel first.")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"{wheel}[viz]"], check=True)

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import torch

from dit_lens import ablation, circuits, scenes, screening, synopsis, viz
from hooked_models import HookedTextToImage

SMALL = bool(os.environ.get("DIT_LENS_SMALL"))  # the test suite runs small settings
SCENES, STEPS = (4, 2) if SMALL else (48, 14)

model = HookedTextToImage.from_pretrained("rte-micro")
prompt = "red circle is above blue square"

# %% [markdown]
# ## 1. Relation heads, from weights alone
#
# Cross-attention reads the residual stream without a norm, so "position code × word" is an exact
# term of every attention score. A relation head's term is a ramp along the word's direction.
# `cosine` compares with the ramp (negative: the head looks away from where the word points, so it
# marks where the *other* object goes), `p` with random directions and shuffled positions.

# %%
words = ("above", "below", "left", "right", "upper", "lower", "higher")
ranking = screening.screen_heads(
    model.dit, {word: screening.word_vector(model, word) for word in words}
)
ranking.head(6).round(3)

# %%
found = ranking[(ranking["cosine"].abs() >= 0.5) & (ranking["p"] <= 0.01)]
heads = [f"L{row.layer}H{row.head}" for row in found.itertuples()]
shown = ("above", "below", "left", "right")
figure, axes = plt.subplots(2, 4, figsize=(6, 3.2), layout="constrained")
for head, row in zip(heads[:2], axes, strict=True):
    maps = [
        circuits.position_word_map(model.dit, head, screening.word_vector(model, word))
        for word in shown
    ]
    for word, values, ax in zip(shown, maps, row, strict=True):
        viz.bare(ax).imshow(values - values.mean(), cmap="RdBu_r")
        ax.set_title(f"{head} × {word}", fontsize=8)
plt.show()

# %% [markdown]
# ## 2. They are at work at the first step
#
# Before there is anything to see, positions already differ in how much of the relation word they
# read.

# %%
with torch.no_grad():
    _, cache = model.run_with_cache(
        prompt,
        seed=0,
        num_steps=STEPS,
        names_filter=lambda name: name.endswith("cross_attn.hook_pattern"),
    )
at = model.to_str_tokens(prompt).index("▁above")
steps = sorted({0, 1, STEPS // 2, STEPS - 1})
figure, axes = plt.subplots(
    2, len(steps), figsize=(1.5 * len(steps), 3), layout="constrained", squeeze=False
)
for head, row in zip(heads[:2], axes, strict=True):
    layer, number = circuits.parse_head(head)
    for step, ax in zip(steps, row, strict=True):
        seen = cache["pattern", layer, "cross_attn", step][0, number, :, at].unflatten(0, (8, 8))
        viz.bare(ax).imshow(seen, vmin=0, vmax=1, cmap="magma")
        ax.set_title(f"{head}, step {step}", fontsize=8)
plt.show()

# %% [markdown]
# ## 3. Take them away
#
# The relation words are hidden from the heads (masked before the softmax, so other words get their
# share), for the same scenes from the same noise. Controls: as many random heads of the same
# layers, and random words. One head alone hardly matters here, since the model has several.

# %%
wanted = scenes.sample(SCENES, seed=1, split="all", color_words="both")
conditions = {
    heads[0]: ablation.knockout_role("relation", heads[0]),
    "all found": ablation.knockout_role("relation", heads),
}
effects = ablation.ablation_effects(
    model, wanted, conditions, np.arange(SCENES)[:, None], controls=1, num_steps=STEPS
)
effects["relation_loose_effect"].to_pandas().round(3)

# %% [markdown]
# ## 4. Object heads
#
# Which heads read an object's own shape word where that object is, rather than the other's? The
# synopsis sums attention over groups of image and text positions while images are made; no pattern
# is ever stored.

# %%
texts, seeds = [scenes.caption(scene) for scene in wanted], list(range(SCENES))
with torch.no_grad():
    images = model(texts, seeds, STEPS)
groups = synopsis.image_groups_from_images(images, wanted, (8, 8))
seen = synopsis.attention_synopsis(
    model, texts, seeds, image_groups=groups, reduce="mean", num_steps=STEPS
)
own = seen.sel(branch="cond", image_group="object2", text_group="shape2") - seen.sel(
    branch="cond", image_group="object2", text_group="shape1"
)
by_head = own.mean(("prompt", "step"), skipna=True).to_pandas()
by_head.round(2)

# %% [markdown]
# The strongest of them *after* the relation heads: its map of a shape word is flat over positions,
# until what the relation heads write is added to the position code. From weights, and one prompt's
# text.

# %%
senders = [head for head in heads if circuits.parse_head(head)[0] <= 2]
ranked = by_head.stack().sort_values(ascending=False)
receiver = next(
    (layer, head)
    for layer, head in ranked.index
    if layer > max(circuits.parse_head(h)[0] for h in senders)
)
maps = circuits.two_head_maps(model, prompt, senders, receiver)
figure, axes = plt.subplots(2, 2, figsize=(4, 3.8), layout="constrained")
reach = float(abs(maps["composed"].sel(text_pos=[1, 5])).max())
for column, position in enumerate((1, 5)):  # "circle", "square"
    for row, which in enumerate(("alone", "composed")):
        ax = viz.bare(axes[row][column])
        ax.imshow(maps[which][position], vmin=-reach, vmax=reach, cmap="RdBu_r")
        ax.set_title(
            f"L{receiver[0]}H{receiver[1]} × {maps.token.values[position]}, {which}", fontsize=8
        )
plt.show()

# %% [markdown]
# ## 5. Does the object head carry shapes?
#
# Both shape words hidden from it, and from the four strongest such heads.

# %%
strongest = [f"L{layer}H{head}" for layer, head in ranked.index[:4]]
conditions = {
    f"L{receiver[0]}H{receiver[1]}": ablation.knockout_role(
        ("shape1", "shape2"), f"L{receiver[0]}H{receiver[1]}"
    ),
    ", ".join(strongest): ablation.knockout_role(("shape1", "shape2"), strongest),
}
effects = ablation.ablation_effects(
    model, wanted, conditions, np.arange(SCENES)[:, None], controls=1, num_steps=STEPS
)
effects["shape_effect"].to_pandas().round(3)
