# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # The same experiment on another machine
#
# `remote.RemoteTextToImage` is a `HookedTextToImage` whose runs happen where the model is, through
# nnsight; names, hooks and interventions stay the same. What it reaches, how to host a model and
# what cannot be: `docs/remote.md`.

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
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", f"{wheel}[viz,remote]"], check=True
    )

# %% [markdown]
# ## Where the model runs
#
# `remote=False` opens it in this process, through nnsight as on a server; the address of a server
# that you host, such as `"http://127.0.0.1:8001"`, sends the same runs there, and the tests do.

# %%
import os

import matplotlib.pyplot as plt
import torch

from dit_lens import Intervention, Replace, prompts, readout, remote
from hooked_models import HookedTextToImage

STEPS = 2 if os.environ.get("DIT_LENS_SMALL") else 14  # the test suite runs small settings
far = remote.RemoteTextToImage("rte-micro", remote=False)
near = HookedTextToImage.from_pretrained("rte-micro")
prompt = "red circle is above blue square"

# %% [markdown]
# ## A cache travels, and equals the local one
#
# Narrow names and steps: whole tensors are sent back.

# %%
run = {"seed": 0, "num_steps": STEPS}
some = {"names_filter": "blocks.2.cross_attn.hook_z", "steps": [0, 1]}
images, cache = far.run_with_cache(prompt, **run, **some)
with torch.no_grad():
    expected, local = near.run_with_cache(prompt, **run, **some)
print("largest difference of the image:", (images - expected).abs().max().item())
for name in local:
    print(name, tuple(cache[name].shape), (cache[name] - local[name]).abs().max().item())

# %% [markdown]
# ## A head that no longer sees a word
#
# An `Intervention` is data: it is resolved here, and acts there.

# %%
hide = Intervention(
    "blocks.2.cross_attn.hook_pattern",
    heads=[2],
    tokens=prompts.word("above"),
    action="knockout",
)
hidden = far.run_with_hooks(prompt, **run, fwd_hooks=hide.hooks(far, prompt, num_steps=STEPS))
print("pixels move by", (hidden - images).abs().mean().item())

# %% [markdown]
# ## A map that is summed there
#
# Patterns are many numbers, and one map is few: only the map comes back.

# %%
maps = readout.heatmap(far, prompt, "above", by=["layer", "head"], **run)
picture = maps.sel(layer=2, head=2).squeeze()
figure, axes = plt.subplots(1, 3, figsize=(5.4, 2), layout="constrained")
axes[0].imshow(images[0].permute(1, 2, 0))
axes[1].imshow(picture, cmap="magma")
axes[2].imshow(hidden[0].permute(1, 2, 0))
for ax, title in zip(axes, ("image", "L2H2 reads 'above'", "without"), strict=True):
    ax.set_title(title, fontsize=8)
    ax.axis("off")
plt.show()

# %% [markdown]
# ## Activation patching in one request
#
# The clean run, the corrupt run and the patched runs are one trace: values of the clean run
# (`remote.CLEAN`) never leave the server.

# %%
corrupt = "red circle is below blue square"
heads = {
    name: [
        Intervention(f"blocks.{name[1]}.cross_attn.hook_z", heads=[int(name[3])], action=swap)
        for swap in [Replace(remote.CLEAN)]
    ]
    for name in ("L1H0", "L2H1", "L2H2")
}
found = far.patch(prompt, corrupt, heads, **run)
for name, image in found.items():
    print(
        name, "moves pixels of the corrupt image by", (image - found["corrupt"]).abs().mean().item()
    )
