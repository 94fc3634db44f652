"""Published checkpoints of improved-diffusion's UNet and of variance heads, as files to runs and back to the bit."""

import dataclasses
import json
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import load_file
from published import group
from safetensors.numpy import load_file as load_safetensors

from s2dm_jax.common.errors import UserError
from s2dm_jax.config.build import network_of, schedule_spec
from s2dm_jax.diffusion.schedule import linear_schedule
from s2dm_jax.models import variance_head
from s2dm_jax.models.improved_unet import ImprovedUNet
from s2dm_jax.models.improved_unet_module import timestep_embedding
from s2dm_jax.models.unet import UNet
from s2dm_jax.weights import diffusers_improved, torch_names
from s2dm_jax.weights.improved_shapes import infer_improved
from s2dm_jax.weights.read import read_weights
from s2dm_jax.weights.torch_pickle import open_torch, write_torch
from s2dm_jax.workdir.load import read_config

SMALL = ImprovedUNet(8, 3, 3, 32, (1,), 1, (8,), num_heads=4, t_offset=1)


@pytest.fixture(scope="module")
def command():
    """The `main` of scripts/convert.py."""
    return load_file(Path(__file__).parents[2] / "scripts" / "convert.py").main


def save(path, state):
    """A state_dict as torch saves it, without our card."""
    write_torch(path.with_suffix(".tmp"), state, "")
    with zipfile.ZipFile(path.with_suffix(".tmp")) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            if not info.filename.endswith("s2dm_jax.json"):
                new.writestr(info, old.read(info))
    return str(path)


def contents(path):
    """The state_dict in a file, its tensors as arrays, in order."""
    with open_torch(path) as (state, read, _):
        return {name: read(tensor) for name, tensor in state.items()}


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].tobytes() == np.ascontiguousarray(value).tobytes(), name


