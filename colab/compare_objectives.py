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
# # Comparing the objectives
#
# This notebook compares plain training (`ddpm`), the skip-step term of
# [S²-DMs](https://arxiv.org/abs/2401.01520) (`s2`), the sequence-aware term of SA-DPM (Nguyen et al., AAAI 2024;
# `sa`), and a variant without training: rescaling the output of the plain network. It starts with the theory in
# three formulas, then trains on digits three times and compares the networks with the formulas. It takes a few
# minutes on two CPU cores, less if [quickstart.ipynb](quickstart.ipynb) has already trained `s2`.
#
# The outputs below are stored with the notebook, so you can read it without running anything.
#
# **In Colab**, the badge opens the list of notebooks on GitHub: enter the address of this repository and choose
# `colab/compare_objectives.ipynb`. Then paste the same address into the marked line of the next cell and run all cells.
# In a clone of the repository, the line stays empty.
#
# **On a GPU or TPU**, also set `EXTRAS` to `plot,cuda` or `plot,tpu` and `QUICK` to `False`. This trains with the
# settings of `configs/digits.py`: 1,400 steps at batch size 64 instead of 1,000 at batch size 16.

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
# ## The theory in three formulas
#
# Timesteps $t$ run from 0 to $T-1$, $\varepsilon$ is the noise in $x_t$ and $f$ the network's output. The
# skip-step term trains $c_t f$ to predict the noise, with
# $c_t = \sqrt{1-\alpha_\mathrm{skip}}/\sqrt{\alpha_\mathrm{skip}}$. Completing the square in its sum with the
# plain loss gives
#
# $$\tau\,\lVert\varepsilon-f\rVert^2 + (1-\tau)\,\lVert\varepsilon-c_t f\rVert^2
# \;=\; w_t\,\lVert f-s_t\,\varepsilon\rVert^2 + k_t\,\lVert\varepsilon\rVert^2 \tag{1}$$
#
# The optimum is that of plain training, $\mathbb{E}[\varepsilon\,|\,x_t]$, times a factor that depends only on
# the noise schedule, skip and τ:
#
# $$s_t = \frac{\tau+(1-\tau)\,c_t}{w_t}, \qquad w_t = \tau+(1-\tau)\,c_t^2 \tag{2}$$
#
# The sequence-aware term squares the *sum* of the errors at $K$ neighbouring timesteps. Their noise is
# independent, so the part that the errors share comes from the image, and shrinking the output lowers the loss.
# Along a direction in which the images have variance $\sigma^2$, the optimal linear network is the plain one
# times
#
# $$\frac{\bar\alpha_t\sigma^2+1-\bar\alpha_t}{(1+\rho)\,\bar\alpha_t\sigma^2+1-\bar\alpha_t},
# \qquad \rho=\frac{\lambda(K-1)}{K+\lambda} \tag{3}$$
#
# [docs/objectives.md](../docs/objectives.md) derives all three formulas and lists where the papers differ from
# their released code. The preset `paper` uses the same noise for both terms, as above; `released` draws separate
# noise for the skip-step term, which makes the factor smaller than 1.

# %%
import json

import matplotlib.pyplot as plt
import numpy as np

from s2dm_jax.diffusion import objectives
from s2dm_jax.diffusion.schedule import linear_schedule

schedule = linear_schedule()


def shrinkage(variance, K, lam):
    """Formula (3) at every timestep."""
    rho, signal, noise = lam * (K - 1) / (K + lam), schedule.alpha_bar * variance, 1 - schedule.alpha_bar
    return (signal + noise) / ((1 + rho) * signal + noise)


figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
for colour, skip in enumerate((2, 10, 50)):
    for preset, style in (("paper", "-"), ("released", "--")):
        s = objectives.skip_scale(schedule, skip, preset=preset)
        axes[0].plot(s, style, color=f"C{colour}", label=f"skip {skip}, {preset}")
