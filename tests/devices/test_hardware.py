"""Compiler options, FLOPs and peak rates, peak memory; what rematerialisation changes."""

import dataclasses
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2dm_jax.devices import hardware
from s2dm_jax.devices.hardware import compiler_options, jit_network, numerics, peak_flops, peak_memory
from s2dm_jax.models.flops import forward_flops, step_flops
from s2dm_jax.models.unet import UNet

TINY = UNet(8, 1, 1, 32, (1,), 1, (8,))


def test_compiler_options_are_those_that_the_compiler_accepts(monkeypatch):
    accepted = {"xla_cpu_enable_fast_math": "False"}
    assert compiler_options(accepted) == accepted
    assert compiler_options({**accepted, "xla_cpu_no_such_option": "1"}) == {}
    # The defaults are accepted by this jaxlib: a misspelt one would silently cost speed.
    assert compiler_options()
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert compiler_options(accepted) == {}
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compiler_options(accepted) == {}


def test_compiler_options_are_asked_for_at_the_first_call(monkeypatch):
    @jit_network(static_argnums=0)
    def power(exponent, x):
        traced.append(exponent)
        return x**exponent

    traced = []
    monkeypatch.setattr(hardware, "compiler_options", lambda: {"xla_cpu_no_such_option": "1"})
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_cpu_no_such_option"):
        power(2, jnp.array(3.0))
    monkeypatch.undo()
    cube = jit_network(static_argnums=0)(power.__wrapped__)
    assert (cube(3, jnp.array(2.0)), cube(3, jnp.array(3.0))) == (8, 27)
    assert traced.count(3) == 1


def test_forward_flops_of_the_published_network():
    """CIFAR-10's network: 6.222 G multiply-adds, counted with hooks on the published PyTorch code."""
    network = UNet(32, 3, 3, 128, (1, 2, 2, 2), 2, (16,))
    np.testing.assert_allclose(forward_flops(network), 2 * 6.222e9, rtol=2e-3)


def test_rematerialisation_is_not_counted():
    assert forward_flops(remat(TINY)) == forward_flops(TINY)
    assert step_flops(TINY, batch_size=8, num_timesteps_per_image=2) == 3 * 8 * 2 * forward_flops(TINY)


def remat(network):
    return dataclasses.replace(network, remat=True)


class FakeDevice:
    def __init__(self, kind="cpu", memory=None):
        self.device_kind = kind
        self.memory_stats = lambda: memory


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("cpu", None),
    ],
)
def test_peak_is_that_of_all_devices_in_half_precision(monkeypatch, kind, tflops):
    monkeypatch.setattr(jax, "devices", lambda: [FakeDevice(kind)] * 4)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert peak_flops("bfloat16") == peak_flops("float16") == (tflops and 4e12 * tflops)
    assert peak_flops("float32") is None


def test_peak_memory_is_that_of_the_fullest_device(monkeypatch):
    devices = [FakeDevice(memory={"peak_bytes_in_use": peak, "bytes_in_use": 9000}) for peak in (500, 700, 600)]
    monkeypatch.setattr(jax, "local_devices", lambda: [FakeDevice(), *devices])
    assert peak_memory() == 700


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the process's memory is read from /proc")
def test_peak_memory_on_cpu_is_that_of_the_process_in_bytes():
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    total_kb = int(Path("/proc/meminfo").read_text().split()[1])
    # The kernel batches its counters, so the peak can trail what is resident by a little.
    assert 0.9 * resident_pages * resource.getpagesize() <= peak_memory() <= 1024 * total_kb


def gradient(network):
    def loss(params, x):
        return network.apply(params, x, np.ones(len(x), np.float32), jax.random.key(1)).var()

    return jax.grad(loss)


def residual_bytes(network, batch_size):
    """Bytes that are stored from the forward to the backward pass, the weights among them."""

    def residuals(params, x):
        apply = lambda params: network.apply(params, x, jnp.ones(len(x)), jax.random.key(1))  # noqa: E731
        return jax.vjp(apply, params)[1]

    x = jnp.zeros((batch_size, *network.image_shape))
    leaves = jax.tree.leaves(jax.eval_shape(residuals, network.init(0), x))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def test_rematerialisation_holds_fewer_activations_for_the_backward_pass():
    # The difference of two batch sizes leaves out the weights.
    plain, again = (residual_bytes(network, 16) - residual_bytes(network, 8) for network in (TINY, remat(TINY)))
    assert again < plain / 4


@pytest.mark.slow
def test_rematerialisation_changes_no_gradient():
    network = UNet(8, 1, 1, 32, (1, 2), 1, (4,), dropout=0.1)
    params = network.init(0)
    x = np.random.default_rng(0).standard_normal((4, 8, 8, 1), np.float32)
    plain, again = (jax.jit(gradient(n))(params, x) for n in (network, remat(network)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, again)


def test_settings_that_change_results_are_named(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "-1")
    monkeypatch.setenv("JAX_LOG_COMPILES", "1")
    assert numerics() == {}
    for name, value in (("JAX_NUM_CPU_DEVICES", "2"), ("JAX_SETTING_OF_TOMORROW", "1"), ("NVIDIA_TF32_OVERRIDE", "0")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert numerics() == {name: value}
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        assert numerics() == {"device": "cpu"}
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=1 --xla_a=2")
    with jax.default_matmul_precision("highest"):
        assert numerics() == {
            "jax_default_matmul_precision": "highest",
            "XLA_FLAGS": ["--xla_a=2", "--xla_b=1"],
        }
