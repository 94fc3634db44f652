"""A small image classifier whose features replace Inception's if those do not fit or are unavailable.

A Fréchet distance in these features is not an FID: it compares only runs that share the classifier.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from s2dm_jax.common.images import to_unit
from s2dm_jax.common.progress import progress_bar
from s2dm_jax.devices.distributed import is_main_process
from s2dm_jax.devices.sharding import shard_batch
from s2dm_jax.inference.batches import map_batches
from s2dm_jax.models.cpu_ops import conv2d

# A feature is the same number on every device: not TF32 on one and bfloat16 on another.
_full_precision = jax.default_matmul_precision("highest")

NUM_FEATURES = 64
# Pixels of a side.
MIN_SIDE = 8

# Smaller images get a two-layer perceptron: on 8×8 digits it is as accurate as convolutions with pooled channels, and
# separates noise from real digits three times as well, in units of the distance between real digits and real digits.
# Others get convolutions of stride 2 down to 4 pixels, and a dense layer that sees positions.
_MIN_CONVOLVED_SIDE, _MAX_CONVOLVED_SIDE = 16, 64
_WIDTHS: tuple[int, ...] = (128, NUM_FEATURES)
_CHANNELS = (32, 64, 128)
_MAX_IMAGES, _MAX_BYTES = 50_000, 2**30
_TRAIN_BATCH, _ACCURACY_BATCH = 64, 256
_STEPS, _STEPS_WITH_CONVOLUTIONS = 600, 2000
# Steps in one compiled program, between two updates of the progress bar.
_STEPS_PER_CHUNK = 50
_LEARNING_RATE = 3e-3

Params = dict[str, jax.Array]


def train_classifier(
    images: np.ndarray, labels: np.ndarray, num_classes: int, seed: int = 0, steps: int | None = None
) -> Params:
    """Trains the classifier with Adam; the same arguments give the same parameters, float32 arrays by name.

    Args:
      images: uint8 [N,H,W,C], N ≥ 1, H and W ≥ 8; of more than 50,000 or 1 GB a random subset is used.
      labels: integers [N] in [0, num_classes), with num_classes ≥ 2.
      seed: of the initial weights and the order of the batches.
      steps: at least 1, each on a batch of 64 (or N, if less); by default 600, with convolutions 2,000.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape or min(images.shape[1:3]) < MIN_SIDE:
        raise ValueError(
            "images must be uint8 [N,H,W,C], not empty, with H and W at least 8, "
            f"got {images.dtype} {list(images.shape)}"
        )
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if steps is None:
        steps = _STEPS_WITH_CONVOLUTIONS if _has_convolutions(images.shape[1:]) else _STEPS
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    _check_labels(labels, len(images))
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels must be in [0, {num_classes}), got values from {labels.min()} to {labels.max()}")

    rng = np.random.default_rng(seed)
    limit = min(_MAX_IMAGES, _MAX_BYTES // math.prod(images.shape[1:]))
    if len(images) > limit:
        rows = np.sort(rng.choice(len(images), limit, replace=False))
        images, labels = images[rows], labels[rows]
    params = _initial_params(rng, images.shape[1:], num_classes)
    # Drawn on the host: jax.random's draws cost more to compile here than the training takes to run.
    size = min(_TRAIN_BATCH, len(images))
    epochs = math.ceil(steps * size / len(images))
    order = np.concatenate([rng.permutation(len(images)) for _ in range(epochs)])
    batches = order[: steps * size].reshape(steps, size)
    # Adam starts from zeros; compiling its own init takes longer than making them.
    moments = jax.eval_shape(_optimizer(steps).init, params)
    state = params, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), moments)
    on_device = jnp.asarray(images), jnp.asarray(labels)
    with progress_bar(steps, "steps of the classifier", shown=is_main_process(), delay=2) as advance:
        for first in range(0, steps, _STEPS_PER_CHUNK):
            chunk = batches[first : first + _STEPS_PER_CHUNK]
            state = jax.block_until_ready(_train(steps, state, *on_device, chunk))
            advance(len(chunk))
    return state[0]


