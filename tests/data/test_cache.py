"""Your own images: what is read from where, what is skipped and reported; cache entries are complete or absent."""

import errno
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from s2dm_jax.common.errors import UserError
from s2dm_jax.config.defaults import default_config
from s2dm_jax.config.io import to_json
from s2dm_jax.data import archives, sources, tfds_builder
from s2dm_jax.data import cache as dataset_cache
from s2dm_jax.data.datasets import load_dataset
from s2dm_jax.data.splits import split_and_label
from s2dm_jax.workdir.folder import check_same_images, prepare_workdir

ROOT = Path(__file__).parents[2]


def png(seed, size=8):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = {f"{kind}/{i:02d}.png": png(i + 10 * (kind == "dog")) for kind in ("cat", "dog") for i in range(10)}


def make_folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def make_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def make_tar(path, files):
    with tarfile.open(path, f"w:{path.suffix[1:]}" if path.suffix != ".tar" else "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("S2DM_JAX_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def config_for(source, **fields):
    config = default_config()
    config.data.update(source=str(source), **{"resolution": 8, "channels": 3, **fields})
    return config


def left_in(cache):
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_folder_zip_and_tar_of_the_same_tree_give_the_same_arrays(cache, tmp_path):
    backwards = dict(reversed(PICTURES.items()))
    made = [
        make_folder(tmp_path / "folder", PICTURES),
        make_zip(tmp_path / "some.zip", backwards),
        make_tar(tmp_path / "some.tar", {f"./wrapped/{name}": data for name, data in backwards.items()}),
        make_tar(tmp_path / "some.tar.xz", PICTURES),
    ]
    loaded = [load_dataset(config_for(source)) for source in made]
    for data in loaded:
        assert (len(data.train), len(data.held_out), data.num_classes) == (18, 2, 2)
        for field in ("train", "train_labels", "held_out", "held_out_labels"):
            np.testing.assert_array_equal(getattr(data, field), getattr(loaded[0], field))
    images = np.concatenate([loaded[0].train, loaded[0].held_out])
    labels = np.concatenate([loaded[0].train_labels, loaded[0].held_out_labels])
    expected = [(np.asarray(Image.open(io.BytesIO(d))).tobytes(), int("dog" in n)) for n, d in PICTURES.items()]
    assert sorted((i.tobytes(), label) for i, label in zip(images, labels, strict=True)) == sorted(expected)


def splits_of(names):
    """Training images, held-out images and those of neither split, by their numbers; the classes."""
    splits = split_and_label(names)
    numbers = np.array([int(Path(name).stem) for name in names])
    train, held_out, neither = (
        sorted(numbers[mask].tolist())
        for mask in (splits.used & ~splits.held_out, splits.used & splits.held_out, ~splits.used)
    )
    return train, held_out, neither, splits.classes


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a/train/x/1.png", "a/train/y/2.png", "a/test/y/3.png"], ([1, 2], [3], [], ["x", "y"])),
        (["Train/1.png", "val/2.png", "train/3.png"], ([1, 3], [2], [], ["."])),
        (["training/x/1.png", "Testing/x/2.png", "dev/x/3.png"], ([1], [2, 3], [], ["x"])),
        (["train2017/1.png", "val2017/2.png", "held_out/3.png"], ([1], [2, 3], [], ["."])),
        # Something around the words, the same for both kinds; a split within itself.
        (["train_64x64/1.png", "valid_64x64/2.png", "train_station/3.png"], ([1], [2], [3], ["."])),
        (["seg_train/seg_train/x/1.png", "seg_test/seg_test/x/2.png", "seg_pred/3.png"], ([1], [2], [3], ["x"])),
        (["trainA/1.png", "trainB/2.png", "testA/3.png", "testB/4.png"], ([1, 2], [3, 4], [], ["a", "b"])),
        (["latest_train/x/1.png", "latest_val/x/2.png"], ([1], [2], [], ["x"])),
        # A stray picture, another folder, wrapped in a folder or not.
        (["train/x/1.png", "test/x/2.png", "3.png", "unlabeled/x/4.png"], ([1], [2], [3, 4], ["x"])),
        (["set/train/x/1.png", "set/test/x/2.png", "3.png"], ([1], [2], [3], ["x"])),
        # Splits inside the classes.
        (["x/train/1.png", "x/test/2.png", "y/train/3.png", "y/test/4.png"], ([1, 3], [2, 4], [], ["x", "y"])),
        # A class that only the held-out images have.
        (["train/x/1.png", "test/y/2.png"], ([1], [2], [], ["x", "y"])),
    ],
)
def test_folders_named_for_splits_are_the_splits(names, expected):
    assert splits_of(names) == expected


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["train/1.png", "other/2.png", "3.png"], [".", "other", "train"]),
        (["test/1.png", "test/2.png"], ["."]),
        (["bus/1.png", "train/2.png", "tram/3.png"], ["bus", "train", "tram"]),
        # One class with folders of such names does not make splits of them.
        (["a/train/1.png", "a/test/2.png", *(f"b/{i}.png" for i in range(3, 9))], ["a/test", "a/train", "b"]),
    ],
)
def test_without_both_kinds_of_folders_a_tenth_is_held_out(names, classes):
    train, held_out, neither, found = splits_of(names)
    assert (len(train), len(held_out), neither, found) == (len(names) - 1, 1, [], classes)
    said = "classes  none: the images are not in folders by class"
    assert split_and_label(names).description.endswith(said) == (classes == ["."])


