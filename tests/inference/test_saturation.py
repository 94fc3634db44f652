"""Nonsense images, saturated or not finite, are reported in a sentence; without a finite one none is written."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FunctionNetwork

from s2dm_jax.common.errors import UserError
from s2dm_jax.config.defaults import default_config
from s2dm_jax.data.datasets import load_digits
from s2dm_jax.diffusion.schedule import linear_schedule
from s2dm_jax.inference import sample as sample_mode
from s2dm_jax.inference import visualize
from s2dm_jax.inference.model import Model
from s2dm_jax.inference.noise_statistics import estimate_noise_statistics
from s2dm_jax.inference.saturation import Ends, fault_of, saturation_limit
from s2dm_jax.samplers.noise import initial_noise

WORDS = ("ddim, timestep_spacing linspace", "timestep_spacing=uniform")


def model_of(function, saturation=0.3):
    """A model whose network is a function of (x, t), at T = 20."""
    config = default_config()
    config.diffusion.update(T=20, beta_end=0.5)
    config.sample.update({"nfe": 2, "num_images": 3, "batch_size": 2})
    network = FunctionNetwork(lambda params, x, t: function(x, t), image_shape=(8, 8, 3), dtype="bfloat16")
    params = {"w": np.zeros(1, np.float32)}
    return Model(config, network, linear_schedule(20, beta_end=0.5), params, 7, saturation=saturation)


SATURATED = model_of(lambda x, t: -1e5 * x)
NAN = model_of(lambda x, t: x * jnp.nan)
HEALTHY = model_of(lambda x, t: x * 0.9)


def test_the_limit_is_beyond_real_images_of_any_kind():
    for real, above, below in ((0.02, 0.13, 0.11), (0.49, 0.75, 0.73), (0.81, 0.91, 0.9), (None, 0.96, 0.94)):
        assert below <= saturation_limit(real) < above
        assert "0 or 255" in fault_of(Ends(9, above, 0), lambda real=real: real, *WORDS).text
        assert fault_of(Ends(9, below, 0), lambda real=real: real, *WORDS) is None
    # Black and white alone.
    assert fault_of(Ends(9, 1.0, 0), lambda: 1.0, *WORDS) is None
    assert load_digits().saturation == pytest.approx(0.58, abs=0.001)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (
            {},
            r"100\.0 % of the images' values are 0 or 255, against 30\.0 % of those of real images \(ddim, timestep",
        ),
        (
            {"timestep_spacing": "linspace"},
            r"timestep_spacing linspace, .* try timestep_spacing=uniform, a higher nfe, c",
        ),
        ({"timesteps": (0, 19)}, "explicit timesteps, NFE 2, linear schedule, bfloat16.*model.dtype=float32"),
    ],
)
def test_saturated_images_are_reported(how, expected):
    with pytest.warns(RuntimeWarning, match=expected):
        SATURATED.sample(3, **({"nfe": 2} | how if "timesteps" not in how else how))


@pytest.mark.filterwarnings("error")
def test_others_are_not():
    images = HEALTHY.sample(5, nfe=2, batch_size=2)
    assert ((images == 0) | (images == 255)).mean() < 0.3
    visualize.interpolate(HEALTHY, [0], [1], 3, nfe=2)


def test_values_that_are_not_finite_are_reported_by_every_way_to_sample():
    partly = model_of(lambda x, t: jnp.where(x[:, :1, :1, :1] > 0, jnp.nan, x))
    bad = int((np.asarray(initial_noise(0, jnp.arange(4), (8, 8, 3)))[:, 0, 0, 0] > 0).sum())
    with pytest.warns(RuntimeWarning, match=f"{bad} of 4 images have values that are not finite"):
        partly.sample(4, nfe=1, batch_size=3)
    for draw in (
        lambda report: NAN.sample(3, nfe=2, report=report),
        lambda report: list(NAN.batches(NAN.config.sample, False, report)),
        lambda report: visualize.trajectory(NAN, range(3), nfe=2, report=report),
        lambda report: visualize.interpolate(NAN, [0], [1], 3, nfe=2, report=report),
        lambda report: visualize.compare([HEALTHY, NAN], 3, nfe=2, report=report),
    ):
        faults = []
        draw(faults.append)
        assert [fault.hopeless for fault in faults] == [True]
        assert faults[0].text.startswith("3 of 3 images have values that are not finite (ddim")


@pytest.mark.parametrize("output", ["grid", "npz", "png"])
def test_sampling_writes_what_is_saturated_with_a_warning_and_nothing_of_nan(output, tmp_path, monkeypatch, capsys):
    models = {"saturated": SATURATED, "nan": NAN}
    monkeypatch.setattr(sample_mode, "load", lambda path, step=None, ema="": models[path])
    config = SATURATED.config
    config.sample.output = output
    sample_mode.sample(config, "saturated", str(tmp_path / "out"))
    assert capsys.readouterr().err.startswith("warning: 100.0 % of the images' values are 0 or 255")
    assert len(list((tmp_path / "out").iterdir())) == 1
    with pytest.raises(UserError, match="3 of 3 images have values that are not finite"):
        sample_mode.sample(config, "nan", str(tmp_path / "none"))
    assert list((tmp_path / "none").iterdir()) == []


def test_a_statistic_that_is_not_finite_is_refused_and_not_stored(tmp_path):
    images = np.zeros((3, 8, 8, 3), np.uint8)
    with pytest.raises(UserError, match="the network's output at timestep 0 is not finite"):
        estimate_noise_statistics(NAN.network, NAN.schedule, NAN.ema_params, images, tmp_path)
    assert list(tmp_path.iterdir()) == []
