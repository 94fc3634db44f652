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
# # Fast sampling
#
# Samplers at equal NFE (number of function evaluations of the network), weights from and to PyTorch, and a
# sampler exported to one file that depends only on JAX: about two minutes on two CPU cores, less if
# [quickstart.ipynb](quickstart.ipynb) has trained the network.
#
# **On a GPU or TPU** set `EXTRAS` to `plot,cuda` or `plot,tpu` and `QUICK` to `False` in the next cell. The
# network is then trained with the settings of `configs/digits.py`, 1,400 steps of 64 images instead of 1,000
# of 16, and more samplers are compared at more NFE. A TPU belongs to one process at a time: that is why all
# commands come before the first line that computes in this notebook.

# %%
# @title Setup: Colab installs the package from its repository, elsewhere the installed one is used
REPOSITORY = ""  # @param {type: "string"}
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
# ## A trained network
#
# The run of [quickstart.ipynb](quickstart.ipynb): if that notebook has trained it, the same command only
# evaluates it.

# %%
RUN = f"{RUNS}/s2"
LENGTH = "--config.train.steps=1000 --config.train.batch_size=16" if QUICK else ""
SAMPLING = "--config.sample.sampler=unipc"
EVALUATION = "--config.eval.samplers=ddim,unipc --config.eval.nfe=10"
SHOWN = f"--config.train.sample_every=200 {SAMPLING} {EVALUATION}"
# !{sys.executable} -m s2dm_jax.main --config=configs/digits.py:s2_10 --workdir={RUN} {LENGTH} {SHOWN}

# %% [markdown]
# ## Samplers at equal network evaluations
#
# Nearly all time is spent in the network, so samplers are compared at equal *NFE*, not at equal steps: F-PNDM
# with S steps has an NFE of S + 9. `--mode=evaluate` takes several samplers and NFE; pairs that a sampler
# cannot run are skipped. Each sampler has the timestep spacing that suits it best.
# [docs/samplers.md](../docs/samplers.md) has their formulas.
#
# `analytic` (Analytic-DPM) draws noise at every step, with the variance that is optimal for the network. It
# follows from a statistic of the network that is estimated once, in the quick setting from 10 images per
# timestep, and stored with the run. [docs/covariance.md](../docs/covariance.md) describes it, and the trained
# variance heads of SN- and NPR-DPM.

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
# executes code in a file. A published DDIM checkpoint becomes a run, to sample from, to evaluate, or to
# continue training with either term:
#
# ```
# python scripts/convert.py ckpt.pth runs/celeba
# ```
#
# Here nothing is downloaded: the run above is written as such a file and read back. The published networks
# are recognised by their shapes; others need `--resolution`, the size of the images.
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
# `--mode=export` writes network, weights, timesteps and sampler to one file, for any batch size on CPU, CUDA
# and TPU.

# %%
# !{sys.executable} -m s2dm_jax.main --mode=export --workdir={RUN} --config.export.path={OUT}/sampler.npz \
#     --config.sample.sampler=unipc --config.sample.nfe=5

# %% [markdown]
# To use the file takes JAX, NumPy and these lines. (`s2dm_jax.load` reads it too, and then its weights can be
# sampled with any sampler.)

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
# The Fréchet distance of 500 samples to held-out digits in the features of a small classifier (not FID), and
# samples of each sampler from the same noise at 5 NFE. The last rows are from the imported weights and the
# reloaded file.

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

# %% [markdown] A multistep sampler reaches at 5 NFE what DDIM needs many more for. Such short training does
# not show how the samplers rank on photographs.
#
# The last cell checks that weights come back from PyTorch's format bit for bit, that the reloaded file gives
# the samples of the run (up to one grey value, from rounding), and that UniPC is ahead of DDIM at 5 NFE.

# %%
jax.tree.map(np.testing.assert_array_equal, imported.ema_params, model.ema_params)
assert np.abs(reloaded.astype(int) - samples["unipc, 5"]).max() <= 1
assert dict(curves["unipc"])[5] < dict(curves["ddim"])[5]
