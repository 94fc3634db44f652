"""Weights in and out against PyTorch and diffusers themselves; skipped where they are not installed.

pip install 's2dm_jax[torch]' && pytest -n0 -m '' tests/weights/test_with_torch.py
"""

import argparse
import dataclasses
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from published import group

from s2dm_jax.config.defaults import default_config
from s2dm_jax.diffusion.betas import ScheduleSpec
from s2dm_jax.diffusion.schedule import SCHEDULES
from s2dm_jax.inference.model import Model
from s2dm_jax.models.unet import UNet
from s2dm_jax.weights import torch_names
from s2dm_jax.weights.read import Weights, read_weights
from s2dm_jax.weights.torch_pickle import open_torch
from s2dm_jax.weights.write import infer_config, write_weights

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 's2dm_jax[torch]'")


def write_golden(path, before_1_6):
    """tests/golden/torch_zip.pth and torch_before_1_6.pth."""
    w = torch.arange(6, dtype=torch.float32).reshape(2, 3) / 2
    params = OrderedDict(
        {
            "module.w": w.t(),
            "module.part": torch.arange(10, dtype=torch.float32)[4:8],
            "module.half": torch.tensor([1.5, -2.0], dtype=torch.float16),
            "module.brain": torch.tensor([0.5, 3.0], dtype=torch.bfloat16),
            "module.scalar": torch.tensor(7.0),
        }
    )
    beside = {
        "args": argparse.Namespace(lr=1e-3, betas=[0.9, 0.999]),
        "best": np.float64(1.5),
        "device": torch.device("cpu"),
        "shape": torch.Size([2, 3]),
        "lr": 2e-4,
        "parameter": torch.nn.Parameter(w),
    }
    contents = [params, beside, 3, 790000, {"w": w + 1}]
    torch.save(contents, path, _use_new_zipfile_serialization=not before_1_6)


@pytest.mark.parametrize("name", ["torch_zip.pth", "torch_before_1_6.pth"])
def test_todays_torch_writes_what_the_golden_files_hold(tmp_path, name):
    write_golden(tmp_path / name, before_1_6=name == "torch_before_1_6.pth")
    read = []
    for folder in (tmp_path, Path(__file__).parents[1] / "golden"):
        with open_torch(folder / name) as (contents, fetch, _):
            arrays = {key: fetch(tensor).tobytes() for key, tensor in contents[0].items()}
            read.append((arrays, contents[0]["module.w"].shape, contents[1]["lr"], contents[2:4]))
    assert read[0] == read[1]


def golden_weights(golden, name):
    """A golden network, its published state_dict, and the file's arrays in PyTorch's layout."""
    arrays = golden(name)
    shape = json.loads(str(arrays["config"]))
    state = group(arrays, "param/")
    shapes = {key: value.shape for key, value in state.items()}
    network = torch_names.infer_network(shapes, shape["resolution"])
    assert list(network.attn_resolutions) == shape["attn_resolutions"]
    return network, state, np.moveaxis(arrays["x"], -1, -3), arrays["t"], np.moveaxis(arrays["out"], -1, -3)


def as_weights(network, state):
    params = torch_names.from_torch(state, network)
    return Weights(network, params, params, None, ScheduleSpec("linear", 1000), 0, "", "")


def write(path, kind, weights):
    write_weights(str(path), kind, weights, infer_config(weights), source={"file": "", "first_step": 0})


