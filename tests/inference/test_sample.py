"""Sampling from trained runs: one image per (seed, index), any number of images, rows of pictures, files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, FunctionNetwork, save_run
from PIL import Image

import s2dm_jax
from s2dm_jax.common.errors import UserError
from s2dm_jax.common.images import to_uint8
from s2dm_jax.config.defaults import default_config
from s2dm_jax.config.validate import check_config
from s2dm_jax.diffusion import objectives
from s2dm_jax.diffusion.schedule import linear_schedule
from s2dm_jax.inference import sample as sample_mode
from s2dm_jax.inference import sampler as sampling
from s2dm_jax.inference import visualize
from s2dm_jax.inference.model import Model
from s2dm_jax.inference.sample import sample
from s2dm_jax.inference.sampler import configure_sampler, sample_batches
from s2dm_jax.models import variance_head
from s2dm_jax.models.unet import UNet
from s2dm_jax.samplers.common import scale_eps
from s2dm_jax.samplers.ddim import ddim
from s2dm_jax.samplers.specs import SAMPLERS, nfe_of
from s2dm_jax.samplers.timesteps import TimestepSpec, plan_timesteps, uniform_timesteps

NETWORK = UNet(8, 1, 1, 32, (1,), 1, ())


def small_config(**sample):
    config = default_config()
    config.diffusion.update(T=20, beta_start=1e-4, beta_end=0.02)
    config.model.update(ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())
    config.sample.update({"nfe": 3, "num_images": 4, **sample})
    config.eval.nfe = (10,)
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "tiny"
    # The command line's `nfe` must replace the run's `steps`. Initial weights barely change an image; twice
    # as large they do.
    save_run(path, small_config(nfe=0, steps=4), seed=0, ema_factor=2)
    return path


@pytest.fixture(scope="module")
def model(workdir):
    return s2dm_jax.load(str(workdir))


@pytest.fixture
def quick_noise(monkeypatch):
    """Noise that compiles in no time, a function of the same arguments; test_samplers.py has the real one."""

    def noise(seed, indices, shape):
        pixels = jnp.arange(np.prod(shape)).reshape(shape)
        return jnp.sin((jnp.asarray(indices).reshape(-1, 1, 1, 1) + 5.3) * (pixels + 17.1) + seed)

    monkeypatch.setattr(sampling, "initial_noise", noise)
    monkeypatch.setattr(visualize, "initial_noise", noise)
    monkeypatch.setattr(sampling, "image_keys", lambda seed, indices: (seed, indices))
    monkeypatch.setattr(
        sampling, "per_image_noise", lambda keys, shape: lambda step: noise(keys[0] + step, keys[1], shape)
    )
    return noise


@pytest.fixture
def toy(monkeypatch, quick_noise):
    """A model whose network is (x, t) → params·x·(1 + t/20), and the list of the batches that were traced."""
    traced = []

    def eps(params, x, t):
        traced.append(x.shape)
        return params * x * (1 + t.reshape(-1, 1, 1, 1) / 20)

    model = Model(small_config(), FunctionNetwork(eps), linear_schedule(20, 1e-4, 0.02), np.float32(0.7), 7)
    monkeypatch.setattr(
        sample_mode,
        "load",
        lambda path, step=None, ema="": model._replace(ema_params=np.float32(0.5 + len(path) / 1000), ema=ema),
    )
    return model, traced


def test_an_image_depends_on_its_seed_and_index_alone(model):
    images = model.sample(7, nfe=3, seed=3)
    assert (images.shape, images.dtype) == ((7, 8, 8, 1), np.uint8)
    assert len(np.unique(images, axis=0)) == 7
    # Other batches may round a pixel to the neighbouring byte.
    in_batches = model.sample(7, nfe=3, seed=3, batch_size=3)
    np.testing.assert_allclose(in_batches.astype(int), images, atol=1)
    sampler, timesteps = model.sampler(nfe=3)
    in_disorder = np.asarray(sampler(model.ema_params, timesteps, 3, np.array([5, 0, 3])))
    np.testing.assert_array_equal(in_disorder, in_batches[[5, 0, 3]])
    assert (model.sample(3, nfe=3, seed=4, batch_size=3) != in_batches[:3]).any()


def test_batches_add_up_and_share_one_program(toy):
    model, traced = toy
    sampler, timesteps = model.sampler(nfe=3, eta=0.5)
    options = {"seed": 0, "num_images": 8, "batch_size": 3}
    batches = list(sample_batches(sampler, model.ema_params, timesteps, **options))
    assert [len(batch) for batch in batches] == [3, 3, 2]
    assert set(traced) == {(3, 8, 8, 1)}
    np.testing.assert_array_equal(np.concatenate(batches), model.sample(8, nfe=3, eta=0.5))
    assert len(model.sample(1, nfe=3, batch_size=9)) == 1
    for name in ("num_images", "batch_size"):
        with pytest.raises(ValueError, match=f"{name}=0 is out of range: it must be at least 1"):
            next(sample_batches(sampler, model.ema_params, timesteps, **{**options, name: 0}))


def test_other_values_compile_nothing(toy):
    model, traced = toy
    scale = np.linspace(0.9, 1.1, 20)

    def images(timesteps, **how):
        return model.sample(2, timesteps=timesteps, **how)

    first = images((0, 5, 10), eta=0.5, skip_scale=scale)
    count = len(traced)
    for other in (
        images((0, 5, 10), eta=0.5, skip_scale=scale, seed=1),
        images((0, 7, 19), eta=0.5, skip_scale=scale),
        images((0, 5, 10), eta=0.7, skip_scale=scale),
        images((0, 5, 10), eta=0.5, skip_scale=scale**2),
        model._replace(ema_params=np.float32(0.6)).sample(2, timesteps=(0, 5, 10), eta=0.5, skip_scale=scale),
    ):
        assert (other != first).any()
    assert len(traced) == count


@pytest.mark.parametrize("method", SAMPLERS)
def test_every_method_makes_the_calls_it_says(model, quick_noise, monkeypatch, method):
    calls = []

    class Counted(UNet):
        def apply_with_features(self, *inputs):
            jax.debug.callback(lambda: calls.append(1))
            return super().apply_with_features(*inputs)

    network = Counted(**vars(model.network))
    nfe = nfe_of(method, SAMPLERS[method].min_steps + 1)
    # A schedule of its own: a compiled program of another test would not count.
    schedule, head = (
        linear_schedule(20, 1e-4, 0.02),
        variance_head.Head(method, variance_head.init_params(network, 0)),
    )
    sampler, timesteps = configure_sampler(network, schedule, method, nfe=nfe, ms_eps=np.full(20, 0.5), head=head)
    images = np.asarray(sampler(model.ema_params, timesteps, 0, np.arange(2)))
    jax.effects_barrier()
    assert len(calls) == nfe
    assert (images.shape, images.dtype) == ((2, 8, 8, 1), np.uint8)
    assert (images[0] != images[1]).any()


def test_skip_scale_is_the_samplers(toy, quick_noise):
    model, _ = toy
    plain = model.sample(3, nfe=4)
    np.testing.assert_array_equal(model.sample(3, nfe=4, skip_scale=np.ones(20)), plain)
    np.testing.assert_array_equal(model.sample(3, nfe=4, skip_scale=0), plain)
    scaled = model.sample(3, nfe=4, skip_scale=10, skip_scale_tau=0.5, skip_scale_preset="released")
    eps_fn = scale_eps(
        model.network.eps_fn(model.ema_params, model.schedule),
        objectives.skip_scale(model.schedule, 10, 0.5, "released"),
    )
    x_T = quick_noise(0, np.arange(3), (8, 8, 1))
    expected = to_uint8(jax.jit(lambda x: ddim(eps_fn, x, model.schedule, uniform_timesteps(20, 4)))(x_T))
    np.testing.assert_allclose(scaled.astype(int), expected, atol=1)
    assert (np.abs(scaled.astype(int) - plain) > 1).any()


def test_ends_of_an_interpolation_are_the_plain_images(toy):
    model, _ = toy
    rows = visualize.interpolate(model, [0, 4], [1, 2], 5, seed=3, nfe=4)
    assert rows.shape == (2, 5, 8, 8, 1)
    plain = model.sample(5, nfe=4, seed=3)
    np.testing.assert_array_equal(rows[:, 0], plain[[0, 4]])
    np.testing.assert_array_equal(rows[:, -1], plain[[1, 2]])
    assert len(np.unique(rows[0], axis=0)) == 5
    between_seeds = visualize.interpolate(model, [0], [0], 2, seed=3, end_seed=8, nfe=4)
    np.testing.assert_array_equal(between_seeds[0, 1], model.sample(1, nfe=4, seed=8)[0])
    for bad in ({"eta": 0.5}, {"sampler": "ddpm"}):
        with pytest.raises(ValueError, match="is stochastic; interpolation needs"):
            visualize.interpolate(model, [0], [1], **bad)


@pytest.mark.parametrize("method", ["ddpm", "s_pndm", "dpmpp_2m"])
def test_a_trajectory_ends_in_the_image(toy, method):
    """Also where the last step is long, and PNDM's image is not what its last evaluation predicts."""
    model, _ = toy
    how = {"sampler": method, "timesteps": (9, 12, 15, 19), "seed": 3}
    strips = visualize.trajectory(model, [2, 0], **how)
    images = model.sample(3, **how)
    assert strips.shape == (2, 4, 8, 8, 1)
    np.testing.assert_allclose(strips[:, -1].astype(int), images[[2, 0]], atol=1)
    # The first is what the network makes of x_T alone.
    assert (strips[:, 0] != strips[:, -1]).any()


