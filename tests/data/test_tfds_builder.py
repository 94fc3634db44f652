"""The builders of CIFAR-10, CelebA and CelebA-HQ, run on small archives from a server on this machine, up to training
steps; TensorFlow cannot be imported.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image
from small_archives import (
    COMMAND_WITHOUT_TENSORFLOW,
    cut,
    make_celeba,
    make_cifar10,
    mirror,
    small_picture,
    write_checksums,
)

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import data_cache_dir
from s2dm_jax.config.datasets import DATASETS
from s2dm_jax.config.defaults import default_config
from s2dm_jax.data import cache as dataset_cache
from s2dm_jax.data import tfds_builder
from s2dm_jax.data.datasets import load_dataset


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Empty folders for the cache and for tensorflow-datasets; gives the folder for files got by hand."""
    monkeypatch.setenv("S2DM_JAX_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.delenv("S2DM_JAX_MIRROR", raising=False)
    manual = tmp_path / "tfds" / "downloads" / "manual"
    manual.mkdir(parents=True)
    return manual


@pytest.fixture
def server(places, tmp_path, monkeypatch):
    """A mirror with an empty folder; beside it, features that need no training."""
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mean.py").write_text("def mean(images): return images.mean((1, 2)) / 255")
    with mirror(tmp_path / "mirror") as running:
        monkeypatch.setenv("S2DM_JAX_MIRROR", running.url)
        yield running


def config_of(name, **fields):
    config = default_config()
    config.data.update(name=name, **fields)
    return config


def as_pairs(images, labels):
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


TWENTY_STEPS = [
    "--config.train.steps=20",
    "--config.train.batch_size=2",
    "--config.sample.num_images=4",
    "--config.sample.nfe=2",
    "--config.eval.num_images=4",
    "--config.eval.batch_size=4",
    "--config.eval.nfe=2",
    "--config.eval.feature_extractor=mean.py:mean",
]
TINY = ["--config.model.ch=32", "--config.model.ch_mult=1", "--config.model.num_res_blocks=1"]
TINY += [
    "--config.model.attn_resolutions=",
    "--config.data.resolution=8",
    "--config.eval.feature_extractor=mean.py:mean",
]


def test_labels_of_another_name_are_not_taken_for_none(monkeypatch):
    coil = {"image": object(), "object_id": SimpleNamespace(names=["a", "b"]), "angle": object()}
    assert tfds_builder.label_feature("cifar10", {**coil, "label": SimpleNamespace(names=["a"])}) == "label"
    assert not tfds_builder.label_feature("celebahq", {"image": object()})
    with pytest.raises(
        UserError, match=r"'label' is not a class among .*; name one of object_id as `label` of cifar10"
    ):
        tfds_builder.label_feature("cifar10", coil)
    with pytest.raises(UserError, match="name one of none"):
        tfds_builder.label_feature("cifar10", {"label": object()})
    for label, found in (("object_id", "object_id"), ("", "")):
        monkeypatch.setitem(tfds_builder.DATASETS, "cifar10", DATASETS["cifar10"]._replace(label=label))
        assert tfds_builder.label_feature("cifar10", coil) == found


def test_the_literal_command_downloads_cifar10_and_trains(server, tmp_path):
    expected = make_cifar10(server.folder)
    write_checksums(server.folder)
    command = [sys.executable, "-c", COMMAND_WITHOUT_TENSORFLOW, "--config=configs/cifar10.py", *TWENTY_STEPS, *TINY]
    fast = {**environment(), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=fast)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "workdir: runs/cifar10_s2_10"
    assert f"downloading {server.url}/cifar-10-binary.tar.gz (0.1 MB)" in lines
    assert "train: 20 images" in done.stdout
    assert "Unknown size" not in done.stdout
    last = (tmp_path / "runs" / "cifar10_s2_10" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["step"] == 20
    # What was downloaded serves other sizes, and the cache later runs.
    server.faults["cifar-10-binary.tar.gz"] = [404, 404]
    load_dataset(config_of("cifar10"))
    server.requests.clear()
    data = load_dataset(config_of("cifar10"))
    assert as_pairs(data.train, data.train_labels) == as_pairs(*expected[:2])
    assert as_pairs(data.held_out, data.held_out_labels) == as_pairs(*expected[2:])
    assert data.num_classes == 10
    assert "CIFAR-10 of tensorflow-datasets 3.0.2, 32×32×3" in data.provenance
    assert server.requests == []


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "config"), [("cifar10", "configs/cifar10.py"), ("celeba", "configs/celeba64.py")])
def test_the_real_config_trains_twenty_steps_on_what_it_downloads(server, tmp_path, name, config):
    (make_cifar10 if name == "cifar10" else make_celeba)(server.folder)
    write_checksums(server.folder)
    command = [sys.executable, "-c", COMMAND_WITHOUT_TENSORFLOW, f"--config={config}", "--workdir=run", *TWENTY_STEPS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["step"] == 20


def test_what_tensorflow_datasets_has_prepared_as_array_record_is_used_as_it_is(server, tmp_path):
    import tensorflow_datasets as tfds

    from s2dm_jax.data.builders import Cifar10

    expected = make_cifar10(server.folder)
    write_checksums(server.folder)
    # As a user of tensorflow-datasets does, in its own folder.
    tfds_builder.build("cifar10", tmp_path / "tfds")
    shutil.rmtree(server.folder)
    data = load_dataset(config_of("cifar10"))
    assert as_pairs(data.train, data.train_labels) == as_pairs(*expected[:2])
    assert not (data_cache_dir() / "tfds").exists()
    # And tensorflow-datasets reads what was prepared here.
    published = tfds.builder("cifar10", data_dir=tmp_path / "tfds")
    assert published.version == Cifar10.VERSION
    examples = list(published.as_data_source(split="test"))
    assert as_pairs([e["image"] for e in examples], [e["label"] for e in examples]) == as_pairs(*expected[2:])
    assert sorted(e["id"].decode() for e in examples) == [f"test_{i:05d}" for i in range(4)]


def test_what_only_tensorflow_reads_is_one_sentence(places):
    folder = places.parents[1] / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    info = {"name": "cifar10", "version": "3.0.2", "fileFormat": "tfrecord"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError) as error:
        dataset_cache.check_preparable(config_of("cifar10"))
    assert str(error.value) == (
        f"{folder} is in the format tfrecord, which only TensorFlow reads: set TFDS_DATA_DIR to another folder "
        "to have cifar10 prepared again, or prepare it there with file_format='array_record'"
    )
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match=r"^preparing cifar10 failed with ParseError: [^\n]*; download .* again"):
        dataset_cache.check_preparable(config_of("cifar10"))


