"""The public surface: each name imports, is annotated in full, and documents the shapes of its arrays.

What is not listed may move without notice.
"""

import importlib
import inspect
import re

import pytest

PUBLIC = {
    "diffusion.types": ["EpsFn", "NoiseFn"],
    "diffusion.schedule": ["NoiseSchedule", "linear_schedule", "cosine_schedule", "add_noise"],
    "diffusion.objectives": [
        "Objective",
        "paper",
        "released",
        "NoiseSample",
        "sample_noise",
        "loss",
        "skip_scale",
    ],
    "diffusion.parameterization": ["PREDICTIONS"],
    "models.network": ["Network", "NETWORKS", *(f"Network.{name}" for name in ("init", "apply", "eps_fn"))],
    "models.unet": ["UNet"],
    "models.variance_head": ["VarianceHead"],
    "samplers.specs": ["SAMPLERS", "get_sampler"],
    "samplers.timesteps": [
        *(
            f"{name}_timesteps"
            for name in ("uniform", "quadratic", "linspace", "trailing", "log_snr", "truncated_log_snr", "karras")
        ),
    ],
    "samplers.ddim": ["ddim", "ddpm"],
    "samplers.pndm": ["f_pndm", "s_pndm"],
    "samplers.heun": ["heun"],
    "samplers.multistep": ["deis", "dpmpp", "dpmpp_2m", "dpmpp_3m", "unipc"],
    "samplers.analytic": ["analytic", "sn", "npr", "optimal_timesteps"],
    "config": ["default_config", "set_objective", "set_head"],
    "config.io": ["load_config"],
    "config.validate": ["check_config"],
    "data.datasets": ["Dataset", "load_dataset"],
    "data.batches": ["batch_at"],
    "inference.model": ["load", "Model", "Model.sample", "Model.sampler"],
    "inference.sampler": ["sample_batches"],
    "inference.visualize": ["interpolate", "trajectory", "compare"],
    "weights.read": ["read_weights"],
    "weights.write": ["write_weights"],
    "weights.export": ["export_programs"],
    "evaluation.evaluate": ["evaluate"],
    "evaluation.metrics": ["frechet_distance", "fid_infinity", "kid", "inception_score", "precision_recall"],
    "evaluation.estimation_gap": ["estimation_gap"],
    "training.loop": ["train"],
    "training.step": ["StepConfig", "update", "make_train_chunk"],
}
NAMES = [(module, name) for module, names in PUBLIC.items() for name in names]


def public(module, name):
    found = importlib.import_module(f"s2dm_jax.{module}")
    for part in name.split("."):
        found = getattr(found, part)
    return found


FUNCTIONS = [(module, name) for module, name in NAMES if inspect.isroutine(public(module, name))]
CLASSES = [(module, name) for module, name in NAMES if inspect.isclass(public(module, name))]


def takes_or_gives_arrays(signature):
    annotations = [p.annotation for p in signature.parameters.values()] + [signature.return_annotation]
    return any(re.search(r"\b(Array|ndarray)\b", str(annotation)) for annotation in annotations)


def names_shapes(text):
    """Whether a docstring holds a shape, such as [B, H, W, C], [n, 3] or []; an interval has no letters."""
    return any(not inner or re.search("[A-Za-z]", inner) for inner in re.findall(r"\[([^\[\]]*)\]", text))


@pytest.mark.parametrize(("module", "name"), FUNCTIONS + CLASSES)
def test_public_names_are_annotated_in_full(module, name):
    if getattr(public(module, name), "_is_protocol", False):
        # Nobody calls a Protocol: its methods are in the list.
        return
    signature = inspect.signature(public(module, name))
    empty = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"]
    assert empty == []
    if (module, name) in FUNCTIONS:
        assert signature.return_annotation is not signature.empty


@pytest.mark.parametrize(("module", "name"), FUNCTIONS + CLASSES)
def test_public_names_are_documented(module, name):
    text = inspect.getdoc(public(module, name)) or ""
    # A dataclass without a docstring gets its signature as one.
    assert not text.startswith(f"{name}("), text
    assert len(text.split("\n")[0].split()) >= 3


@pytest.mark.parametrize(("module", "name"), FUNCTIONS)
def test_functions_of_arrays_document_shapes(module, name):
    function = public(module, name)
    signature, texts = inspect.signature(function), [inspect.getdoc(function) or ""]
    if "x_T" in signature.parameters:
        # What all samplers take and return is documented once, in their sub-package.
        texts.append(importlib.import_module("s2dm_jax.samplers").__doc__ or "")
    if takes_or_gives_arrays(signature):
        assert any(map(names_shapes, texts))


def test_the_package_exports_load_and_its_version():
    package = importlib.import_module("s2dm_jax")
    assert package.load is public("inference.model", "load")
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", package.__version__)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x [B, H, W, C]", True),
        ("int [S]", True),
        ("float32 [n, 10]", True),
        ("int32 [], a step", True),
        ("pixels in [−1, 1], t in [0, T)", False),
        ("images of the shape of x", False),
    ],
)
def test_shapes_are_recognised(text, expected):
    assert names_shapes(text) == expected
