"""Shows that XLA:CPU computes convolutions in a loop wrongly on two devices of one CPU, unless YNNPACK does them.

  python scripts/dev/xla_cpu_devices.py --iterations=160

Needs JAX alone and takes half a minute to a minute. Each row compares a program on two devices with the same one on a
single device. With jaxlib 0.10.2 on two cores the convolutions that are left to Eigen (first row) are wrong from about
the 100th iteration on, for a few images at the ends of each device's part of the batch; those of YNNPACK are right.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

OPTION = "xla_cpu_experimental_ynn_fusion_type"
COMPILER_OPTIONS = {"Eigen": {OPTION: "LIBRARY_FUSION_TYPE_REDUCE"}, "the default": {}}


def convolutions(x, weights):
    """Residual pairs of 3×3 convolutions; x [B, H, W, C]."""

    def conv(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    for w, v in zip(*weights, strict=True):
        x = x + conv(jax.nn.silu(conv(jax.nn.silu(x), w)), v)
    return x


def looped(x, weights, iterations):
    """One value of each image in each iteration: float32 [iterations, B]. The iterations are independent."""

    def body(carry, i):
        return carry, convolutions(x + 1e-3 * i, weights)[:, 3, 3, 3]

    return jax.lax.scan(body, 0, jnp.arange(iterations, dtype=jnp.float32))[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=160, help="iterations of the loop (default: %(default)s)")
    iterations = parser.parse_args().iterations
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices())
    rng = np.random.default_rng(0)
    x = rng.standard_normal((128, 8, 8, 96), np.float32)
    weights = [0.05 * rng.standard_normal(shape, np.float32) for shape in ((3, 3, 3, 96, 32), (3, 3, 3, 32, 96))]
    split, copied = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    print(f"jax {jax.__version__}")
    for name, options in COMPILER_OPTIONS.items():
        run = jax.jit(looped, static_argnums=2, compiler_options=options)
        one = np.asarray(run(*jax.device_put((x, weights), jax.devices()[0]), iterations))
        two = np.asarray(run(jax.device_put(x, split), jax.device_put(weights, copied), iterations))
        wrong = np.argwhere(np.abs(one - two) > 1e-3 * np.abs(one).max())
        detail = f"; from iteration {wrong[0, 0]} on, images {sorted(set(wrong[:, 1].tolist()))}" if len(wrong) else ""
        print(
            f"convolutions by {name}: {len(wrong)} of {one.size:,} values are wrong on two devices{detail}", flush=True
        )


if __name__ == "__main__":
    main()
