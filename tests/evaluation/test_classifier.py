import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from s2dm_jax.evaluation import classifier
from s2dm_jax.evaluation.classifier import accuracy, features_and_logits, train_classifier
from s2dm_jax.evaluation.metrics import feature_statistics, frechet_distance
from s2dm_jax.models.flops import equations


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = np.floor(data.images * 255 / 16 + 0.5).astype(np.uint8)[..., None]
    order = np.random.default_rng(0).permutation(len(images))
    train, held_out = order[:1297], order[1297:]
    return (images[train], data.target[train]), (images[held_out], data.target[held_out])


@pytest.fixture(scope="module")
def params(digits):
    (images, labels), _ = digits
    return train_classifier(images, labels, num_classes=10)


def features(params, images):
    return np.asarray(features_and_logits(params, images)[0])


def random_images(count, height, width, channels):
    return np.random.default_rng(1).integers(0, 256, (count, height, width, channels), np.uint8)


def test_recognises_held_out_digits(params, digits):
    _, (images, labels) = digits
    assert accuracy(params, images, labels) > 0.96


def test_training_in_chunks_changes_nothing(digits, monkeypatch):
    (images, labels), _ = digits
    in_one = train_classifier(images, labels, num_classes=10, steps=12)
    monkeypatch.setattr(classifier, "_STEPS_PER_CHUNK", 5)
    for name, value in train_classifier(images, labels, num_classes=10, steps=12).items():
        np.testing.assert_array_equal(value, in_one[name])


def test_same_seed_same_parameters_and_another_seed_others(params, digits):
    (images, labels), _ = digits
    again = train_classifier(images, labels, num_classes=10, seed=0)
    assert again.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(again[name], value)
    other = train_classifier(images, labels, num_classes=10, seed=1)
    assert not np.array_equal(other["head_w"], params["head_w"])


def test_features_do_not_depend_on_the_other_images(params, digits):
    _, (images, _) = digits
    together = features(params, images)
    assert together.shape == (500, 64)
    assert together.dtype == np.float32
    np.testing.assert_allclose(features(params, images[250:260]), together[250:260], rtol=1e-5, atol=1e-5)


def test_accuracy_is_the_fraction_of_labels_with_the_largest_logit():
    # Two hidden units are relu(x) and relu(−x) of the first pixel x, the logits these two and ½: the class is
    # 0 for white, 1 for black and 2 for grey.
    first_pixel = np.zeros((64, 2), np.float32)
    first_pixel[0] = 1, -1
    params = {
        "hidden0_w": first_pixel,
        "hidden0_b": np.zeros(2, np.float32),
        "hidden1_w": np.eye(2, dtype=np.float32),
        "hidden1_b": np.zeros(2, np.float32),
        "head_w": np.eye(2, 3, dtype=np.float32),
        "head_b": np.array([0, 0, 0.5], np.float32),
    }
    # More than one batch, and the last is not full.
    labels = np.arange(700) % 3
    images = np.zeros((700, 8, 8, 1), np.uint8)
    images[:, 0, 0, 0] = np.array([255, 0, 128])[labels]
    assert accuracy(params, images, labels) == 1
    labels[[0, 300, 699]] = 2, 1, 2
    assert accuracy(params, images, labels) == 697 / 700
    assert accuracy(params, images, (labels + 1) % 3) == 2 / 700


def test_distance_tells_digits_from_damaged_digits(params, digits):
    (train, train_labels), (held_out, _) = digits
    rng = np.random.default_rng(2)

    def distance(images):
        statistics = feature_statistics(features(params, images))
        return frechet_distance(*statistics, *feature_statistics(features(params, held_out)))

    floor = distance(train[:500])
    noise = np.clip(rng.standard_normal((500, 8, 8, 1)), -1, 1)
    assert distance(np.floor((noise + 1) * 127.5 + 0.5).astype(np.uint8)) > 50 * floor
    assert distance(np.roll(train[:500], 1, axis=2)) > 5 * floor
    assert distance(train[train_labels < 5][:500]) > 3 * floor
    damaged = np.where(rng.random((500, 8, 8, 1)) < 0.1, random_images(500, 8, 8, 1), train[:500])
    assert distance(damaged) > 2 * floor


def test_colour_images_of_another_size():
    images = random_images(40, 12, 9, 3)
    images[20:] //= 4
    labels = np.repeat([0, 1], 20)
    params = train_classifier(images, labels, num_classes=2, steps=20)
    assert accuracy(params, images, labels) == 1
    assert features(params, images).shape == (40, 64)


def test_convolutions_for_larger_images():
    # A bright square left or right, on noise: what a mean over pixels could not tell.
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 60)
    images = rng.integers(0, 120, (60, 18, 20, 3), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[6:12, 12 * label + 1 : 12 * label + 7] += 130
    params = train_classifier(images[:40], labels[:40], num_classes=2, steps=60)
    assert {"conv0_w", "conv2_w", "hidden0_w"} < params.keys()
    assert accuracy(params, images[40:], labels[40:]) > 0.9
    found, logits = features_and_logits(params, images[40:])
    np.testing.assert_allclose(found, features(params, images[40:]), rtol=1e-5, atol=1e-5)
    assert found.shape == (20, 64)
    assert (np.asarray(logits).argmax(1) == labels[40:]).mean() > 0.9
    with pytest.raises(ValueError, match="images must have the classifier's"):
        features(params, random_images(2, 40, 40, 3))


@pytest.mark.parametrize("size", [8, 32])
def test_features_keep_float32_on_accelerators(size):
    images = np.zeros((20, size, size, 3), np.uint8)
    params = train_classifier(images, np.arange(20) % 2, num_classes=2, steps=1)
    program = jax.make_jaxpr(features_and_logits)(params, images)
    kinds = "dot_general", "conv_general_dilated"
    products = [e for e in equations(program.jaxpr) if e.primitive.name in kinds]
    assert len(products) > 2
    for product in products:
        assert product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (
            {"images": np.zeros((4, 8, 8, 1))},
            r"images must be uint8 \[N,H,W,C\].* got float64 \[4, 8, 8, 1\]",
        ),
        ({"images": np.zeros((4, 8, 7, 1), np.uint8)}, r"H and W at least 8, got uint8 \[4, 8, 7, 1\]"),
        ({"images": np.zeros((0, 8, 8, 1), np.uint8)}, "not empty"),
        ({"labels": np.arange(3)}, r"labels must be integers \[4\], got int64 \[3\]"),
        ({"labels": np.zeros(4)}, r"labels must be integers \[4\], got float64 \[4\]"),
        ({"labels": np.array([0, 1, 2, 3])}, r"labels must be in \[0, 3\), got values from 0 to 3"),
        ({"labels": np.array([0, -1, 2, 1])}, r"labels must be in \[0, 3\), got values from -1 to 2"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_bad_training_arguments(replace, message):
    good = {"images": np.zeros((4, 8, 8, 1), np.uint8), "labels": np.array([0, 1, 2, 0]), "num_classes": 3}
    with pytest.raises(ValueError, match=message):
        train_classifier(**(good | replace))


def test_bad_images_and_labels_after_training(params):
    with pytest.raises(ValueError, match="images must have the classifier's 64 values each"):
        features(params, random_images(2, 8, 8, 3))
    with pytest.raises(ValueError, match=r"labels must be integers \[2\]"):
        accuracy(params, random_images(2, 8, 8, 1), np.arange(3))
