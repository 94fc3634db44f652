"""Weights to every format and back to the bit, published checkpoints, damaged files, runs that resume."""

import json
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import full_disk, load_file, save_run
from safetensors import safe_open
from safetensors.numpy import save_file

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.hashing import sha256_of_tensors
from s2dm_jax.config.defaults import default_config, image_shape
from s2dm_jax.config.io import from_json
from s2dm_jax.models.unet import UNet
from s2dm_jax.weights import torch_names
from s2dm_jax.weights.export import export
from s2dm_jax.weights.read import Weights, read_weights
from s2dm_jax.weights.torch_pickle import write_torch
from s2dm_jax.weights.write import infer_config, write_weights
from s2dm_jax.workdir.load import load_run

NETWORK = UNet(8, 1, 1, 32, (1,), 1, (8,))
KINDS = {
    "ckpt.pth": "ddim",
    "model_3_ema.pth": "sa_dpm",
    "plain.pth": "pndm",
    "w.safetensors": "safetensors",
    "diffusers": "diffusers",
}


@pytest.fixture(scope="module")
def command():
    """The `main` of scripts/convert.py."""
    return load_file(Path(__file__).parents[2] / "scripts" / "convert.py").main


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with results."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    config = default_config()
    config.diffusion.update(T=20, beta_start=1e-4, beta_end=0.02)
    config.model.update(ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(8,), dropout=0.2)
    config.sample.nfe, config.eval.nfe = 3, (10,)
    save_run(path, config, seed=3, ema_factor=0.5)
    row = {"name": "ddim", "nfe": 10, "num_images": 5, "frechet_distance": 1.5, "normalized": 0.25}
    results = {"step": 7, "eval": {}, "rows": [row], "provenance": {"seed": 11}}
    (path / "results.json").write_text(json.dumps(results))
    return path


