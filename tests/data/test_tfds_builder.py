"""The real builders of tensorflow-datasets, run on small archives made here, up to a training step.

They need TensorFlow, the extra `prepare`: `pip install -e '.[test,prepare]'`, then
`python -m pytest tests/data/test_tfds_builder.py`.
"""

import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import small_config
from PIL import Image

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import data_cache_dir
from s2dm_jax.config.datasets import DATASETS
from s2dm_jax.config.defaults import default_config
from s2dm_jax.data import cache as dataset_cache
from s2dm_jax.data import tfds_builder
from s2dm_jax.data.datasets import load_dataset
from s2dm_jax.training.loop import train

needs_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None,
    reason="TensorFlow is not installed: pip install -e '.[test,prepare]'",
)

# The child process, knowing the small archives by their own sizes and checksums.
CHILD = """
import sys
from tensorflow_datasets.core.download import checksums, download_manager
from s2dm_jax.data import tfds_builder

original = download_manager.DownloadManager.__init__

def patched(self, **arguments):
    original(self, **arguments)
    for url, info in self._url_infos.items():
        path = tfds_builder.manual_folder() / (info.filename or "none")
        if path.exists():
            self._url_infos[url] = checksums.compute_url_info(path)

download_manager.DownloadManager.__init__ = patched
tfds_builder.main()
"""


def small_picture(seed, width, height):
    """A smooth picture: its corners' colours, enlarged."""
    corners = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Empty folders for the cache and for tensorflow-datasets; the folder for files got by hand."""
    monkeypatch.setenv("S2DM_JAX_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(tfds_builder, "tfds_command", lambda request: [sys.executable, "-c", CHILD, request])
    manual = tmp_path / "tfds" / "downloads" / "manual"
    manual.mkdir(parents=True)
    return manual


def make_cifar10(folder):
    """cifar-10-binary.tar.gz with 4 images in each of its files; returns images and labels of both splits."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, 24)
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as archive:

        def add(name, data):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))

        for i, name in enumerate([*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]):
            rows = range(4 * i, 4 * i + 4)
            add(name, b"".join(bytes([labels[r]]) + images[r].transpose(2, 0, 1).tobytes() for r in rows))
        classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        add("batches.meta.txt", "\n".join(classes).encode())
    return images[:20], labels[:20], images[20:], labels[20:]


def as_pairs(images, labels):
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


def test_labels_of_another_name_are_not_taken_for_none(monkeypatch):
    coil = {"image": object(), "object_id": SimpleNamespace(names=["a", "b"]), "angle": object()}
    assert tfds_builder.label_feature("cifar10", {**coil, "label": SimpleNamespace(names=["a"])}) == "label"
    assert not tfds_builder.label_feature("celebahq", {"image": object()})
    with pytest.raises(UserError, match=r"'label' is no class among .*; name one of object_id as `label` of cifar10"):
        tfds_builder.label_feature("cifar10", coil)
    with pytest.raises(UserError, match="name one of none"):
        tfds_builder.label_feature("cifar10", {"label": object()})
    for label, found in (("object_id", "object_id"), ("", "")):
        monkeypatch.setitem(tfds_builder.DATASETS, "cifar10", DATASETS["cifar10"]._replace(label=label))
        assert tfds_builder.label_feature("cifar10", coil) == found


