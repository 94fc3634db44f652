"""diffusers' names, configs and schedules; test_with_torch.py runs diffusers itself."""

import json

import numpy as np
import pytest

from s2dm_jax import diffusers, unet
from s2dm_jax.config import UserError
from s2dm_jax.schedule import SCHEDULES
from s2dm_jax.torch_files import write_torch
from s2dm_jax.unet import UNetConfig
from s2dm_jax.weights_files import read_weights, to_state

NETWORK = UNetConfig(8, 1, 1, 32, (1,), 1, (8,))


def published():
    return to_state(unet.init_params(NETWORK, 0))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("norm_eps", None),
        ("freq_shift", 0),
        ("attention_head_dim", 8),
        ("_class_name", "UNet2DConditionModel"),
        ("down_block_types", ["SkipDownBlock2D"]),
        ("sample_size", None),
        ("block_out_channels", [48, 32]),
    ],
)
def test_a_diffusers_network_of_another_kind_is_refused(tmp_path, field, value):
    state = diffusers.to_diffusers(published(), NETWORK)
    write_torch(tmp_path / "diffusion_pytorch_model.bin", state, "")
    path = tmp_path / "config.json"
    config = diffusers.unet_config(NETWORK)
    config[field] = value
    # A field that is not there has diffusers' default, which is another one.
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(UserError, match=r"config.json does not describe a network .*(its|it is)") as error:
        read_weights(str(tmp_path))
    assert "\n" not in str(error.value)


def test_googles_old_layout_of_a_diffusers_folder_is_read(tmp_path):
    """Everything in one folder, attention under its old names, weights as a .bin."""
    state = diffusers.to_diffusers(published(), NETWORK)
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        state = {name.replace(new, old): value for name, value in state.items()}
    assert any("query" in name for name in state)
    write_torch(tmp_path / "diffusion_pytorch_model.bin", state, "")
    (tmp_path / "config.json").write_text(json.dumps(diffusers.unet_config(NETWORK)))
    scheduler = {"_class_name": "DDPMScheduler", "num_train_timesteps": 50, "beta_schedule": "linear"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(scheduler))
    weights = read_weights(str(tmp_path))
    assert weights.schedule == ("linear", 50)
    for name, value in published().items():
        np.testing.assert_array_equal(to_state(weights.ema)[name], value)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config.json does not describe a network"):
        read_weights(str(tmp_path))


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_known_again(name):
    config = diffusers.scheduler_config(name, 40)
    assert diffusers.read_scheduler_config(json.loads(json.dumps(config))) == (name, 40)
    config["beta_start"], config["trained_betas"] = 0.2, None
    if name == "cosine":
        config["beta_schedule"] = "sigmoid"
    with pytest.raises(ValueError, match="none of our schedules"):
        diffusers.read_scheduler_config(config)
