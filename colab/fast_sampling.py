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
# # Fast sampling
#
# This notebook compares samplers at equal NFE (number of function evaluations of the network), converts weights
# to and from PyTorch, and exports a sampler to a single file that depends only on JAX. It takes a few minutes
# on two CPU cores, less if [quickstart.ipynb](quickstart.ipynb) has already trained the network.
#
# The outputs below are stored with the notebook, so you can read it without running anything.
#
# **In Colab**, the badge opens the list of notebooks on GitHub: enter the address of this repository and choose
# `colab/fast_sampling.ipynb`. Then paste the same address into the marked line of the next cell and run all cells.
# In a clone of the repository, the line stays empty.
#
# **On a GPU or TPU**, also set `EXTRAS` to `plot,cuda` or `plot,tpu` and `QUICK` to `False`. This trains with the
# settings of `configs/digits.py`, 1,400 steps at batch size 64 instead of 1,000 at batch size 16, and compares
# more samplers at more NFE. Only one process can use a TPU, so all commands come before the first computation in
# this notebook.

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
# This is the run of [quickstart.ipynb](quickstart.ipynb). If that notebook has already trained it, the command
# only prints its results.

# %%
RUN = f"{RUNS}/s2"
LENGTH = "--config.train.steps=1000 --config.train.batch_size=16" if QUICK else ""
SAMPLING = "--config.sample.sampler=unipc"
EVALUATION = "--config.eval.samplers=ddim,unipc --config.eval.nfe=10"
SHOWN = f"--config.train.sample_every=200 {SAMPLING} {EVALUATION}"
# !{sys.executable} -m s2dm_jax.main --config=configs/digits.py:s2_10 --workdir={RUN} {LENGTH} {SHOWN}

# %% [markdown]
# ## Compare samplers at equal NFE
#
# Sampling spends nearly all its time in the network, so compare samplers at equal NFE, not at equal steps: F-PNDM
# with S steps has an NFE of S + 9. `--mode=evaluate` accepts several samplers and NFE and skips the pairs that a
# sampler cannot run. By default each sampler uses the timestep spacing that suits it best.
# [docs/samplers.md](../docs/samplers.md) has the formulas.
#
# `analytic` (Analytic-DPM) draws noise at every step, with the variance that is optimal for the network. It
# computes the variance from a statistic of the network, which is estimated once (in the quick setting from 10
# images per timestep) and stored with the run. [docs/covariance.md](../docs/covariance.md) describes it, and the
# trained variance heads of SN- and NPR-DPM.

# %%
SAMPLERS = "ddim,dpmpp_2m,unipc,analytic" if QUICK else "ddim,s_pndm,f_pndm,deis,dpmpp_2m,unipc,analytic"
NFE = "5,10" if QUICK else "5,10,20"
IMAGES = 10 if QUICK else 100
# !{sys.executable} -m s2dm_jax.main --mode=evaluate --workdir={RUN} \
#     --config.eval.samplers={SAMPLERS} --config.eval.nfe={NFE} --config.eval.noise_stat_images={IMAGES}

# %% [markdown]
# ## Import a PyTorch checkpoint
#
# `scripts/convert.py` reads the checkpoints of DDIM, SA-DPM, PNDM and diffusers without PyTorch, and never
# executes code in a file. It turns a published DDIM checkpoint into a run that you can sample, evaluate, or train
# further with either term:
#
# ```
# python scripts/convert.py ckpt.pth runs/celeba
# ```
#
# To avoid a download, the next cell writes the run above to such a file and reads it back. The published networks
# are recognised by their shapes; other networks need `--resolution`, the size of the images.
# [docs/weights.md](../docs/weights.md) lists all formats and checks.

# %%
import shutil

OUT = f"{RUNS}/exchange"
shutil.rmtree(OUT, ignore_errors=True)
Path(OUT).mkdir()
# !{sys.executable} scripts/convert.py {RUN} {OUT}/digits.pth
# !{sys.executable} scripts/convert.py {OUT}/digits.pth {OUT}/imported \
#     --resolution=8 --config=configs/digits.py:s2_10