def test_compared_runs_start_from_the_same_noise(toy):
    models = [toy[0], toy[0]._replace(ema_params=np.float32(0.5))]
    rows = visualize.compare([*models, models[0]], 3, seed=5, nfe=3)
    np.testing.assert_array_equal(rows[0], models[0].sample(3, seed=5, nfe=3))
    np.testing.assert_array_equal(rows[1], models[1].sample(3, seed=5, nfe=3))
    np.testing.assert_array_equal(rows[2], rows[0])
    assert (rows[0] != rows[1]).any()
    other = models[0]._replace(network=NETWORK.__class__(16, 1, 1, 32, (1,), 1, ()))
    with pytest.raises(ValueError, match="images of different shapes"):
        visualize.compare([models[0], other], 1)


def test_files_tell_what_is_in_them(toy, workdir, capsys):
    path = sample(small_config(sampler="s_pndm"), str(workdir))
    assert path.parent == workdir / "samples"
    assert path.name.startswith("s_pndm_nfe3_seed0_")
    assert path.suffix == ".png"
    assert "s_pndm, 2 steps, NFE 3, seed 0" in capsys.readouterr().out
    before = path.read_bytes()
    chosen = sample(small_config(sampler="s_pndm", ema="sigma_rel=0.1", output="npz"), str(workdir))
    assert chosen.name.startswith("s_pndm_nfe3_seed0_sigma_rel0.1_")
    assert json.loads(str(np.load(chosen)["provenance"]))["runs"][0]["ema"] == "sigma_rel=0.1"
    assert "EMA sigma_rel=0.1 at step 7" in capsys.readouterr().out
    assert sample(small_config(sampler="s_pndm"), str(workdir)) == path
    assert path.read_bytes() == before
    others = [
        {"pndm_convention": "published", "timestep_spacing": "uniform"},
        {"skip_scale": 10},
        {"timesteps": (0, 1)},
        {"num_images": 3},
    ]
    others = [small_config(sampler="s_pndm", **change) for change in others]
    assert len({path, *(sample(other, str(workdir)) for other in others)}) == 5
    assert capsys.readouterr().out.count("NFE 3, skip_scale 10, seed 0") == 1

    folder = sample(small_config(output="png", batch_size=3), str(workdir))
    assert [p.name for p in sorted(folder.iterdir())] == [f"{i:06d}.png" for i in range(4)]
    expected = sample_mode.load(str(workdir)).sample(4, nfe=3, batch_size=3)
    for i, image in enumerate(expected):
        np.testing.assert_array_equal(Image.open(folder / f"{i:06d}.png"), image[:, :, 0])


