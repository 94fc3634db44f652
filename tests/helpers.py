"""What several test files share: small configs and networks, runs that were never trained, comparisons."""

import contextlib
import dataclasses
import functools
import importlib.util
import resource
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from s2dm_jax.config import default_config
from s2dm_jax.config.build import build_network
from s2dm_jax.config.ema import extra_names
from s2dm_jax.config.io import to_json
from s2dm_jax.models.unet import UNet
from s2dm_jax.samplers.specs import get_sampler
from s2dm_jax.workdir import checkpoint
from s2dm_jax.workdir.state import build_optimizer, init_state, make_optimizer

ROOT = Path(__file__).resolve().parents[1]
# The smallest network and evaluation: what is tested with it is the loop.
SMALL = {
    "model.ch": 32,
    "model.ch_mult": (1,),
    "model.num_res_blocks": 1,
    "model.attn_resolutions": (),
    "model.dropout": 0.1,
    "data.random_flip": True,
    "loss.skip": 10,
    "loss.K": 2,
    "loss.lam": 1.0,
    "train.steps": 4,
    "train.batch_size": 8,
    "train.log_every": 2,
    "train.sample_every": 4,
    "train.checkpoint_every": 2,
    "train.lr": 1e-3,
    "sample.steps": 2,
    "sample.num_images": 8,
    "eval.nfe": (2,),
    "eval.num_images": 8,
    "eval.batch_size": 8,
}


TINY = UNet(resolution=8, in_channels=1, out_channels=1, ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())


@dataclasses.dataclass(frozen=True)
class ToyNetwork:
    """Two layers pixel by pixel, which compile in no time: a network as `network.Network` wants one."""

    image_shape: tuple[int, int, int] = (8, 8, 1)
    dtype: str = "float32"

    def param_shapes(self):
        shapes = {"hidden": {"kernel": (1, 16), "bias": (16,)}, "out": {"kernel": (16, 1)}}
        return {
            layer: {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in parts.items()}
            for layer, parts in shapes.items()
        }

    def init(self, seed):
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), self.param_shapes())

    def apply(self, params, x, t, dropout_key=None):
        hidden = x @ params["hidden"]["kernel"] + params["hidden"]["bias"] + t[:, None, None, None] / 1000
        return jnp.tanh(hidden) @ params["out"]["kernel"]

    def eps_fn(self, params, schedule, dropout_key=None):
        return lambda x, t: self.apply(params, x, t, dropout_key)


@dataclasses.dataclass(frozen=True)
class FunctionNetwork:
    """A function (params, x, t) → ε as a network; nothing else is asked of it."""

    function: Callable
    image_shape: tuple[int, int, int] = (8, 8, 1)
    dtype: str = "float32"

    def eps_fn(self, params, schedule, dropout_key=None):
        return lambda x, t: self.function(params, x, t)


def small_config(**changes):
    config = default_config()
    for name, value in {**SMALL, **changes}.items():
        group, field = name.split(".")
        config[group][field] = value
    return config


def final_state(workdir, config):
    network = build_network(config)
    like = init_state(network, make_optimizer(1e-3, 1.0), 0)
    return checkpoint.restore_latest(checkpoint.open_checkpoints(workdir), like)


def sampler_with_noise(name, noise_fn=lambda step: jnp.sin(1.7 * step)):
    """The sampler of that name with noise, a variance head or covariances, where it requires them."""
    sampler = get_sampler(name)
    if name in ("sn", "npr"):

        def with_variance_head(eps_fn, x_T, schedule, timesteps, **options):
            def eps_variance_fn(x, t):
                eps = eps_fn(x, t)
                return eps, 0.1 + eps**2

            return sampler(eps_variance_fn, x_T, schedule, timesteps, noise_fn=noise_fn, **options)

        return with_variance_head
    options = {"ddpm": {}, "ddim": {"eta": 0.7}, "analytic": {"cov_x0": np.full(1000, 0.1)}}
    return functools.partial(sampler, noise_fn=noise_fn, **options[name]) if name in options else sampler


def assert_close(actual, expected, rtol):
    # Relative to the largest value: a pixel near 0 has no relative precision of its own.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max())


@contextlib.contextmanager
def full_disk(size=4096):
    """For the block, no file may grow beyond `size` bytes: writing more fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def load_file(path):
    """A Python file as a module: a command of scripts/, a config."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_run(path, config, *, seed, ema_factor):
    """Makes `path` the folder of a run of 7 steps that were never trained; its average is a multiple."""
    path.mkdir()
    (path / "config.json").write_text(to_json(config))
    state = init_state(build_network(config), build_optimizer(config), seed, ema_extra=extra_names(config.train))
    ema = jax.tree.map(lambda leaf: np.asarray(leaf) * ema_factor, state.params)
    manager = checkpoint.open_checkpoints(path)
    checkpoint.save(manager, 7, jax.device_put(state._replace(step=np.int32(7), ema_params=ema)))
    manager.close()
