"""Stage 1: what a device computes is right. Each part compares and returns {"passed", "summary", errors}.

`right_published` compares with the published numbers. XLA's choice of kernels is not tuned here: what is tuned, the
train steps of stage "fast", is checked there by its losses.
"""

import contextlib
import os
import subprocess
import sys
from typing import Any

from gpu_stages.comparison import TESTS, add_tests_to_path, bounded, flat, largest_error, norm_error, published_module
from gpu_stages.parts import UNTUNED, Part, Settings
from gpu_stages.programs import published_config
from gpu_stages.right_published import check_network, check_samplers, check_training

# Bounds on relative errors.
_BFLOAT16_BOUND = 0.05
_SAME_MATHEMATICS_BOUND = 1e-5
_EXPORTED_BOUND = 1e-4
_GREY_LEVELS = 1


def check_bfloat16(settings: Settings) -> dict[str, Any]:
    """The gradients of a CIFAR-10 step in bfloat16 against float32 at the highest precision, tensor by tensor."""
    import jax
    import numpy as np

    from s2dm_jax.config.build import build_network, build_objective, build_schedule
    from s2dm_jax.config.defaults import image_shape
    from s2dm_jax.diffusion import objectives
    from s2dm_jax.weights import torch_names

    def gradients(dtype: str) -> dict[str, np.ndarray]:
        config = published_config("configs/cifar10.py:ddpm", settings.tiny, **{"model.dtype": dtype})
        network, schedule, objective = build_network(config), build_schedule(config), build_objective(config)
        size, channels = image_shape(config)
        batch = 4 if settings.tiny else 32
        x0 = np.random.default_rng(0).uniform(-1, 1, (batch, size, size, channels)).astype(np.float32)
        sample = objectives.sample_noise(objective, jax.random.key(0), schedule.T, x0.shape)

        def mean_loss(params):
            return objectives.loss(network.eps_fn(params, schedule), schedule, objective, x0, sample)[0].mean()

        precision = "highest" if dtype == "float32" else None
        with jax.default_matmul_precision(precision):
            grads = jax.jit(jax.grad(mean_loss))(network.init(0))
        return {name: np.asarray(grad, np.float64) for name, grad in torch_names.to_torch(grads).items()}

    exact, rounded = gradients("float32"), gradients("bfloat16")
    whole = np.sqrt(sum(np.sum(np.square(exact[name])) for name in exact))
    difference = np.sqrt(sum(np.sum(np.square(rounded[name] - exact[name])) for name in exact))
    norms = {name: float(np.linalg.norm(exact[name])) for name in exact}
    # The gradient of a key's bias is zero in exact arithmetic: its relative error says nothing.
    errors = {name: norm_error(rounded[name], exact[name]) for name in exact if norms[name] > 1e-5 * whole}
    worst = sorted(errors, key=lambda name: -errors[name])[:10]
    total, median = float(difference / whole), float(np.median(list(errors.values())))
    summary = f"gradients in bfloat16 against float32: relative error {total:.2%} of the whole, "
    summary += f"{median:.2%} of the median tensor, {errors[worst[0]]:.2%} of {worst[0]}"
    return {
        "passed": bool(total <= _BFLOAT16_BOUND and median <= _BFLOAT16_BOUND),
        "summary": summary,
        "error": total,
        "median": median,
        "errors": errors,
        "worst": {name: {"error": errors[name], "norm": norms[name]} for name in worst},
    }


def check_timesteps(settings: Settings) -> dict[str, Any]:
    """Loss and gradient of K = 1 … 4 timesteps in one network call against K calls."""
    import jax
    import numpy as np
    from steps import one_call_per_timestep

    from s2dm_jax.config.build import build_network, build_schedule
    from s2dm_jax.diffusion import objectives

    config = published_config("configs/cifar10.py:ddpm", True, **{"model.dtype": "float32"})
    network, schedule, batch = build_network(config), build_schedule(config), 4
    params = network.init(0)
    x0 = np.random.default_rng(0).uniform(-1, 1, (batch, *network.image_shape)).astype(np.float32)

    def answers(network, objective, sample):
        def mean_loss(params):
            return objectives.loss(network.eps_fn(params, schedule), schedule, objective, x0, sample)[0].mean()

        return jax.jit(jax.value_and_grad(mean_loss))(params)

    errors = {}
    with jax.default_matmul_precision("highest"):
        for K in (1, 2) if settings.tiny else (1, 2, 3, 4):
            objective = objectives.paper(K=K, lam=1.0)
            sample = objectives.sample_noise(objective, jax.random.key(0), schedule.T, x0.shape)
            (loss, grads), (loss_1, grads_1) = (
                answers(each, objective, sample) for each in (network, one_call_per_timestep(network, batch))
            )
            errors[f"K={K}"] = {"loss": largest_error(loss, loss_1), "grad": norm_error(flat(grads), flat(grads_1))}
    bounds = dict.fromkeys(("loss", "grad"), _SAME_MATHEMATICS_BOUND)
    return bounded("K timesteps of an image in one call against K calls", errors, bounds)


