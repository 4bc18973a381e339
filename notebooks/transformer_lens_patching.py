# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # TransformerLens' patching on a diffusion transformer
#
# `transformer_lens.patching` takes a model and tokens. `model.at(step)` is such a model: one step
# of one generation, hooks under canonical names, and "tokens" that are row numbers. Everything
# below is TransformerLens' own code, unmodified.

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
from transformer_lens import patching

from dit_lens import Intervention, sweep
from dit_lens.intervene.interventions import Replace
from hooked_models import HookedTextToImage

SMALL = bool(os.environ.get("DIT_LENS_SMALL"))  # the test suite runs small settings

model = HookedTextToImage.from_pretrained("rte-nano" if SMALL else "rte-micro")
clean, corrupted = "red circle is above blue square", "red circle is below blue square"
layers, heads = range(model.cfg.n_layers), range(model.cfg.n_heads)
up = torch.linspace(1, -1, 128)[:, None]


# [batch channel row column] -> [batch]: red's height above blue's, in the picture that the latents
# say
def height(x0):
    picture = model.decode(x0)
    return ((picture[:, 0] - picture[:, 2]) * up).mean(dim=(1, 2))


# %% [markdown]
# The view returns the step's clean-image prediction (`returns="images"` would run every generation
# to its end).

# %%
with torch.no_grad():
    view, tokens = model.at(step=0, prompts=[clean, corrupted], seed=0, returns="x0")
    x0, _ = view.run_with_cache(tokens)
    above, below = height(x0)
print(
    "tokens:",
    tokens[:, :4].tolist(),
    "…; x0:",
    tuple(x0.shape),
    f"; height {above:+.3f} (above), {below:+.3f} (below)",
)

# %% [markdown]
# ## Denoising the corrupted prompt, head by head
#
# The clean run's z of one cross-attention head at a time is put into the corrupted run.

# %%
_, clean_cache = view.run_with_cache(tokens[:1])
with torch.no_grad():
    patched = patching.generic_activation_patch(
        view,
        tokens[1:],
        clean_cache,
        height,
        patching.layer_head_vector_patch_setter,
        "cross_z",
        ("layer", "head"),
        reduce="mean",
    )
share = (torch.as_tensor(patched) - below) / (above - below)  # 0: still below, 1: above
figure, ax = plt.subplots(figsize=(2.6, 3), layout="constrained")
drawn = ax.imshow(share, cmap="RdBu_r", vmin=-1, vmax=1)
ax.set(
    xlabel="head", ylabel="layer", xticks=heads, yticks=layers, title="share of the effect restored"
)
figure.colorbar(drawn)
plt.show()

# %% [markdown]
# ## The residual stream, by position
#
# Before a layer, at one image position at a time: where the relation is once it has been read.

# %%
with torch.no_grad():
    by_position = patching.get_act_patch_resid_pre(
        view, tokens[1:], clean_cache, lambda x0: height(x0).mean()
    )
restored = (torch.as_tensor(by_position) - below) / (above - below)
figure, axes = plt.subplots(1, len(layers), figsize=(1.4 * len(layers), 1.7), layout="constrained")
reach = restored.abs().max().item()
for layer, ax in zip(layers, axes, strict=True):
    ax.imshow(restored[layer].unflatten(0, (8, 8)), cmap="RdBu_r", vmin=-reach, vmax=reach)
    ax.set(xticks=[], yticks=[], title=f"before {layer}")
plt.show()

# %% [markdown]
# ## The same as one plan
#
# `dit_lens.sweep` knows what cells share, and makes them rows of a batch. Same numbers.

# %%
with torch.no_grad():
    _, whole = model.run_with_cache(
        clean,
        seed=0,
        steps=[0],
        names_filter=lambda name: name.endswith("cross_attn.hook_z"),
        num_steps=14,
    )
cells = sweep.grid(
    Intervention("blocks.*.cross_attn.hook_z", steps=0, branch="cond", action=Replace(whole)),
    layers=layers,
    heads=heads,
)
found = sweep.run(model, corrupted, 0, cells, {"height": sweep.Metric(height, on="x0")})
planned = found["height"].isel(prompt=0, seed=0).values.reshape(len(layers), len(heads))
print(
    "largest difference from TransformerLens' loop:",
    abs(planned - torch.as_tensor(patched).numpy()).max(),
)
