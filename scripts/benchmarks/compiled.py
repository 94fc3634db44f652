"""`benchmark.py compiled`: the program that XLA compiles for a config's training on a GPU or TPU.

It compiles as training does, on any machine, and runs nothing: it reports properties of the program.
"""

import re
import time
from collections import Counter
from unittest import mock

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
# JAX's name of the platform, the extra with its compiler, memory in GB, arguments of get_topology_desc.
TARGETS = {
    "h100": ("gpu", "cuda", 80, {"platform": "cuda", "target_config": _H100}),
    "v5e": ("tpu", "tpu", 16, {"platform": "tpu"}),
}
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def add_arguments(parser) -> None:
    parser.add_argument("--target", choices=TARGETS, default="h100", help="device to compile for (default: h100)")
    parser.add_argument("--config", default="configs/cifar10.py", help="config FILE[:OBJECTIVE] (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="batch size (default: the config's)")
    parser.add_argument("--grad-accum-steps", type=int, help="parts of a batch (default: the config's)")
    parser.add_argument("--remat", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--devices", type=int, choices=(1, 2, 4), default=1, help="number of devices (default: 1)")


def benchmark_compiled(arguments) -> None:
    """Compiles a config's training for a device that this machine does not have: memory, kernels,
    collectives.
    """
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from s2dm_jax.common.errors import UserError
    from s2dm_jax.config.build import build_network, build_objective
    from s2dm_jax.config.defaults import image_shape
    from s2dm_jax.config.io import load_config
    from s2dm_jax.config.validate import check_config
    from s2dm_jax.devices import sharding
    from s2dm_jax.training.step import make_train_chunk
    from s2dm_jax.workdir.state import init_state, make_optimizer

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

    platform, extra, memory, description = TARGETS[arguments.target]
    topology_name = {"topology": "1x1x4"} if platform == "gpu" else {"topology_name": "v5e:2x2"}
    try:
        topology = topologies.get_topology_desc(**description, **topology_name)
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"--target={arguments.target} needs a compiler; install it with pip install '.[{extra}]': {error}"
        ) from error
    mesh = Mesh(np.array(topology.devices[: arguments.devices]), ("data",))

    def there(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    # The network and its convolutions are those of the target's platform, the devices the target's.
    with (
        mock.patch.object(jax, "default_backend", return_value=platform),
        mock.patch.object(sharding, "data_mesh", return_value=mesh),
    ):
        network = build_network(config)
        optimizer = make_optimizer(config.train.lr, config.train.grad_clip)
        chunk = make_train_chunk(config, network, optimizer)
        state = init_state(network, optimizer, 0)
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
        options = {"xla_gpu_autotune_level": "0"} if platform == "gpu" else {}
        out = shardings, replicated
        step = jax.jit(chunk, donate_argnums=0, out_shardings=out, compiler_options=options)
        lowered = step.lower(state, None, images, key)
    batch_size, K = config.train.batch_size, build_objective(config).num_timesteps_per_image
    print(
        f"{arguments.config}: batch {batch_size}, K = {K}, {network.dtype}, {config.train.log_every} steps a "
        f"chunk, for {arguments.devices} × {topology.devices[0].device_kind}",
        flush=True,
    )
    began = time.perf_counter()
    program = lowered.compile()
    seconds = time.perf_counter() - began
    used = program.memory_analysis()
    state_gb, temporary_gb = used.argument_size_in_bytes / 1e9, used.temp_size_in_bytes / 1e9
    print(f"compiled in {seconds:.0f} s")
    print(f"{state_gb + temporary_gb:.1f} of {memory} GB per device, {temporary_gb:.1f} of them temporaries")
    text = program.as_text()
    # The largest computation is the body of the scan: one train step.
    kernels = max(len(re.findall(r" (?:fusion|custom-call)\(", part)) for part in text.split("\n\n"))
    collectives = Counter(re.findall(rf" ({'|'.join(_COLLECTIVES)})(?:-start)?\(", text))
    exchanged = ", ".join(f"{count} × {name}" for name, count in collectives.items()) or "none"
    print(f"a step: about {kernels:,} kernels; collectives between devices: {exchanged}")