def check_resume(settings: Settings) -> dict[str, Any]:
    """Four steps without a break against two, a checkpoint, and two in a new loop: the same bits."""
    import jax
    import numpy as np

    add_tests_to_path()
    from helpers import small_config

    from s2dm_jax.training.loop import TrainingLoop
    from s2dm_jax.training.setup import set_up
    from s2dm_jax.workdir.folder import open_workdir

    def train(name: str, steps: int) -> dict[str, Any]:
        config = small_config(**{"train.steps": steps})
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(open_workdir(str(settings.scratch / name), config))
            loop = TrainingLoop(set_up(config, folder, None), stack)
            loop.run()
            return jax.tree.map(np.asarray, loop.state)

    straight = train("straight", 4)
    train("resumed", 2)
    pairs = zip(jax.tree.leaves(straight), jax.tree.leaves(train("resumed", 4)), strict=True)
    equal = [bool(np.array_equal(a, b)) for a, b in pairs]
    summary = f"resumed training: {sum(equal)} of {len(equal)} arrays of the state equal to the last bit"
    return {"passed": all(equal), "summary": summary, "arrays": len(equal), "equal": sum(equal)}


def check_batches(settings: Settings) -> dict[str, Any]:
    """DDIM images of one seed in batches of two sizes, with the CIFAR-10 network in the default type and in float32."""
    import numpy as np

    from s2dm_jax.inference.sampler import configure_sampler

    small, large = (3, 5) if settings.tiny else (16, 50)
    differences = {}
    for dtype in ("auto", "float32"):
        network, params, schedule = _denoiser(settings, dtype)
        sample, timesteps = configure_sampler(network, schedule, "ddim", nfe=2 if settings.tiny else 10)
        few, many = (np.asarray(sample(params, timesteps, 0, np.arange(n)), int) for n in (small, large))
        levels = np.abs(few - many[:small])
        differences[dtype] = {
            "dtype": network.network.dtype,
            "levels": int(levels.max()),
            "share": float((levels > 0).mean()),
            "saturated": float(np.isin(few, (0, 255)).mean()),
        }
    most = max(each["levels"] for each in differences.values())
    parts = [f"{each['dtype']} {each['levels']} ({each['share']:.2%} of bytes)" for each in differences.values()]
    summary = f"images in batches of {small} and {large} differ by grey levels: {', '.join(parts)}"
    return {"passed": most <= _GREY_LEVELS, "summary": summary, "differences": differences}


def check_exported(settings: Settings) -> dict[str, Any]:
    """An exported sampler, run by a process that imports only JAX, against the run that it was exported from."""
    import jax
    import numpy as np

    add_tests_to_path()
    from helpers import save_run

    from s2dm_jax.inference.sampler import resolve_program, run_sampler
    from s2dm_jax.weights.export import export
    from s2dm_jax.workdir.load import load_run

    config = published_config("configs/digits.py:ddpm", settings.tiny, **{"model.dtype": "float32", "sample.nfe": 4})
    config.export.path = str(settings.scratch / "sampler.npz")
    workdir = settings.scratch / "exported"
    save_run(workdir, config, seed=0, ema_factor=1.0)
    with jax.default_matmul_precision("highest"):
        export(config, str(workdir))
        run = load_run(str(workdir))
        network, schedule = _network_and_schedule(config)
        program, timesteps, arguments = resolve_program(network, schedule, "ddim", nfe=4)
        expected = jax.jit(lambda params, indices: run_sampler(program, params, timesteps, 0, indices, **arguments))(
            run.ema_params, np.arange(6)
        )
    output = settings.scratch / "exported.npy"
    command = [sys.executable, "-c", _RUN_EXPORTED, config.export.path, str(output)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": _without_checkout()})
    error = largest_error(np.load(output), expected)
    summary = f"an exported sampler, run without s2dm_jax, differs from the run by {error:.1e} of the largest value"
    return {"passed": error <= _EXPORTED_BOUND, "summary": summary, "error": error}


# The loader of docs/weights.md.
_RUN_EXPORTED = """
import sys
import jax
import numpy as np
from jax import export
with np.load(sys.argv[1]) as file:
    weights = {name[8:]: file[name] for name in file.files if name.startswith("weights/")}
    run = jax.jit(export.deserialize(bytearray(file["sampler"])).call)
np.save(sys.argv[2], np.asarray(run(weights, np.int32(0), np.arange(6, dtype=np.int32))))
assert not {"s2dm_jax", "flax"} & set(sys.modules)
"""


def _without_checkout() -> str:
    """PYTHONPATH without this project."""
    here = ("", ".", str(TESTS.parent))
    return os.pathsep.join(path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in here)


def _network_and_schedule(config: Any) -> tuple[Any, Any]:
    from s2dm_jax.config.build import build_network, build_schedule

    return build_network(config), build_schedule(config)


def _denoiser(settings: Settings, dtype: str) -> tuple[Any, dict, Any]:
    """A network whose samples are images: the golden files' closed form and a tenth of the CIFAR-10 UNet's output."""
    config = published_config("configs/cifar10.py:ddpm", settings.tiny, **{"model.dtype": dtype})
    network, schedule = _network_and_schedule(config)
    return published_module().PerturbedClosedForm(network), network.init(0), schedule


_DETERMINISTIC = {"XLA_FLAGS": f"{UNTUNED['XLA_FLAGS']} --xla_gpu_deterministic_ops=true"}
PARTS = {
    "network": Part(check_network, 90, UNTUNED),
    "training": Part(check_training, 110, UNTUNED),
    "samplers": Part(check_samplers, 90, UNTUNED),
    "bfloat16": Part(check_bfloat16, 110, UNTUNED),
    "timesteps": Part(check_timesteps, 110, UNTUNED),
    "resume": Part(check_resume, 110, _DETERMINISTIC),
    "batches": Part(check_batches, 110, UNTUNED),
    "exported": Part(check_exported, 110, UNTUNED),
}