@pytest.mark.parametrize(("crop", "box"), [("auto", (25, 57, 153, 185)), ("center_crop_140", (19, 39, 159, 179))])
def test_celeba_is_cropped_and_resized_as_pillow_does(server, crop, box):
    pictures, labels = make_celeba(server.folder)
    write_checksums(server.folder)
    data = load_dataset(config_of("celeba", crop=crop))
    expected = [np.asarray(p.crop(box).resize((64, 64), Image.Resampling.BILINEAR)) for p in pictures]
    assert as_pairs(data.train, data.train_labels) == as_pairs(expected[:8], labels[:8])
    assert as_pairs(data.held_out, data.held_out_labels) == as_pairs(expected[10:], labels[10:])
    assert data.num_classes == 4


def test_celebahq_comes_from_a_tar_got_by_hand(places):
    config = config_of("celebahq")
    with pytest.raises(UserError, match=r"make data256x256\.tar by hand and put it at .*manual/data256x256\.tar"):
        load_dataset(config)
    pictures = [small_picture(i, 256, 256) for i in range(20)]
    with tarfile.open(places / "data256x256.tar", "w") as archive:
        for i, picture in enumerate(pictures):
            picture.save(places / "picture.png")
            archive.add(places / "picture.png", f"data256x256/{i:05d}.png")
    data = load_dataset(config)
    assert (len(data.train), len(data.held_out), data.num_classes) == (18, 2, 1)
    both = [image.tobytes() for image in (*data.train, *data.held_out)]
    assert sorted(both) == sorted(picture.tobytes() for picture in pictures)


@pytest.mark.slow
def test_killed_ten_times_while_downloading_and_preparing_the_next_run_works(server, tmp_path):
    expected = make_cifar10(server.folder, per_file=400)
    write_checksums(server.folder)
    config = config_of("cifar10")
    program = (
        "from s2dm_jax.config import default_config; from s2dm_jax.data import cache; config = default_config(); "
        "config.data.name = 'cifar10'; print('began', flush=True); cache.prepare_dataset(config)"
    )

    def start():
        command = [sys.executable, "-c", program]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment()
        )
        assert process.stdout.readline() == "began\n"
        return process

    began = time.monotonic()
    with start() as process:
        assert "train: 2,000 images" in process.stdout.read()
    duration = time.monotonic() - began
    folder = dataset_cache.prepare_dataset(config)
    whole = {path.name: path.read_bytes() for path in folder.glob("*.npy")}
    data = load_dataset(config)
    assert as_pairs(data.train, data.train_labels) == as_pairs(*expected[:2])
    seed = np.random.SeedSequence().entropy
    # Shown if the test fails.
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    killed = 0
    while killed < 10:
        for made in (folder, data_cache_dir() / "tfds"):
            shutil.rmtree(made)
        # Half of the times the download too is interrupted.
        server.faults["cifar-10-binary.tar.gz"] = [cut] * (killed % 2)
        with start() as process:
            time.sleep(rng.uniform(0, duration))
            if process.poll() is not None:
                continue
            process.kill()
        killed += 1
        assert not folder.exists() or dataset_cache.is_ready(folder)
        with start() as process:
            process.stdout.read()
        assert {path.name: path.read_bytes() for path in folder.glob("*.npy")} == whole
        cache = data_cache_dir()
        assert sorted(path.name for path in cache.iterdir()) == sorted([folder.name, "cifar10.lock", "tfds"])
        assert not [*cache.rglob("incomplete.*"), *cache.rglob("*.part")]
    print(f"killed {killed} times within {duration:.1f} s")
