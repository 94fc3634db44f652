"""The wheel: what it holds, and that it runs where there is no clone."""

import email
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import s2dm_jax

ROOT = Path(__file__).parents[1]


def run(*command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def build(target, folder):
    """Builds "wheel" or "sdist" from the clone, and returns the file."""
    before = set(folder.iterdir())
    run(sys.executable, "-m", "hatchling", "build", f"--target={target}", f"--directory={folder}", cwd=ROOT)
    (path,) = set(folder.iterdir()) - before
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that is made from the sdist."""
    folder = tmp_path_factory.mktemp("wheel")
    sdist = build("sdist", tmp_path_factory.mktemp("sdist"))
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", f"--wheel-dir={folder}"]
    run(sys.executable, "-m", "pip", "wheel", *options, sdist)
    (path,) = folder.glob("*.whl")
    return path


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return sorted(archive.namelist())


def test_it_holds_the_package_and_the_configs_and_nothing_else(wheel, tmp_path):
    modules = [path.relative_to(ROOT).as_posix() for path in (ROOT / "s2dm_jax").rglob("*.py")]
    configs = [f"s2dm_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")]
    about = f"s2dm_jax-{s2dm_jax.__version__}.dist-info"
    metadata_files = [
        f"{about}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    ]
    assert names_in(wheel) == sorted([*modules, *configs, *metadata_files, "s2dm_jax/py.typed"])
    assert names_in(build("wheel", tmp_path)) == names_in(wheel)


def test_its_metadata(wheel):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Version"] == s2dm_jax.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("Provides-Extra") == sorted(project["optional-dependencies"])
    needed = [one for one in metadata.get_all("Requires-Dist") if "extra ==" not in one]
    assert len(needed) == len(project["dependencies"])
    with zipfile.ZipFile(wheel) as archive:
        (scripts,) = (archive.read(name) for name in archive.namelist() if name.endswith("/entry_points.txt"))
    assert scripts.decode().split() == ["[console_scripts]", "s2dm-jax", "=", "s2dm_jax.main:main"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload(decode=True).decode() == (ROOT / "README.md").read_text()


def test_it_trains_in_an_empty_folder(wheel, tmp_path):
    site, folder = tmp_path / "site", tmp_path / "empty"
    folder.mkdir()
    options = ["--no-deps", "--no-compile", "--disable-pip-version-check", f"--target={site}"]
    run(sys.executable, "-m", "pip", "install", *options, wheel)
    there = {"cwd": folder, "env": {**os.environ, "PYTHONPATH": str(site)}}
    imported = run(sys.executable, "-c", "import s2dm_jax; print(s2dm_jax.__file__)", **there).stdout
    assert Path(imported.strip()) == site / "s2dm_jax" / "__init__.py"

    flags = [
        "--config.model.ch_mult=1",
        "--config.model.attn_resolutions=8",
        "--config.model.num_res_blocks=1",
    ]
    flags += ["--config.train.steps=2", "--config.train.batch_size=8"]
    flags += ["--config.eval.num_images=8", "--config.eval.nfe=2", "--config.sample.num_images=4"]
    command = [sys.executable, "-m", "s2dm_jax.main", "--config=configs/digits.py:s2", "--workdir=run"]
    said = run(*command, *flags, **there).stdout
    assert re.search(r"^\| ddim, quadratic +\| 2 +\| \d+\.\d\d +\|", said, re.MULTILINE)
    assert said.splitlines()[-1] == "samples: run/samples"
    assert sorted(path.name for path in folder.iterdir()) == ["run"]
