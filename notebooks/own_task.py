# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # A task of your own: train a model on it, and find its circuit
#
# `examples/inside.py` says what there is to draw: "red disc is inside blue box", "green box is
# bigger than red diamond", four colors, 64 pixels. Nothing of the package is edited. The training
# takes about nine minutes of one core; the cell goes on where it was stopped, and returns at once
# when the run is there.

# %% [markdown]
# Without the library, such as on Colab: there is no public address to install it from yet, so
# upload this notebook, the folder `examples` and the wheel that `python -m build` makes; the next
# cell installs it.

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
import tempfile

import matplotlib.pyplot as plt
import torch

ROOT = next(path for path in (Path.cwd(), *Path.cwd().parents) if (path / "examples").is_dir())
sys.path.insert(0, str(ROOT))

from dit_lens import evaluation, viz
from dit_lens.training import TrainConfig, train
from examples.inside import Inside
from examples.inside_circuit import Exchange, choose, measure, scenes
from hooked_models import HookedTextToImage

SMALL = bool(os.environ.get("DIT_LENS_SMALL"))  # the test suite runs small settings
STEPS, LOOKS, IMAGES, NUM_STEPS = (2, 2, 3, 2) if SMALL else (900, 24, 48, 14)

# %% [markdown]
# ## The task
#
# It samples scenes, says their prompts, renders and judges them.

# %%
task = Inside()
examples = task.sample(6, seed=5)
figure, axes = plt.subplots(1, 6, figsize=(8, 1.7), layout="constrained")
for ax, scene, image in zip(axes, examples, task.render(examples), strict=True):
    viz.bare(ax).imshow(image.permute(1, 2, 0))
    ax.set_title(task.prompt(scene).replace(" is ", " is\n", 1), fontsize=7)
plt.show()

# %% [markdown]
# ## Train

# %%
config = TrainConfig(
    Path(tempfile.mkdtemp()) / "run" if SMALL else ROOT / "runs/inside-notebook",
    "nano",
    steps=STEPS,
    decay_from=0.5,
    evaluation_scenes=32,
    dynamics_points=2,
)
model = HookedTextToImage.from_pretrained(train(config, task))

# %% [markdown]
# ## What it has learnt
#
# On scenes whose combinations were never trained, by relation, with 95 % intervals.

# %%
held_out = task.sample(IMAGES, seed=1, split="held_out")
with torch.no_grad():
    verdicts = evaluation.score(model, held_out, num_steps=NUM_STEPS, task=task)
rows = verdicts.to_dataframe().assign(asked=[scene.relation for scene in held_out])
evaluation.accuracies(rows, ["asked"], task.metrics).round(3)

# %% [markdown]
# ## Which heads decide what lies inside
#
# Some heads read the prompt with both objects exchanged, "blue box is inside red disc" for "red
# disc is inside blue box"; the others read the prompt. If the colors then lie the other way round,
# these heads decide. Heads are dropped from all nine, the least needed first, while nine tenths of
# what all turn is turned; then the set is measured on other prompts, of images that are as prompted
# without an exchange.

# %%
seen = scenes(LOOKS, seed=11)
heads = choose(Exchange(model, seen, NUM_STEPS))
others = scenes(IMAGES, seed=12, but=seen)
exchange = Exchange(model, others, NUM_STEPS)
table = measure(exchange, heads)
table.round(3)

# %% [markdown]
# The same noise and the same prompt: as it is, with the set exchanged, and with all other heads
# exchanged.

# %%
shown = min(6, IMAGES)
every = [f"L{layer}H{head}" for layer in range(3) for head in range(3)]
sets = {
    "as it is": [],
    "the set": heads,
    "all others": [head for head in every if head not in heads],
}
figure, grid = plt.subplots(3, shown, figsize=(8, 4), layout="constrained", squeeze=False)
for (name, some), line in zip(sets.items(), grid, strict=True):
    images = exchange.draw(some, slice(shown))
    for ax, image, scene in zip(line, images, others[:shown], strict=True):
        viz.bare(ax).imshow(image.permute(1, 2, 0))
        if name == "as it is":
            ax.set_title(task.prompt(scene).replace(" is ", " is\n", 1), fontsize=7)
    line[0].set_ylabel(name, fontsize=8)
plt.show()
