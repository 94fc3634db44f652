"""Five training steps against the plain PyTorch loop of the benchmark; skipped without PyTorch.

pip install 's2dm_jax[torch]' && pytest -n0 tests/scripts/test_torch_step.py
"""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import ROOT
from published import LINEAR

from s2dm_jax.diffusion import objectives
from s2dm_jax.diffusion.objectives import NoiseSample
from s2dm_jax.models.flops import forward_flops
from s2dm_jax.models.improved_unet import ImprovedUNet
from s2dm_jax.training.averages import Averages
from s2dm_jax.training.step import StepConfig, update
from s2dm_jax.weights import torch_names
from s2dm_jax.workdir.state import TrainState, make_optimizer

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 's2dm_jax[torch]'")

# Two channels per group, so that the embedding matters where it is added.
NETWORK = ImprovedUNet(8, 3, 3, 64, (1, 2), 1, (4,), num_heads=4, t_offset=1)
SETTINGS = {"device": "cpu", "channels_last": False, "compile": False, "dtype": "float32", "skip": 0, "tau": 1.0}
SETTINGS |= {"lr": 1e-3, "grad_clip": 0.0, "ema_decay": 0.9}
STEPS, BATCH = 5, 3


def start(network):
    """The initial weights with noise added, so that what starts at zero matters as well."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + 0.05 * rng.standard_normal(leaf.shape, np.float32), network.init(0))


def torch_steps(network, params, x0, t, noise, K):
    settings = {**vars(network), **SETTINGS, "network": "improved_unet", "channels": 3, "K": K, "lam": 1.0}
    import torch_worker

    model = torch_worker.make_network(settings)
    model.load_state_dict({name: torch.tensor(value) for name, value in torch_names.to_torch(params).items()})
    step, average = torch_worker.make_update(settings, model)
    losses = []
    for i in range(STEPS):
        images, drawn = (torch.tensor(np.moveaxis(a[i], -1, -3)) for a in (x0, noise))
        losses.append(step(images, torch.tensor(t[i]), drawn.flatten(0, 1)).item())
    return losses, *({k: v.numpy() for k, v in m.state_dict().items()} for m in (model, average))


@pytest.mark.parametrize(("scale_shift_norm", "K"), [(True, 1), (False, 2)])
def test_five_steps_are_those_of_pytorch(scale_shift_norm, K, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))
    network = dataclasses.replace(NETWORK, scale_shift_norm=scale_shift_norm)
    rng = np.random.default_rng(1)
    x0 = rng.uniform(-1, 1, (STEPS, BATCH, *network.image_shape)).astype(np.float32)
    t = rng.integers(0, 1000 - K + 1, (STEPS, BATCH))
    noise = rng.standard_normal((STEPS, BATCH, K, *network.image_shape), np.float32)
    params = start(network)
    objective = objectives.paper(K=K, lam=float(K > 1))
    optimizer = make_optimizer(SETTINGS["lr"], SETTINGS["grad_clip"])
    made_of = StepConfig(network, LINEAR, objective, optimizer, Averages(SETTINGS["ema_decay"]))
    state = TrainState(np.int32(0), params, params, optimizer.init(params))
    step = jax.jit(lambda state, x0, sample: update(made_of, state, x0, sample, None))
    losses = []
    for i in range(STEPS):
        state, metrics = step(state, x0[i], NoiseSample(t[i], noise[i], None))
        losses.append(float(metrics["loss"]))
    expected, final, average = torch_steps(network, params, x0, t, noise, K)
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    initial = torch_names.to_torch(params)
    for ours, theirs in ((state.params, final), (state.ema_params, average)):
        ours = torch_names.to_torch(ours)
        assert list(ours) == list(theirs)
        # The exact gradient of a key's bias is zero: Adam moves it by rounding alone.
        names = [name for name in theirs if not name.endswith("qkv.bias")]
        off = sum(np.square(ours[name] - theirs[name]).sum() for name in names)
        moved = sum(np.square(theirs[name] - initial[name]).sum() for name in names)
        assert (off / moved) ** 0.5 < 0.01


def test_flops_are_those_that_pytorch_counts(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))
    import torch_worker

    network = dataclasses.replace(NETWORK, ch_mult=(1, 2, 3), attn_resolutions=(8, 2), num_res_blocks=2)
    model = torch_worker.make_network({**vars(network), **SETTINGS, "network": "improved_unet", "channels": 3})
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 8, 8), torch.zeros(1))
    assert forward_flops(network) == counter.get_total_flops()
