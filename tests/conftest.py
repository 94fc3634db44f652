"""Golden numbers of the published PyTorch code: a few in the repo, all of them in ../shared/golden."""

import importlib.util
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from s2dm_jax import checkpoint, main, train_step
from s2dm_jax.config import build_network, to_json

# Most of the suite's time is compiling programs that run once; the processes that tests start inherit this.
_QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK_COMPILE}".strip()

_HERE = Path(__file__).parent / "golden"
_ALL = Path(__file__).parents[2] / "shared" / "golden"


def equations(jaxpr):
    """All equations of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def _nhwc(array):
    return np.moveaxis(array, -3, -1) if array.ndim >= 4 else array


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(tmp_path_factory):
    """Runs that compile the same program twice within the session pay once."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="session", autouse=True)
def _no_download():
    """Nothing is fetched from the network; a test that fetches names its own server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "s2dm_jax.inception_weights.URL", "file:///nowhere/pt_inception-2015-12-05-6726825d.pth"
        )
        yield


@pytest.fixture(scope="session")
def golden():
    """Function of a file's name giving its arrays: images as NHWC, parameters as PyTorch has them."""

    def load(name):
        path = next((folder / name for folder in (_ALL, _HERE) if (folder / name).exists()), None)
        if path is None:
            pytest.skip(f"{name} is not kept in this repo and ../shared/golden is not here")
        if path.suffix == ".json":
            return json.loads(path.read_text())
        with np.load(path) as arrays:
            parameters = ("param/", "grad/", "init/", "final/", "ema/")
            return {k: v if k.startswith(parameters) else _nhwc(v) for k, v in arrays.items()}

    return load


@pytest.fixture
def command_line(monkeypatch):
    """Function of arguments that runs `python -m s2dm_jax.main` with them in this process."""

    def run(*argv):
        # A config's fields become flags each time that one is read.
        for name in [name for name in flags.FLAGS if name.startswith("config.")]:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
        monkeypatch.setattr("sys.argv", ["main", *argv])
        main.main()

    return run


def load_file(path):
    """A Python file as a module: a command of scripts/, a config."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_run(path, config, *, seed, ema_factor):
    """Makes `path` the folder of a run of 7 steps that were never trained; its average is a multiple."""
    path.mkdir()
    (path / "config.json").write_text(to_json(config))
    optimizer = train_step.make_optimizer(config.train.lr, config.train.grad_clip)
    state = train_step.init_state(build_network(config), optimizer, seed)
    ema = jax.tree.map(lambda leaf: np.asarray(leaf) * ema_factor, state.params)
    manager = checkpoint.open_checkpoints(path)
    checkpoint.save(manager, 7, jax.device_put(state._replace(step=np.int32(7), ema=ema)))
    manager.close()


def group(arrays, prefix):
    """The entries of a golden file below a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
