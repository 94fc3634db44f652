"""The Inception network that defines FID: the TensorFlow graph of 2015-12-05, as ported to PyTorch.

It differs from torchvision's Inception v3 in three ways: average pools leave the padding out of the mean, the last
block takes a maximum instead of a mean, and there are 1,008 classes. Batch norms are folded into the convolutions.
Everything is float32 at full precision: TF32 would move FID. `PIPELINES` has the two ways in which images are prepared
for it in published FIDs, which differ in their numbers.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NUM_FEATURES = 2048
NUM_LOGITS = 1008
SIZE = 299

_NORM_EPS = 1e-3
_LAYOUT = ("NHWC", "HWIO", "NHWC")

Params = dict[str, jax.Array]


def fold_norms(state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The network's float32 parameters from the state dict of its PyTorch port, with the batch norms folded.

    They are "NAME.kernel" [H,W,I,O] and "NAME.bias" [O] for each convolution, and "fc.kernel" [2048,1008]. `ValueError`
    for arrays that are missing, of other shapes or not finite.
    """
    params = {}
    for name in sorted({key.rpartition(".conv.")[0] for key in state_dict if ".conv." in key}):
        weight, bias, mean, variance = (
            _array(state_dict, f"{name}.bn.{part}") for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / np.sqrt(variance + _NORM_EPS)
        kernel = _array(state_dict, f"{name}.conv.weight") * scale[:, None, None, None]
        params[f"{name}.kernel"] = kernel.transpose(2, 3, 1, 0)
        params[f"{name}.bias"] = bias - mean * scale
    params["fc.kernel"] = _array(state_dict, "fc.weight").T
    params = {name: value.astype(np.float32) for name, value in params.items()}
    for name, shape in parameter_shapes().items():
        found = params[name].shape if name in params else None
        if found != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {found}")
    return params


def parameter_shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter."""
    shapes = {}

    def conv(name, x, kernel, features, stride=1, padding="VALID"):
        sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        own = {f"{name}.kernel": (*sides, x.shape[-1], features), f"{name}.bias": (features,)}
        shapes.update(own)
        params = {name: jnp.zeros(shape) for name, shape in own.items()}
        return _conv(params, name, x, kernel, features, stride, padding)

    jax.eval_shape(lambda x: _blocks(conv, x), jnp.zeros((1, SIZE, SIZE, 3)))
    return {**shapes, "fc.kernel": (NUM_FEATURES, NUM_LOGITS)}


def features_and_logits(params: Params, images: jax.Array, pipeline: str = "tf1") -> tuple[jax.Array, jax.Array]:
    """The last mean pool, float32 [B,2048], and the logits without their bias, float32 [B,1008].

    FID, KID, precision and recall are measured in the former, Inception Score in the latter. The images are uint8
    [B,H,W,C] with C = 1 (repeated) or 3; `pipeline` is a key of `PIPELINES`.
    """
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"images must be uint8 [B,H,W,C] with 1 or 3 channels, got {images.dtype} {list(images.shape)}"
        )
    if images.shape[-1] == 1:
        images = jnp.repeat(images, 3, axis=-1)
    pooled = stages(params, PIPELINES[pipeline].prepare(images.astype(jnp.float32)))["2048"]
    return pooled, jnp.matmul(pooled, params["fc.kernel"], precision=lax.Precision.HIGHEST)


def stages(params: Params, x: jax.Array) -> dict[str, jax.Array]:
    """The mean over pixels at four depths, "64" to "2048", float32 [B, that number], of x [B,299,299,3] in [0, 256].

    The network's own units are (x − 128)/128.
    """
    outputs = _blocks(functools.partial(_conv, params), (x - 128.0) / 128.0)
    return {name: value.mean(axis=(1, 2)) for name, value in outputs.items()}


def resize(x: jax.Array, size: int = SIZE) -> jax.Array:
    """Bilinear resize of float [B,H,W,C] to [B,size,size,C] as in TensorFlow 1.

    Pixel i is read at i·(old/new); corners are not aligned.
    """
    return _bilinear(x, size, lambda pixel, ratio: pixel * ratio)


def resize_half_pixel(x: jax.Array, size: int = SIZE) -> jax.Array:
    """Bilinear resize of float [B,H,W,C] to [B,size,size,C] as PyTorch's `interpolate` with align_corners=False.

    Pixel i is read at (i + ½)·(old/new) − ½, at 0 where that is less; there is no antialiasing.
    """
    return _bilinear(x, size, lambda pixel, ratio: np.maximum((pixel + 0.5) * ratio - 0.5, 0))


class Pipeline(NamedTuple):
    """How images are prepared for Inception.

    Attributes:
      prepare: float32 [B,H,W,C] in [0, 255] → [B,299,299,C], as `stages` takes it.
      provenance: that in words; the caches of statistics and results depend on the text.
    """

    prepare: Callable[[jax.Array], jax.Array]
    provenance: str


# `config.fields.INCEPTION_RESIZES` has the names.
PIPELINES = {
    # Heusel et al. 2017, torch-fidelity, StyleGAN, EDM.
    "tf1": Pipeline(resize, "bilinear to 299 × 299 as TensorFlow 1, from uint8, no file in between"),
    # Analytic-DPM, PNDM, SA-DPM. The network's units are x/127.5 − 1.
    "pytorch_fid": Pipeline(
        lambda x: resize_half_pixel(x) * (256 / 255),
        "bilinear to 299 × 299 with half-pixel centres and x/127.5 − 1 as pytorch-fid, from uint8, no file in between",
    ),
}


def _bilinear(x: jax.Array, size: int, position_of: Callable[[np.ndarray, np.float32], np.ndarray]) -> jax.Array:
    """Reads pixel i of each side at `position_of(i, old/new)` ≥ 0, beyond the last pixel that pixel."""
    for axis in (1, 2):
        length = x.shape[axis]
        # TensorFlow and PyTorch compute the positions in float32.
        position = position_of(np.arange(size, dtype=np.float32), np.float32(length / size))
        low = np.floor(position).astype(int)
        share = (position - low).reshape([-1 if i == axis else 1 for i in range(4)])
        below, above = jnp.take(x, low, axis), jnp.take(x, np.minimum(low + 1, length - 1), axis)
        x = below + (above - below) * share
    return x


def _conv(params, name, x, _kernel, _features, stride=1, padding="VALID"):
    kernel, precision = params[f"{name}.kernel"], lax.Precision.HIGHEST
    x = lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=_LAYOUT, precision=precision)
    return jax.nn.relu(x + params[f"{name}.bias"])


def _max_pool(x, stride, padding="VALID"):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _mean_pool(x):
    """The mean over 3×3 pixels, of those that lie inside the image."""

    def sums(values):
        return lax.reduce_window(values, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")

    return sums(x) / sums(jnp.ones((1, *x.shape[1:3], 1), x.dtype))


def _blocks(conv, x):
    """The outputs [B, H, W, C] at four depths; `conv` takes name, x, kernel, features, stride and padding."""

    def chain(name, x, *layers):
        for suffix, kernel, features, *stride in layers:
            x = conv(f"{name}{suffix}", x, kernel, features, *stride, padding="VALID" if stride else "SAME")
        return x

    def join(*branches):
        return jnp.concatenate(branches, axis=-1)

    outputs = {}
    x = conv("Conv2d_1a_3x3", x, 3, 32, 2)
    x = conv("Conv2d_2a_3x3", x, 3, 32)
    x = conv("Conv2d_2b_3x3", x, 3, 64, padding="SAME")
    x = outputs["64"] = _max_pool(x, 2)
    x = conv("Conv2d_3b_1x1", x, 1, 80)
    x = conv("Conv2d_4a_3x3", x, 3, 192)
    x = outputs["192"] = _max_pool(x, 2)

    for block, pooled in (("5b", 32), ("5c", 64), ("5d", 64)):
        name = f"Mixed_{block}.branch"
        x = join(
            chain(name, x, ("1x1", 1, 64)),
            chain(name, x, ("5x5_1", 1, 48), ("5x5_2", 5, 64)),
            chain(name, x, ("3x3dbl_1", 1, 64), ("3x3dbl_2", 3, 96), ("3x3dbl_3", 3, 96)),
            chain(name, _mean_pool(x), ("_pool", 1, pooled)),
        )
    name = "Mixed_6a.branch"
    x = join(
        chain(name, x, ("3x3", 3, 384, 2)),
        chain(name, x, ("3x3dbl_1", 1, 64), ("3x3dbl_2", 3, 96), ("3x3dbl_3", 3, 96, 2)),
        _max_pool(x, 2),
    )
    wide, tall = (1, 7), (7, 1)
    for block, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        name = f"Mixed_{block}.branch"
        double = [("7x7dbl_1", 1, c), ("7x7dbl_2", tall, c), ("7x7dbl_3", wide, c), ("7x7dbl_4", tall, c)]
        x = join(
            chain(name, x, ("1x1", 1, 192)),
            chain(name, x, ("7x7_1", 1, c), ("7x7_2", wide, c), ("7x7_3", tall, 192)),
            chain(name, x, *double, ("7x7dbl_5", wide, 192)),
            chain(name, _mean_pool(x), ("_pool", 1, 192)),
        )
    outputs["768"] = x
    name = "Mixed_7a.branch"
    crossed = [("7x7x3_1", 1, 192), ("7x7x3_2", wide, 192), ("7x7x3_3", tall, 192), ("7x7x3_4", 3, 192, 2)]
    x = join(chain(name, x, ("3x3_1", 1, 192), ("3x3_2", 3, 320, 2)), chain(name, x, *crossed), _max_pool(x, 2))
    for block in ("7b", "7c"):
        name = f"Mixed_{block}.branch"
        one = chain(name, x, ("3x3_1", 1, 384))
        two = chain(name, x, ("3x3dbl_1", 1, 448), ("3x3dbl_2", 3, 384))
        # The graph takes a mean in its first such block and, by an oversight that FID keeps, a maximum here.
        pooled = _mean_pool(x) if block == "7b" else _max_pool(x, 1, "SAME")
        x = join(
            chain(name, x, ("1x1", 1, 320)),
            *(chain(name, one, (f"3x3_2{part}", shape, 384)) for part, shape in (("a", (1, 3)), ("b", (3, 1)))),
            *(chain(name, two, (f"3x3dbl_3{part}", shape, 384)) for part, shape in (("a", (1, 3)), ("b", (3, 1)))),
            chain(name, pooled, ("_pool", 1, 192)),
        )
    outputs["2048"] = x
    return outputs


def _array(state_dict, name):
    if name not in state_dict:
        raise ValueError(f"{name} is missing")
    array = np.asarray(state_dict[name], np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds values that are not finite")
    return array
