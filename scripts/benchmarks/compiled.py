"""`benchmark.py compiled`: the program that XLA compiles for a config's training on a GPU or TPU.

It compiles as training does, on any machine, and runs nothing: it reports properties of the program, and what a step
is predicted to take (`predict.py`).
"""

import json
import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import hlo
import kernel_costs
import least
import predict

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import check_writable, user_path

# XLA's description of the GPU, from the vendor's data sheet and CUDA's device properties.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3350000000000
  l2_cache_size: 52428800
  device_memory_size: 84929347584
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 8 }
dnn_version_info { major: 9 minor: 7 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Target(NamedTuple):
    """A device to compile for.

    Attributes:
      platform: JAX's name.
      extra: of this package, with the compiler.
      memory_gb: of a device.
      topology: arguments of `get_topology_desc`.
      options: XLA's, beside those of training.
      tflops: best rate of a bfloat16 matrix product: measured on an H100 (configs/*.py), a data sheet's for the TPU.
      tb_per_s: bandwidth of the memory, from the data sheet.
    """

    platform: str
    extra: str
    memory_gb: int
    topology: dict[str, Any]
    options: dict[str, Any]
    tflops: float
    tb_per_s: float


# Without a GPU nothing can be tuned, and XLA then has no tiles for a product of Triton's: cuBLAS computes all of them.
_GPU_OPTIONS = {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": False}
TARGETS = {
    "h100": Target(
        "gpu",
        "cuda",
        80,
        {"platform": "cuda", "target_config": _H100, "topology": "1x1x4"},
        _GPU_OPTIONS,
        tflops=790,
        tb_per_s=3.35,
    ),
    "v5e": Target("tpu", "tpu", 16, {"platform": "tpu", "topology_name": "v5e:2x2"}, {}, tflops=197, tb_per_s=0.82),
}
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def add_arguments(parser) -> None:
    parser.add_argument("--target", choices=TARGETS, default="h100", help="device to compile for (default: h100)")
    parser.add_argument("--config", default="configs/cifar10.py", help="config FILE[:OBJECTIVE] (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="batch size (default: the config's)")
    parser.add_argument("--grad-accum-steps", type=int, help="parts of a batch (default: the config's)")
    parser.add_argument("--remat", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--devices", type=int, choices=(1, 2, 4), default=1, help="number of devices (default: 1)")
    text = "of the prediction (default: the target's)"
    parser.add_argument("--rate", type=float, help=f"TFLOP/s of a matrix product, {text}")
    parser.add_argument("--bandwidth", type=float, help=f"TB/s of the memory, {text}")
    parser.add_argument("--json", type=Path, help="file for the prediction")


def benchmark_compiled(arguments) -> None:
    """Compiles a config's training for a device that this machine does not have: memory, kernels,
    collectives, and the time that a step is predicted to take.
    """
    target = TARGETS[arguments.target]
    if target.platform == "gpu":
        # Read when jax is imported. Nothing runs, and where no GPU is JAX would refuse its compiler.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    output = arguments.json and user_path(arguments.json, "--json")
    if output:
        check_writable([output], "give another --json")
    config = _load_config(arguments)
    devices = _devices(arguments, target)
    lowered, network = _lower(config, target, devices)
    K = _timesteps_per_image(config)
    print(
        f"{arguments.config}: batch {config.train.batch_size}, K = {K}, {network.dtype}, {config.train.log_every} "
        f"steps a chunk, for {len(devices)} × {devices[0].device_kind}",
        flush=True,
    )
    began = time.perf_counter()
    program = lowered.compile()
    print(f"compiled in {time.perf_counter() - began:.0f} s")
    text = program.as_text()
    _print_properties(program, text, target)
    prediction = _predict(arguments, config, network, text)
    print(f"\n{predict.table(prediction)}\n\n{predict.summary(prediction)}")
    if output:
        output.write_text(json.dumps(prediction, indent=1) + "\n", encoding="utf-8")


def _load_config(arguments) -> Any:
    from s2dm_jax.config.io import load_config
    from s2dm_jax.config.validate import check_config

    config = load_config(arguments.config)
    if arguments.batch is not None:
        config.train.batch_size = arguments.batch
    if arguments.grad_accum_steps is not None:
        config.train.grad_accum_steps = arguments.grad_accum_steps
    config.model.remat = config.model.remat or arguments.remat
    check_config(config)
    if config.train.batch_size % arguments.devices:
        raise UserError(
            f"--devices={arguments.devices} does not divide the batch size {config.train.batch_size}; give --batch"
        )
    if config.variance_head.kind:
        raise UserError(
            f"--config={arguments.config} trains a variance head; only the training of a network is compiled"
        )
    return config


def _timesteps_per_image(config) -> int:
    from s2dm_jax.config.build import build_objective

    return build_objective(config).num_timesteps_per_image


def _devices(arguments, target: Target) -> list[Any]:
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(**target.topology)
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"--target={arguments.target} needs a compiler; install it with pip install '.[{target.extra}]': {error}"
        ) from error
    return topology.devices[: arguments.devices]


def _lower(config, target: Target, devices: list[Any]) -> tuple[Any, Any]:
    """The lowered chunk of train steps, and the network."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from s2dm_jax.config.build import build_network
    from s2dm_jax.config.defaults import image_shape
    from s2dm_jax.devices import sharding
    from s2dm_jax.training.step import make_train_chunk
    from s2dm_jax.workdir.state import build_optimizer, init_state, initial_loss_scale

    mesh = Mesh(np.array(devices), ("data",))

    def there(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    # The network and its convolutions are those of the target's platform, the devices the target's.
    with (
        mock.patch.object(jax, "default_backend", return_value=target.platform),
        mock.patch.object(sharding, "data_mesh", return_value=mesh),
    ):
        network = build_network(config)
        optimizer = build_optimizer(config)
        chunk = make_train_chunk(config, network, optimizer)
        state = init_state(network, optimizer, 0, initial_loss_scale(config))
        shardings, replicated = (
            sharding.state_shardings(state, config.train.shard_state),
            sharding.replicated(),
        )
        state = jax.tree.map(there, state, shardings)
        size, channels = image_shape(config)
        batch = config.train.log_every, config.train.batch_size, size, size, channels
        split = NamedSharding(mesh, PartitionSpec(None, "data"))
        images = jax.ShapeDtypeStruct(batch, np.uint8, sharding=split)
        key = there(jax.random.key(0), replicated)
        out = shardings, replicated
        step = jax.jit(chunk, donate_argnums=0, out_shardings=out, compiler_options=target.options)
        return step.lower(state, None, images, key), network


def _print_properties(program, text: str, target: Target) -> None:
    used = program.memory_analysis()
    state_gb, temporary_gb = used.argument_size_in_bytes / 1e9, used.temp_size_in_bytes / 1e9
    total_gb = state_gb + temporary_gb
    print(f"{total_gb:.1f} of {target.memory_gb} GB per device, {temporary_gb:.1f} of them temporaries")
    # The largest computation is the body of the scan: one train step.
    kernels = max(len(re.findall(r" (?:fusion|custom-call)\(", part)) for part in text.split("\n\n"))
    collectives = Counter(re.findall(rf" ({'|'.join(_COLLECTIVES)})(?:-start)?\(", text))
    exchanged = ", ".join(f"{count} × {name}" for name, count in collectives.items()) or "none"
    print(f"a step: about {kernels:,} kernels; collectives between devices: {exchanged}")


def _predict(arguments, config, network, text: str) -> dict[str, Any]:
    """The prediction for one device, which has its share of the batch; collectives are not counted."""
    from s2dm_jax.models.flops import step_flops

    target = TARGETS[arguments.target]
    images, K = config.train.batch_size // arguments.devices, _timesteps_per_image(config)
    prediction = predict.predict(
        kernel_costs.step_kernels(hlo.parse(text)),
        least.least_kernels(network, images * K),
        (arguments.rate or target.tflops) * 1e12,
        (arguments.bandwidth or target.tb_per_s) * 1e12,
        images,
        step_flops(network, images, K),
    )
    described = {"config": arguments.config, "target": arguments.target, "batch_per_device": images, "K": K}
    return {**described, "dtype": str(network.dtype), **prediction}
