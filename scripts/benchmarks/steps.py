"""`benchmark.py losses`, `heads`, `attention`: variants of a train step of the CIFAR-10 UNet, interleaved."""

import functools
import statistics
import time
from unittest import mock

import numpy as np
from gpu_stages.programs import ratio

from s2dm_jax.common.errors import UserError


def benchmark_losses(arguments):
    """Times a train step of the CIFAR-10 UNet with each objective, relative to plain training."""
    from s2dm_jax.diffusion import objectives

    network = cifar10_network()
    separate = one_call_per_timestep(network, arguments.batch)
    cases = {
        "plain": (objectives.paper(), network),
        "skip 10": (objectives.paper(skip=10), network),
        "K = 2": (objectives.paper(K=2, lam=1.0), network),
        "K = 2 in 2 calls": (objectives.paper(K=2, lam=1.0), separate),
        "K = 4": (objectives.paper(K=4, lam=1.0), network),
        "K = 4 in 4 calls": (objectives.paper(K=4, lam=1.0), separate),
    }
    selected = ("plain", *arguments.only.split(",")) if arguments.only else cases
    if unknown := set(selected) - cases.keys():
        raise UserError(f"--only has {unknown.pop()!r}, which is not one of {', '.join(cases)}")
    steps, memory = {}, {}
    for name, (objective, network) in cases.items():
        if name in selected:
            steps[name], memory[name] = _compile_step(objective, network, arguments.batch)
            print(f"compiled {name}", flush=True)
    print_ratios(steps, arguments.rounds, "plain", memory)


def one_call_per_timestep(network, batch):
    """The network with a call for each of the K timesteps of an image, in place of one for all of them."""
    import jax

    class OneCallPerTimestep(type(network)):
        def apply(self, params, x, t, dropout_key=None):
            # The merged batch has the K timesteps of an image side by side.
            K = len(x) // batch
            keys = [None] * K if dropout_key is None else jax.random.split(dropout_key, K)
            eps = [network.apply(params, x[k::K], t[k::K], keys[k]) for k in range(K)]
            return jax.numpy.stack(eps, axis=1).reshape(x.shape)

    return OneCallPerTimestep(**vars(network))