def test_analytic_estimates_its_statistic_once(workdir, capsys):
    with pytest.raises(ValueError, match="needs ms_eps"):
        s2dm_jax.load(str(workdir)).sample(2, "analytic", nfe=3)
    config = small_config(sampler="analytic", noise_stat_images=3)
    first = sample(config, str(workdir))
    assert "estimating the mean square of ε at 20 timesteps, 3 images" in capsys.readouterr().out
    assert sample(config, str(workdir)) == first
    printed = capsys.readouterr().out
    assert "estimating" not in printed
    assert "ms_eps   3 images per timestep" in printed

    model = s2dm_jax.load(str(workdir))
    even, best = (model.sample(4, "analytic", nfe=3, timestep_spacing=grid) for grid in ("linspace", "optimal"))
    assert (even != best).any()
    np.testing.assert_array_equal(model.sampler("analytic", nfe=3, timestep_spacing="optimal")[1][-1], 19)
    assert sample(small_config(sampler="analytic", noise_stat_images=4), str(workdir)) != first


@pytest.mark.parametrize(
    ("change", "tiles"),
    [({"interpolate": 3}, (2, 3)), ({"trajectory": True}, (4, 3)), ({"compare": "itself"}, (2, 4))],
)
def test_rows_of_pictures(toy, workdir, change, tiles):
    if "compare" in change:
        change = {"compare": f"{workdir},"}
    path = sample(small_config(**change), str(workdir))
    assert next(iter(change)) in path.name
    rows, columns = tiles
    assert Image.open(path).size == (columns * 34 + 2, rows * 34 + 2)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "s2dm_jax.main", "--mode=sample", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_command_line(workdir, model):
    """Without --config the run's own is used; what is said of the number of steps replaces its `steps`."""
    done = command(f"--workdir={workdir}", "--config.sample.nfe=5", "--config.sample.output=npz")
    assert (done.returncode, done.stderr) == (0, "")
    path = Path(done.stdout.splitlines()[-1].split()[1])
    assert path.name.startswith("ddim_nfe5_seed0_")
    with np.load(path) as arrays:
        np.testing.assert_array_equal(arrays["images"], model.sample(4, nfe=5))
        provenance = json.loads(str(arrays["provenance"]))
    assert (provenance["nfe"], provenance["runs"][0]["timesteps"]) == (5, [0, 4, 8, 12, 16])
    # The same program, which was kept: 4 images, 5 levels.
    arguments = [
        "--config.sample.steps=5",
        "--config.sample.timestep_spacing=quadratic",
        "--config.sample.num_images=4",
    ]
    done = command(f"--workdir={workdir}", "--config=configs/digits.py", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ddim, 5 steps, NFE 5, seed 0" in done.stdout
    assert Path(done.stdout.splitlines()[-1].split()[1]).read_bytes().startswith(b"\x89PNG")


BAD = [
    ({"sampler": "euler"}, "config.sample.sampler='euler' is not valid; choose one of ddim, ddpm, f_pndm"),
    ({"steps": 21, "nfe": 0}, "config.sample.steps=21 is out of range: T=20 allows 1 to 20"),
    ({"nfe": 21}, "config.sample.nfe=21 is not possible: steps=21 is out of range: T=20"),
    ({"eta": 1.5}, "config.sample.eta=1.5 is out of range: it must be from 0.0 to 1.0"),
    ({"eta": 0.5, "sampler": "deis"}, "config.sample.eta=0.5 is not an option of deis, only of ddim"),
    (
        {"nfe": 12, "sampler": "f_pndm"},
        "config.sample.nfe=12 is too few for f_pndm: its smallest number of steps makes 13",
    ),
    ({"steps": 3, "nfe": 4}, "config.sample.nfe=4 contradicts steps=3: 3 steps of ddim make 3 evaluations"),
    ({"timesteps": (0, 1)}, "config.sample.nfe=3 contradicts timesteps: 2 steps of ddim make 2"),
    ({"timesteps": (0, 9, 5)}, "config.sample.timesteps=[0, 9, 5] are not in ascending order"),
    ({"timesteps": (0, 5, 5)}, "config.sample.timesteps=[0, 5, 5] are not in ascending order"),
    ({"timesteps": (0, 5, 20)}, "config.sample.timesteps go from 0 to 20; T=20 allows 0 to 19"),
    ({"timesteps": (0, 1.5, 2)}, "config.sample.timesteps=(0, 1.5, 2) has the wrong type"),
    (
        {"timestep_spacing": "cosine"},
        "config.sample.timestep_spacing='cosine' is not valid; choose one of auto, uniform, quadratic",
    ),
    (
        {"timestep_spacing": "linspace", "nfe": 1},
        "config.sample.nfe=1 is not possible: steps=1 is too few for linspace",
    ),
    ({"raw_eps": True, "sampler": "unipc"}, "config.sample.raw_eps=True is not an option of unipc, only of ddim"),
    ({"order": 4, "sampler": "deis"}, "config.sample.order=4 is not valid; choose one of 1, 2, 3"),
    (
        {"pndm_convention": "published", "sampler": "s_pndm", "timestep_spacing": "linspace"},
        "config.sample.pndm_convention='published' reads alpha_bar one timestep later",
    ),
    ({"skip_scale": 20}, "config.sample.skip_scale=20 must be at most 19"),
    ({"output": "gif"}, "config.sample.output='gif' is not valid; choose one of grid, npz, png"),
    ({"output": "npz", "trajectory": True}, "config.sample.output='npz' cannot be combined with"),
    ({"interpolate": 5, "trajectory": True}, "interpolate and config.sample.trajectory are mutually exclusive"),
    ({"interpolate": 5, "num_images": 3}, "num_images=3: it must be at least 2, and num_images even"),
    ({"interpolate": 5, "eta": 0.5}, "config.sample.interpolate=5 needs a deterministic sampler"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD)
def test_bad_fields(change, sentence):
    with pytest.raises(UserError) as error:
        check_config(small_config(**change), trained=True)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_values_in_python(toy):
    model, _ = toy
    for change, sentence in [
        ({"sampler": "euler"}, "sampler='euler' is not one of"),
        ({"eta": 2}, "eta=2 is not allowed"),
        ({"clip": True}, "clip=True is not an option of any sampler"),
        ({"skip_scale": np.ones(3)}, r"skip_scale has shape \(3,\)"),
        ({"skip_scale": 20}, "skip_scale=20 is out of range"),
        ({"timestep_spacing": "cosine"}, "timestep_spacing='cosine' is not one of"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            model.sample(1, **change)
    with pytest.raises(ValueError, match="order=0 is not allowed"):
        configure_sampler(NETWORK, model.schedule, "deis", order=0)
    with pytest.raises(ValueError, match="steps=5 contradicts timesteps, which are 2"):
        plan_timesteps(20, "ddim", TimestepSpec(steps=5, timesteps=(0, 1)))


def test_bad_command_lines(workdir, tmp_path):
    """Reported in one sentence with status 2 and nothing written."""
    run = f"--workdir={workdir}"
    shutil.copy(workdir / "config.json", tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for arguments, sentence in [
        ([], "--workdir is missing"),
        ([f"--workdir={tmp_path / 'none'}"], "is not a folder; give the --workdir of a training run"),
        ([f"--workdir={tmp_path}"], "holds no checkpoint"),
        ([run, "--config.train.lr=1"], "--config.train.lr cannot be changed with --mode=sample"),
        ([run, "--config.sample.samplr=ddim"], "did you mean config.sample.sampler?"),
        ([run, f"--config.sample.compare={tmp_path}"], "holds no checkpoint"),
        ([run, "--config.sample.timesteps=0,9,5"], "are not in ascending order without repeats"),
    ]:
        done = command(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), done
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("error: ")
        assert sentence in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_damaged_checkpoints(workdir, tmp_path):
    """Weights or metadata that are cut short, and weights that are gone."""
    saved = workdir / "checkpoints" / "7"
    files = [file for file in saved.rglob("*") if file.is_file()]
    weights = max(files, key=lambda file: file.stat().st_size).relative_to(saved)
    metadata = next(file for file in files if "array_metadatas" in str(file)).relative_to(saved)
    for i, file in enumerate((weights, metadata, weights)):
        run = tmp_path / f"run{i}"
        shutil.copytree(workdir, run)
        path = run / "checkpoints" / "7" / file
        if i < 2:
            os.truncate(path, path.stat().st_size // 2)
        else:
            path.unlink()
        with pytest.raises(UserError, match=r"checkpoints/7 cannot be read: it is damaged") as error:
            s2dm_jax.load(str(run))
        assert "\n" not in str(error.value)
    done = command(f"--workdir={tmp_path / 'run0'}")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr[:500]


def test_importing_the_package_imports_no_jax():
    code = "import sys, s2dm_jax, s2dm_jax.config.defaults; print('jax' in sys.modules, callable(s2dm_jax.load))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == "False True\n", done.stderr


def test_a_folder_of_images_is_complete_or_absent(workdir, toy, monkeypatch):
    config = small_config(output="png", batch_size=2, seed=77)
    batches = Model.batches

    def fails_later(*arguments):
        yield next(iter(batches(*arguments)))
        raise OSError(28, "No space left on device")

    before = sorted((workdir / "samples").glob("*"))
    monkeypatch.setattr(Model, "batches", fails_later)
    with pytest.raises(OSError, match="No space left on device") as error:
        sample(config, str(workdir))
    monkeypatch.setattr(Model, "batches", batches)
    assert sorted((workdir / "samples").glob("*")) == before
    folder = sample(config, str(workdir))
    assert str(folder) == error.value.filename
    assert sample(config, str(workdir)) == folder
    assert len(list(folder.iterdir())) == 4
