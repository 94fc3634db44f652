"""improved-diffusion's UNet against the published PyTorch one: outputs, gradients, sizes, names, initialisation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from helpers import FunctionNetwork, small_config
from published import group, improved_network_of, network_answers

from s2dm_jax.common.errors import UserError
from s2dm_jax.config.build import network_of
from s2dm_jax.config.validate import check_config
from s2dm_jax.diffusion.schedule import linear_schedule
from s2dm_jax.inference.model import Model, load
from s2dm_jax.models import variance_head
from s2dm_jax.models.flops import forward_flops
from s2dm_jax.models.improved_unet import ImprovedUNet
from s2dm_jax.models.network import num_params
from s2dm_jax.training.loop import train
from s2dm_jax.weights import torch_names
from s2dm_jax.weights.export import export

CIFAR10 = ImprovedUNet(32, 3, 3, 128, (1, 2, 2, 2), 3, (16, 8), dropout=0.3)
# Two channels per group, so that the embedding matters.
TINY = ImprovedUNet(4, 1, 1, 64, (1,), 1, (), num_heads=2)


@pytest.mark.parametrize("name", ["iddpm_a.npz", pytest.param("iddpm_b.npz", marks=pytest.mark.slow)])
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


def test_published_output_of_six_channels(golden):
    """The output of iddpm_b alone, as compiling its gradient takes long."""
    arrays = golden("iddpm_b.npz")
    network, x, t, labels = improved_network_of(arrays), arrays["x"], arrays["t"], arrays["y"]
    params = torch_names.from_torch(group(arrays, "param/"), network)
    eps, variance, _ = jax.jit(network.outputs)(params, x, t, labels=labels)
    out = np.concatenate([eps, variance], axis=-1)
    np.testing.assert_allclose(out, arrays["out"], rtol=1e-4, atol=1e-4 * np.abs(out).max())


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


def perturbed(network):
    """Parameters in which what starts at zero matters as well."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + 0.05 * rng.standard_normal(leaf.shape, np.float32), network.init(0))


def test_labels_timesteps_and_the_learned_variance():
    """Against the same network without any: a class is a bias of the embedding, offset and scale act on t."""
    special = dataclasses.replace(TINY, num_classes=3, t_offset=1, t_scale=0.25, learned_variance=True)
    params, x, t = perturbed(special), np.ones((2, 4, 4, 1), np.float32), np.array([3, 600])
    outputs, apply = jax.jit(special.outputs), jax.jit(TINY.apply)
    eps, variance, _ = outputs(params, x, t, labels=np.array([2, 2]))
    plain = {name: value for name, value in params.items() if name != "label_emb"}
    bias = plain["time_embed"]["2"]["bias"] + params["label_emb"]["embedding"][2]
    plain["time_embed"] = {**plain["time_embed"], "2": {**plain["time_embed"]["2"], "bias": bias}}
    for channel, output in enumerate((eps, variance)):
        last = jax.tree.map(lambda leaf, c=channel: leaf[..., c : c + 1], params["out"]["2"])
        expected = apply({**plain, "out": {**params["out"], "2": last}}, x, (t + 1) / 4)
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)
    others, *_ = outputs(params, x, t, labels=np.array([2, 0]))
    np.testing.assert_allclose(others[0], eps[0], rtol=1e-5)
    assert np.abs(others[1] - eps[1]).max() > 0.01


def test_initialisation_is_that_of_the_published_code():
    params = traverse_util.flatten_dict(dataclasses.replace(CIFAR10, num_classes=10).init(0), sep=".")
    for name, value in params.items():
        module = name.rpartition(".")[0]
        if module.endswith(("out_layers.3", "proj_out")) or module == "out.2":
            assert not value.any(), name
        elif f"{module}.kernel" in params:
            fan_in = np.prod(params[f"{module}.kernel"].shape[:-1])
            assert 0.8 * fan_in**-0.5 < np.abs(value).max() <= fan_in**-0.5, name
    assert abs(params["label_emb.embedding"].std() - 1) < 0.05
    head = variance_head.init_params(CIFAR10, 0)
    assert not any(leaf.any() for leaf in jax.tree.leaves(head["conv_out2"]))
    # Extended-Analytic-DPM's "simple" head.
    assert sum(leaf.size for leaf in jax.tree.leaves(head)) == 3_715


