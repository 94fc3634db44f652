"""improved-diffusion's UNet against the published PyTorch one: outputs, gradients, sizes, names, initialisation."""

import numpy as np
import pytest
from published import group, improved_network_of, network_answers

from s2dm_jax.models.improved_unet import ImprovedUNet
from s2dm_jax.models.network import num_params
from s2dm_jax.weights import torch_names

CIFAR10 = ImprovedUNet(32, 3, 3, 128, (1, 2, 2, 2), 3, (16, 8), dropout=0.3)


@pytest.mark.parametrize("name", ["iddpm_a.npz", "iddpm_b.npz"])
def test_published_network(golden, name):
    arrays = golden(name)
    answers = network_answers(arrays)
    np.testing.assert_allclose(answers["out"], arrays["out"], rtol=1e-4, atol=1e-4 * np.abs(arrays["out"]).max())
    np.testing.assert_allclose(answers["loss"], arrays["loss"], rtol=1e-4)
    np.testing.assert_allclose(answers["grad_norm"], arrays["grad_norm"], rtol=1e-4)
    for tensor, expected in group(arrays, "grad/").items():
        # With one channel per group, the norms of iddpm_b remove what the embedding adds: those gradients are rounding.
        atol = 1e-4 * np.abs(expected).max() + 1e-8 * arrays["grad_norm"]
        np.testing.assert_allclose(answers["grads"][tensor], expected, rtol=1e-3, atol=atol)


def test_torch_names_round_trip_to_the_bit_and_in_order(golden):
    arrays = golden("iddpm_b.npz")
    published = group(arrays, "param/")
    back = torch_names.to_torch(torch_names.from_torch(published, improved_network_of(arrays)))
    assert list(back) == list(published)
    for name in published:
        np.testing.assert_array_equal(back[name], published[name])


def test_published_tensors_and_parameter_counts(golden):
    expected = {name: tuple(shape) for name, shape in golden("iddpm_keys.json").items()}
    shapes = torch_names.torch_shapes(CIFAR10)
    assert shapes == expected
    assert len(shapes) == 446
    imagenet = ImprovedUNet(64, 3, 3, 128, (1, 2, 3, 4), 3, (16, 8), learned_variance=True)
    lsun = ImprovedUNet(256, 3, 3, 128, (1, 1, 2, 2, 4, 4), 2, (16, 8), scale_shift_norm=False, learned_variance=True)
    counts = golden("iddpm_param_counts.json")
    assert [num_params(network) for network in (CIFAR10, imagenet, lsun)] == list(counts.values())