@needs_tensorflow
def test_cifar10_from_the_builder_to_a_training_step(places, tmp_path, capfd):
    train_images, train_labels, test_images, test_labels = make_cifar10(places)
    config = small_config(**{"data.name": "cifar10", "train.steps": 2, "eval.num_images": 4})
    train(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
    data = load_dataset(config)
    assert as_pairs(data.train, data.train_labels) == as_pairs(train_images, train_labels)
    assert as_pairs(data.held_out, data.held_out_labels) == as_pairs(test_images, test_labels)
    assert data.num_classes == 10
    assert "CIFAR-10 of tensorflow-datasets 3.0.2, 32×32×3" in data.provenance
    assert "tensorflow" not in sys.modules
    # The cache serves later runs, without the archives.
    (places / "cifar-10-binary.tar.gz").unlink()
    assert load_dataset(config).provenance == data.provenance


@needs_tensorflow
def test_what_tensorflow_datasets_has_prepared_is_used_whatever_its_format(places, tmp_path):
    train_images, train_labels, _, _ = make_cifar10(places)
    # As a user of tensorflow-datasets does: in its own folder and its default format, TFRecord.
    own = CHILD.replace("tfds_builder.main()", "import tensorflow_datasets as tfds; tfds.load('cifar10')")
    subprocess.run([sys.executable, "-c", own], check=True, capture_output=True)
    (places / "cifar-10-binary.tar.gz").unlink()
    config = default_config()
    config.data.name = "cifar10"
    data = load_dataset(config)
    assert as_pairs(data.train, data.train_labels) == as_pairs(train_images, train_labels)
    assert not (data_cache_dir() / "tfds").exists()


def make_celeba(folder):
    """The five files of CelebA with 14 faces: 8 for training, 2 for validation, 4 for the test."""
    names = [f"{i:06d}.jpg" for i in range(1, 15)]
    decoded = {}
    with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
        for i, name in enumerate(names):
            buffer = io.BytesIO()
            small_picture(i, 178, 218).save(buffer, "JPEG", quality=90)
            archive.writestr(f"img_align_celeba/{name}", buffer.getvalue())
            decoded[name] = Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
    split = [0] * 8 + [1] * 2 + [2] * 4
    (folder / "list_eval_partition.txt").write_text(
        "".join(f"{name} {part}\n" for name, part in zip(names, split, strict=True))
    )
    from tensorflow_datasets.datasets.celeb_a import celeb_a_dataset_builder as celeb_a

    def table(file, headings, value):
        rows = "".join(f"{n} {' '.join(str(value(i, h)) for h in headings)}\n" for i, n in enumerate(names))
        (folder / file).write_text(f"{len(names)}\n{' '.join(headings)}\n{rows}")

    def attribute(i, heading):
        wanted = {"Male": i % 2 == 0, "Smiling": i % 3 == 0}
        return 1 if wanted.get(heading) else -1

    table("list_attr_celeba.txt", celeb_a.ATTR_HEADINGS, attribute)
    table("list_landmarks_align_celeba.txt", celeb_a.LANDMARK_HEADINGS, lambda i, h: i)
    (folder / "identity_CelebA.txt").write_text("".join(f"{name} {i}\n" for i, name in enumerate(names)))
    labels = [(i % 2 == 0) + 2 * (i % 3 == 0) for i in range(14)]
    return [decoded[name] for name in names], labels


@needs_tensorflow
@pytest.mark.parametrize(("crop", "box"), [("auto", (25, 57, 153, 185)), ("center_crop_140", (19, 39, 159, 179))])
def test_celeba_is_cropped_and_resized_as_pillow_does(places, crop, box):
    pictures, labels = make_celeba(places)
    config = default_config()
    config.data.update(name="celeba", crop=crop)
    data = load_dataset(config)
    expected = [np.asarray(p.crop(box).resize((64, 64), Image.Resampling.BILINEAR)) for p in pictures]
    assert as_pairs(data.train, data.train_labels) == as_pairs(expected[:8], labels[:8])
    assert as_pairs(data.held_out, data.held_out_labels) == as_pairs(expected[10:], labels[10:])
    assert data.num_classes == 4


@needs_tensorflow
def test_celebahq_comes_from_a_tar_got_by_hand(places):
    config = default_config()
    config.data.name = "celebahq"
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


@needs_tensorflow
def test_a_failed_download_is_reported_in_one_sentence(places, monkeypatch):
    broken = CHILD.replace("tfds_builder.main()", "tfds_builder.build = lambda *_: 1 / 0\ntfds_builder.main()")
    monkeypatch.setattr(tfds_builder, "tfds_command", lambda request: [sys.executable, "-c", broken, request])
    config = default_config()
    config.data.name = "cifar10"
    sentence = r"get cifar-10-binary\.tar\.gz by hand, put it into .*manual and run the same command again"
    with pytest.raises(UserError, match=sentence) as error:
        load_dataset(config)
    assert "\n" not in str(error.value)
    assert not [p for p in data_cache_dir().iterdir() if p.suffix != ".lock" and p.name != "tfds"]


@needs_tensorflow
@pytest.mark.slow
def test_killed_at_ten_random_moments_the_next_run_works(places):
    train_images, train_labels, _, _ = make_cifar10(places)
    config = default_config()
    config.data.name = "cifar10"
    program = (
        "import sys; from s2dm_jax.config import default_config; from s2dm_jax.data import cache, "
        "tfds_builder;tfds_builder.tfds_command = lambda request: [sys.executable, '-c', sys.argv[1], "
        "request];config = default_config(); config.data.name = 'cifar10'; cache.prepare_dataset(config)"
    )

    def start():
        return subprocess.Popen([sys.executable, "-c", program, CHILD], stderr=subprocess.DEVNULL)

    began = time.monotonic()
    assert start().wait() == 0
    duration = time.monotonic() - began
    folder = dataset_cache.prepare_dataset(config)
    seed = np.random.SeedSequence().entropy
    # Shown if the test fails.
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    killed = 0
    while killed < 10:
        for made in (folder, data_cache_dir() / "tfds"):
            shutil.rmtree(made)
        with start() as process:
            time.sleep(rng.uniform(0, duration))
            if process.poll() is not None:
                continue
            process.kill()
        killed += 1
        assert not folder.exists() or dataset_cache.is_ready(folder)
        assert start().wait() == 0
        data = load_dataset(config)
        assert as_pairs(data.train, data.train_labels) == as_pairs(train_images, train_labels)
        cache = data_cache_dir()
        assert sorted(path.name for path in cache.iterdir()) == sorted([folder.name, "cifar10.lock", "tfds"])
        assert not [*cache.rglob("incomplete.*")]
    print(f"killed {killed} times within {duration:.1f} s")