def fails(command, capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        command([str(argument) for argument in arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("golden_name", "stated", "expected"),
    [
        # Analytic-DPM counts from 1: what its network gets at t is here that of t − 1.
        ("iddpm_a.npz", {}, {"t_offset": 1, "t_scale": 1.0, "num_heads": 4, "scale_shift_norm": True}),
        # OpenAI's of 4000 timesteps, which its code scales to 1000.
        ("iddpm_b.npz", {"num_heads": 2, "t_scale": 0.25}, {"t_offset": 0, "num_classes": 5, "learned_variance": True}),
    ],
)
def test_golden_outputs_through_a_file(golden, tmp_path, golden_name, stated, expected):
    arrays = golden(golden_name)
    path = save(tmp_path / "a.pth", group(arrays, "param/"))
    weights = read_weights(path, resolution=arrays["x"].shape[1], stated=stated)
    network = weights.network
    assert {name: getattr(network, name) for name in expected} == expected
    t = (arrays["t"] / network.t_scale - network.t_offset).astype(np.float32)
    eps, variance, _ = jax.jit(network.outputs)(weights.ema_params, arrays["x"], t, None, arrays.get("y"))
    out = eps if variance is None else np.concatenate([eps, variance], axis=-1)
    np.testing.assert_allclose(out, arrays["out"], rtol=1e-4, atol=1e-4 * np.abs(arrays["out"]).max())


def test_openais_file_becomes_a_run_and_every_file(golden, command, tmp_path, capsys):
    state = group(golden("iddpm_b.npz"), "param/")
    source = save(tmp_path / "ema_0.9999_500000.pt", state)
    command([source, str(tmp_path / "run"), "--resolution=8", "--num_heads=2", "--T=4000", "--schedule=cosine"])
    printed = capsys.readouterr().out
    assert "schedule cosine, T = 4,000\nassumed  t_offset 0, t_scale 1, as improved-diffusion's for LSUN" in printed
    config = read_config(tmp_path / "run")
    network, spec = network_of(config, "float32"), schedule_spec(config)
    assert (network.num_heads, network.num_classes, network.learned_variance) == (2, 5, True)
    assert (spec.T, spec.schedule) == (4000, "cosine")
    for before, after in [("run", "a.safetensors"), ("a.safetensors", "b.pt"), ("b.pt", "c.ckpt")]:
        command([str(tmp_path / before), str(tmp_path / after)])
    assert_same(contents(tmp_path / "b.pt"), state)
    assert_same(contents(tmp_path / "c.ckpt"), state)
    again = read_weights(str(tmp_path / "c.ckpt"))
    assert (again.network, again.schedule) == (network, spec)
    assert again.model_card["source"]["steps_there"] == 500_000
    # A config that says what the file leaves open is taken at its word.
    command([source, str(tmp_path / "d.pt"), "--resolution=8", f"--config={tmp_path / 'run' / 'config.json'}"])
    assert "assumed" not in capsys.readouterr().out
    assert read_weights(str(tmp_path / "d.pt")).network == network


def test_openais_two_files_of_a_step_become_one_run(command, tmp_path, capsys):
    raw, ema = (torch_names.to_torch(HEADS["ddim"].init(seed)) for seed in (1, 2))
    files = [
        save(tmp_path / name, state) for name, state in {"model000007.pt": raw, "ema_0.9999_000007.pt": ema}.items()
    ]
    command([files[0], str(tmp_path / "both.pth"), "--resolution=8", f"--ema-file={files[1]}"])
    back = read_weights(str(tmp_path / "both.pth"))
    assert_same(torch_names.to_torch(back.params), raw)
    assert_same(torch_names.to_torch(back.ema_params), ema)
    later = save(tmp_path / "ema_0.9999_000009.pt", ema)
    error = fails(command, capsys, files[0], tmp_path / "x", "--resolution=8", f"--ema-file={later}")
    assert "their networks or steps differ (9 and 7); give the EMA of the same step" in error
    error = fails(command, capsys, tmp_path / "both.pth", tmp_path / "x", "--resolution=8", f"--ema-file={files[1]}")
    assert "both.pth already contains an EMA" in error


def test_published_networks_are_known_from_their_shapes(golden):
    keys = {name: tuple(shape) for name, shape in golden("iddpm_keys.json").items()}
    analytic = ImprovedUNet(32, 3, 3, 128, (1, 2, 2, 2), 3, (16, 8), dropout=0.3, t_offset=1)
    network, assumed = infer_improved(keys)
    assert network == analytic
    assert assumed[4:] == ("linear", 1000)
    variance = {"learned_variance": True}
    openai = {
        ImprovedUNet(32, 3, 3, 128, (1, 2, 2, 2), 3, (16, 8), 0.3, learned_variance=True, t_scale=0.25): (
            "cosine",
            4000,
        ),
        ImprovedUNet(64, 3, 3, 128, (1, 2, 3, 4), 3, (16, 8), learned_variance=True, t_scale=0.25): ("cosine", 4000),
        # Its timesteps are not rescaled.
        ImprovedUNet(64, 3, 3, 192, (1, 2, 3, 4), 3, (16, 8), learned_variance=True, num_classes=1000): (
            "cosine",
            4000,
        ),
        ImprovedUNet(256, 3, 3, 128, (1, 1, 2, 2, 4, 4), 2, (16,), num_heads=1, scale_shift_norm=False, **variance): (
            "linear",
            1000,
        ),
    }
    for network, schedule in openai.items():
        found, assumed = infer_improved(torch_names.torch_shapes(network))
        assert (found, assumed[4:]) == (network, schedule)
    # Other values as stated; rescaled timesteps follow T.
    shapes = torch_names.torch_shapes(next(iter(openai)))
    assert infer_improved(shapes, stated={"T": 500})[0].t_scale == 2
    other = ImprovedUNet(24, 1, 1, 64, (1, 2, 3), 2, (), num_heads=2, resamp_with_conv=False, scale_shift_norm=False)
    assert infer_improved(torch_names.torch_shapes(other), 24, {"num_heads": 2, "t_scale": 1.0})[0] == other


HEADS = {"improved": SMALL, "ddim": UNet(8, 1, 1, 32, (1,), 1, (8,))}
HEAD_NAMES = {
    "improved": ["out2.0.weight", "out2.0.bias", "out2.2.weight", "out2.2.bias"],
    "ddim": ["norm_out2.weight", "norm_out2.bias", "conv_out2.weight", "conv_out2.bias"],
}


def with_head(name):
    """The tensors of a network and of a variance head beside it in Extended-Analytic-DPM's state_dict, all random."""
    network, rng = HEADS[name], np.random.default_rng(0)
    shapes = [(32,), (32,), (network.in_channels, 32, 3, 3), (network.in_channels,)]
    head = [rng.standard_normal(shape, np.float32) for shape in shapes]
    return torch_names.to_torch(network.init(1)), dict(zip(HEAD_NAMES[name], head, strict=True))


def test_a_variance_head_becomes_a_run_and_a_file_again(command, tmp_path, capsys):
    trunk, beside = with_head("improved")
    source = save(tmp_path / "sn.pth", {**trunk, **beside})
    flags = ["--resolution=8", "--variance_head=sn", f"--base={tmp_path / 'base'}"]
    command([source, str(tmp_path / "sn"), *flags])
    base, config = read_config(tmp_path / "base"), read_config(tmp_path / "sn")
    assert (config.variance_head.kind, config.sample.sampler, config.model.t_offset) == ("sn", "sn", 1)
    assert (base.variance_head.kind, base.model) == ("", config.model)
    # From both runs into one file.
    command([str(tmp_path / "sn"), str(tmp_path / "again.pth")])
    assert_same(contents(tmp_path / "again.pth"), {**trunk, **beside})
    # What we wrote says the kind itself.
    assert read_weights(str(tmp_path / "again.pth")).head.kind == "sn"
    error = fails(command, capsys, tmp_path / "again.pth", tmp_path / "x", "--variance_head=npr", "--base=b")
    assert "again.pth, whose head is sn" in error
    error = fails(command, capsys, tmp_path / "again.pth", tmp_path / "x.safetensors")
    assert "safetensors has no place for a variance head; choose analytic_dpm" in error
    # What the file leaves open is that of the base's run; a head of another network is not put on it.
    error = fails(command, capsys, source, tmp_path / "x", *flags, "--t_offset=0")
    assert "is the run of a network with t_offset=1, but for this file it is 0" in error
    other = save(tmp_path / "other.pth", {**trunk, "out.2.bias": trunk["out.2.bias"] + 1, **beside})
    error = fails(command, capsys, other, tmp_path / "x", *flags)
    assert "holds other weights than the frozen network in the file" in error
    assert not (tmp_path / "x").exists()


class Features(ImprovedUNet):
    """Its features are the image's pixels, small, so that the norm's epsilon counts."""

    def apply_with_features(self, params, x, t, dropout_key=None):
        return x[..., :3], 3e-3 * x


def test_a_variance_head_is_extended_analytic_dpms_out2():
    network = Features(**vars(SMALL))
    _, state = with_head("improved")
    x = np.random.default_rng(1).standard_normal((2, 8, 8, 32), np.float32)
    head = torch_names.head_from_torch(state, network)
    _, found = variance_head.apply(network, {}, head, linear_schedule(), x, np.zeros(2, np.float32))
    scale, bias, kernel, last_bias = state.values()
    # GroupNorm of 32 groups, one channel each, SiLU, and a 3×3 convolution.
    features = 3e-3 * x.astype(np.float64)
    mean, variance = features.mean((1, 2), keepdims=True), features.var((1, 2), keepdims=True)
    h = (features - mean) / np.sqrt(variance + 1e-5) * scale + bias
    h = np.pad(h / (1 + np.exp(-h)), ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [h[:, i : i + 8, j : j + 8] @ kernel[:, :, i, j].T for i in range(3) for j in range(3)]
    np.testing.assert_allclose(found, sum(taps) + last_bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_a_variance_head_of_no_stated_kind_stays_with_its_file_or_is_left_out(command, tmp_path, capsys, name):
    trunk, beside = with_head(name)
    source = save(tmp_path / "head.pth", {**trunk, **beside})
    command([source, str(tmp_path / "again.pth"), "--resolution=8", "--to=analytic_dpm"])
    assert_same(contents(tmp_path / "again.pth"), {**trunk, **beside})
    assert "head is not written" not in capsys.readouterr().out
    command([source, str(tmp_path / "w.safetensors"), "--resolution=8"])
    assert (
        "the variance head is not written; to write its run, give --variance_head=sn or npr" in capsys.readouterr().out
    )
    assert_same(load_safetensors(tmp_path / "w.safetensors"), dict(sorted(trunk.items())))
    assert "give --base=FOLDER" in fails(
        command, capsys, source, tmp_path / "x", "--resolution=8", "--variance_head=sn"
    )


def test_diffusers_folders_of_networks_that_it_can_express(command, tmp_path):
    """test_with_torch.py runs diffusers itself."""
    state = torch_names.to_torch(SMALL.init(0))
    source = save(tmp_path / "a.pt", state)
    command([source, str(tmp_path / "b"), "--to=diffusers", "--resolution=8", "--t_offset=0"])
    config = json.loads((tmp_path / "b" / "unet" / "config.json").read_text())
    assert (config["attention_head_dim"], config["resnet_time_scale_shift"]) == (8, "scale_shift")
    back = read_weights(str(tmp_path / "b"))
    assert back.network == dataclasses.replace(SMALL, t_offset=0, dropout=back.network.dropout)
    assert_same(torch_names.to_torch(back.ema_params), state)
    # One that counts from 1 becomes one that counts from 0: the same embedding at every timestep.
    command([source, str(tmp_path / "c"), "--to=diffusers", "--resolution=8"])
    turned = read_weights(str(tmp_path / "c"))
    assert (turned.network, turned.model_card["config"]["model"]["t_offset"]) == (back.network, 0)
    t = np.arange(1000)
    found = timestep_embedding(t, 32) @ turned.ema_params["time_embed"]["0"]["kernel"]
    expected = timestep_embedding(t + 1, 32) @ back.ema_params["time_embed"]["0"]["kernel"]
    np.testing.assert_allclose(found, expected, atol=1e-4)  # float32 angles
    # What diffusers' own training saves by default: the head's width is given, not the heads.
    theirs = {
        name: config[name] for name in ("sample_size", "block_out_channels", "down_block_types", "up_block_types")
    }
    theirs |= {"_class_name": "UNet2DModel", "in_channels": 3, "out_channels": 3, "layers_per_block": 1}
    network = diffusers_improved.read_unet_config(theirs)
    assert network == ImprovedUNet(8, 3, 3, 32, (1,), 1, (8,), num_heads=4, scale_shift_norm=False)
    for field, value in {
        "t_scale": 0.25,
        "learned_variance": True,
        "num_classes": 2,
        "resamp_with_conv": False,
    }.items():
        with pytest.raises(ValueError, match=f"diffusers cannot express this network: {field}="):
            diffusers_improved.check_expressible(dataclasses.replace(SMALL, **{field: value}))
    with pytest.raises(ValueError, match="num_heads=4 for attention of 32 and 64 channels"):
        diffusers_improved.check_expressible(dataclasses.replace(SMALL, ch_mult=(1, 2)))
    with pytest.raises(ValueError, match="its attention_head_dim is 5 for attention of 32 channels"):
        diffusers_improved.read_unet_config({**theirs, "attention_head_dim": 5})


def test_what_cannot_be_used_is_refused_in_a_sentence(command, tmp_path, capsys):
    state = torch_names.to_torch(SMALL.init(0))
    source = save(tmp_path / "a.pt", state)

    def refused(sentence, out="x", *flags, file=source):
        assert sentence in fails(command, capsys, file, tmp_path / out, "--resolution=8", *flags)

    refused("for the network unet, not for improved_unet; choose improved_diffusion", "x.pth", "--to=ddim")
    refused("must end in .pt or .pth", "x.ckpt", "--to=improved_diffusion")
    refused("holds no variance head", "x", "--variance_head=sn", "--base=b")
    refused("--base=b is only for the run of a variance head", "x", "--base=b")
    refused("is also OUT, the run of the variance head", "x", f"--base={tmp_path / 'x'}", "--variance_head=sn")
    refused("--num_heads=0 is out of range", "x", "--num_heads=0")
    refused("num_heads=3 must divide", "x", "--num_heads=3")
    refused("model.name='improved_unet', but the config has 'unet'", "x", "--config=configs/digits.py")
    unet = save(tmp_path / "b.pth", torch_names.to_torch(HEADS["ddim"].init(0)))
    refused("--T=4000 is only for a state_dict of an improved-diffusion network", "x", "--T=4000", file=unet)
    refused("for the network improved_unet, not for unet", "x.pt", "--to=improved_diffusion", file=unet)

    def unusable(sentence, **changes):
        changed = {name.replace("_W", ".weight").replace("__", "."): v for name, v in changes.items()}
        with pytest.raises(UserError, match=sentence):
            read_weights(save(tmp_path / "c.pth", {**state, **changed}), resolution=8)

    wide = np.zeros((5, 32, 3, 3), np.float32)
    unusable("out.2.weight has 5 channels, but 3, the noise, or 6", out__2_W=wide)
    unusable("super-resolution", input_blocks__0__0_W=np.zeros((32, 6, 3, 3), np.float32))
    unusable("place for the checkpoint's tensor input_blocks.1.2.op.weight", input_blocks__1__2__op_W=wide)
    unusable(r"out.2.weight is of shape \(0, 32, 3, 3\), but a kernel's 4 axes", out__2_W=wide[:0])
    unusable("which lack some", input_blocks__7__0__op_W=wide)
    with pytest.raises(UserError, match=r"lacks the tensor time_embed.2.bias"):
        read_weights(
            save(tmp_path / "c.pth", {k: v for k, v in state.items() if k != "time_embed.2.bias"}), resolution=8
        )
    with pytest.raises(UserError, match="resolution cannot be inferred from the shapes"):
        read_weights(source)


def test_labels_are_asked_for_before_a_class_conditional_network_runs():
    network = ImprovedUNet(8, 3, 3, 32, (1,), 1, (), num_classes=2)
    with pytest.raises(UserError, match=r"class-conditional \(model.num_classes=2\)"):
        network.apply(network.param_shapes(), np.zeros((1, 8, 8, 3), np.float32), np.zeros(1))