axes[0].set(xlabel="timestep t", ylabel="$s_t$", title="Skip-step term, τ = 0.99: formula (2)")
for K, lam in ((2, 1.0), (3, 0.3), (4, 0.2)):
    axes[1].plot(shrinkage(0.25, K, lam), label=f"K = {K}, λ = {lam:g}")
axes[1].set(xlabel="timestep t", ylabel="factor", title="Sequence-aware term, σ² = 0.25: formula (3)")
for axis in axes:
    axis.legend()
plt.show()

# %% [markdown]
# ## Train
#
# All runs use the same number of network evaluations. With K = 2 the sequence-aware term needs two per image and
# step, so it trains for half the steps, and its learning rate decays equally far. Runs of one seed start from the
# same weights and see the same images in the same order.

# %%
STEPS = 1000 if QUICK else 1400
LENGTH = "--config.train.batch_size=16" if QUICK else ""
SAMPLING = "--config.sample.sampler=unipc"
EVALUATION = "--config.eval.samplers=ddim,unipc --config.eval.nfe=10"
SHOWN = f"--config.train.sample_every=200 {SAMPLING} {EVALUATION}"
# !{sys.executable} -m s2dm_jax.main --config=configs/digits.py:ddpm --workdir={RUNS}/ddpm \
#     --config.train.steps={STEPS} {LENGTH} {SHOWN}
# !{sys.executable} -m s2dm_jax.main --config=configs/digits.py:s2_10 --workdir={RUNS}/s2 \
#     --config.train.steps={STEPS} {LENGTH} {SHOWN}
# !{sys.executable} -m s2dm_jax.main --config=configs/digits.py:sa_2 --workdir={RUNS}/sa \
#     --config.train.steps={STEPS // 2} --config.train.decay_steps=700 {LENGTH} {SHOWN}

# %% [markdown]
# ## Rescale without training
#
# By (2), training with the skip-step term leads to the plain network with its output multiplied by $s_t$. The
# factor can also be applied while sampling, without training: `skip_scale=10` evaluates the plain run with it.

# %%
results = {name: json.loads(Path(RUNS, name, "results.json").read_text())["rows"] for name in ("ddpm", "s2", "sa")}
# !{sys.executable} -m s2dm_jax.main --mode=evaluate --workdir={RUNS}/ddpm --config.eval.skip_scale=10 \
#     --config.eval.samplers=ddim --config.eval.nfe=10
results["ddpm, rescaled"] = json.loads(Path(RUNS, "ddpm", "results.json").read_text())["rows"]

# %% [markdown]
# ## Side by side
#
# Left: samples of all four variants from the same noise, with DDIM in ten network evaluations. Right: the Fréchet
# distance of 500 samples to held-out digits in the features of a small classifier (not FID).

# %%
import s2dm_jax
from s2dm_jax.common.images import image_grid

models = {name: s2dm_jax.load(f"{RUNS}/{name}") for name in ("ddpm", "s2", "sa")}
options = {"sampler": "ddim", "nfe": 10}
samples = {name: model.sample(16, **options) for name, model in models.items()}
samples["ddpm, rescaled"] = models["ddpm"].sample(16, skip_scale=10, **options)

order = ("ddpm", "ddpm, rescaled", "s2", "sa")
figure, axes = plt.subplots(1, 2, figsize=(12, 3), width_ratios=(1.8, 1), layout="constrained")
grid = image_grid(np.concatenate([samples[name][:12] for name in order]), columns=12)
axes[0].imshow(grid.squeeze(), cmap="gray", vmin=0, vmax=255)
axes[0].set_yticks((np.arange(4) + 0.5) * len(grid) / 4, order)
axes[0].set(xticks=[], title="The same noise through each")
distances = [results[name][1]["frechet_distance"] for name in order]
axes[1].bar_label(axes[1].barh(order, distances), fmt="%.1f", padding=3)
axes[1].invert_yaxis()
real, noise = (results["ddpm"][row]["frechet_distance"] for row in (0, -1))
axes[1].set(xlim=(0, 1.2 * max(distances)), title=f"Fréchet distance (real {real:.1f}, noise {noise:.0f})")
plt.show()

