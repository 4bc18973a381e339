# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Look inside a generation
#
# `model.run_with_cache` on a whole image generation: every denoising step, both guidance branches,
# by TransformerLens' names.

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
import torch

from hooked_models import HookedTextToImage

STEPS = 3 if os.environ.get("DIT_LENS_SMALL") else 14  # the test suite runs small settings

# bundled; a pipeline folder or a hub id does as well
model = HookedTextToImage.from_pretrained("rte-micro")
prompt = "red circle is above blue square"
with torch.no_grad():
    images, cache = model.run_with_cache(prompt, seed=0, num_steps=STEPS)
cache

# %% [markdown]
# Names within one denoiser call are TransformerLens' own, `cross_attn` beside `attn`; over a
# generation they begin with the step and the branch. There is a shorthand, and there are stacks.

# %%
names = list(model.hook_dict)
print(len(names), "names, such as", *names[:: len(names) // 6], sep="\n  ")
print(
    cache["steps.0.cond.blocks.2.cross_attn.hook_pattern"].shape, "[batch head image_pos text_pos]"
)
print(
    torch.equal(
        cache["pattern", 2, "cross_attn", 0], cache["steps.0.cond.blocks.2.cross_attn.hook_pattern"]
    )
)
print(
    cache.stack("pattern", layer=2, sublayer="cross_attn").shape,
    "[step batch head image_pos text_pos]",
)

# %% [markdown]
# ## What the model believes at each step
#
# `hook_x0` is the clean image that it predicts there. The layout is decided at the first step.

# %%
figure, axes = plt.subplots(1, STEPS + 1, figsize=(0.9 * (STEPS + 1), 1.2), layout="constrained")
for step, ax in enumerate(axes):
    with torch.no_grad():
        picture = images if step == STEPS else model.decode(cache[f"steps.{step}.hook_x0"])
    ax.imshow(picture[0].permute(1, 2, 0))
    ax.set_title("image" if step == STEPS else f"x0, {step}", fontsize=7)
    ax.axis("off")
plt.show()

# %% [markdown]
# ## Which word each head reads, and where
#
# Attention of layer 2's three heads at the first step, one map a word. Head 2 reads "above" in the
# upper half of an image that is still pure noise: it is a relation head. Head 1 reads it in the
# lower half.

# %%
tokens = model.to_str_tokens(prompt)
pattern = cache["pattern", 2, "cross_attn", 0][0].unflatten(1, (8, 8))  # [head row column text_pos]
figure, axes = plt.subplots(3, len(tokens), figsize=(1.0 * len(tokens), 3.3), layout="constrained")
for head, row in enumerate(axes):
    for position, ax in enumerate(row):
        ax.imshow(pattern[head, :, :, position], vmin=0, vmax=1, cmap="magma")
        ax.set(
            xticks=[],
            yticks=[],
            title=tokens[position] if head == 0 else "",
            ylabel=f"L2H{head}" if position == 0 else "",
        )
plt.show()

# %% [markdown]
# ## The residual stream is a sum
#
# What attention, cross-attention and MLPs write is cached behind its gate, so the parts add up to
# the stream exactly. `cache.at(step)` is a TransformerLens `ActivationCache`, and its tools work.

# %%
of_step = cache.at(step=0)
parts, labels = of_step.decompose_resid(layer=-1, return_labels=True)
print("largest error of the sum:", (parts.sum(0) - of_step["resid_post", -1]).abs().max().item())
figure, ax = plt.subplots(figsize=(6, 2.2), layout="constrained")
ax.bar(labels, parts.norm(dim=-1).mean(dim=(1, 2)))
ax.tick_params(axis="x", rotation=90, labelsize=7)
ax.set(ylabel="mean norm", yscale="log")
plt.show()

# %% [markdown]
# ## Change something
#
# A hook may return a new value, or write in place. A fork of a trajectory at any step is exactly a
# full rerun.


# %%
# [batch image_pos head d_head]; hook.step, hook.branch, hook.layer() say where
def silence(z, hook):
    z[:, :, 1] = 0


with torch.no_grad():
    changed = model.run_with_hooks(
        prompt,
        seed=0,
        num_steps=STEPS,
        fwd_hooks=[("steps.0.cond.blocks.2.cross_attn.hook_z", silence)],
    )
    run = model.trajectory(prompt, seed=0, num_steps=STEPS)
    forked = run.fork(STEPS // 2, []).images
print("L2H1 silenced at step 0 moves pixels by", (changed - images).abs().mean().item())
print("a fork without hooks is the run itself:", torch.equal(forked, run.images))
