"""`benchmark.py evaluate`: sampling with Inception features, relative to each alone, and the time of FID."""

import statistics
import time

from gpu_stages.programs import ratio
from gpu_stages.sampling import random_inception
from steps import cifar10_network


def benchmark_evaluate(arguments) -> None:
    """Times sampling with Inception features, relative to the sum of both alone, and FID of 2,048 features.

    CIFAR-10's UNet and Inception have random weights: the time does not depend on them.
    """
    import jax
    import numpy as np

    from s2dm_jax.diffusion.schedule import linear_schedule
    from s2dm_jax.evaluation import inception, metrics
    from s2dm_jax.inference.sampler import configure_sampler, map_batches, sample_batches

    rng = np.random.default_rng(0)
    network = cifar10_network()
    params = jax.device_put(network.init(0))
    sampler, timesteps = configure_sampler(network, linear_schedule(), "ddim", nfe=arguments.nfe)
    features = random_inception()
    batch, count = arguments.batch, 2 * arguments.batch

    def sampled(postprocess):
        options = {"seed": 0, "num_images": count, "batch_size": batch, "progress": False}
        return sample_batches(sampler, params, timesteps, postprocess=postprocess, **options)

    def summed(batches):
        sums = metrics.init_sums(inception.NUM_FEATURES)
        for each in batches:
            sums = metrics.update_sums(sums, each)

    images = np.concatenate(list(sampled(None)))
    runs = {
        "sampling": lambda: list(sampled(None)),
        "features": lambda: summed(map_batches(lambda rows: features(images[rows]), count, batch, False)),
        "both": lambda: summed(sampled(features)),
    }
    seconds = {name: [] for name in runs}
    # The first round compiles. Interleaving the runs makes a slow moment of the machine affect all of them.
    for lap in range(arguments.rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if lap:
                seconds[name].append(time.perf_counter() - began)
    for name, times in seconds.items():
        print(f"{name:10s} {statistics.median(times) * 1e3 / count:9.1f} ms per image", flush=True)
    alone = [sampling + features for sampling, features in zip(seconds["sampling"], seconds["features"], strict=True)]
    print(f"both / sum of both alone: {ratio(seconds['both'], alone)['median']:.3f}", flush=True)

    mixing = rng.standard_normal((2048, 2048)) / 45
    sets = [metrics.feature_statistics(rng.standard_normal((4096, 2048)) @ mixing) for _ in range(2)]
    began, cpu = time.perf_counter(), time.process_time()
    metrics.frechet_distance(*sets[0], *sets[1])
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(f"FID of 2,048 features: {wall:.1f} s, {cpu:.1f} CPU s")
