# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Your model, your prompt
#
# From a model and a word to a map, a ranked table of heads and a causal check. The lines below run
# on a bundled model; put a folder or a hub id of FLUX, Stable Diffusion 3, Qwen-Image, SANA or
# PixArt in its place, and a prompt of your own. `docs/your_model.md` has the rest.

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

from dit_lens import Intervention, prompts, readout, sweep
from hooked_models import HookedTextToImage

SMALL = bool(os.environ.get("DIT_LENS_SMALL"))  # the test suite runs small settings

name, prompt, word = "rte-micro", "red circle is above blue square", "circle"
steps, seeds = (2, range(2)) if SMALL else (14, range(16))
model = HookedTextToImage.from_pretrained(name)

# %% [markdown]
# ## Which heads attend to the word, and where?
#
# Summed over steps while the model runs: a map for each layer and head is all that is kept.

# %%
maps = readout.heatmap(model, prompt, word, seed=0, num_steps=steps, by=["layer", "head"])
maps = maps.squeeze(["prompt", "word"], drop=True)
heads = maps.max(["y", "x"]).to_series().sort_values(ascending=False)
image = model(prompt, seed=0, num_steps=steps)[0]

figure, axes = plt.subplots(1, 5, figsize=(9, 2.1), layout="constrained")
axes[0].imshow(image.permute(1, 2, 0))
axes[1].imshow(maps.mean(["layer", "head"]), cmap="magma")
titles = ["image", f"all heads, “{word}”"]
for ax, (layer, head) in zip(axes[2:], heads.index[:3], strict=True):
    ax.imshow(maps.sel(layer=layer, head=head), cmap="magma")
    titles.append(f"L{layer}H{head}")
for ax, title in zip(axes, titles, strict=True):
    ax.set_title(title, fontsize=9)
    ax.axis("off")
plt.show()
heads.head(6)

# %% [markdown]
# ## Do they matter?
#
# A head that attends to a word need not matter to the image. So the word is hidden from the three
# heads, and from random sets of three others, which say what hiding anything does.

# %%
where = readout.text_attentions(model.dit)


def blind(layer, head):
    site = f"blocks.{layer}.{where[layer]}.hook_pattern"
    return Intervention(site, [head], prompts.word(word), action="knockout")


sets = {"first three": heads.index[:3]} | {
    f"random {draw}": heads.iloc[3:].sample(3, random_state=draw).index for draw in range(4)
}
edits = {name: [blind(*place) for place in places] for name, places in sets.items()}
moved = sweep.Metric(sweep.displacement, given=["baseline"])
found = sweep.run(
    model,
    prompt,
    seeds=seeds,
    interventions=edits,
    metrics={"moved": moved},
    num_steps=steps,
)
effect = found["moved_effect"].to_pandas()
effect

# %%
figure, ax = plt.subplots(figsize=(5, 2), layout="constrained")
mean = effect["mean"]
ax.errorbar(
    mean,
    range(len(mean)),
    xerr=[mean - effect["low"], effect["high"] - mean],
    fmt="o",
    color="tab:blue",
)
ax.set_yticks(range(len(mean)), mean.index)
ax.invert_yaxis()
ax.set_xlabel(f"how far the image moves when “{word}” is hidden")
plt.show()

# %% [markdown]
# ## The image without them

# %%
hooks = [
    hook for edit in edits["first three"] for hook in edit.hooks(model, prompt, num_steps=steps)
]
without = model.run_with_hooks(prompt, seed=0, num_steps=steps, fwd_hooks=hooks)[0]
figure, axes = plt.subplots(1, 2, figsize=(4, 2.1), layout="constrained")
for ax, picture, title in zip(axes, (image, without), ("image", "word hidden"), strict=True):
    ax.imshow(picture.permute(1, 2, 0))
    ax.set_title(title, fontsize=9)
    ax.axis("off")
plt.show()