def test_the_split_and_what_it_leaves_out_are_printed(cache, tmp_path, capsys):
    files = {f"train/{name}": data for name, data in PICTURES.items()}
    files |= {f"test/{name}": data for name, data in list(PICTURES.items())[:3]} | {"sample.png": png(50)}
    data = load_dataset(config_for(make_folder(tmp_path / "folder", files)))
    assert (len(data.train), len(data.held_out)) == (20, 3)
    # A later run, which finds them in the cache, prints it in its summary.
    assert data.split.splitlines()[1] == "classes  2: cat, dog"
    out = capsys.readouterr().out
    assert "split    train/ 20 for training, test/ 3 held out; left out, outside these folders: no folder 1" in out
    assert "classes  2: cat, dog" in out


def test_links_to_folders_are_followed_and_nothing_is_read_twice(cache, tmp_path, capsys):
    elsewhere = make_folder(tmp_path / "elsewhere", {f"{i}.png": png(i + 50) for i in range(10)})
    source = make_folder(tmp_path / "folder", PICTURES)
    # Before the real folders in the order of names, behind a link, back to the start, and nowhere.
    (source / "a").symlink_to(source / "cat")
    (source / "birds").symlink_to(elsewhere)
    (elsewhere / "again").symlink_to(source)
    (source / "broken").symlink_to(tmp_path / "nothing")
    data = load_dataset(config_for(source))
    assert (len(data.train) + len(data.held_out), data.num_classes) == (30, 3)
    out = capsys.readouterr().out
    assert "left out, 2 link(s) to folders that are read already, such as 'a', 'birds/again'" in out
    assert "classes  3: birds, cat, dog" in out