def test_flops_are_those_of_the_layers():
    c, pixels, emb = 64, 16, 256
    block = 2 * 9 * pixels * c * c + emb * 2 * c
    attention = pixels * 4 * c * c + 2 * pixels**2 * c
    up = 2 * (9 * pixels * 2 * c * c + 9 * pixels * c * c + emb * 2 * c + pixels * 2 * c * c)
    ends = c * emb + emb * emb + 2 * 9 * pixels * c
    assert forward_flops(TINY) == 2 * (ends + block + (2 * block + attention) + up)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"model.name": "unet", "model.num_heads": 2},
            r"config\.model\.num_heads=2 is not a field of UNet; leave it None",
        ),
        ({"model.num_heads": 3}, r"config\.model\.num_heads=3 must divide the channels of every resolution level"),
        ({"model.learned_variance": True}, r"config\.model\.learned_variance=True is for weights"),
        ({"model.ch": 40}, r"config\.model\.ch=40 must be a multiple of 32"),
        (
            {"sample.sampler": "ddpm", "sample.variance": "learned"},
            r"config\.sample\.variance='learned' needs a network",
        ),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        check_config(small_config(**{"model.name": "improved_unet", **fields}))


def test_the_config_sets_every_field():
    fields = {"num_heads": 2, "scale_shift_norm": False, "learned_variance": True, "t_offset": 1, "t_scale": 0.25}
    config = small_config(**{"model.name": "improved_unet", **{f"model.{k}": v for k, v in fields.items()}})
    check_config(config, trained=True)
    network = network_of(config, "float32")
    assert {name: getattr(network, name) for name in fields} == fields
    default = network_of(small_config(**{"model.name": "improved_unet"}), "float32")
    assert (default.num_heads, default.scale_shift_norm, default.learned_variance, default.t_scale) == (
        4,
        True,
        False,
        1,
    )


@dataclasses.dataclass(frozen=True)
class ClosedForm(FunctionNetwork):
    """ε = 0.9·x_t with the learned variance of the parameter v."""

    learned_variance: bool = True

    def eps_variance_fn(self, params, schedule):
        return lambda x, t: (0.9 * x, params["v"] * jnp.ones_like(x))


def test_sampling_with_the_learned_variance():
    """v = 1 everywhere is the variance large: the images of one seed are the same."""
    network = ClosedForm(lambda params, x, t: 0.9 * x)

    def images(variance, v=0.0, **options):
        model = Model(small_config(), network, linear_schedule(), {"v": np.float32(v)}, 0)
        return model.sample(2, "ddpm", nfe=4, variance=variance, **options).astype(int)

    large = images("large")
    assert np.abs(images("learned", 1.0) - large).max() <= 1
    assert (images("learned", 0.0) != large).any()
    with pytest.raises(ValueError, match="skip_scale cannot be combined with variance='learned'"):
        images("learned", skip_scale=10)


@pytest.mark.slow
def test_all_that_the_first_network_does(tmp_path):
    """Training with remat and in bfloat16, statistics, a variance head, evaluation and export."""
    changes = {"model.name": "improved_unet", "model.attn_resolutions": (8,), "loss.skip": 0, "train.steps": 4}
    weights = {"initial": network_of(small_config(**changes), "float32").init(0)}
    for name, fields in {"plain": {}, "remat": {"model.remat": True}, "half": {"model.dtype": "bfloat16"}}.items():
        train(small_config(**changes, **fields), tmp_path / name)
        weights[name] = load(tmp_path / name).ema_params
    flat = {name: np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(p)]) for name, p in weights.items()}
    moved = np.linalg.norm(flat["plain"] - flat["initial"])
    assert np.linalg.norm(flat["remat"] - flat["plain"]) < 0.01 * moved
    assert np.linalg.norm(flat["half"] - flat["plain"]) < 0.5 * moved
    model = load(tmp_path / "plain")
    for sampler in ("ddim", "ddpm", "unipc"):
        assert model.sample(2, sampler, nfe=5).shape == (2, 8, 8, 1)
    model.config.sample.update({"nfe": 4, "steps": 0})
    again = load(export(model.config, str(tmp_path / "plain")))
    np.testing.assert_array_equal(again.sample(2, nfe=4), model.sample(2, nfe=4))
    head = small_config(
        **changes, **{"variance_head.kind": "npr", "variance_head.base_workdir": str(tmp_path / "plain")}
    )
    head.sample.sampler = head.eval.samplers = "npr"
    train(head, tmp_path / "head")
    trained = load(tmp_path / "head")
    assert all(leaf.any() for leaf in jax.tree.leaves(trained.variance_head.params))
    assert trained.sample(2, "npr", nfe=3).shape == (2, 8, 8, 1)
