"""The FID Inception: published numbers, TensorFlow's resize, and where its weights come from."""

import functools
import hashlib
import http.server
import re
import threading
import zlib

import jax
import numpy as np
import pytest
from published import group

from s2dm_jax.common.errors import UserError
from s2dm_jax.config.fields import INCEPTION_RESIZES
from s2dm_jax.evaluation import inception, inception_weights
from s2dm_jax.weights.torch_pickle import write_torch


def made_up(name, shape):
    """The weights that the golden values were made with (tests/golden/README.md)."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith(("running_var", "bn.weight")):
        return np.float32(rng.uniform(0.5, 1.5, shape))
    if name.endswith(("running_mean", "bias")):
        return np.float32(0.1 * rng.standard_normal(shape))
    return np.float32(np.sqrt(2 / np.prod(shape[1:])) * rng.standard_normal(shape))


@pytest.fixture(scope="module")
def state_dict(golden):
    keys = golden("inception_keys.json")
    return {name: made_up(name, shape) for name, shape in keys.items() if not name.endswith("num_batches_tracked")}


@pytest.fixture(scope="module")
def params(state_dict):
    return inception.fold_norms(state_dict)


def test_every_depth_equals_the_published_code(golden, params):
    files = {"tf1": ("inception.npz", "abc"), "pytorch_fid": ("inception_pytorch_fid.npz", "abd")}
    assert files.keys() == inception.PIPELINES.keys() == set(INCEPTION_RESIZES)
    inputs, published = [], []
    for pipeline, (file, cases) in files.items():
        expected = golden(file)
        for case in cases:
            # The fixture takes images for NCHW; these are NHWC already.
            image = np.moveaxis(expected[f"{case}/image"], -1, -3).astype(np.float32)
            inputs.append(np.asarray(inception.PIPELINES[pipeline].prepare(image)))
            published.append(group(expected, f"{case}/"))
    # All sizes in one batch after the resize: one compilation.
    outputs = jax.jit(inception.stages)(params, np.concatenate(inputs))
    outputs = {name: np.asarray(value) for name, value in outputs.items()}
    outputs["logits_unbiased"] = outputs["2048"] @ params["fc.kernel"]
    ends = np.cumsum([len(each) for each in inputs])
    for name, values in outputs.items():
        for actual, each in zip(np.split(values, ends[:-1]), published, strict=True):
            if name in each:
                scale = 1e-3 * np.abs(each[name]).max()
                np.testing.assert_allclose(actual, each[name], rtol=1e-3, atol=scale, err_msg=name)


def test_resize_reads_pixel_i_at_i_times_the_ratio():
    x = np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1) * np.ones((1, 4, 2, 1), np.float32)
    # Rows 0, 0.5, 1, … 3, and beyond the last row that row again: TensorFlow 1 without aligned corners.
    rows = np.asarray(inception.resize(x, 8))[0, :, 0, 0]
    np.testing.assert_array_equal(rows, [0, 0.5, 1, 1.5, 2, 2.5, 3, 3])
    np.testing.assert_array_equal(np.asarray(inception.resize(x, 2))[0, :, 0, 0], [0, 2])
    # With half-pixel centres: symmetric, and where it shrinks the two nearest rows alone.
    rows = np.asarray(inception.resize_half_pixel(x, 8))[0, :, 0, 0]
    np.testing.assert_array_equal(rows, [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    np.testing.assert_array_equal(np.asarray(inception.resize_half_pixel(x**2, 1))[0, :, 0, 0], [2.5])
    image = np.random.default_rng(0).random((1, 299, 299, 1), np.float32)
    np.testing.assert_array_equal(inception.resize(image), image)
    np.testing.assert_array_equal(inception.resize_half_pixel(image), image)


def test_grey_images_are_repeated_and_others_refused(params, monkeypatch):
    seen = []

    def pooled(_, x):
        seen.append(np.asarray(x))
        return {"2048": np.ones((len(x), 2048), np.float32)}

    monkeypatch.setattr(inception, "stages", pooled)
    grey = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 1), np.uint8)
    _, logits = inception.features_and_logits(params, grey)
    inception.features_and_logits(params, grey.repeat(3, axis=3))
    assert seen[0].shape == (2, 299, 299, 3)
    np.testing.assert_array_equal(*seen)
    np.testing.assert_allclose(logits[0], params["fc.kernel"].sum(0), rtol=1e-4, atol=1e-4)
    for bad in (np.zeros((1, 8, 8, 2), np.uint8), np.zeros((1, 8, 8, 3), np.float32)):
        with pytest.raises(ValueError, match=r"images must be uint8 \[B,H,W,C\] with 1 or 3 channels"):
            inception.features_and_logits(params, bad)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("S2DM_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def server(tmp_path):
    """A web server on this machine that serves the test's folder; gives its URL."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_weights_are_fetched_checked_converted_once_and_kept(state_dict, params, tmp_path, cache, server):
    path = tmp_path / "weights.pth"
    write_torch(path, state_dict, "")
    digest = sha256(path)
    fetched = inception_weights.inception_params(f"{server}/weights.pth", digest)
    assert fetched.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(fetched[name], value, err_msg=name)
    files = list((cache / "inception").iterdir())
    assert [file.name for file in files] == [f"{digest}.npz"]
    # Neither the file nor the server is needed any more.
    path.unlink()
    again = inception_weights.inception_params("", digest)
    np.testing.assert_array_equal(again["fc.kernel"], params["fc.kernel"])
    # A damaged cache is not used.
    files[0].write_bytes(files[0].read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"cannot be fetched \(.*No such file"):
        inception_weights.inception_params(path.as_uri(), digest)


def test_other_files_are_refused_in_one_sentence(tmp_path, cache):
    path = tmp_path / "weights.pth"
    write_torch(path, {"conv.weight": np.zeros((2, 2), np.float32)}, "")
    with pytest.raises(UserError, match=rf"has the SHA-256 {sha256(path)}, not 6726825d.*: it is cut short or"):
        inception_weights.inception_params(str(path))
    with pytest.raises(UserError, match=r"does not hold the FID Inception's weights: fc\.weight is missing"):
        inception_weights.inception_params(str(path), sha256(path))
    with pytest.raises(UserError, match=r"missing\.pth cannot be read \(No such file.*get it from "):
        inception_weights.inception_params(str(tmp_path / "missing.pth"))
    assert not list(cache.rglob("*.*"))


def test_code_in_a_file_is_not_run(tmp_path, cache):
    path, victim = tmp_path / "evil.pth", tmp_path / "victim"
    write_torch(path, {"a": np.zeros(1, np.float32)}, "")
    path.write_bytes(f"cposix\nsystem\n(S'touch {victim}'\ntR.".encode())
    with pytest.raises(UserError, match=r"posix\.system"):
        inception_weights.inception_params(str(path), sha256(path))
    assert not victim.exists()


def test_without_weights_and_network_one_sentence_says_what_to_do(cache, server, monkeypatch):
    monkeypatch.setattr(inception_weights, "URL", f"{server}/gone/pt_inception.pth")
    with pytest.raises(UserError) as caught:
        inception_weights.inception_params()
    place = re.escape(str(cache / "inception" / "pt_inception.pth"))
    assert re.search(rf"cannot be fetched \(.*not found.*\).* put it at {place} or give it as", str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_file_put_where_the_sentence_says_is_found(cache):
    place = cache / "inception" / "pt_inception-2015-12-05-6726825d.pth"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"not the weights")
    with pytest.raises(UserError, match=rf"{re.escape(str(place))} has the SHA-256"):
        inception_weights.inception_params()