def test_a_linked_split_is_a_split(cache, tmp_path):
    make_folder(tmp_path / "elsewhere", {f"x/{i}.png": png(i) for i in range(9)})
    source = make_folder(tmp_path / "folder", {f"test/x/{i}.png": png(i + 20) for i in range(4)})
    (source / "train").symlink_to(tmp_path / "elsewhere")
    data = load_dataset(config_for(source))
    assert (len(data.train), len(data.held_out)) == (9, 4)


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_links_lead_inside_an_archive_as_inside_a_folder(cache, tmp_path, kind):
    source = make_folder(tmp_path / "folder", {f"test/{i}.png": png(i) for i in range(4)})
    make_folder(source, {f"pool/{i}.png": png(i + 20) for i in range(6)})
    # The link's name says what the images are for.
    (source / "train").symlink_to("pool")
    (source / "test" / "linked.png").symlink_to("../pool/0.png")
    os.link(source / "pool" / "1.png", source / "test" / "hard.png")
    files = [path for path in sorted(source.rglob("*")) if not path.is_dir() or path.is_symlink()]
    if kind == "tar":
        with tarfile.open(tmp_path / "some.tar", "w") as archive:
            for path in files:
                archive.add(path, path.relative_to(source))
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
            for path in files:
                member = zipfile.ZipInfo(str(path.relative_to(source)))
                member.external_attr = path.lstat().st_mode << 16
                archive.writestr(member, os.readlink(path) if path.is_symlink() else path.read_bytes())
    data = load_dataset(config_for(source if kind == "folder" else tmp_path / f"some.{kind}"))
    assert (len(data.train), len(data.held_out)) == (6, 6)
    for row, number in ((-1, 0), (-2, 1)):
        np.testing.assert_array_equal(data.held_out[row], data.train[number])


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_linked_split_that_is_missing_is_no_reason_to_train_on_the_other(cache, tmp_path, kind):
    source = make_folder(tmp_path / "folder", {f"test/{i}.png": png(i) for i in range(9)})
    (source / "train").symlink_to(tmp_path / "nothing")
    if kind == "tar":
        with tarfile.open(tmp_path / "some.tar", "w") as archive:
            archive.add(source, "")
        source = tmp_path / "some.tar"
    with pytest.raises(UserError, match="leaves no image for the split train"):
        load_dataset(config_for(source))


def test_a_folder_that_cannot_be_read_counts_as_invalid(cache, tmp_path, monkeypatch, capsys):
    source, scandir = make_folder(tmp_path / "folder", PICTURES), os.scandir

    def refuse(path):
        if isinstance(path, Path) and path.name == "dog":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"'dog/' \(Permission denied; images in this folder are left out\)"):
        load_dataset(config_for(source, max_invalid_fraction=0.0))
    data = load_dataset(config_for(source, max_invalid_fraction=0.2))
    assert (len(data.train) + len(data.held_out), data.labelled) == (10, False)
    assert "skipped 'dog/': Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_a_file_that_is_in_an_archive_twice_is_read_once_as_it_was_last(cache, tmp_path, make, capsys):
    path = make(tmp_path / f"some.{make.__name__[5:]}", PICTURES)
    if make is make_zip:
        with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("cat/00.png", png(99))
    else:
        with tarfile.open(path, "a") as archive:
            member = tarfile.TarInfo("./cat/00.png")
            member.size = len(png(99))
            archive.addfile(member, io.BytesIO(png(99)))
    data = load_dataset(config_for(path))
    images = {image.tobytes() for image in (*data.train, *data.held_out)}
    expected = {**PICTURES, "cat/00.png": png(99)}
    assert images == {np.asarray(Image.open(io.BytesIO(file))).tobytes() for file in expected.values()}
    assert "1 file(s) that a later one of the same name in the archive overrides" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz", "tar.xz"])
def test_concatenated_archives_are_refused(cache, tmp_path, suffix):
    make = make_zip if suffix == "zip" else make_tar
    parts = [make(tmp_path / f"{n}.{suffix}", {f"{n}/{name}": data for name, data in PICTURES.items()}) for n in "ab"]
    both = tmp_path / f"both.{suffix}"
    both.write_bytes(parts[0].read_bytes() + parts[1].read_bytes())
    with pytest.raises(UserError, match="concatenated archives: unpack them into one folder"):
        load_dataset(config_for(both))