# %% [markdown]
# One seed and such short training are no evidence for or against an objective.
# [docs/objectives.md](../docs/objectives.md#comparison-on-digits) has the comparison over five seeds: rescaling
# does what training with the skip-step term does, and the sequence-aware term does not help at equal network
# evaluations.
#
# ## Formulas against trained networks
#
# The networks' outputs vary less between runs than the distances do. Left: the factor that brings the plain
# network's output closest to that of `s2` at each timestep, compared with (2). Right: the root mean square of the
# output of `sa` relative to the plain network, compared with (3) for the variances of the digits along their
# principal axes.

# %%
import jax
import jax.numpy as jnp

from s2dm_jax.data.datasets import load_digits
from s2dm_jax.diffusion.schedule import add_noise

digits = load_digits()
x0 = jnp.asarray(digits.held_out / 127.5 - 1, jnp.float32)
epsilon = jax.random.normal(jax.random.key(1), x0.shape)
network = models["ddpm"].network


@jax.jit
def output(params, t):
    """A network's output for the held-out digits at timestep t."""
    t = jnp.full(len(x0), t)
    return network.apply(params, add_noise(schedule, x0, t, epsilon), t)


times = np.arange(1, 1000, 50)
outputs = {
    name: np.stack([output(model.ema_params, t) for t in times], dtype=np.float64).reshape(len(times), -1)
    for name, model in models.items()
}
plain = np.square(outputs["ddpm"]).sum(1)
factor = (outputs["s2"] * outputs["ddpm"]).sum(1) / plain
smaller = np.sqrt(np.square(outputs["sa"]).sum(1) / plain)

axes_variance = np.linalg.eigvalsh(np.cov(digits.train.reshape(len(digits.train), -1).T / 127.5))[:, None]
share = (1 - schedule.alpha_bar) / (schedule.alpha_bar * axes_variance + 1 - schedule.alpha_bar)
expected = np.sqrt((share * shrinkage(axes_variance, 2, 1.0) ** 2).sum(0) / share.sum(0))
scale = objectives.skip_scale(schedule, 10)

figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
axes[0].plot(scale, label="formula (2)")
axes[0].plot(times, factor, "o", label="measured")
axes[0].set(xlabel="timestep t", ylabel="factor", title="Output of s2 against that of ddpm")
axes[1].plot(expected, label="formula (3)")
axes[1].plot(times, smaller, "o", label="measured")
axes[1].set(xlabel="timestep t", ylabel="ratio", title="Size of the output of sa against that of ddpm")
for axis in axes:
    axis.legend()
plt.show()

# %% [markdown]
# The skip-step term changes the output by a quarter of a percent. In the noisier half of the timesteps, where the
# networks are trained well enough to measure it, this agrees with (2). The sequence-aware term shrinks the output
# by up to a fifth at the cleanest timesteps; (3) holds for linear networks, which these are not there.
#
# ## Checks
#
# The last cell checks (1) with an arbitrary function as the network, and the agreement seen above:

# %%
objective = objectives.paper(skip=10)
sample = objectives.sample_noise(objective, jax.random.key(2), schedule.T, x0.shape)
total, _ = objectives.loss(lambda x, t: jnp.tanh(2 * x), schedule, objective, x0, sample)
w, s, k = (table[sample.t, None, None, None] for table in objectives.skip_quadratic(schedule, objective))
noise = np.asarray(sample.noise[:, 0], np.float64)
f = np.tanh(2 * np.asarray(add_noise(schedule, x0, sample.t, sample.noise[:, 0]), np.float64))
np.testing.assert_allclose(total, (w * (f - s * noise) ** 2 + k * noise**2).sum((1, 2, 3)), rtol=1e-4)

noisy = times > 500
assert abs((factor - scale[times])[noisy].mean()) < 1e-3 < (factor - 1)[noisy].mean()
assert abs(smaller - expected[times])[times > 200].max() < 0.03 < 1 - smaller[0]
