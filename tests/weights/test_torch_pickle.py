"""PyTorch's files, read and written without PyTorch: golden files of torch 2.13, hostile and damaged ones."""

import collections
import datetime
import io
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from s2dm_jax.common.errors import UserError
from s2dm_jax.weights.torch_pickle import open_torch, read_note, write_torch

GOLDEN = Path(__file__).parents[1] / "golden"
LEGACY_HEAD = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))


@pytest.mark.parametrize(("name", "has_checksums"), [("torch_zip.pth", True), ("torch_before_1_6.pth", False)])
def test_what_torch_wrote_is_read(name, has_checksums):
    # `write_golden` of test_with_torch.py wrote it: a transposed tensor, a part of a larger one, other types.
    w = np.arange(6, dtype=np.float32).reshape(2, 3) / 2
    with open_torch(GOLDEN / name) as (contents, read, checked):
        params, beside, epoch, step, ema = contents
        read_params = {key: read(tensor) for key, tensor in params.items()}
        np.testing.assert_array_equal(read(ema["w"]), w + 1)
        np.testing.assert_array_equal(read(beside["parameter"]), w)
    assert checked == has_checksums
    assert (epoch, step, beside["lr"], beside["shape"]) == (3, 790000, 2e-4, (2, 3))
    np.testing.assert_array_equal(read_params["module.w"], w.T)
    np.testing.assert_array_equal(read_params["module.part"], [4, 5, 6, 7])
    np.testing.assert_array_equal(read_params["module.half"], np.array([1.5, -2], np.float16))
    np.testing.assert_array_equal(read_params["module.brain"].astype(np.float32), [0.5, 3])
    assert read_params["module.scalar"] == 7
    assert read_params["module.scalar"].shape == ()


def test_what_is_written_is_read_back_to_the_bit(tmp_path):
    path = tmp_path / "a.pth"
    weight = np.random.default_rng(0).standard_normal((4, 3, 2)).astype(np.float32)
    rest = [{"lr": 1e-3, "betas": (0.9, 0.999), "none": None, "params": [0, 2**31, -1]}, True, "ε", 2**70]
    write_torch(path, [{"weight": weight.transpose(2, 0, 1)}, *rest], "a note")
    with open_torch(path) as (contents, read, checked):
        assert read(contents[0]["weight"]).tobytes() == weight.transpose(2, 0, 1).tobytes()
        assert contents[1:] == rest
        assert checked
    assert read_note(path) == "a note"
    assert read_note(GOLDEN / "torch_zip.pth") is None
    with pytest.raises(TypeError, match="holds no set"):
        write_torch(path, {1, 2}, "")
    with pytest.raises(TypeError, match="must be float32, not float64"):
        write_torch(path, np.zeros(3), "")


def test_torchs_safe_unpickler_knows_every_opcode_that_is_written(tmp_path):
    # Those of torch/_weights_only_unpickler.py that plain data and tensors need.
    opcodes = {"PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BINPERSID", "BINPUT", "NONE", "NEWTRUE", "NEWFALSE"}
    opcodes |= {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "TUPLE", "EMPTY_TUPLE"}
    opcodes |= {"EMPTY_LIST", "APPENDS", "EMPTY_DICT", "SETITEMS"}
    numbers = [0, 255, 256, -1, 2**31, 2**70, 0.5, float("nan")]
    write_torch(tmp_path / "a.pth", [{"w": np.ones((2, 3), np.float32)}, numbers, (None, True, False, "ε")], "")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        assert {opcode.name for opcode, *_ in pickletools.genops(archive.read("a/data.pkl"))} <= opcodes
    with pytest.raises(TypeError, match="holds no float64"):
        write_torch(tmp_path / "b.pth", np.float64(0.5), "")