def test_labels_of_any_integers_are_classes(cache, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    labels = np.array([3_000_000_000, -7] * 20)
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    data = load_dataset(config_for(tmp_path / "images.npz"))
    assert (data.num_classes, data.labelled) == (2, True)
    assert set(data.train_labels) == {0, 1}
    for unlabelled in (np.full(40, 5), np.arange(40)):
        np.savez(tmp_path / "images.npz", images=images, labels=unlabelled)
        assert not load_dataset(config_for(tmp_path / "images.npz")).labelled


def test_arrays_are_sources(cache, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    data = load_dataset(config_for(tmp_path / "images.npy"))
    both = [i.tobytes() for i in (*data.train, *data.held_out)]
    assert sorted(both) == sorted(i.tobytes() for i in images)
    np.savez_compressed(tmp_path / "images.npz", images=images[..., 0], labels=np.arange(20) % 3)
    data = load_dataset(config_for(tmp_path / "images.npz", channels=1))
    assert (data.train.shape, data.num_classes) == ((18, 8, 8, 1), 3)
    for image, label in zip(data.train, data.train_labels, strict=True):
        np.testing.assert_array_equal(images[..., :1][images[..., 0].tolist().index(image[..., 0].tolist())], image)
        assert images[..., 0].tolist().index(image[..., 0].tolist()) % 3 == label


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.zeros((4, 8, 8, 3), np.float32), r"holds float32 \[4, 8, 8, 3\]; it must be uint8"),
        (np.zeros((4, 3, 8, 8), np.uint8), r"images \[3, 8, 8\]; they must be \[H, W, C\]"),
        (np.zeros((8, 8), np.uint8), r"holds uint8 \[8, 8\]; it must be"),
        (np.zeros((64, 64, 3), np.uint8), r"\[64, 64, 3\], which is one image .* or 64 grey ones"),
        (np.array([{}]), "it must be uint8"),
    ],
)
def test_arrays_of_another_kind_are_refused(cache, tmp_path, array, sentence):
    np.save(tmp_path / "images.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=sentence):
        load_dataset(config_for(tmp_path / "images.npy"))
    assert left_in(cache) == []


def test_invalid_files_are_named_counted_and_skipped_up_to_the_limit(cache, tmp_path, capsys):
    bad = {
        "cat/cut.png": PICTURES["cat/00.png"][:50],
        "dog/text.jpg": b"hello",
        "dog/empty.webp": b"",
    }
    others = {"readme.txt": b"hello", "__MACOSX/cat/._00.png": b"x", "cat/.thumb.png": b"x"}
    source = make_zip(tmp_path / "some.zip", {**PICTURES, **bad, **others})
    with pytest.raises(UserError, match=r"2 of 23 images are .*config\.data\.max_invalid_fraction=0\.01 allows 1"):
        load_dataset(config_for(source))
    assert left_in(cache) == []
    capsys.readouterr()
    data = load_dataset(config_for(source, max_invalid_fraction=0.13))
    output = capsys.readouterr()
    for name in bad:
        assert f"skipped {name!r}: " in output.err
    assert "3 of 23 images skipped; at most 3 may be" in output.err
    assert "left out, because of their suffix or as hidden files: 2 × 'hidden', 1 × '.txt'" in output.out
    assert "3 skipped" in data.provenance
    provenance = json.loads((cache / left_in(cache)[0] / "provenance.json").read_text())
    assert sorted(name for name, _ in provenance["skipped"]) == sorted(bad)
    images = [i.tobytes() for i in (*data.train, *data.held_out)]
    assert sorted(images) == sorted(np.asarray(Image.open(io.BytesIO(d))).tobytes() for d in PICTURES.values())
    # No gap is left where an image was skipped: labels still belong to their images.
    cats = {np.asarray(Image.open(io.BytesIO(d))).tobytes() for n, d in PICTURES.items() if "cat" in n}
    assert all((i.tobytes() in cats) == (label == 0) for i, label in zip(data.train, data.train_labels, strict=True))


def test_the_reasons_for_skipping_are_sentences(cache, tmp_path, capsys):
    files = {**PICTURES, "cat/text.png": b"hello", "cat/cut.png": PICTURES["cat/00.png"][:60]}
    path = make_zip(tmp_path / "some.zip", files)
    content = bytearray(path.read_bytes())
    # The data of one member, and the mark of encryption of another.
    at = content.index(PICTURES["dog/03.png"][40:60])
    content[at] ^= 1
    entry = content.rindex(b"dog/04.png") - 46
    content[entry + 8] |= 1
    content[content.index(b"dog/04.png") - 30 + 6] |= 1
    path.write_bytes(content)
    load_dataset(config_for(path, max_invalid_fraction=0.5))
    err = capsys.readouterr().err
    for reason in ("not a PNG, JPEG or WebP file", "it is damaged in the archive", "it is encrypted"):
        assert reason in err
    assert not re.search(r"0x[0-9a-f]{4}|<\w", err)


def test_a_split_of_which_nothing_can_be_read_is_not_too_small(cache, tmp_path):
    files = {f"train/{name}": data for name, data in PICTURES.items()} | {"test/a.png": b"no", "test/b.png": b"no"}
    source = make_folder(tmp_path / "folder", files)
    with pytest.raises(UserError, match="no image for the split held_out; all of its images are corrupt"):
        load_dataset(config_for(source, max_invalid_fraction=0.5))


def test_no_path_in_an_archive_leads_anywhere(cache, tmp_path):
    paths = ["../up.png", "/abs.png", "a/../../up2.png", "..\\win.png"]
    files = {**PICTURES, **{name: png(50 + i) for i, name in enumerate(paths)}}
    before = set(tmp_path.rglob("*"))
    with_link = make_tar(tmp_path / "some.tar", files)
    with tarfile.open(with_link, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"link{kind.decode()}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    data = load_dataset(config_for(with_link, max_invalid_fraction=0.2))
    # To a tar, a backslash is a letter, and the fourth a hidden file.
    assert len(data.train) + len(data.held_out) == 23
    assert "4 skipped" in data.provenance
    assert len(load_dataset(config_for(make_zip(tmp_path / "some.zip", files))).train) == 22
    made = {path for path in tmp_path.rglob("*") if cache not in path.parents} - before
    assert made == {cache, tmp_path / "some.tar", tmp_path / "some.zip"}


def test_members_that_open_into_too_much_are_not_opened(cache, tmp_path, monkeypatch):
    for module in (sources, archives):
        monkeypatch.setattr(module, "MAX_BYTES", 10_000)
    huge = {"cat/huge.png": bytes(20_000)}
    for source in (
        make_zip(tmp_path / "some.zip", {**PICTURES, **huge}),
        make_tar(tmp_path / "some.tar.gz", {**PICTURES, **huge}),
        make_folder(tmp_path / "folder", {**PICTURES, **huge}),
    ):
        assert "1 skipped" in load_dataset(config_for(source)).provenance
    provenance = json.loads((cache / left_in(cache)[0] / "provenance.json").read_text())
    assert provenance["skipped"] == [["cat/huge.png", "a file of 20,000 bytes, more than 10,000"]]


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damaged_archives_are_never_taken_for_whole(cache, tmp_path, kind, damage):
    path = tmp_path / f"some.{kind}"
    (make_zip if kind == "zip" else make_tar)(path, PICTURES)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2 // 512 * 512]
    else:
        # In the tar, the header of the fourth member: tarfile by itself ends there without a word.
        where = 3 * 1024 + 150 if kind == "tar" else len(data) // 2
        data[where : where + 4] = bytes(255 - byte for byte in data[where : where + 4])
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged") as error:
        load_dataset(config_for(path, max_invalid_fraction=0.0))
    assert "\n" not in str(error.value)
    assert left_in(cache) == []


def test_sources_that_are_none(cache, tmp_path):
    with pytest.raises(UserError, match=r"no such file or folder"):
        load_dataset(config_for(tmp_path / "nothing"))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"its suffix is not one of \.zip"):
        load_dataset(config_for(tmp_path / "notes.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds 0 images; it must hold at least 2"):
        load_dataset(config_for(tmp_path / "empty"))
    (tmp_path / "some.zip").write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"some\.zip is damaged or cut short"):
        load_dataset(config_for(tmp_path / "some.zip"))


def test_the_cache_is_used_until_source_or_treatment_change(cache, tmp_path, monkeypatch):
    source = make_folder(tmp_path / "folder", PICTURES)
    first = dataset_cache.prepare_dataset(config_for(source))
    monkeypatch.setattr(dataset_cache, "_finish", None)
    assert dataset_cache.prepare_dataset(config_for(source)) == first
    monkeypatch.undo()
    monkeypatch.setenv("S2DM_JAX_DATA", str(cache))
    grey = dataset_cache.prepare_dataset(config_for(source, channels=1))
    (source / "dog" / "10.png").write_bytes(png(99))
    more = dataset_cache.prepare_dataset(config_for(source))
    assert len({first, grey, more}) == 3
    assert np.load(more / "train.npy").shape[0] == 19
    assert np.load(first / "train.npy").shape[0] == 18


def test_a_run_resumes_with_the_same_images_from_any_path_and_with_no_others(cache, tmp_path):
    run = tmp_path / "run"

    def check(config):
        data = load_dataset(config)
        check_same_images(run, data.digest, data.labels_digest)

    config = config_for(make_folder(tmp_path / "folder", PICTURES))
    prepare_workdir(run, config)
    (run / "config.json").write_text(to_json(config))
    check(config)
    moved = config_for(make_zip(tmp_path / "some.zip", PICTURES))
    prepare_workdir(run, moved)
    check(moved)
    other = config_for(make_zip(tmp_path / "other.zip", {**PICTURES, "cat/00.png": png(77)}))
    with pytest.raises(UserError, match=r"its images have changed"):
        check(other)
    renamed = {name.replace("dog/05", "cat/55"): data for name, data in PICTURES.items()}
    with pytest.raises(UserError, match=r"its (images|labels) have changed"):
        check(config_for(make_zip(tmp_path / "renamed.zip", renamed)))
    # What an older version recorded: the images alone.
    digest = (run / "dataset.sha256").read_text().split()[0]
    (run / "dataset.sha256").write_text(f"{digest}\n")
    check(config)
    assert len((run / "dataset.sha256").read_text().split()) == 2
    images = np.zeros((20, 8, 8, 3), np.uint8) + np.arange(20, dtype=np.uint8)[:, None, None, None]
    for labels in (np.arange(20) % 2, np.arange(20) % 3):
        np.savez(tmp_path / "images.npz", images=images, labels=labels)
        data = load_dataset(config_for(tmp_path / "images.npz"))
        if labels.max() == 1:
            check_same_images(tmp_path, data.digest, data.labels_digest)
    with pytest.raises(UserError, match=r"its labels have changed"):
        check_same_images(tmp_path, data.digest, data.labels_digest)


@pytest.mark.parametrize("name", ["train.npy", "held_out_labels.npy"])
def test_a_flipped_byte_in_the_cache_is_noticed(cache, tmp_path, name):
    config = config_for(make_folder(tmp_path / "folder", PICTURES))
    path = dataset_cache.prepare_dataset(config) / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} has changed since it was prepared .*; remove the folder"):
        load_dataset(config)


