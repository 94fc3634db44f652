"""The exported sampler in a process that cannot import this project, and as a run to sample from."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import save_run

import s2dm_jax
from s2dm_jax.common.errors import UserError
from s2dm_jax.common.hashing import sha256_of_arrays
from s2dm_jax.config.build import build_schedule
from s2dm_jax.config.defaults import default_config
from s2dm_jax.inference import sampler as sampling
from s2dm_jax.inference.sampler import SamplerConfig, resolve_sampler, run_sampler, sampler_options
from s2dm_jax.models import variance_head
from s2dm_jax.samplers.noise import initial_noise
from s2dm_jax.samplers.timesteps import split_timestep_spec
from s2dm_jax.weights import export
from s2dm_jax.workdir.load import load_run

ROOT = Path(__file__).parents[2]
LOADER = re.search(r"<!-- loader -->\n```python\n(.*?)```", (ROOT / "docs" / "weights.md").read_text(), re.S)[1]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of 7 steps that were never trained."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    config = default_config()
    config.diffusion.update(T=20, beta_start=1e-4, beta_end=0.02)
    config.model.update(ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())
    config.sample.nfe, config.eval.nfe = 3, (10,)
    # The initial network changes little.
    save_run(path, config, seed=0, ema_factor=2)
    return path


def exported(workdir, path, **sample):
    run = load_run(str(workdir))
    run.config.sample.update(sample)
    run.config.export.path = str(path)
    return run, export.export(run.config, str(workdir))


def reference(run, seed, indices, x_T=None):
    """What this project draws, as float32: `configure_sampler` without the rounding to bytes."""
    schedule = build_schedule(run.config)
    spec, options = split_timestep_spec(sampler_options(run.config.sample))
    timesteps, scale, options = resolve_sampler(schedule, spec=spec, **options)
    eta = options.pop("eta", None) or None
    program = SamplerConfig(run.network, schedule, run.config.sample.sampler, tuple(sorted(options.items())))
    return np.asarray(
        jax.jit(lambda: run_sampler(program, run.ema_params, timesteps, seed, indices, eta=eta, scale=scale, x_T=x_T))()
    )


OUTSIDE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("s2dm_jax", "flax", "optax", "orbax", "ml_collections"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture(scope="module")
def sampler_file(workdir, tmp_path_factory):
    return exported(workdir, tmp_path_factory.mktemp("exported") / "new" / "sampler.npz", skip_scale=5)[1]


def run_outside(folder, lines):
    """Runs lines of Python after docs/weights.md's loader, where s2dm_jax cannot be imported.

    Returns:
      The arrays that the lines put into the dict `out`.
    """
    code = f"""{OUTSIDE}{LOADER}
out = {{}}
{lines}
assert not [name for name in sys.modules if name.split(".")[0] in ("s2dm_jax", "flax")]
np.savez("out.npz", **out)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "out.npz") as file:
        return dict(file)


