"""What a step costs and a device can do; what recomputation changes."""

import dataclasses

import jax
import numpy as np
import pytest

from s2dm_jax.devices import hardware
from s2dm_jax.devices.hardware import peak_flops, peak_memory
from s2dm_jax.models.flops import forward_flops, step_flops
from s2dm_jax.models.unet import UNet

TINY = UNet(8, 1, 1, 32, (1,), 1, (8,))


def test_what_a_compiler_does_not_know_it_is_not_told(monkeypatch):
    hardware.compiler_options.cache_clear()
    # This jaxlib knows them.
    assert hardware.compiler_options() == hardware._CPU_OPTIONS
    hardware.compiler_options.cache_clear()
    monkeypatch.setattr(hardware, "_CPU_OPTIONS", {"xla_cpu_no_such_option": "1"})
    assert hardware.compiler_options() == {}
    hardware.compiler_options.cache_clear()


def test_forward_flops_of_the_published_network():
    """The count that was taken from the published PyTorch code for CIFAR-10 (design.md)."""
    network = UNet(32, 3, 3, 128, (1, 2, 2, 2), 2, (16,))
    np.testing.assert_allclose(forward_flops(network), 2 * 6.222e9, rtol=2e-3)


def test_recomputation_is_not_counted():
    assert forward_flops(remat(TINY)) == forward_flops(TINY)
    assert step_flops(TINY, batch_size=8, num_timesteps_per_image=2) == 3 * 8 * 2 * forward_flops(TINY)


def remat(network):
    return dataclasses.replace(network, remat=True)


class FakeDevice:
    def __init__(self, kind):
        self.device_kind = kind


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("cpu", None),
    ],
)
def test_peak_is_that_of_all_devices_in_bfloat16(monkeypatch, kind, tflops):
    monkeypatch.setattr(jax, "devices", lambda: [FakeDevice(kind)] * 4)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert peak_flops("bfloat16") == (tflops and 4e12 * tflops)
    assert peak_flops("float32") is None


def test_memory_peak_grows_with_what_is_held():
    before = peak_memory()
    block = np.ones(before // 8 // 4 * 5)
    assert peak_memory() > before
    assert block[0] == 1


def gradient(network):
    def loss(params, x):
        return network.apply(params, x, np.ones(len(x), np.float32), jax.random.key(1)).var()

    return jax.grad(loss)


def test_each_block_is_computed_again_if_asked():
    x = np.zeros((2, 8, 8, 1), np.float32)
    text = str(jax.make_jaxpr(gradient(remat(TINY)))(TINY.init(0), x))
    # Two blocks and one attention down, three and two in the middle and up again, …
    blocks = 1 + 1 + 3 + 2 + 2
    assert text.count("prevent_cse") == blocks
    assert "prevent_cse" not in str(jax.make_jaxpr(gradient(TINY))(TINY.init(0), x))


@pytest.mark.slow
def test_computing_again_changes_nothing():
    network = UNet(8, 1, 1, 32, (1, 2), 1, (4,), dropout=0.1)
    params = network.init(0)
    x = np.random.default_rng(0).standard_normal((4, 8, 8, 1), np.float32)
    plain, again = (jax.jit(gradient(n))(params, x) for n in (network, remat(network)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, again)