def test_an_entry_that_may_not_be_read_is_not_made_anew(tmp_path, monkeypatch):
    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UserError, match=r"entry/provenance\.json cannot be read \(Permission denied\)"):
        dataset_cache.is_ready(tmp_path / "entry")


def test_what_a_killed_process_left_is_made_anew(cache, tmp_path):
    source = make_folder(tmp_path / "folder", PICTURES)
    folder = dataset_cache.prepare_dataset(config_for(source))
    whole = (folder / "train.npy").read_bytes()
    (folder / "train.npy").write_bytes(whole[:-1])
    leftover = folder.with_name(f".{folder.name}.tmp")
    leftover.mkdir()
    (leftover / "train.npy").write_bytes(b"half")
    assert dataset_cache.prepare_dataset(config_for(source)) == folder
    assert (folder / "train.npy").read_bytes() == whole
    assert left_in(cache) == [folder.name]


@pytest.mark.parametrize("text", ["", "[]", "null", '{"files": {}}', '{"files": []}'])
def test_an_entry_whose_provenance_is_damaged_is_made_anew(cache, tmp_path, text):
    config = config_for(make_folder(tmp_path / "folder", PICTURES))
    expected = load_dataset(config)
    folder = dataset_cache.prepare_dataset(config)
    (folder / "provenance.json").write_text(text)
    assert load_dataset(config).provenance == expected.provenance