@pytest.mark.parametrize("name", ["unet_a.npz", "unet_b.npz"])
def test_torch_to_ours_to_diffusers_runs_alike(golden, tmp_path, name):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")
    network, state, x, t, out = golden_weights(golden, name)
    torch.save({key: torch.tensor(value) for key, value in state.items()}, tmp_path / "published.pth")
    weights = read_weights(str(tmp_path / "published.pth"), resolution=network.resolution)
    write(tmp_path / "folder", "diffusers", weights)
    model = diffusers.UNet2DModel.from_pretrained(tmp_path / "folder", subfolder="unet").eval()
    with torch.no_grad():
        found = model(torch.tensor(x), torch.tensor(t)).sample.numpy()
    error = np.abs(found - out).max() / np.abs(out).max()
    print(f"{name}: {error:.1e} of the largest output")
    assert error <= 1e-4
    # And what diffusers saves comes back to the bit.
    model.save_pretrained(tmp_path / "theirs")
    back = read_weights(str(tmp_path / "theirs"))
    # The shapes do not tell dropout; the folder has the published configs'.
    assert dataclasses.replace(back.network, dropout=0.0) == network
    for key, value in torch_names.to_torch(back.ema_params).items():
        assert value.tobytes() == np.ascontiguousarray(state[key]).tobytes(), key


@pytest.mark.parametrize("t_offset", [0, 1])
def test_improved_diffusions_network_runs_alike_in_diffusers(golden, tmp_path, t_offset):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")
    arrays = golden("iddpm_a.npz")
    state = group(arrays, "param/")
    torch.save({key: torch.tensor(value) for key, value in state.items()}, tmp_path / "published.pt")
    stated = {"t_offset": t_offset}
    weights = read_weights(str(tmp_path / "published.pt"), resolution=arrays["x"].shape[1], stated=stated)
    write(tmp_path / "ours.pt", "improved_diffusion", weights)
    theirs = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert list(theirs) == list(state)
    assert all(theirs[key].numpy().tobytes() == np.ascontiguousarray(value).tobytes() for key, value in state.items())
    write(tmp_path / "folder", "diffusers", weights)
    model = diffusers.UNet2DModel.from_pretrained(tmp_path / "folder", subfolder="unet").eval()
    with torch.no_grad():
        x, t = torch.tensor(np.moveaxis(arrays["x"], -1, 1).copy()), torch.tensor(arrays["t"] - t_offset)
        found = np.moveaxis(model(x, t).sample.numpy(), 1, -1)
    error = np.abs(found - arrays["out"]).max() / np.abs(arrays["out"]).max()
    print(f"t_offset {t_offset}: {error:.1e} of the largest output")
    assert error <= 1e-4
    # What diffusers saves comes back to the bit, but for the matrix that was turned; it says the heads.
    model.save_pretrained(tmp_path / "theirs")
    back = read_weights(str(tmp_path / "theirs"))
    assert back.network == dataclasses.replace(weights.network, t_offset=0)
    for key, value in torch_names.to_torch(back.ema_params).items():
        if key != "time_embed.0.weight" or not t_offset:
            assert value.tobytes() == np.ascontiguousarray(state[key]).tobytes(), key


@pytest.mark.parametrize("before_1_6", [False, True])
@pytest.mark.parametrize("kind", ["ddim", "sa_dpm", "pndm"])
def test_a_torch_file_of_ours_has_the_same_bytes(golden, tmp_path, kind, before_1_6):
    network, state, *_ = golden_weights(golden, "unet_b.npz")
    write(tmp_path / "ours.pth", kind, as_weights(network, state))
    theirs = torch.load(tmp_path / "ours.pth", weights_only=True)
    found = theirs[-1] if kind == "ddim" else theirs
    prefix = "module." if kind == "sa_dpm" else ""
    assert found.keys() == {f"{prefix}{key}" for key in state}
    for key, value in state.items():
        assert found[f"{prefix}{key}"].numpy().tobytes() == np.ascontiguousarray(value).tobytes(), key
    # As torch saves it again, without our card and in either container.
    torch.save(theirs, tmp_path / "theirs.pth", _use_new_zipfile_serialization=not before_1_6)
    back = read_weights(str(tmp_path / "theirs.pth"), resolution=network.resolution)
    assert back.network == network
    for key, value in torch_names.to_torch(back.ema_params).items():
        assert value.tobytes() == np.ascontiguousarray(state[key]).tobytes(), key
    if kind == "ddim":
        module = torch.nn.ParameterList(torch.nn.Parameter(value) for value in theirs[0].values())
        # The DDIM code resumes so.
        torch.optim.Adam(module.parameters()).load_state_dict(theirs[1])


