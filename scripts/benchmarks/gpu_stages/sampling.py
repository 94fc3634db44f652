"""Sampling with CIFAR-10's network, Inception's features, and both together, with random weights.

The time depends on no weight.
"""

import functools
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from gpu_stages.figures import measured_matmul_rate
from gpu_stages.parts import Settings
from gpu_stages.programs import published_config, spread

_NFE = 10
_ROUNDS = 3


class Sampler(NamedTuple):
    """A compiled sampler.

    Attributes:
      batches: `sample_batches` of a number of images, with its option `postprocess`.
      batch: images of a batch.
      network: what it samples from.
      compile_seconds: of the first batch, less those of the second.
    """

    batches: Callable[..., Any]
    batch: int
    network: Any
    compile_seconds: float


class Features(NamedTuple):
    """Inception's feature function of uint8 [B, H, W, C], compiled as in `Sampler`."""

    apply: Callable[..., Any]
    compile_seconds: float


def sampling(settings: Settings) -> dict[str, Any]:
    """Part `sampling`: images per second of DDIM as users sample, to images on the host."""
    from s2dm_jax.models.flops import forward_flops

    sampler = ddim_sampler(settings.tiny)
    count = (1 if settings.tiny else 4) * sampler.batch
    seconds = [_timed(lambda: list(sampler.batches(count))) for _ in range(_ROUNDS)]
    images_per_s = count / statistics.median(seconds)
    flops = images_per_s * _NFE * forward_flops(sampler.network)
    rate = measured_matmul_rate(settings)
    share = f", {flops / rate:.0%} of the matrix rate".replace("%", " %") if rate else ""
    return {
        "summary": f"DDIM, {_NFE} network evaluations, batch {sampler.batch}, {sampler.network.dtype}: "
        f"{images_per_s:,.0f} images/s, {flops / 1e12:,.3g} TFLOP/s{share}; to compile {sampler.compile_seconds:.1f} s",
        "images_per_s": images_per_s,
        "seconds": spread(seconds),
        "images": count,
        "tflops": flops / 1e12,
        "share_of_matmul_rate": flops / rate if rate else None,
        "compile_s": sampler.compile_seconds,
        "batch": sampler.batch,
        "dtype": sampler.network.dtype,
        "nfe": _NFE,
    }


def inception(settings: Settings) -> dict[str, Any]:
    """Part `inception`: features per second of images that are on the device."""
    import jax
    import numpy as np

    features, sampler = inception_features(settings.tiny), ddim_sampler(settings.tiny)
    shape = (sampler.batch, *sampler.network.image_shape)
    images = jax.device_put(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    calls = 1 if settings.tiny else 4

    def run():
        for _ in range(calls):
            result = features.apply(images)
        result.block_until_ready()

    seconds = [_timed(run) for _ in range(1 if settings.tiny else _ROUNDS)]
    per_s = calls * sampler.batch / statistics.median(seconds)
    return {
        "summary": f"Inception, float32, batch {sampler.batch}: {per_s:,.0f} images/s; to compile "
        f"{features.compile_seconds:.1f} s",
        "images_per_s": per_s,
        "seconds": spread(seconds),
        "images": calls * sampler.batch,
        "compile_s": features.compile_seconds,
        "batch": sampler.batch,
    }


def end_to_end(settings: Settings) -> dict[str, Any]:
    """Part `end_to_end`: from noise to FID of 50,000 images, against random statistics."""
    import numpy as np

    from s2dm_jax.evaluation import metrics

    sampler, features = ddim_sampler(settings.tiny), inception_features(settings.tiny)
    count, dimensions = (2 * sampler.batch, 64) if settings.tiny else (50_000, 2048)
    began = time.perf_counter()
    sums = metrics.init_sums(dimensions)
    for batch in sampler.batches(count, postprocess=features.apply):
        sums = metrics.update_sums(sums, batch[:, :dimensions])
    sampled = time.perf_counter()
    with warnings.catch_warnings():
        # Of too few images for a covariance, in a rehearsal.
        warnings.simplefilter("ignore", RuntimeWarning)
        mean, cov = metrics.mean_and_cov(sums)
    scale = np.sqrt(np.diag(cov).mean() + 1e-12)
    distance = metrics.frechet_distance(mean, cov, mean + scale, np.diag(np.linspace(0.5, 1.5, dimensions)) * scale**2)
    ended = time.perf_counter()
    compiled = sampler.compile_seconds + features.compile_seconds
    return {
        "summary": f"{count:,} images in {_NFE} evaluations, batch {sampler.batch}, to FID: {ended - began:.1f} s "
        f"({ended - sampled:.1f} s of it the distance), {ended - began + compiled:.1f} s with compilation",
        "seconds": ended - began,
        "seconds_of_distance": ended - sampled,
        "seconds_with_compilation": ended - began + compiled,
        "images": count,
        "batch": sampler.batch,
        "nfe": _NFE,
        "distance": distance,
    }


@functools.cache
def ddim_sampler(tiny: bool) -> Sampler:
    """DDIM with the network of configs/cifar10.py, compiled once in a process for all parts that need it."""
    import jax

    from s2dm_jax.config.build import build_network
    from s2dm_jax.diffusion.schedule import linear_schedule
    from s2dm_jax.inference.sampler import configure_sampler, sample_batches

    network, batch = build_network(published_config("configs/cifar10.py:ddpm", tiny)), 2 if tiny else 500
    params = jax.device_put(network.init(0))
    sample, timesteps = configure_sampler(network, linear_schedule(), "ddim", nfe=_NFE)

    def batches(count, postprocess=None):
        options = {"seed": 0, "num_images": count, "batch_size": batch, "progress": False}
        return sample_batches(sample, params, timesteps, postprocess=postprocess, **options)

    first, second = (_timed(lambda: list(batches(batch))) for _ in range(2))
    return Sampler(batches, batch, network, max(0.0, first - second))


@functools.cache
def inception_features(tiny: bool) -> Features:
    """Inception's features of images as `ddim_sampler` makes them, compiled once in a process."""
    import numpy as np

    sampler, apply = ddim_sampler(tiny), random_inception()
    images = np.zeros((sampler.batch, *sampler.network.image_shape), np.uint8)
    first, second = (_timed(lambda: apply(images).block_until_ready()) for _ in range(2))
    return Features(apply, max(0.0, first - second))


def random_inception() -> Callable[..., Any]:
    """A compiled function of uint8 [B, H, W, C] → float32 [B, 2048]: Inception with random weights."""
    import jax
    import numpy as np

    from s2dm_jax.evaluation import inception

    rng = np.random.default_rng(0)
    weights = {
        name: np.float32(rng.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[:-1]))))
        for name, shape in inception.parameter_shapes().items()
    }
    weights = jax.device_put(weights)
    apply = jax.jit(lambda weights, images: inception.features_and_logits(weights, images)[0])
    return functools.partial(apply, weights)


def _timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