def test_two_at_once_prepare_once_and_the_second_says_that_it_waits(cache, tmp_path, monkeypatch, capfd):
    source = make_folder(tmp_path / "folder", PICTURES)
    finish, go_on, calls, folders = dataset_cache._finish, threading.Event(), [], []

    def slow(*arguments):
        calls.append(1)
        go_on.wait(30)
        finish(*arguments)

    monkeypatch.setattr(dataset_cache, "_finish", slow)
    threads = [
        threading.Thread(target=lambda: folders.append(dataset_cache.prepare_dataset(config_for(source)))) for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    output = ""
    while "another process is preparing" not in output:
        time.sleep(0.02)
        output += capfd.readouterr().out
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert folders[0] == folders[1]


@pytest.mark.slow
def test_killed_at_ten_random_moments_the_next_run_works(cache, tmp_path):
    files = {f"{i % 3}/{i:05d}.png": png(i, 24) for i in range(4000)}
    source = make_folder(tmp_path / "folder", files)
    program = (
        "import sys; from data.test_cache import config_for\n"
        "from s2dm_jax.data.cache import prepare_dataset\n"
        "print('began', flush=True); print(prepare_dataset(config_for(sys.argv[1])), flush=True)"
    )

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(source)],
            cwd=ROOT / "tests",
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout.readline() == "began\n"
        return process

    began = time.monotonic()
    with start() as process:
        folder = Path(process.stdout.read().splitlines()[-1])
    duration = time.monotonic() - began
    whole = {path.name: path.read_bytes() for path in folder.glob("*.npy")}
    seed = np.random.SeedSequence().entropy
    # Shown if the test fails.
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    killed = 0
    while killed < 10:
        for path in folder.glob("*"):
            path.unlink()
        folder.rmdir()
        with start() as process:
            time.sleep(rng.uniform(0, duration))
            if process.poll() is not None:
                continue
            process.kill()
        killed += 1
        if folder.exists():
            assert {path.name: path.read_bytes() for path in folder.glob("*.npy")} == whole
        with start() as process:
            process.stdout.read()
        assert {path.name: path.read_bytes() for path in folder.glob("*.npy")} == whole
        assert dataset_cache.is_ready(folder)
        assert left_in(cache) == [folder.name]
    print(f"killed {killed} times within {duration:.1f} s", os.getpid())


