"""The metadata of a training state: config, versions, commit."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

from ml_collections import ConfigDict

from s2dm_jax.common.version import __version__


def run_metadata(config: ConfigDict) -> dict:
    """Config, versions of the packages and commit of this code, as plain data for JSON."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    # This package's own version does not need an installation: a checkout on PYTHONPATH has none.
    own = {"s2dm_jax": __version__, "python": platform.python_version()}
    versions = {name: importlib.metadata.version(name) for name in names} | own
    return {"config": config.to_dict(), "versions": versions, "git_commit": git_commit()}


def git_commit() -> str | None:
    """The commit of this code, with "+changes" if files differ from it; None outside of a checkout."""

    def git(*arguments):
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # Installed files may be inside another repository, which does not track them.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