def assert_equal_trees(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def weights(workdir):
    return read_weights(str(workdir))


@pytest.fixture(scope="module")
def files(weights, workdir, tmp_path_factory):
    """The run in every format, by name, with its cards."""
    folder = tmp_path_factory.mktemp("files")
    for name, kind in KINDS.items():
        config = infer_config(weights)
        write_weights(str(folder / name), kind, weights, config, source={}, license="mit")
    config = from_json((workdir / "config.json").read_text())
    config.export.path = str(folder / "sampler.npz")
    export(config, str(workdir))
    assert not list(folder.glob(".*")), "temporary names must not stay"
    return folder


@pytest.mark.parametrize("name", [*KINDS, "sampler.npz"])
def test_there_and_back_to_the_bit(files, weights, name):
    back = read_weights(str(files / name))
    assert (back.network, back.step, back.schedule) == (weights.network, 7, ("linear", 20, 1e-4, 0.02))
    assert_equal_trees(back.ema_params, weights.ema_params)
    # Only DDIM's list has both.
    assert_equal_trees(back.params, weights.params if name == "ckpt.pth" else weights.ema_params)
    folder = name == "diffusers"
    card = json.loads((files / name / "model_card.json" if folder else files / f"{name}.json").read_text())
    assert back.model_card == card
    text = (files / name / "README.md" if folder else files / f"{name}.md").read_text()
    license = "not stated" if name == "sampler.npz" else "mit"
    assert (card["license"], card["data"], card["training"]["steps"]) == (license, "digits", 7)
    assert card["metrics"]["provenance"] == {"seed": 11}
    for part in (license, "digits", "1.50", "seed", "tau 0.99"):
        assert part in text


def test_the_command_makes_a_run_of_a_checkpoint(command, files, workdir, tmp_path, capsys):
    command([str(files / "ckpt.pth"), str(tmp_path / "run")])
    assert "a DDIM training checkpoint, with its EMA; its checksums agree" in capsys.readouterr().out
    before, after = load_run(str(workdir)), load_run(str(tmp_path / "run"))
    assert after.config == before.config
    assert (after.network, after.step) == (before.network, 7)
    assert_equal_trees((after.params, after.ema_params), (before.params, before.ema_params))
    # The results stay with the weights.
    command([str(tmp_path / "run"), str(tmp_path / "again.safetensors")])
    assert read_weights(str(tmp_path / "again.safetensors")).model_card["metrics"]["provenance"] == {"seed": 11}


def published(seed=0, network=NETWORK):
    return torch_names.to_torch(network.init(seed))


def prefixed(state):
    return {f"module.{name}": value for name, value in state.items()}


@pytest.fixture
def read(tmp_path):
    """A function that writes contents as torch does and reads the weights."""

    def read(contents, **options):
        # Without our note, so that the network follows from the shapes alone.
        write_torch(tmp_path / "a.pth", contents, "")
        with zipfile.ZipFile(tmp_path / "a.pth") as old, zipfile.ZipFile(tmp_path / "b.pth", "w") as new:
            for info in old.infolist():
                if not info.filename.endswith("s2dm_jax.json"):
                    new.writestr(info, old.read(info))
        return read_weights(str(tmp_path / "b.pth"), **{"resolution": 8, **options})

    return read


def both(weights):
    return torch_names.to_torch(weights.params), torch_names.to_torch(weights.ema_params)


def with_prefix(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


def nested(raw, ema):
    """Checkpoints as people have them: contents, the weights and the EMA expected, a part of the description."""
    counter = np.zeros(1, np.float32)
    buffers = {"betas": counter, "alphas_cumprod_prev": counter, "sqrt_recip_alphas_cumprod": counter}
    buffers |= {"posterior_log_variance_clipped": counter, "loss_weight": counter, "a.b.num_batches_tracked": counter}
    lucidrains = {**with_prefix("online_model.model.", raw), **with_prefix("ema_model.model.", ema), "initted": counter}
    partly = {f"{'module.' * (i % 2)}{name}": value for i, (name, value) in enumerate(ema.items())}
    return {
        "torch.compile": (with_prefix("_orig_mod.", ema), ema, ema, "prefix _orig_mod. taken off"),
        "both wrappers": (with_prefix("module._orig_mod.", ema), ema, ema, "prefix module._orig_mod. taken off"),
        "model": (with_prefix("model.", ema), ema, ema, "prefix model. taken off"),
        "latent diffusion": (with_prefix("model.diffusion_model.", ema), ema, ema, "model.diffusion_model. taken"),
        "DDPM": ({**with_prefix("denoise_fn.", ema), **buffers}, ema, ema, "without the buffers a.b.num_batches_t"),
        "single modules": (partly, ema, ema, "prefix module. taken off"),
        "state_dict": ({"state_dict": ema, "epoch": 3}, ema, ema, "the state_dict state_dict"),
        "timm": ({"state_dict": raw, "state_dict_ema": ema}, raw, ema, "state_dict_ema, the EMA"),
        "ema": ({"model": with_prefix("module.", raw), "ema": ema, "optimizer": {"state": {0: raw}}}, raw, ema, "EMA"),
        "lucidrains": (
            {"step": 7, "model": with_prefix("model.", raw), "ema": lucidrains},
            raw,
            ema,
            "ema_model.model.",
        ),
        "Lightning": (
            {"state_dict": {**with_prefix("model.", raw), **with_prefix("ema_model.", ema)}, "global_step": 7},
            ema,
            ema,
            "of the EMA",
        ),
        "latent diffusion's EMA": (
            {
                **with_prefix("model.diffusion_model.", raw),
                **{f"model_ema.diffusion_model{name.replace('.', '')}": value for name, value in ema.items()},
                "model_ema.decay": counter,
            },
            ema,
            ema,
            "of the EMA",
        ),
        "torch_ema": (
            {"model": with_prefix("module.", raw), "ema": {"decay": 0.9, "shadow_params": list(ema.values())}},
            raw,
            ema,
            "the state_dict model, with its EMA",
        ),
        "an EMA of another name": ({"net": raw, "ema_net": ema}, raw, ema, "the state_dict ema_net, the EMA"),
        "AveragedModel": ({"n_averaged": counter, **with_prefix("module.", ema)}, ema, ema, "buffers n_averaged"),
        "FSDP": ({name.replace(".", "._fsdp_wrapped_module.", 1): v for name, v in ema.items()}, ema, ema, "_fsdp_wr"),
        "a compiled part": (
            {name.replace("mid.", "mid._orig_mod."): value for name, value in ema.items()},
            ema,
            ema,
            "prefix _orig_mod. taken off",
        ),
        "any prefix": (with_prefix("student.eps.", ema), ema, ema, "prefix student.eps. taken off"),
        "beside others": (
            {**with_prefix("unet.", ema), "vae.encoder.conv_in.weight": counter},
            ema,
            ema,
            "the 104 of unet",
        ),
        "deeper": ({"checkpoint": {"net": {"params": ema}}}, ema, ema, "the state_dict checkpoint.net.params"),
        "tuple": ((ema, {"epoch": 1}), ema, ema, "the state_dict 0"),
    }


@pytest.mark.parametrize("name", nested({}, {}))
def test_checkpoints_are_read_as_people_have_them(read, name):
    contents, params, ema, description = nested(published(1), published(2))[name]
    found = read(contents)
    assert_equal_trees(both(found), (params, ema))
    assert description in found.description
    if name in ("lucidrains", "Lightning"):
        assert found.step == 7


def _saved(path, state):
    save_file(state, path)
    return str(path)


def test_of_several_unknown_state_dicts_one_is_named(read, tmp_path):
    raw, ema = published(1), published(2)
    contents = {"teacher": raw, "student": {"last": ema}}
    with pytest.raises(UserError, match=r"holds several state_dicts: teacher \(\d+ tensors\), student.last \(.*--key"):
        read(contents)
    assert_equal_trees(both(read(contents, key="student.last")), (ema, ema))
    with pytest.raises(UserError, match=r"no state_dict under --key=student; there are: teacher"):
        read(contents, key="student")
    # Two networks in one state_dict.
    contents = {**with_prefix("a.", raw), **with_prefix("module.b.", ema)}
    with pytest.raises(UserError, match="several networks, whose names begin with a, b; name one with --key"):
        read(contents)
    assert_equal_trees(both(read(contents, key="b")), (ema, ema))
    assert_equal_trees(both(read({"net": contents}, key="net.a")), (raw, raw))
    with pytest.raises(UserError, match=r"its EMA is a list of 1 tensors, .* the \d+ weights of .* --key=model takes"):
        read({"model": raw, "ema": {"shadow_params": [raw["conv_in.bias"]]}})
    with pytest.raises(UserError, match=r"conv_in.bias is of type int8, but floating-point weights are needed"):
        read_weights(_saved(tmp_path / "a.safetensors", {**raw, "conv_in.bias": np.ones(32, np.int8)}), resolution=8)
    with pytest.raises(UserError, match=r"conv_in.weight is missing, .*; it holds 1 tensors: a.b.c"):
        read({"a.b.c": raw["conv_in.bias"]})


def test_published_checkpoints_are_taken_apart(read):
    raw, ema = published(1), published(2)

    ddim = read([prefixed(raw), {"state": {}}, 4, 790_000, ema])
    assert (ddim.network, ddim.step, ddim.model_card, ddim.schedule) == (NETWORK, 790_000, None, None)
    assert_equal_trees(both(ddim), (raw, ema))
    without = read([prefixed(raw), {"state": {}}, 4, 790_000])
    assert "no EMA" in without.description
    assert_equal_trees(both(without), (raw, raw))
    assert_equal_trees(both(read(prefixed(ema))), (ema, ema))
    heads = {"norm_out2.weight": np.ones(32, np.float32), "conv_out2.bias": np.ones(1, np.float32)}
    assert_equal_trees(both(read({**raw, **heads})), (raw, raw))

    names = list(raw)
    optimizer = {
        "state": {i: {"exp_avg": raw[name], "ema": ema[name]} for i, name in enumerate(names)},
        "param_groups": [{"lr": 1e-4, "params": list(range(len(names)))}],
    }
    sa_dpm = {"model_dict": prefixed(raw), "epoch": 3, "args": None, "optimizer": optimizer, "step": 9}
    assert_equal_trees(both(read(sa_dpm)), (raw, ema))
    assert read(sa_dpm).step == 9
    del optimizer["state"][0]
    assert_equal_trees(both(read(sa_dpm)), (raw, raw))

    with pytest.raises(UserError, match=r"b.pth cannot be used: it holds a dict of epoch, but a state_dict"):
        read({"epoch": 3})
    with pytest.raises(UserError, match="the images' resolution cannot be inferred from the shapes"):
        read(raw, resolution=None)
    with pytest.raises(
        UserError, match=r"not the weights of improved-diffusion's UNet: input_blocks.0.0.weight is missing"
    ):
        read({"time_embed.0.weight": raw["conv_in.bias"]})
    with pytest.raises(UserError, match=r"mid.block_1.conv1.weight has shape .*\(3, 3, 3, 3\).*\(32, 32, 3, 3\)"):
        read({**raw, "mid.block_1.conv1.weight": np.zeros((3, 3, 3, 3), np.float32)})
    with pytest.raises(UserError, match=r"no place for the checkpoint's tensor x of shape \(2,\)"):
        read({**raw, "x": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match=r"lacks the tensor conv_out.bias of shape \(1,\)"):
        read({name: value for name, value in raw.items() if name != "conv_out.bias"})
    with pytest.raises(UserError, match=r"tensor conv_in.bias of shape \(32,\) holds values that are not finite"):
        read({**raw, "conv_in.bias": np.full(32, np.nan, np.float32)})
    sha256 = ddim.sha256
    with pytest.raises(UserError, match=r"its sha256 is .*, not 0000"):
        read(raw, digest="0" * 64)
    assert read([prefixed(raw), {"state": {}}, 4, 790_000, ema], digest=sha256).sha256 == sha256


@pytest.mark.parametrize(("resolution", "ch_mult"), [(32, (1, 2, 2, 2)), (64, (1, 2, 2, 2, 4))])
def test_published_networks_are_known_from_their_shapes(resolution, ch_mult):
    network = UNet(resolution, 3, 3, 128, ch_mult, 2, (16,))
    assert torch_names.infer_network(torch_names.torch_shapes(network)) == network


def _contents(weights):
    leaves = [leaf.tobytes() for leaf in jax.tree.leaves((weights.ema_params, weights.params))]
    return leaves, weights.network, weights.step, weights.schedule, weights.model_card


@pytest.mark.parametrize("name", ["ckpt.pth", "w.safetensors", "diffusers", "sampler.npz"])
def test_no_damaged_file_becomes_another_network(files, tmp_path, name):
    whole = _contents(read_weights(str(files / name)))
    rng, sentences = random.Random(0), []
    for trial in range(100):
        copy = tmp_path / str(trial) / name
        copy.parent.mkdir()
        if (files / name).is_dir():
            shutil.copytree(files / name, copy)
            inside = [*copy.glob("*/*"), copy / "model_index.json", copy / "SHA256SUMS"]
            file = rng.choice(sorted(inside))
        else:
            file = Path(shutil.copy(files / name, copy))
        data = bytearray(file.read_bytes())
        if trial % 2:
            del data[rng.randrange(len(data)) :]
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        try:
            # A bit that says nothing, such as the time in a zip file, may be any.
            assert _contents(read_weights(str(copy))) == whole
        except UserError as error:
            sentences.append(str(error))
        shutil.rmtree(copy.parent)
    assert len(sentences) >= 90
    assert not any("\n" in sentence for sentence in sentences)


def test_a_card_that_seems_to_be_away_is_missed(files, tmp_path):
    data = bytearray((files / "ckpt.pth").read_bytes())
    # Its name in the zip's directory, which is at the end; the one in front of it stays.
    data[data.rfind(b"s2dm_jax.json")] ^= 1
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(UserError, match="cannot be read as a PyTorch checkpoint"):
        read_weights(str(tmp_path / "a.pth"), resolution=8)


def test_a_safetensors_file_with_another_config_is_refused(files, tmp_path):
    with safe_open(files / "w.safetensors", framework="np") as file:
        metadata = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata["s2dm_jax.card"] = metadata["s2dm_jax.card"].replace('"T": 20', '"T": 21')
    save_file(state, tmp_path / "a.safetensors", metadata)
    with pytest.raises(UserError, match="have changed since"):
        read_weights(str(tmp_path / "a.safetensors"))
    # With the right digest, but a card that is none.
    metadata = {"s2dm_jax.card": "{}"}
    metadata["s2dm_jax.sha256"] = sha256_of_tensors(state, metadata)
    save_file(state, tmp_path / "a.safetensors", metadata)
    with pytest.raises(UserError, match="model card is damaged or was not written by s2dm_jax"):
        read_weights(str(tmp_path / "a.safetensors"))


def test_nothing_is_overwritten_or_half_written(command, files, tmp_path, monkeypatch, capsys):
    def fails(out, sentence, *flags):
        with pytest.raises(SystemExit) as stop:
            command([str(files / "w.safetensors"), str(out), *flags])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1

    (tmp_path / "a.pth").write_text("mine")
    fails(tmp_path / "a.pth", "already exists and would be overwritten")
    (tmp_path / "b.pth.md").write_text("mine")
    fails(tmp_path / "b.pth", "b.pth.md already exists and would be overwritten")
    fails(tmp_path / "a.npz", "an exported sampler is written by python -m s2dm_jax.main --mode=export")
    fails(tmp_path / "a.pth2", "--resolution=0 is out of range", "--resolution=0")
    fails(tmp_path / "c.safetensors", "must end in .pth", "--to=ddim")

    with full_disk():
        fails(tmp_path / "c.safetensors", "c.safetensors cannot be written (File too large)")
        fails(tmp_path / "c.pth", "c.pth cannot be written (File too large)")
        fails(tmp_path / "d", "d cannot be written (File too large)", "--to=diffusers")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "b.pth.md"]
    assert (tmp_path / "a.pth").read_text() == (tmp_path / "b.pth.md").read_text() == "mine"


@pytest.fixture(scope="module")
def foreign(command, tmp_path_factory):
    """A run's folder from a state_dict of a network for 16×16 RGB images, for which there is no data set."""
    folder = tmp_path_factory.mktemp("foreign")
    network = UNet(16, 3, 3, 32, (1,), 1, ())
    save_file(published(5, network), folder / "published.safetensors")
    command([str(folder / "published.safetensors"), str(folder / "run"), "--resolution=16"])
    return folder / "run"


def test_weights_from_elsewhere_sample_without_their_data_set(foreign, command_line, capsys):
    command_line(
        "--mode=sample",
        f"--workdir={foreign}",
        "--config.sample.nfe=1",
        "--config.sample.num_images=2",
    )
    assert len(list((foreign / "samples").glob("ddim_nfe1_*.png"))) == 1
    with pytest.raises(SystemExit):
        command_line(f"--workdir={foreign}")
    sentence = (
        "error: config.data.source=unknown: the weights do not record what they were trained on; give its images,"
    )
    error = capsys.readouterr().err
    assert error.startswith(sentence)
    assert error.count("\n") == 1
    with pytest.raises(SystemExit):
        command_line("--mode=evaluate", f"--workdir={foreign}", "--config.eval.nfe=1")
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shape", "data", "expected"),
    [
        ((64, 3), "", ("digits", "unknown")),
        ((256, 3), "", ("digits", "unknown")),
        ((64, 3), "celeba", ("celeba", "")),
        ((64, 3), "ffhq", ("ffhq", "")),
        ((32, 3), "", ("cifar10", "")),
        ((8, 1), "", ("digits", "")),
    ],
)
def test_the_dataset_of_weights_is_named_only_where_one_has_their_shape(shape, data, expected):
    network = UNet(shape[0], shape[1], shape[1], 32, (1,), 1, ())
    config = infer_config(Weights(network, {}, {}, None, None, 0, "", ""), data=data)
    assert (config.data.name, config.data.source) == expected
    assert image_shape(config) == shape


def test_a_card_claims_nothing_about_a_training_that_it_does_not_know(command, foreign, tmp_path):
    command([str(foreign), str(tmp_path / "again.pth"), "--license=cc0"])
    card = json.loads((tmp_path / "again.pth.json").read_text())
    assert card["source"]["file"] == "published.safetensors"
    assert len(card["source"]["sha256"]) == 64
    assert (card["data"], card["training"], card["objective"], card["license"]) == (
        *["not stated"] * 3,
        "cc0",
    )
    assert "No evaluation results" in (tmp_path / "again.pth.md").read_text()


def test_a_config_must_be_that_of_the_weights(files):
    weights = read_weights(str(files / "w.safetensors"))
    config = default_config()
    config.diffusion.update(T=20, beta_start=1e-4, beta_end=0.02)
    config.model.update(ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(8,))
    config.eval.nfe, config.loss.skip = (10,), 2
    assert infer_config(weights, given=config.copy_and_resolve_references()).loss.skip == 2
    config.model.ch_mult = (1, 2)
    with pytest.raises(UserError, match=r"model.ch_mult=\(1,\), but the config has \(1, 2\)"):
        infer_config(weights, given=config)
    config.model.ch_mult, config.diffusion.T = (1,), 30
    with pytest.raises(UserError, match=r"'T': 20.*but the config has .*'T': 30"):
        infer_config(weights, given=config)
    wide = weights._replace(network=UNet(**{**vars(NETWORK), "out_channels": 2}))
    with pytest.raises(UserError, match=r"conv_out.weight has 2 channels, conv_in.weight 1"):
        infer_config(wide)


@pytest.mark.slow
def test_weights_from_elsewhere_go_on_training(command, tmp_path):
    """20 steps on from a published state_dict, and an evaluation, by the command that the script prints."""
    network = UNet(8, 1, 1, 32, (1,), 1, ())
    save_file(published(5, network), tmp_path / "published.safetensors")
    run = tmp_path / "run"
    command([str(tmp_path / "published.safetensors"), str(run), "--resolution=8"])
    argv = [sys.executable, "-m", "s2dm_jax.main", f"--workdir={run}", "--config.train.steps=20"]
    argv += ["--config.train.log_every=10", "--config.eval.nfe=5", "--config.eval.num_images=20"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = load_run(str(run))
    assert after.step == 20
    changed = np.abs(
        after.params["conv_in"]["kernel"] - torch_names.from_torch(published(5, network), network)["conv_in"]["kernel"]
    )
    assert 0 < changed.max() < 0.1
    command([str(run), str(tmp_path / "on.pth")])
    card = json.loads((tmp_path / "on.pth.json").read_text())
    assert card["source"]["file"] == "published.safetensors"
    assert (card["training"]["steps"], card["data"]) == (20, "digits")
    assert card["metrics"]["step"] == 20