def test_a_dataset_that_cannot_be_prepared_leaves_nothing(cache, monkeypatch):
    def fail(name, transform, temporary, folder):
        (temporary / "train.npy").touch()
        raise ValueError("no\nsuch thing")

    config = default_config()
    config.data.name = "cifar10"
    monkeypatch.setattr(tfds_builder, "run", fail)
    with pytest.raises(UserError, match=r"^preparing cifar10 failed with ValueError: no such thing; download .* again"):
        load_dataset(config)
    assert not left_in(cache)


def test_celebahq_says_what_is_to_be_made_by_hand(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    config = default_config()
    config.data.name = "celebahq"
    place = tmp_path / "tfds" / "downloads" / "manual" / "data256x256.tar"
    with pytest.raises(UserError, match=f"CelebA-HQ 256 cannot be downloaded: .* put it at {place}, or give"):
        dataset_cache.check_preparable(config)
    place.parent.mkdir(parents=True)
    place.touch()
    dataset_cache.check_preparable(config)


def test_a_cache_that_cannot_be_used_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("S2DM_JAX_DATA", str(tmp_path / "file" / "cache"))
    source = make_folder(tmp_path / "images", PICTURES)
    with pytest.raises(UserError, match=r"the cache of prepared data .* cannot be used \(Not a directory\)"):
        load_dataset(config_for(source))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.npy", b"", "it is empty"),
        ("a.npy", b"\x93NUMPY\x01\x00v\x00{'descr'", "an array in it is cut short or not in numpy's format"),
        ("a.npz", b"PK\3\4", "it is cut short"),
        ("a.zip", b"<!DOCTYPE html>", "it is a web page"),
        ("a.zip", b"x" * 600, "it is not a zip file"),
        ("a.tar", b"x" * 600, "it is not a tar file, or its compression is not supported"),
        ("a.tar.gz", b"version https://git-lfs.github.com/spec/v1", "it is a Git LFS pointer"),
    ],
)
def test_what_a_source_is_instead_is_one_sentence(cache, tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_dataset(config_for(tmp_path / name))
    assert f"({reason}" in str(error.value)
    assert "\n" not in str(error.value)
