"""Checks of `right` against the numbers of the published code, in float32 at the highest precision."""

from typing import Any

from gpu_stages.comparison import bounded, largest_error, published_module
from gpu_stages.parts import Settings

# The tolerances of the tests, on relative errors.
_NETWORK_BOUNDS = {"out": 1e-4, "loss": 1e-4, "grad_norm": 1e-4, "grad": 1e-3}
_TRAINING_BOUNDS = {"loss": 1e-3, "grad_norm": 1e-3, "update": 0.01}
_SAMPLER_BOUNDS = {"float32": 1e-3, "float64": 1e-5}


def check_network(settings: Settings) -> dict[str, Any]:
    """The UNet: outputs, the DDIM loss and its gradients."""
    import jax
    import numpy as np

    published = published_module()
    errors = {}
    with jax.default_matmul_precision("highest"):
        for name in ("unet_a", "unet_b")[: 1 if settings.tiny else None]:
            arrays = published.read_golden(f"{name}.npz")
            answers = published.network_answers(arrays)
            errors[name] = {key: largest_error(answers[key], arrays[key]) for key in ("out", "loss", "grad_norm")}
            expected = published.group(arrays, "grad/")
            errors[name]["grad"] = float(
                np.max([largest_error(answers["grads"][key], expected[key]) for key in expected])
            )
    return bounded("UNet against the published code", errors, _NETWORK_BOUNDS)


def check_training(settings: Settings) -> dict[str, Any]:
    """Five steps of the published training loops: losses, gradient norms, how far the weights moved."""
    import jax
    import numpy as np

    published = published_module()
    from torch_random import sketch

    errors = {}
    with jax.default_matmul_precision("highest"):
        for name in ("train_ddpm", "train_sa2", "train_sa3", "train_s2")[: 1 if settings.tiny else None]:
            arrays = published.read_golden(f"{name}.npz")
            history, params, _ = published.published_run(arrays)
            init, expected = published.group(arrays, "init/"), arrays["final_sketch"]
            moved = sketch({key: params[key].astype(np.float64) - init[key] for key in init})
            errors[name] = {
                "loss": float(np.max(np.abs(history[:, 0] / arrays["loss"] - 1))),
                "grad_norm": float(np.max(np.abs(history[:, 1] / arrays["grad_norm"] - 1))),
                "update": float(np.linalg.norm(moved - expected) / np.linalg.norm(expected)),
            }
    return bounded("five training steps of the published loops", errors, _TRAINING_BOUNDS)


def check_samplers(settings: Settings) -> dict[str, Any]:
    """DDIM, DDPM and PNDM with the golden files' closed-form network."""
    import jax
    import jax.numpy as jnp

    published = published_module()
    from s2dm_jax.samplers.ddim import ddim, ddpm
    from s2dm_jax.samplers.pndm import f_pndm, s_pndm

    files = {name: published.read_golden(f"{name}.npz") for name in ("ddim", "ddpm", "pndm")}
    cases: dict[str, tuple] = {
        "ddim/uniform_10_eta0.0": (ddim, {"eta": 0.0}),
        "ddim/quad_20_eta0.0": (ddim, {"eta": 0.0}),
        "ddim/uniform_10_eta1.0": (ddim, {"eta": 1.0}),
        "ddpm/10": (ddpm, {}),
        "pndm/F-PNDM_10": (f_pndm, {}),
        "pndm/S-PNDM_10": (s_pndm, {}),
    }
    errors: dict[str, dict[str, float]] = {}
    for case, (sampler, options) in list(cases.items())[:: 3 if settings.tiny else 1]:
        file, _, key = case.partition("/")
        arrays, errors[case] = files[file], {}
        for dtype in _SAMPLER_BOUNDS:
            with jax.enable_x64(dtype == "float64"):
                noise = arrays.get(f"{key}/noise")
                drawn = {} if noise is None else {"noise_fn": published.injected(jnp.asarray(noise), dtype)}
                x = published.sample_golden(sampler, arrays["x_T"], arrays[f"{key}/seq"], dtype, **options, **drawn)
            errors[case][dtype] = largest_error(x, arrays[f"{key}/x"])
    return bounded("DDIM, DDPM, PNDM against the published code", errors, _SAMPLER_BOUNDS)
