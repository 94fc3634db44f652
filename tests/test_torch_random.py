"""PyTorch's generator in NumPy: its published first draws, the networks that it initialises, the sketch."""

import hashlib
import json

import numpy as np
import pytest
from helpers import ROOT
from torch_random import TorchGenerator, initial_weights, sketch


def test_first_draws_are_those_of_torch():
    # `torch.manual_seed(0)`, then `torch.rand(4)`, `torch.randn(3)` or `torch.randn(16)`, to four digits.
    rand = (TorchGenerator(0).uniform(1.0, (4,)) + 1) / 2
    np.testing.assert_allclose(rand, [0.4963, 0.7682, 0.0885, 0.1320], atol=5e-5)
    np.testing.assert_allclose(TorchGenerator(0).normal((3,)), [1.5410, -0.2934, -2.1788], atol=5e-5)
    np.testing.assert_allclose(TorchGenerator(0).normal((16,))[:3], [-1.1258, -1.1524, -0.2506], atol=5e-5)


@pytest.mark.parametrize("name", ["train_ddpm", "train_sa2", "train_sa3", "train_s2"])
def test_initial_weights_equal_the_published_bit_for_bit(name):
    with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as arrays:
        network = json.loads(str(arrays["network"]))
    expected, _ = network.pop("sha256"), network.pop("prefix")
    digest = hashlib.sha256()
    for tensor in initial_weights(**network).values():
        digest.update(tensor.tobytes())
    assert digest.hexdigest() == expected


def test_a_sketch_has_the_norm_of_all_entries():
    rng = np.random.default_rng(0)
    tensors = {"a": rng.standard_normal((300, 500)), "b": 3 * rng.standard_normal(1000)}
    norm = np.sqrt(sum(np.sum(t**2) for t in tensors.values()))
    np.testing.assert_allclose(np.linalg.norm(sketch(tensors)), norm, rtol=0.03)
    # A single entry that differs is never missed, as it would be by a subset of the entries.
    single = {name: np.zeros_like(t) for name, t in tensors.items()}
    single["a"][17, 3] = 0.5
    np.testing.assert_allclose(np.linalg.norm(sketch(single)), 0.5)
