"""A small image classifier whose features stand in for Inception's where those do not fit or cannot be had.

A Fréchet distance in these features is no FID: it compares only runs that share the classifier. This is a
two-layer perceptron: on 8×8 digits as accurate as a convolutional net with channel means, it sets noise three
times farther apart from real digits, in units of the distance between real digits and real digits.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

NUM_FEATURES = 64
_WIDTHS = (128, NUM_FEATURES)
_TRAIN_BATCH = 64
_FEATURE_BATCH = 256
_LEARNING_RATE = 3e-3

Params = dict[str, jax.Array]


def train_classifier(
    images: np.ndarray, labels: np.ndarray, num_classes: int, seed: int = 0, steps: int = 600
) -> Params:
    """Trains the classifier with Adam; the same arguments give the same parameters.

    Args:
      images: uint8 [N,H,W,C], N ≥ 1, H and W ≥ 8.
      labels: integers [N] in [0, num_classes).
      num_classes: at least 2.
      seed: of the initial weights and the order of the batches.
      steps: at least 1, each on a batch of 64 (or N, if less).

    Returns:
      float32 arrays by name.

    Raises:
      ValueError: where an argument is not as above.
    """
    images, labels = _checked_images(images), np.asarray(labels)
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    _check_labels(labels, len(images))
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels must be in [0, {num_classes}), got values from {labels.min()} to {labels.max()}"
        )

    rng = np.random.default_rng(seed)
    params = _initial_params(rng, math.prod(images.shape[1:]), num_classes)
    # Drawn on the host: jax.random's draws cost more to compile here than the training takes to run.
    size = min(_TRAIN_BATCH, len(images))
    epochs = math.ceil(steps * size / len(images))
    order = np.concatenate([rng.permutation(len(images)) for _ in range(epochs)])
    batches = order[: steps * size].reshape(steps, size)
    return _train(params, jnp.asarray(images), jnp.asarray(labels), jnp.asarray(batches))


def features(params: Params, images: np.ndarray) -> np.ndarray:
    """The classifier's last hidden layer, after its ReLU.

    Args:
      params: from `train_classifier`.
      images: uint8 [N,H,W,C], N ≥ 1, of the size that the classifier was trained on.

    Returns:
      float32 [N,64], ≥ 0, on the host.

    Raises:
      ValueError: where images is not as above.
    """
    images = _checked_images(images)
    values = params["hidden0_w"].shape[0]
    if math.prod(images.shape[1:]) != values:
        raise ValueError(f"images must have the classifier's {values} values each, got {images.shape[1:]}")
    chunks = []
    for start in range(0, len(images), _FEATURE_BATCH):
        chunk = images[start : start + _FEATURE_BATCH]
        # One shape for all chunks, so that one compilation serves any number of images.
        padded = np.zeros((_FEATURE_BATCH, *images.shape[1:]), np.uint8)
        padded[: len(chunk)] = chunk
        chunks.append(np.asarray(_features(params, padded))[: len(chunk)])
    return np.concatenate(chunks)


def accuracy(params: Params, images: np.ndarray, labels: np.ndarray) -> float:
    """The fraction of images whose most likely class is their label.

    Args:
      params: from `train_classifier`.
      images: uint8 [N,H,W,C], as for `features`.
      labels: integers [N].

    Returns:
      A number in [0, 1].

    Raises:
      ValueError: where images or labels are not as above.
    """
    labels = np.asarray(labels)
    _check_labels(labels, len(images))
    logits = features(params, images) @ np.asarray(params["head_w"]) + np.asarray(params["head_b"])
    return float(np.mean(logits.argmax(axis=1) == labels))


def _initial_params(rng, inputs, num_classes):
    params = {}
    for index, width in enumerate(_WIDTHS):
        params[f"hidden{index}_w"] = rng.standard_normal((inputs, width)) * math.sqrt(2 / inputs)
        params[f"hidden{index}_b"] = np.zeros(width)
        inputs = width
    params["head_w"] = rng.standard_normal((inputs, num_classes)) * math.sqrt(1 / inputs)
    params["head_b"] = np.zeros(num_classes)
    return {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}


@jax.jit
def _features(params, images):
    x = images.reshape(len(images), -1).astype(jnp.float32) / 127.5 - 1.0
    for index in range(len(_WIDTHS)):
        x = jax.nn.relu(x @ params[f"hidden{index}_w"] + params[f"hidden{index}_b"])
    return x


@jax.jit
def _train(params, images, labels, batches):
    optimizer = optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, len(batches)))

    def loss(params, batch):
        logits = _features(params, images[batch]) @ params["head_w"] + params["head_b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

    def step(state, batch):
        params, moments = state
        updates, moments = optimizer.update(jax.grad(loss)(params, batch), moments)
        return (optax.apply_updates(params, updates), moments), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), batches)
    return params


def _checked_images(images):
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape or min(images.shape[1:3]) < 8:
        raise ValueError(
            "images must be uint8 [N,H,W,C], not empty, with H and W at least 8, "
            f"got {images.dtype} {list(images.shape)}"
        )
    return images


def _check_labels(labels, count):
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (count,):
        raise ValueError(f"labels must be integers [{count}], got {labels.dtype} {list(labels.shape)}")