# %% [markdown]
# ## Export a sampler
#
# `--mode=export` writes the network, its weights, the timesteps and the sampler to one file, for any batch size on
# CPU, CUDA and TPU:

# %%
# !{sys.executable} -m s2dm_jax.main --mode=export --workdir={RUN} --config.export.path={OUT}/sampler.npz \
#     --config.sample.sampler=unipc --config.sample.nfe=5

# %% [markdown]
# To use the file, you need JAX, NumPy and the lines below. (`s2dm_jax.load` reads it too, and can then sample its
# weights with any sampler.)

# %%
import jax
import numpy as np
from jax import export


def load_sampler(path):
    with np.load(path) as file:
        weights = {name[8:]: file[name] for name in file.files if name.startswith("weights/")}
        run = jax.jit(export.deserialize(bytearray(file["sampler"])).call)
    return lambda seed, indices: np.asarray(run(weights, seed, indices))


reloaded = load_sampler(f"{OUT}/sampler.npz")(np.int32(0), np.arange(16, dtype=np.int32))
reloaded = np.floor((np.clip(reloaded, -1, 1) + 1) * 127.5 + 0.5).astype(np.uint8)

# %% [markdown]
# ## Results
#
# Left: the Fréchet distance of 500 samples to held-out digits in the features of a small classifier (not FID).
# Right: samples of each sampler from the same noise at NFE 5. The last two rows use the imported weights and the
# exported file.

# %%
import json

import matplotlib.pyplot as plt

import s2dm_jax
from s2dm_jax.common.images import image_grid

model, imported = s2dm_jax.load(RUN), s2dm_jax.load(f"{OUT}/imported")
options = {"nfe": 5}
samples = {f"{name}, 5": model.sample(16, name, **options) for name in ("ddim", "analytic", "dpmpp_2m", "unipc")}
samples["unipc, imported"] = imported.sample(16, "unipc", **options)
samples["unipc, reloaded"] = reloaded
rows = json.loads(Path(RUN, "results.json").read_text())["rows"]

figure, axes = plt.subplots(1, 2, figsize=(13, 3.6), width_ratios=(1, 2), layout="constrained")
curves = {}
for row in rows[1:-1]:
    curves.setdefault(row["name"].split(",")[0], []).append((row["nfe"], row["frechet_distance"]))
for name, points in curves.items():
    axes[0].plot(*zip(*points, strict=True), "o-", label=name)
axes[0].axhline(rows[0]["frechet_distance"], color="grey", linestyle=":", label="real digits")
axes[0].set(xlabel="NFE", ylabel="Fréchet distance", ylim=0, title="500 samples")
axes[0].set_xticks(sorted({row["nfe"] for row in rows[1:-1]}))
axes[0].legend()
grid = image_grid(np.concatenate(list(samples.values())), columns=16)
axes[1].imshow(grid.squeeze(), cmap="gray", vmin=0, vmax=255)
axes[1].set_yticks((np.arange(len(samples)) + 0.5) * len(grid) / len(samples), samples)
axes[1].set(xticks=[], title="The same noise, 5 NFE")
plt.show()

# %% [markdown]
# The multistep samplers are ahead of DDIM, most at NFE 5. Such short training does not show how the samplers rank on
# photographs.
#
# ## Checks
#
# The weights must come back from PyTorch's format bit for bit, the exported file must give the samples of the run
# (up to one grey value, from rounding), and UniPC must be ahead of DDIM at NFE 5:

# %%
jax.tree.map(np.testing.assert_array_equal, imported.ema_params, model.ema_params)
assert np.abs(reloaded.astype(int) - samples["unipc, 5"]).max() <= 1
assert dict(curves["unipc"])[5] < dict(curves["ddim"])[5]
