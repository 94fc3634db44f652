# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/)
#
# # Quickstart
#
# This notebook trains a diffusion model on 8×8 handwritten digits with the skip-step objective of
# [S²-DMs](https://arxiv.org/abs/2401.01520), samples it with ten network evaluations, and interpolates between
# digits. It takes a minute or two on two CPU cores.
#
# The outputs below are stored with the notebook, so you can read it without running anything.
#
# **In Colab**, the badge opens the list of notebooks on GitHub: enter the address of this repository and choose
# `colab/quickstart.ipynb`. Then paste the same address into the marked line of the next cell and run all cells.
# In a clone of the repository, the line stays empty.
#
# **On a GPU or TPU**, also set `EXTRAS` to `plot,cuda` or `plot,tpu` and `QUICK` to `False`. This trains with the
# settings of `configs/digits.py`: 1,400 steps at batch size 64 instead of 1,000 at batch size 16. Activations
# become bfloat16 and each batch is split over all devices; nothing else changes.

# %%
# @title Setup
# >>>>>> In Colab, edit this one line: the address of the repository, as `git clone` takes it. <<<<<<
REPOSITORY = ""  # @param {type: "string"}

# Optional, for a GPU or TPU.
EXTRAS = "plot"  # @param ["plot", "plot,cuda", "plot,tpu"]
QUICK = True  # @param {type: "boolean"}

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

if "google.colab" in sys.modules and not Path("configs").is_dir():
    if not Path("s2dm_jax").is_dir():
        if not REPOSITORY:
            raise SystemExit("REPOSITORY is empty: it must be the address of this project, as git clone takes it")
        subprocess.run(["git", "clone", "--quiet", "--depth=1", REPOSITORY, "s2dm_jax"], check=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet", f"./s2dm_jax[{EXTRAS}]"]
    subprocess.run(install, check=True)
    if "numpy" in sys.modules and sys.modules["numpy"].__version__ != importlib.metadata.version("numpy"):
        raise SystemExit("NumPy was replaced while in use: choose Runtime > Restart session and run this again")
    os.chdir("s2dm_jax")
roots = [folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "configs/digits.py").is_file()]
if not roots:
    raise SystemExit("configs/digits.py is not here or above: open this notebook inside a copy of the repository")
os.chdir(roots[0])
# Without this a kernel that holds a GPU leaves none of its memory to the commands below.
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
RUNS = f"runs/notebooks/{'quick' if QUICK else 'full'}"

# %% [markdown]
# ## Train
#
# One command trains the network, saves checkpoints and samples, and evaluates the result. The objective follows
# the colon in `digits.py:s2_10`: `ddpm`, `s2_10`, `sa_2` or `s2_10+sa_2`. Every field of
# `s2dm_jax/config/defaults.py` can be set on the command line, as the quick setting does here. To resume an
# interrupted run, rerun the same command. Once the run is complete, the command only prints its results.

# %%
RUN = f"{RUNS}/s2"
LENGTH = "--config.train.steps=1000 --config.train.batch_size=16" if QUICK else ""
SAMPLING = "--config.sample.sampler=unipc"
EVALUATION = "--config.eval.samplers=ddim,unipc --config.eval.nfe=10"
SHOWN = f"--config.train.sample_every=200 {SAMPLING} {EVALUATION}"
# !{sys.executable} -m s2dm_jax.main --config=configs/digits.py:s2_10 --workdir={RUN} {LENGTH} {SHOWN}

# %% [markdown]
# The table lists the Fréchet distance between 500 images and 500 held-out digits, in the features of a small
# digit classifier. It is not FID: other real digits (the floor) and noise (the ceiling) give the scale.
# [docs/evaluation.md](../docs/evaluation.md) describes FID and the other metrics,
# [docs/training.md](../docs/training.md) the files of a run. Two of them are plotted below, the logged metrics
# and the samples saved during training:

# %%
import json

import matplotlib.pyplot as plt
import numpy as np

import s2dm_jax
from s2dm_jax.common.images import image_grid
from s2dm_jax.data.datasets import load_digits
from s2dm_jax.inference import visualize