def _zipped(data, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", data)


def _bare(data, path):
    path.write_bytes(data)


def _legacy(data, path):
    path.write_bytes(LEGACY_HEAD + data)


class _Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("container", [_zipped, _bare, _legacy])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_file_that_would_run_code_is_refused(tmp_path, container, protocol):
    import os

    made = tmp_path / "made by the file"
    evil = _Evil(os.system, f"touch '{made}'")
    # It works where nothing is checked: the test could fail.
    pickle.loads(pickle.dumps(evil, protocol))
    assert made.exists()
    made.unlink()
    for function in (os.system, eval, open, __import__, getattr, os.mkdir):
        arguments = {eval: (f"open({str(made)!r}, 'w')",), open: (str(made), "w"), os.mkdir: (str(made),)}
        evil = _Evil(function, *arguments.get(function, (f"touch '{made}'",)))
        container(pickle.dumps({"conv_in.weight": evil}, protocol), tmp_path / "evil.pth")
        sentence = r"holds the Python object .* which could run code"
        with pytest.raises(UserError, match=sentence) as error, open_torch(tmp_path / "evil.pth"):
            pass
        assert "\n" not in str(error.value)
        assert not made.exists()


def _tensor_of(offset, shape, strides, count):
    """The pickle of a tensor with these numbers over a storage of `count`, as torch writes it."""
    storage = pickle.dumps(("storage", "TYPE", "0", "cpu", count), 0)[:-1]
    typed = storage.replace(pickle.dumps("TYPE", 0)[:-1].split(b"\n")[0] + b"\n", b"ctorch\nFloatStorage\n")
    arguments = b"".join(pickle.dumps(value, 0)[:-1] for value in (offset, shape, strides, False, None))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + typed + b"Q" + arguments + b"tR."


@pytest.mark.parametrize(
    ("numbers", "fits"),
    [
        ((0, (2, 3), (3, 1), 6), True),
        ((1, (2, 3), (3, 1), 6), False),
        ((0, (2, 3), (4, 1), 6), False),
        ((-1, (2, 3), (3, 1), 6), False),
        ((5, (2, 3), (-3, 1), 6), False),
        ((0, (100, 3), (0, 1), 6), False),
        ((0, (2, 3), (3,), 6), False),
        ((0, (2, 3), (3, 1), 7), False),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, numbers, fits):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", _tensor_of(*numbers))
        archive.writestr("a/data/0", np.arange(6, dtype=np.float32).tobytes())

    def value():
        with open_torch(path) as (tensor, read, _):
            return read(tensor)

    if fits:
        np.testing.assert_array_equal(value(), [[0, 1, 2], [3, 4, 5]])
    else:
        with pytest.raises(UserError, match="does not fit into its storage"):
            value()


def test_an_index_that_would_take_all_memory_is_refused(tmp_path):
    # A flipped bit in an index of the memo: unpickling would make room for 2³¹ entries.
    data = pickle.PROTO + b"\2" + pickle.EMPTY_DICT + pickle.LONG_BINPUT + struct.pack("<I", 2**31) + b"."
    _zipped(data, tmp_path / "a.pth")
    with (
        pytest.raises(UserError, match="a memo index beyond the file"),
        open_torch(tmp_path / "a.pth"),
    ):
        pass


def test_parts_that_claim_more_than_the_file_has_are_refused(tmp_path):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
        archive.writestr("a/data/0", bytes(10**7))
    with pytest.raises(UserError, match="claim to be larger than the file"), open_torch(path):
        pass


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"<html>", b"\x80", pickle.dumps([1], 2), LEGACY_HEAD])
def test_what_is_no_checkpoint_is_told_in_one_sentence(tmp_path, content):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as a PyTorch checkpoint") as error, open_torch(path):
        pass
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
        (b"\n<!DOCTYPE html>", "it is a web page"),
        (b"PK\3\4", "it is cut short"),
        (b"\x89HDF", "it does not begin like a torch.save file"),
    ],
)
def test_what_a_file_is_instead_is_said(tmp_path, content, reason):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with (
        pytest.raises(UserError, match=rf"a\.pth cannot be read as a PyTorch checkpoint: .* \({reason}"),
        open_torch(path),
    ):
        pass


def test_plain_objects_beside_the_tensors_are_left_out(tmp_path):
    held = [Path("x"), datetime.timedelta(1), {1}, collections.defaultdict(list, a=1), np.zeros(3), np.float64(2)]
    for protocol in (0, 2, 4):
        _zipped(pickle.dumps({"a": 1, "held": held}, protocol), tmp_path / "a.pth")
        with open_torch(tmp_path / "a.pth") as (contents, *_):
            assert contents["a"] == 1


def test_tensors_of_other_kinds_are_named(tmp_path):
    _zipped(b"ctorch._utils\n_rebuild_sparse_tensor\n.", tmp_path / "a.pth")
    sentence = r"holds tensors of a kind that is not supported \(torch._utils._rebuild_sparse_tensor\)"
    with pytest.raises(UserError, match=sentence), open_torch(tmp_path / "a.pth"):
        pass


def test_a_legacy_file_cut_short_is_refused(tmp_path):
    whole = (GOLDEN / "torch_before_1_6.pth").read_bytes()
    for cut in np.random.default_rng(0).choice(len(whole), 50, replace=False):
        path = tmp_path / "cut.pth"
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="cannot be read as a PyTorch checkpoint"), open_torch(path):
            pass
    path.write_bytes(whole + b"\0")
    with pytest.raises(UserError, match="bytes where its tensors need"), open_torch(path):
        pass


def test_a_big_endian_file_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
        archive.writestr("a/byteorder", b"big")
    with pytest.raises(UserError, match="byte order is not little-endian"), open_torch(path):
        pass
    stream = io.BytesIO(LEGACY_HEAD.replace(b"\x88", b"\x89"))
    path.write_bytes(stream.getvalue())
    with pytest.raises(UserError, match="byte order is not little-endian"), open_torch(path):
        pass
