"""Numbers of the published PyTorch code (tests/golden/README.md) and this project's answers to the same inputs.

It needs no pytest: `scripts/benchmarks/gpu.py` makes the same comparisons on a GPU.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from torch_random import initial_weights

from s2dm_jax.diffusion.objectives import NoiseSample, released
from s2dm_jax.diffusion.schedule import add_noise, linear_schedule
from s2dm_jax.models.improved_unet import ImprovedUNet
from s2dm_jax.models.network import Network
from s2dm_jax.models.unet import UNet
from s2dm_jax.training.averages import Averages
from s2dm_jax.training.step import StepConfig, update
from s2dm_jax.weights import torch_names
from s2dm_jax.workdir.state import TrainState, make_optimizer

_GOLDEN = Path(__file__).parent / "golden"


def read_golden(name):
    """A file's arrays: images as NHWC, parameters as PyTorch has them."""
    path = _GOLDEN / name
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with np.load(path) as stored:
        weights = ("param/", "grad/", "ema/")
        arrays = {k: v if k.startswith(weights) else _nhwc(v) for k, v in stored.items()}
    if "network" in arrays:
        network = json.loads(str(arrays.pop("network")))
        prefix, _ = network.pop("prefix"), network.pop("sha256")
        arrays |= {prefix + k: v for k, v in initial_weights(**network).items()}
    return arrays


def _nhwc(array):
    return np.moveaxis(array, -3, -1) if array.ndim >= 4 else array


def group(arrays, prefix):
    """The entries of a golden file below a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def network_of(arrays, **changes):
    """The golden file's network."""
    c = json.loads(str(arrays["config"]))
    shape = {
        "resolution": c["resolution"],
        "in_channels": c["in_channels"],
        "out_channels": c["out_ch"],
        "ch": c["ch"],
        "ch_mult": tuple(c["ch_mult"]),
        "num_res_blocks": c["num_res_blocks"],
        "attn_resolutions": tuple(c["attn_resolutions"]),
        "resamp_with_conv": c["resamp_with_conv"],
    }
    return UNet(**{**shape, **changes})


def improved_network_of(arrays, **changes):
    """The network of a golden file of improved-diffusion."""
    c = json.loads(str(arrays["config"]))
    shape = {
        "resolution": c["resolution"],
        "in_channels": 3,
        "out_channels": 3,
        "ch": c["model_channels"],
        "ch_mult": tuple(c["channel_mult"]),
        "num_res_blocks": c["num_res_blocks"],
        # There these are factors of downsampling.
        "attn_resolutions": tuple(c["resolution"] // factor for factor in c["attention_resolutions"]),
        "num_heads": c["num_heads"],
        "scale_shift_norm": c["use_scale_shift_norm"],
        "learned_variance": c["out_channels"] == 6,
        "num_classes": c.get("num_classes", 0),
    }
    return ImprovedUNet(**{**shape, **changes})


def network_answers(arrays):
    """The golden network's output, and the DDIM loss with the norm of its gradient and the gradients in torch names."""
    x, t, noise = arrays["x"], arrays["t"], arrays["e"]
    # Both outputs from one pass, as compiling it takes longest.
    twice = jnp.concatenate([x, add_noise(LINEAR, x, t, noise)]), np.tile(t, 2)
    if "channel_mult" in str(arrays["config"]):
        network = improved_network_of(arrays)
        labels = np.tile(arrays["y"], 2) if "y" in arrays else None

        def apply(params):
            eps, variance, _ = network.outputs(params, *twice, labels=labels)
            return eps if variance is None else jnp.concatenate([eps, variance], axis=-1)

    else:
        network = network_of(arrays)

        def apply(params):
            return network.apply(params, *twice)

    def ddim_loss(params):
        out, out_of_noisy = jnp.split(apply(params), 2)
        eps = out_of_noisy[..., : noise.shape[-1]]
        return jnp.square(eps - noise).sum((1, 2, 3)).mean(), out

    params = torch_names.from_torch(group(arrays, "param/"), network)
    (loss, out), grads = jax.jit(jax.value_and_grad(ddim_loss, has_aux=True))(params)
    return {"out": out, "loss": loss, "grad_norm": optax.tree.norm(grads), "grads": torch_names.to_torch(grads)}


def golden_eps(x, t):
    """The closed-form network that the golden files were made with; NumPy in, NumPy out."""
    xp = np if isinstance(x, np.ndarray) else jnp
    u = t.astype(x.dtype)[:, None, None, None] + 1
    a = xp.exp(-(1e-4 * u + 0.5 * (0.02 - 1e-4) / 1000 * u**2))
    return xp.sqrt(1 - a) * (x - 0.2 * xp.sqrt(a)) / (0.09 * a + 1 - a) + 0.05 * xp.sin(3 * x)


# The schedule that the golden files were made with.
LINEAR = linear_schedule()


@dataclasses.dataclass(frozen=True)
class PerturbedClosedForm:
    """`golden_eps` and a tenth of a network's output: an untrained network whose samples are not saturated."""

    network: Network

    @property
    def image_shape(self):
        return self.network.image_shape

    def eps_fn(self, params, schedule, dropout_key=None):
        eps_fn = self.network.eps_fn(params, schedule, dropout_key)
        return lambda x, t: golden_eps(x, t) + 0.1 * eps_fn(x, t)


def injected(noise, dtype):
    return lambda step: jnp.asarray(noise, dtype)[step]


def sample_golden(sampler, x_T, timesteps, dtype, **options):
    """One compiled run of a sampler on the golden network and schedule, results as NumPy arrays."""
    run = jax.jit(lambda x_T: sampler(golden_eps, x_T, LINEAR, timesteps, **options))
    return jax.tree.map(np.asarray, run(np.asarray(x_T, dtype)))


def published_run(arrays):
    """Five steps of the published loop: loss and gradient norm of each, then the weights in torch names."""
    c = json.loads(str(arrays["config"]))
    network = network_of(arrays)
    params = torch_names.from_torch(group(arrays, "init/"), network)
    optimizer = make_optimizer(c["lr"], c["grad_clip"])
    if "skip_factors" in arrays:
        objective = released(skip=int(arrays["skip_factors"]) + 1, tau=float(arrays["tau"]))
        rest, second = arrays["e"][:, :0], arrays["e2"]
    else:
        objective = released(K=max(int(arrays["K"]), 1), lam=float(arrays["lam"]))
        rest, second = np.moveaxis(arrays["e_k"], 1, 2), [None] * len(arrays["t"])
    made_of = StepConfig(network, LINEAR, objective, optimizer, Averages(c["ema_rate"]))
    state = TrainState(np.int32(0), params, params, optimizer.init(params))

    @jax.jit
    def step(state, x0, sample):
        return update(made_of, state, x0, sample, None)

    history = []
    for i, t in enumerate(arrays["t"]):
        noise = arrays["e"][i][:, None]
        if objective.num_timesteps_per_image > 1:
            noise = np.concatenate([noise, rest[i]], axis=1)
        state, metrics = step(state, arrays["x0"][i], NoiseSample(t, noise, second[i]))
        history.append((metrics["loss"], metrics["grad_norm"]))
    return np.array(history), torch_names.to_torch(state.params), torch_names.to_torch(state.ema_params)
