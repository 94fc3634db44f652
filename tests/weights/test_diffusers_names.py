"""diffusers' names, configs and schedules; test_with_torch.py runs diffusers itself."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from s2dm_jax.common.errors import UserError
from s2dm_jax.diffusion.betas import ScheduleSpec
from s2dm_jax.diffusion.parameterization import PREDICTIONS
from s2dm_jax.diffusion.schedule import SCHEDULES
from s2dm_jax.models.unet import UNet
from s2dm_jax.weights import diffusers_names, torch_names
from s2dm_jax.weights.read import read_weights
from s2dm_jax.weights.torch_pickle import write_torch

NETWORK = UNet(8, 1, 1, 32, (1,), 1, (8,))


def published():
    return torch_names.to_torch(NETWORK.init(0))


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("norm_eps", None, "its norm_eps is 1e-05, but DDIM's network has 1e-06"),
        ("freq_shift", 0, "its freq_shift is 0, but DDIM's network has 1"),
        ("attention_head_dim", 8, "its attention_head_dim is 8, but DDIM's network has None"),
        (
            "_class_name",
            "UNet2DConditionModel",
            "it is a UNet2DConditionModel, but a UNet2DModel is needed",
        ),
        ("down_block_types", ["SkipDownBlock2D"], r"its blocks are \['SkipDownBlock2D'\] and"),
        ("sample_size", None, "its sample_size is None, but a number is needed"),
        ("in_channels", 0, "its in_channels is 0, but a number is needed"),
        ("block_out_channels", [48, 32], r"its block_out_channels are \[48, 32\], but each must be"),
    ],
)
def test_a_diffusers_network_of_another_kind_is_refused(tmp_path, field, value, sentence):
    state = diffusers_names.to_diffusers(published(), NETWORK)
    write_torch(tmp_path / "diffusion_pytorch_model.bin", state, "")
    path = tmp_path / "config.json"
    config = diffusers_names.unet_config(NETWORK)
    config[field] = value
    if value is None:
        # A field that is not there has diffusers' default, which is another one.
        del config[field]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"config.json does not describe a network .*: {sentence}") as error:
        read_weights(str(tmp_path))
    assert "\n" not in str(error.value)


def test_googles_old_layout_of_a_diffusers_folder_is_read(tmp_path):
    """Everything in one folder, attention under its old names, weights as a .bin."""
    state = diffusers_names.to_diffusers(published(), NETWORK)
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        state = {name.replace(new, old): value for name, value in state.items()}
    assert any("query" in name for name in state)
    write_torch(tmp_path / "diffusion_pytorch_model.bin", state, "")
    (tmp_path / "config.json").write_text(json.dumps(diffusers_names.unet_config(NETWORK)))
    scheduler = {"_class_name": "DDPMScheduler", "num_train_timesteps": 50, "beta_schedule": "linear"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(scheduler))
    weights = read_weights(str(tmp_path))
    # diffusers takes its betas literally, at any T.
    assert weights.schedule == ("linear", 50, 1e-4, 0.02)
    for name, value in published().items():
        np.testing.assert_array_equal(torch_names.to_torch(weights.ema_params)[name], value)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config.json is not an object of fields"):
        read_weights(str(tmp_path))


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_known_again(name):
    ends = {"cosine": {}, "const": {"beta_end": 0.3}}.get(name, {"beta_start": 2e-3, "beta_end": 0.3})
    for spec in (ScheduleSpec(name, 40), ScheduleSpec(name, 40, **ends)):
        for prediction in PREDICTIONS:
            config = diffusers_names.scheduler_config(spec, prediction)
            found, predicted = diffusers_names.read_scheduler_config(json.loads(json.dumps(config)))
            assert (found[:2], predicted) == (spec[:2], prediction)
            assert [end and pytest.approx(end) for end in spec[2:]] == list(found[2:])
    config["trained_betas"] = [0.2, 0.1] * 20
    with pytest.raises(ValueError, match="do not match any of the schedules"):
        diffusers_names.read_scheduler_config(config)


def test_stable_diffusions_schedule_is_read():
    config = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    spec, _ = diffusers_names.read_scheduler_config(config)
    assert spec == ("quadratic", 1000, 0.00085, 0.012)
    with pytest.raises(ValueError, match="do not match any of the schedules"):
        diffusers_names.read_scheduler_config(config | {"beta_schedule": "sigmoid"})


def test_options_of_sampling_that_are_not_used_are_named():
    config = diffusers_names.scheduler_config(ScheduleSpec("linear", 40))
    assert diffusers_names.unused_scheduler_options(config) == []
    config |= {"clip_sample": True, "timestep_spacing": "trailing", "use_karras_sigmas": None}
    assert diffusers_names.unused_scheduler_options(config) == ["timestep_spacing='trailing'", "clip_sample=True"]
    # Fields that are not in the table are named too, and the network's.
    later = config | {"variance_type": "learned", "of_tomorrow": 2, "solver_type": "bh2", "off": False}
    assert diffusers_names.unused_scheduler_options(later)[2:] == ["variance_type='learned'", "of_tomorrow=2"]
    config = diffusers_names.unet_config(NETWORK)
    assert diffusers_names.unused_network_options(config) == []
    assert diffusers_names.unused_network_options(config | {"new": "on", "off": None}) == ["new='on'"]


def test_the_ema_of_a_training_is_preferred(tmp_path):
    network, params = NETWORK, (NETWORK.init(0), NETWORK.init(1))
    for name, each in zip(("unet", "unet_ema"), params, strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(diffusers_names.unet_config(network)))
        state = diffusers_names.to_diffusers(torch_names.to_torch(each), network)
        save_file(state, tmp_path / name / "diffusion_pytorch_model.safetensors")
    found = read_weights(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, found.ema_params, params[1])
    assert "the EMA, unet_ema, was taken" in found.description
    # A variant of the weights, a folder above, and files that are no JSON.
    weights = tmp_path / "unet_ema" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert "the variant diffusion_pytorch_model.fp16.safetensors was taken" in read_weights(str(tmp_path)).description
    with pytest.raises(UserError, match=f"give what is in it, such as {tmp_path}$"):
        read_weights(str(tmp_path.parent))
    for text, reason in (("", "is empty"), ("[]", "is not an object of fields"), ("{", "is not JSON")):
        (tmp_path / "unet_ema" / "config.json").write_text(text)
        with pytest.raises(UserError, match=f"cannot be used: config.json {reason}; fetch it again"):
            read_weights(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        (
            "prediction_type",
            "flow",
            "its prediction_type is 'flow', but one of epsilon, v_prediction, sample is needed",
        ),
        ("rescale_betas_zero_snr", True, "its rescale_betas_zero_snr is True"),
        ("snr_shift_scale", 3.0, "its snr_shift_scale is 3.0, which changes the betas"),
        ("use_flow_sigmas", True, "its use_flow_sigmas is True, which is flow matching"),
        ("_class_name", "EDMEulerScheduler", "it is a EDMEulerScheduler, whose forward process is not supported"),
        ("num_train_timesteps", 1, "its num_train_timesteps is 1, but a number of at least 2 is needed"),
    ],
)
def test_a_scheduler_of_another_kind_is_refused(field, value, sentence):
    config = {**diffusers_names.scheduler_config(ScheduleSpec("linear", 40)), field: value}
    with pytest.raises(ValueError, match=sentence):
        diffusers_names.read_scheduler_config(config)


def test_a_size_that_cannot_be_halved_is_refused():
    config = {**diffusers_names.unet_config(UNet(8, 1, 1, 32, (1, 1), 1, ())), "sample_size": 9}
    with pytest.raises(ValueError, match="its sample_size 9 cannot be halved 1 times"):
        diffusers_names.read_unet_config(config)


def test_the_first_tensor_that_does_not_fit_is_named():
    state = diffusers_names.to_diffusers(published(), NETWORK)

    def refuses(sentence, **changes):
        changed = {name: value for name, value in {**state, **changes}.items() if value is not None}
        with pytest.raises(ValueError, match=sentence):
            diffusers_names.from_diffusers(changed, NETWORK)

    refuses(r"it lacks the tensor conv_in\.weight of shape \(32, 1, 3, 3\)", **{"conv_in.weight": None})
    refuses(
        r"conv_in\.weight has shape \(32, 3, 3, 3\), but the network needs \(32, 1, 3, 3\)",
        **{"conv_in.weight": np.zeros((32, 3, 3, 3))},
    )
    refuses(r"no place for the tensor class_embedding of shape \(2,\)", class_embedding=np.zeros(2))


def test_resampling_without_convolutions_comes_back_from_blocks_that_have_them():
    network = UNet(8, 1, 1, 32, (1, 1), 1, (), resamp_with_conv=False)
    state = torch_names.to_torch(network.init(0))
    theirs = diffusers_names.to_diffusers(state, network)
    down, up = (theirs[f"{way}_blocks.0.{way}samplers.0.conv.weight"] for way in ("down", "up"))
    # Of one channel: the mean of 2×2 pixels, padded below and to the right; the pixel in the middle.
    assert down[3, 3].tolist() == [[0.25, 0.25, 0], [0.25, 0.25, 0], [0, 0, 0]]
    assert up[3, 3].tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert (np.count_nonzero(down), np.count_nonzero(up)) == (4 * 32, 32)

    described = diffusers_names.read_unet_config(diffusers_names.unet_config(network))
    assert described.resamp_with_conv
    back, found = diffusers_names.from_diffusers(theirs, described)
    assert found == network
    assert back.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value)
    theirs["up_blocks.0.upsamplers.0.conv.bias"] = np.ones(32, np.float32)
    assert diffusers_names.from_diffusers(theirs, described)[1].resamp_with_conv
    # A network of one level resamples nothing.
    assert diffusers_names.from_diffusers(diffusers_names.to_diffusers(published(), NETWORK), NETWORK)[1] == NETWORK