def accuracy(params: Params, images: np.ndarray, labels: np.ndarray) -> float:
    """The fraction of images whose most likely class is their label.

    Args:
      params: from `train_classifier`; of several processes, replicated (`sharding.replicate`).
      images: uint8 [N,H,W,C], N ≥ 1, in memory or mapped, of the size that the classifier was trained on.
      labels: integers [N].

    Returns:
      A number in [0, 1].

    Raises:
      ValueError: if images or labels are not as above.
    """
    labels = np.asarray(labels)
    _check_labels(labels, len(images))

    def predict(rows):
        # Beyond the last image it is repeated; `map_batches` drops the repetitions.
        batch = images[np.minimum(rows, len(images) - 1)]
        return features_and_logits(params, shard_batch(batch))[1].argmax(axis=1)

    predictions = np.concatenate(list(map_batches(predict, len(images), _ACCURACY_BATCH, progress=False)))
    return float(np.mean(predictions == labels))


@jax.jit
@_full_precision
def features_and_logits(params: Params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The last hidden layer after its ReLU [B,64] and the logits [B, classes], float32, of images uint8 [B,H,W,C]."""
    x = to_unit(images)
    if "conv0_w" in params:
        x = jax.image.resize(x, (len(x), *_convolved_size(*x.shape[1:3]), x.shape[3]), "linear")
        for index in range(sum(name.startswith("conv") for name in params) // 2):
            x = conv2d(x, params[f"conv{index}_w"], 2, ((1, 1), (1, 1))) + params[f"conv{index}_b"]
            x = jax.nn.relu(x)
    x = x.reshape(len(x), -1)  # [B, values]
    values = params["hidden0_w"].shape[0]
    if x.shape[1] != values:
        raise ValueError(f"images must have the classifier's {values} values each, got {images.shape[1:]}")
    for index in range(sum(name.startswith("hidden") for name in params) // 2):
        x = jax.nn.relu(x @ params[f"hidden{index}_w"] + params[f"hidden{index}_b"])
    return x, x @ params["head_w"] + params["head_b"]


def _has_convolutions(shape):
    return min(shape[:2]) >= _MIN_CONVOLVED_SIDE


def _initial_params(rng, shape, num_classes):
    params, widths, inputs = {}, _WIDTHS, math.prod(shape)

    def add_layer(name, shape, gain=2):
        params[f"{name}_w"] = rng.standard_normal(shape) * math.sqrt(gain / math.prod(shape[:-1]))
        params[f"{name}_b"] = np.zeros(shape[-1])

    if _has_convolutions(shape):
        (height, width), inputs, index = _convolved_size(*shape[:2]), shape[2], 0
        while min(height, width) > 4:
            channels = _CHANNELS[min(index, len(_CHANNELS) - 1)]
            add_layer(f"conv{index}", (3, 3, inputs, channels))
            height, width, inputs, index = -(-height // 2), -(-width // 2), channels, index + 1
        widths, inputs = (NUM_FEATURES,), height * width * inputs
    for index, width in enumerate(widths):
        add_layer(f"hidden{index}", (inputs, width))
        inputs = width
    add_layer("head", (inputs, num_classes), gain=1)
    return {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}


def _convolved_size(height, width):
    shrink = max(1.0, max(height, width) / _MAX_CONVOLVED_SIDE)
    return round(height / shrink), round(width / shrink)


def _optimizer(steps):
    return optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, steps))


@functools.partial(jax.jit, static_argnums=0)
def _train(steps, state, images, labels, batches):
    """Weights and moments after a step on each of the batches [steps, B]; `steps` in the whole training."""

    def loss(params, batch):
        logits = features_and_logits(params, images[batch])[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

    def step(state, batch):
        params, moments = state
        updates, moments = _optimizer(steps).update(jax.grad(loss)(params, batch), moments)
        return (optax.apply_updates(params, updates), moments), None

    return jax.lax.scan(step, state, batches)[0]


def _check_labels(labels, count):
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (count,):
        raise ValueError(f"labels must be integers [{count}], got {labels.dtype} {list(labels.shape)}")