metrics = [json.loads(line) for line in Path(RUN, "metrics.jsonl").read_text().splitlines()]
grids = sorted(Path(RUN, "samples").glob("step_*.png"))
figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), width_ratios=(1.3, 1, 1, 1), layout="constrained")
axes[0].plot([m["step"] for m in metrics], [m["loss_simple"] for m in metrics])
axes[0].set(xlabel="training step", ylabel="L_simple, summed over 64 pixels", ylim=0, title="Loss")
for axis, path in zip(axes[1:], (grids[0], grids[2], grids[-1]), strict=True):
    axis.imshow(plt.imread(path), cmap="gray")
    axis.set_title(f"Samples after step {int(path.stem.split('_')[1]):,}")
    axis.set_axis_off()
plt.show()

# %% [markdown]
# ## Sample
#
# `load` reads the EMA weights of the newest checkpoint, and `sample` returns uint8 `[N, H, W, C]`. Image i of a
# seed is the same in any batch. Real digits are shown for comparison:

# %%
model = s2dm_jax.load(RUN)
images = model.sample(60, "unipc", nfe=10, seed=0)
figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for axis, shown, title in (
    (axes[0], load_digits().held_out[:60], "Real digits, held out"),
    (axes[1], images, f"{len(images)} samples, UniPC in 10 network evaluations"),
):
    axis.imshow(image_grid(shown, columns=10).squeeze(), cmap="gray", vmin=0, vmax=255)
    axis.set_title(title)
    axis.set_axis_off()
plt.show()

# %% [markdown]
# ## Sampling trajectories
#
# Each row shows the network's prediction of the clean image at each of the ten timesteps, from the noisiest to
# the sample itself:

# %%
strips = visualize.trajectory(model, range(4), sampler="unipc", nfe=10)
figure, axis = plt.subplots(figsize=(10, 4), layout="constrained")
axis.imshow(image_grid(strips.reshape(-1, *model.image_shape), columns=10).squeeze(), cmap="gray")
axis.set(title="Predictions of the image", xlabel="network evaluation")
axis.set_xticks((np.arange(10) + 0.5) * axis.get_images()[0].get_array().shape[1] / 10, range(1, 11))
axis.set_yticks([])
plt.show()

# %% [markdown]
# ## Interpolate
#
# UniPC, like DDIM, is deterministic: the sample is a function of the initial noise. Points on the great circle
# between two noise images give samples between two digits:

# %%
starts, ends = (0, 2, 4, 6), (1, 3, 5, 7)
rows = visualize.interpolate(model, starts, ends, 11, sampler="unipc", nfe=10)
figure, axis = plt.subplots(figsize=(11, 4), layout="constrained")
axis.imshow(image_grid(rows.reshape(-1, *model.image_shape), columns=11).squeeze(), cmap="gray")
axis.set(title="Between images 0 and 1, 2 and 3, 4 and 5, 6 and 7", xlabel="position on the great circle")
axis.set_xticks((np.arange(11) + 0.5) * axis.get_images()[0].get_array().shape[1] / 11, np.arange(11) / 10)
axis.set_yticks([])
plt.show()

# %% [markdown]
# ## Checks
#
# The samples must be much closer to real digits than noise is, and each interpolated row must start and end with
# the samples of its pair (up to one grey value, from rounding):

# %%
results = json.loads(Path(RUN, "results.json").read_text())
distance = {row["name"]: row["frechet_distance"] for row in results["rows"]}
assert distance["unipc, truncated_logsnr"] < distance["noise (ceiling)"] / 10, distance
assert np.abs(rows[:, [0, -1]].astype(int).reshape(images[:8].shape) - images[:8]).max() <= 1

# %% [markdown]
# ## Next steps
#
# - [compare_objectives.ipynb](compare_objectives.ipynb): what the skip-step and the sequence-aware term do.
# - [fast_sampling.ipynb](fast_sampling.ipynb): samplers at equal NFE, PyTorch weights, exporting a sampler.
# - The same command trains on CIFAR-10 (`configs/cifar10.py:s2_10`), CelebA, CelebA-HQ or your own folder of
#   images ([docs/data.md](../docs/data.md)). These need a GPU or TPU; only the config changes.
