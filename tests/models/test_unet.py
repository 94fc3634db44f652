"""The UNet against the published PyTorch one: outputs, gradients, sizes, initialisation, dropout."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from helpers import TINY
from published import group, network_answers, network_of

from s2dm_jax.models.flops import equations
from s2dm_jax.models.network import num_params
from s2dm_jax.models.unet import UNet
from s2dm_jax.weights import torch_names


@pytest.mark.parametrize("name", ["unet_a.npz", "unet_b.npz"])
def test_published_network(golden, name):
    arrays = golden(name)
    answers = network_answers(arrays)
    np.testing.assert_allclose(answers["out"], arrays["out"], rtol=1e-4, atol=1e-4 * np.abs(arrays["out"]).max())
    np.testing.assert_allclose(answers["loss"], arrays["loss"], rtol=1e-4)
    np.testing.assert_allclose(answers["grad_norm"], arrays["grad_norm"], rtol=1e-4)
    for tensor, expected in group(arrays, "grad/").items():
        np.testing.assert_allclose(answers["grads"][tensor], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_torch_names_round_trip_to_the_bit(golden):
    arrays = golden("unet_b.npz")
    published = group(arrays, "param/")
    back = torch_names.to_torch(torch_names.from_torch(published, network_of(arrays)))
    assert back.keys() == published.keys()
    for name in published:
        np.testing.assert_array_equal(back[name], published[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("mid.attn_1.q.bias"), "lacks the tensor mid.attn_1.q.bias"),
        (
            lambda s: s.update({"extra.weight": np.zeros(1)}),
            "no place for the checkpoint's tensor extra.weight",
        ),
        (
            lambda s: s.update({"conv_in.weight": np.zeros((32, 3, 3, 3))}),
            r"\(32, 3, 3, 3\).*\(32, 1, 3, 3\)",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(golden, change, message):
    arrays = golden("unet_b.npz")
    state = group(arrays, "param/")
    change(state)
    with pytest.raises(ValueError, match=message):
        torch_names.from_torch(state, network_of(arrays))


def test_published_parameter_counts(golden):
    sizes = {
        "cifar10": (32, (1, 2, 2, 2)),
        "celeba": (64, (1, 2, 2, 2, 4)),
        "celebahq": (256, (1, 1, 2, 2, 4, 4)),
        "church": (256, (1, 1, 2, 2, 4, 4)),
    }
    for name, count in golden("param_counts.json").items():
        resolution, ch_mult = sizes[name]
        assert num_params(UNet(resolution, 3, 3, 128, ch_mult, 2, (16,))) == count


def test_initialisation_is_pytorchs():
    network = UNet(8, 3, 3, 64, (1, 2), 1, (4,))
    params = traverse_util.flatten_dict(network.init(seed=0), sep=".")
    other = traverse_util.flatten_dict(network.init(seed=1), sep=".")
    for name, value in params.items():
        module, leaf = name.rsplit(".", 1)
        if "norm" in module:
            np.testing.assert_array_equal(value, 1.0 if leaf == "scale" else 0.0)
            continue
        fan_in = np.prod(params[f"{module}.kernel"].shape[:-1])
        assert np.abs(value).max() <= fan_in**-0.5
        if value.size > 1000:
            # A uniform variable on [−b, b] has standard deviation b/√3.
            assert abs(value.std() * (3 * fan_in) ** 0.5 - 1) < 0.05, name
        assert not np.array_equal(value, other[name]), name


def test_dropout_follows_its_key_and_differs_between_images():
    network = UNet(8, 1, 1, 32, (1,), 1, (), dropout=0.5)
    params = network.init(seed=0)
    x = np.ones((2, 8, 8, 1), np.float32)
    t = np.zeros(2, np.int32)
    run = jax.jit(lambda key: network.apply(params, x, t, key))
    a, again, b = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(a, again)
    assert not np.allclose(a, b)
    # Two equal images in one batch: what differs between them is their mask.
    assert not np.allclose(a[0], a[1])
    off = network.apply(params, x, t)
    np.testing.assert_allclose(off[0], off[1], atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.03), ("float16", 0.003)])
def test_half_precision_stays_near_float32(dtype, tolerance):
    network = dataclasses.replace(TINY, attn_resolutions=(8,))
    params = network.init(seed=0)
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 1), np.float32)
    t = np.array([10, 900])
    full, half = (jax.jit(dataclasses.replace(network, dtype=each).apply)(params, x, t) for each in ("float32", dtype))
    assert half.dtype == jnp.float32
    error = np.abs(half - full).max() / np.abs(full).max()
    assert 0 < error < tolerance


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_sum_over_pixels_in_float32(dtype):
    network = dataclasses.replace(TINY, ch_mult=(1, 2), attn_resolutions=(4,), dropout=0.1, dtype=dtype)
    x, t = np.ones((2, 8, 8, 1), np.float32), np.array([10, 900])

    def loss(params):
        return jnp.square(network.apply(params, x, t, jax.random.key(0))).sum()

    program = jax.make_jaxpr(jax.grad(loss))(network.init(0))
    types = []
    for equation in equations(program.jaxpr):
        if equation.primitive.name == "reduce_sum":
            summed = equation.invars[0].aval
            # Two or four that one pixel became may be added up as they are.
            if math.prod(summed.shape[axis] for axis in equation.params["axes"]) > 4:
                types.append(summed.dtype)
    assert len(types) > 50
    assert set(types) == {jnp.dtype("float32")}


def test_images_of_another_size_are_refused():
    params = TINY.init(seed=0)
    with pytest.raises(ValueError, match=r"\(8, 8, 1\), not \(16, 16, 1\)"):
        TINY.apply(params, np.zeros((1, 16, 16, 1), np.float32), np.zeros(1))