def benchmark_attention(arguments):
    """Times a train step of the CIFAR-10 UNet with each form of attention, relative to JAX's own.

    "none" leaves out the products, the softmax, and the projections that only they need.
    """
    import jax
    import jax.numpy as jnp

    from s2dm_jax.diffusion import objectives
    from s2dm_jax.models import layers

    def written_out(q, k, v):
        scores = jnp.einsum("bqhc,bkhc->bhqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores / q.shape[-1] ** 0.5).astype(v.dtype)
        return jnp.einsum("bhqk,bkhc->bqhc", weights, v)

    own = jax.nn.dot_product_attention
    forms = {"dot_product_attention": own, "as trained": layers.softmax_attention, "written out": written_out}
    forms["none"] = lambda q, k, v: v
    if jax.default_backend() == "gpu":
        forms["cuDNN"] = functools.partial(own, implementation="cudnn")
    network = cifar10_network()
    steps, memory = {}, {}
    for name, form in forms.items():
        with mock.patch.object(layers, "softmax_attention", form):
            try:
                steps[name], memory[name] = _compile_step(objectives.paper(), network, arguments.batch)
            except (NotImplementedError, RuntimeError, ValueError) as error:
                # cuDNN supports only some numbers of channels, which depend on the GPU.
                print(f"{name} does not support this: {error}", flush=True)
            else:
                print(f"compiled {name}", flush=True)
    print_ratios(steps, arguments.rounds, "dot_product_attention", memory)


def benchmark_heads(arguments):
    """Times a train step of a variance head on the frozen CIFAR-10 UNet, relative to a plain train step."""
    import jax

    from s2dm_jax.diffusion import objectives
    from s2dm_jax.diffusion.schedule import linear_schedule
    from s2dm_jax.models import variance_head
    from s2dm_jax.training.averages import Averages
    from s2dm_jax.training.step import StepConfig, jit_step, update_variance_head
    from s2dm_jax.workdir.state import make_optimizer, new_state

    network, schedule, objective = cifar10_network(), linear_schedule(), objectives.paper()
    optimizer = make_optimizer(1e-4, 1.0)
    base_params = jax.device_put(network.init(0))
    config = StepConfig(network, schedule, objective, optimizer, Averages(0.9999), variance_head="sn")

    def head(state, x0, key, base_params):
        sample, _ = _sample_noise(objective, schedule, state, x0, key)
        return update_variance_head(config, base_params, state, x0, sample, None)

    own = new_state(variance_head.init_params(network, 0), optimizer)
    inputs = _images(arguments.batch), jax.random.key(0), base_params
    full, _ = _compile_step(objective, network, arguments.batch)
    runs = {
        "full step": full,
        "head's step": _stepper(jit_step(head).lower(own, *inputs).compile(), own, *inputs),
    }
    print_ratios(runs, arguments.rounds, "full step", {})


def _compile_step(objective, network, batch):
    """A function that makes a train step of the CIFAR-10 UNet, and the memory of its temporaries."""
    import jax

    from s2dm_jax.diffusion.schedule import linear_schedule
    from s2dm_jax.training.averages import Averages
    from s2dm_jax.training.step import StepConfig, jit_step, update
    from s2dm_jax.workdir.state import init_state, make_optimizer

    schedule, optimizer = linear_schedule(), make_optimizer(2e-4, 1.0)
    config = StepConfig(network, schedule, objective, optimizer, Averages(0.9999))

    def step(state, x0, key):
        sample, dropout_key = _sample_noise(objective, schedule, state, x0, key)
        return update(config, state, x0, sample, dropout_key)

    state = init_state(network, optimizer, 0)
    inputs = _images(batch), jax.random.key(0)
    program = jit_step(step).lower(state, *inputs).compile()
    memory = program.memory_analysis().temp_size_in_bytes
    return _stepper(program, state, *inputs), f"{memory / 2**20:,.0f} MiB"


def _images(batch):
    return np.random.default_rng(0).uniform(-1, 1, (batch, 32, 32, 3)).astype(np.float32)


def _sample_noise(objective, schedule, state, x0, key):
    import jax

    from s2dm_jax.diffusion import objectives

    draw_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
    return objectives.sample_noise(objective, draw_key, schedule.T, x0.shape), dropout_key


def _stepper(program, state, *inputs):
    # The step donates its state, so each call takes that of the call before.
    current = [state]

    def run():
        current[0], metrics = program(current[0], *inputs)
        metrics["loss"].block_until_ready()

    return run


def cifar10_network():
    """The UNet of configs/cifar10.py, with the activations' type of this machine."""
    from s2dm_jax.config.build import build_network
    from s2dm_jax.config.defaults import default_config

    config = default_config()
    config.data.name = "cifar10"
    return build_network(config)


def print_ratios(runs, rounds, base, notes):
    """Interleaves the runs, so that a slow moment of the machine affects all of them, and compares medians.

    Ratios are of wall time and of the CPU time of this process, which other processes disturb less.
    """
    for run in runs.values():
        run()
    times, cpu_times = ({name: [] for name in runs} for _ in range(2))
    for _ in range(rounds):
        for name, run in runs.items():
            began, cpu_began = time.perf_counter(), time.process_time()
            run()
            times[name].append(time.perf_counter() - began)
            cpu_times[name].append(time.process_time() - cpu_began)
    for name, seconds in times.items():
        wall, cpu = (_ratio_text(taken[name], taken[base]) for taken in (times, cpu_times))
        middle = statistics.median(seconds) * 1e3
        print(f"{name:22s} {middle:9.1f} ms  {wall}  CPU time {cpu}  {notes.get(name, '')}")


def _ratio_text(seconds, base):
    """Median ratio of the rounds, with the smallest and the largest."""
    found = ratio(seconds, base)
    return f"{found['median']:5.2f}× ({found['low']:.2f} to {found['high']:.2f})"