def test_loaded_where_nothing_of_ours_is(workdir, sampler_file):
    out = run_outside(
        sampler_file.parent,
        """
out["seed"] = load("sampler.npz")(np.int32(3), np.array([5, 0, 2], np.int32))
x_T = np.random.default_rng(0).standard_normal((3, 8, 8, 1), np.float32)
out["x_T"] = load("sampler.npz", "sampler_from_noise")(x_T, np.int32(3))
""",
    )
    run = load_run(str(workdir))
    run.config.sample.skip_scale = 5
    x_T = np.random.default_rng(0).standard_normal((3, 8, 8, 1), np.float32)
    x_T = np.concatenate([initial_noise(3, np.array([5, 0, 2]), (8, 8, 1)), x_T])
    expected = reference(run, 3, np.arange(6), x_T)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(out["seed"], expected[:3], atol=1e-5)
    np.testing.assert_allclose(out["x_T"], expected[3:], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sample", [{"skip_scale": 5}, {"eta": 0.7}, {"sampler": "unipc"}])
def test_any_batch_outside_gives_the_same_images(workdir, tmp_path, sample):
    run, _ = exported(workdir, tmp_path / "sampler.npz", **sample)
    x_T = np.random.default_rng(0).standard_normal((3, 8, 8, 1), np.float32)
    t = np.array([0, 7.5, 19], np.float32)
    np.savez(tmp_path / "in.npz", x_T=x_T, t=t)
    out = run_outside(
        tmp_path,
        """
inputs, sampler = np.load("in.npz"), load("sampler.npz")
for n in (1, 3, 16):
    out[f"batch {n}"] = sampler(np.int32(3), np.arange(n, dtype=np.int32))
out["x_T"] = load("sampler.npz", "sampler_from_noise")(inputs["x_T"], np.int32(3))
out["eps"] = load("sampler.npz", "network")(inputs["x_T"], inputs["t"])
""",
    )
    whole = reference(run, 3, np.arange(16))
    assert np.abs(whole).max() > 0.5
    for n in (1, 3, 16):
        np.testing.assert_allclose(out[f"batch {n}"], whole[:n], atol=1e-5)
    np.testing.assert_allclose(out["x_T"], reference(run, 3, np.arange(3), x_T), atol=1e-5)
    eps = jax.jit(lambda: run.network.apply(run.ema_params, x_T, t))()
    np.testing.assert_allclose(out["eps"], eps, atol=1e-5)
    run.config.sample.update(skip_scale=0, eta=0.0, sampler="ddim")
    assert np.abs(reference(run, 3, np.arange(16)) - whole).max() > 1e-3, "what is baked in must show"


def test_every_platform_is_in_the_file(sampler_file):
    with np.load(sampler_file) as file:
        about = json.loads(str(file["about"]))
        program = jax.export.deserialize(bytearray(file["sampler"]))
    assert program.platforms == ("cpu", "cuda", "tpu") == tuple(about["platforms"])
    assert about["card"]["sampler"]["skip_scale"] == 5
    assert about["image_shape"] == [8, 8, 1]
    assert "Embedded sampler" in Path(f"{sampler_file}.md").read_text()


def test_a_variance_head_is_in_the_programs_and_the_file_is_its_base(workdir, tmp_path, monkeypatch):
    run = load_run(str(workdir))
    head = variance_head.Head("npr", variance_head.init_params(run.network, 0))
    run.config.variance_head.kind, run.config.sample.sampler, run.config.sample.nfe = "npr", "npr", 2
    run.config.export.path = str(tmp_path / "sampler.npz")
    monkeypatch.setattr(export, "load_run", lambda *_, **__: run._replace(variance_head=head))
    path = export.export(run.config, str(workdir))
    base = load_run(path)
    assert (base.config.variance_head.kind, base.config.sample.sampler, base.variance_head) == ("", "ddim", None)
    jax.tree.map(np.testing.assert_array_equal, base.ema_params, run.ema_params)
    card = json.loads(Path(f"{path}.json").read_text())
    assert (card["sampler"]["sampler"], card["sampler"]["nfe"]) == ("npr", 2)


def test_the_file_samples_like_the_run(workdir, sampler_file, command_line, monkeypatch):
    model, run = s2dm_jax.load(str(sampler_file)), s2dm_jax.load(str(workdir))
    assert (model.step, model.network, model.config.sample.skip_scale) == (7, run.network, 5)
    jax.tree.map(np.testing.assert_array_equal, model.ema_params, run.ema_params)
    # Noise that compiles in no time.
    monkeypatch.setattr(
        sampling,
        "initial_noise",
        lambda seed, indices, shape: jnp.ones((len(indices), *shape)) * (seed + 0.3),
    )
    command_line(
        "--mode=sample",
        f"--workdir={sampler_file}",
        "--config.sample.num_images=2",
        "--config.sample.output=npz",
    )
    (made,) = (sampler_file.parent / "sampler_samples").iterdir()
    with np.load(made) as file:
        assert file["images"].shape == (2, 8, 8, 1)
        settings = json.loads(str(file["provenance"]))
    assert (settings["skip_scale"], settings["nfe"]) == (5, 3)
    assert settings["runs"][0]["step"] == 7
    assert settings["runs"][0]["weights_sha256"] == sha256_of_arrays(jax.tree.leaves(run.ema_params))


def test_mistakes_with_files_are_told(workdir, sampler_file, tmp_path, command_line, capsys):
    def fails(sentence, *argv):
        with pytest.raises(SystemExit) as stop:
            command_line(*argv)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1

    run = f"--workdir={workdir}"
    fails("config.export.path='a.pth' must end in .npz", "--mode=export", run, "--config.export.path=a.pth")
    fails("already exists", "--mode=export", run, f"--config.export.path={sampler_file}")
    fails("--config.train.lr cannot be changed with --mode=export", "--mode=export", run, "--config.train.lr=1")
    fails("--workdir is missing; for example --mode=export", "--mode=export")
    (tmp_path / "a.npz").write_text("no zip file")
    fails("a.npz is damaged or is not an exported sampler", "--mode=sample", f"--workdir={tmp_path / 'a.npz'}")
    np.savez(tmp_path / "b.npz", about=json.dumps({"format": "another"}))
    fails("its format is 'another'", "--mode=sample", f"--workdir={tmp_path / 'b.npz'}")
    with pytest.raises(UserError, match="is not a folder"):
        s2dm_jax.load(str(tmp_path / "nothing.npz"))