def test_a_sa_dpm_training_checkpoint_has_its_average_in_the_optimizer(golden, tmp_path):
    network, state, *_ = golden_weights(golden, "unet_b.npz")
    model = OrderedDict((f"module.{key}", torch.tensor(value)) for key, value in state.items())
    parameters = [torch.nn.Parameter(value.clone()) for value in model.values()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    sum(parameter.sum() for parameter in parameters).backward()
    optimizer.step()
    for parameter in parameters:
        optimizer.state[parameter]["ema"] = parameter.data * 0.5
    contents = {
        "model_dict": model,
        "epoch": 2,
        "args": argparse.Namespace(lr=1e-3),
        "optimizer": optimizer.state_dict(),
        "scheduler": {"last_epoch": 1},
        "step": 1234,
    }
    torch.save(contents, tmp_path / "ckpt_2.pth")
    weights = read_weights(str(tmp_path / "ckpt_2.pth"), resolution=network.resolution)
    assert weights.step == 1234
    for (key, raw), parameter in zip(state.items(), parameters, strict=True):
        np.testing.assert_array_equal(torch_names.to_torch(weights.params)[key], raw)
        np.testing.assert_array_equal(torch_names.to_torch(weights.ema_params)[key], parameter.data.numpy() * 0.5)


def test_torch_itself_does_not_notice_a_flipped_bit(golden, tmp_path):
    """Why the files are read by our own code."""
    network, state, *_ = golden_weights(golden, "unet_b.npz")
    torch.save({key: torch.tensor(value) for key, value in state.items()}, tmp_path / "a.pth")
    data = bytearray((tmp_path / "a.pth").read_bytes())
    data[data.find(np.ascontiguousarray(state["mid.block_1.conv1.weight"]).tobytes()) + 1000] ^= 1
    (tmp_path / "a.pth").write_bytes(data)
    theirs = torch.load(tmp_path / "a.pth", weights_only=True)
    assert any(not np.array_equal(theirs[key].numpy(), value) for key, value in state.items())
    with pytest.raises(Exception, match="Bad CRC-32"):
        read_weights(str(tmp_path / "a.pth"), resolution=network.resolution)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_diffusers_pipeline_draws_our_ddim(tmp_path, monkeypatch, name, steps):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")
    from diffusers.pipelines.ddim import pipeline_ddim

    network = UNet(16, 3, 3, 32, (1, 2), 1, (8,))
    params = network.init(seed=0)
    schedule = SCHEDULES[name]()
    # An untrained network's pictures are black and white. With noise and an output as small as the signal at
    # the first level, each step's x_0 is within the range of a picture, and both have their part in it.
    signal = np.float32(schedule.alpha_bar[1000 - 1000 // steps] ** 0.5)
    params["conv_out"] = {key: value * signal for key, value in params["conv_out"].items()}
    config = default_config()
    config.diffusion.schedule = name
    weights = Weights(network, params, params, None, ScheduleSpec(name, 1000), 0, "", "")
    write(tmp_path / "folder", "diffusers", weights)
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path / "folder")
    x_T = (np.random.default_rng(0).standard_normal((4, 16, 16, 3)) * signal / 2).astype(np.float32)
    monkeypatch.setattr(pipeline_ddim, "randn_tensor", lambda *_, **__: torch.tensor(np.moveaxis(x_T, -1, 1).copy()))
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(batch_size=4, num_inference_steps=steps, output_type="np").images
    theirs = np.round(np.asarray(pictures) * 255).astype(int)
    sampler, levels = Model(config, network, schedule, params, 0).sampler("ddim", steps=steps)
    ours = np.asarray(sampler(params, levels, 0, np.arange(4), x_T=x_T)).astype(int)
    difference = np.abs(ours - theirs)
    inside = ((ours > 0) & (ours < 255)).mean()
    print(f"{name}, {steps} steps: at most {difference.max()}, {inside:.0%} of the values not clipped")
    assert difference.max() <= 1
    assert inside > 0.2
