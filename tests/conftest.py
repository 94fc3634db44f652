"""Golden values of the published PyTorch code (tests/golden/README.md); fixtures that every test may use."""

import os

import jax
import pytest
from published import read_golden

from s2dm_jax import main

# Most of the suite's time is compiling programs that run once; the processes that tests start inherit this.
_QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK_COMPILE}".strip()


def pytest_collection_modifyitems(items):
    """The longest tests first, so that no worker is left with one of them when the others are done."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


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
            "s2dm_jax.evaluation.inception_weights.URL",
            "file:///nowhere/pt_inception-2015-12-05-6726825d.pth",
        )
        yield


@pytest.fixture(scope="session")
def golden():
    """Function of a file's name giving its arrays: images as NHWC, parameters as PyTorch has them."""
    return read_golden


@pytest.fixture
def command_line(monkeypatch):
    """Function of arguments that runs `python -m s2dm_jax.main` with them in this process."""

    def run(*argv):
        monkeypatch.setattr("sys.argv", ["main", *argv])
        main.main()

    return run
