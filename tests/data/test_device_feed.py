"""The same images at the same step, wherever they are placed."""

import math
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import final_state, small_config

from s2dm_jax.common.errors import UserError
from s2dm_jax.data import device_feed as feeds
from s2dm_jax.data.batches import batch_indices
from s2dm_jax.data.device_feed import make_feed
from s2dm_jax.training.loop import train

STEPS, BATCH = 7, 8
KEY = jax.random.key(5)
# 7 steps of 8 images go past two epochs of 21.
IMAGES = np.random.default_rng(0).integers(0, 256, (21, 4, 4, 1), np.uint8)
# Fraction and bytes of a device's memory that lead to each placement.
PLACEMENTS = {
    "replicated": (0.4, 10**6),
    "sharded": (0.4, 4 * IMAGES.nbytes),
    "host": (0.0, 10**6),
}


def images_of(feed, chunks):
    """What the steps see, chunk by chunk."""
    first, seen = 0, []
    for length in chunks:
        batch = feed.batches(first, length)
        seen.append(np.asarray(batch) if feed.images is None else np.asarray(feed.images)[np.asarray(batch)])
        first += length
    return np.concatenate(seen)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_gives_the_rows_of_batch_indices(placement, tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    expected = IMAGES[np.asarray(batch_indices(KEY, 0, STEPS, BATCH, len(IMAGES)))]
    max_fraction, memory = PLACEMENTS[placement]
    for chunks in ([STEPS], [3, 3, 1]):
        feed = make_feed(mapped, KEY, BATCH, STEPS, max_fraction, memory)
        assert feed.placement == placement
        assert (feed.images is None) == (placement == "host")
        np.testing.assert_array_equal(images_of(feed, chunks), expected)
    # The last chunk in the shape of the others.
    last = feed.batches(6, 3)
    assert last.shape[:2] == (3, BATCH)
    assert last.sharding == feed.batches(3, 3).sharding


def test_the_placement_follows_from_the_size_and_the_fraction():
    def placement(max_fraction, memory):
        return make_feed(IMAGES, KEY, BATCH, STEPS, max_fraction, memory).placement

    size = IMAGES.nbytes
    assert placement(0.4, 20 * size) == "replicated"
    assert placement(0.4, 20 * size - 1) == "sharded"
    smallest = math.ceil(size / 0.4 / jax.device_count())
    assert placement(0.4, smallest) == "sharded"
    assert placement(0.4, smallest - 1) == "host"
    assert placement(0.0, 10**9) == "host"


def test_the_summary_names_the_field_that_decides():
    summary = make_feed(IMAGES, KEY, BATCH, STEPS, 0.0, 10**9).summary
    assert "more than config.data.max_device_memory_fraction=0 of " in summary


def test_chunks_too_large_for_a_device_are_refused():
    feed = make_feed(IMAGES, KEY, BATCH, STEPS, 0.0, 100 * IMAGES.nbytes)
    with pytest.raises(UserError, match=r"config\.train\.log_every=7 steps .* lower config\.train\.log_every"):
        feed.batches(0, STEPS)


def test_the_next_chunk_is_read_while_this_one_runs_and_none_past_the_end():
    read = []

    class Watched:
        shape, nbytes = IMAGES.shape, IMAGES.nbytes

        def __len__(self):
            return len(IMAGES)

        def __getitem__(self, rows):
            if not isinstance(rows, int):
                read.append((rows.shape[0], threading.current_thread() is threading.main_thread()))
            return IMAGES[rows]

    batches = feeds._prefetch(Watched(), KEY, BATCH, STEPS, 1.0, 10**9)
    batches(0, 3)
    batches(3, 3).block_until_ready()
    batches(6, 1).block_until_ready()
    devices = jax.device_count()
    assert read == [(length, False) for length in (3, 3, 1) for _ in range(devices)]


PROGRAM = """
import jax, numpy as np
from data.test_device_feed import BATCH, IMAGES, KEY, STEPS, images_of
from s2dm_jax.data.batches import batch_indices, preprocess_batch
from s2dm_jax.data.device_feed import make_feed
expected = IMAGES[np.asarray(batch_indices(KEY, 0, STEPS, BATCH, len(IMAGES)))]
feed = make_feed(IMAGES, KEY, BATCH, STEPS, 0.4, IMAGES.nbytes)
assert feed.placement == "sharded", feed
assert {s.data.shape for s in feed.images.addressable_shards} == {(6, 4, 4, 1)}
np.testing.assert_array_equal(images_of(feed, [3, 4]), expected)
rows = feed.batches(0, 3)
gather = jax.jit(lambda images, rows: preprocess_batch(images[rows[0]])).lower(feed.images, rows).compile()
np.testing.assert_allclose(gather(feed.images, rows), expected[0] / 127.5 - 1, atol=1e-6)
# The devices exchange a batch, never the set.
text = gather.as_text()
assert "all-reduce" in text and "[24,4,4,1]" not in text, text
host = make_feed(IMAGES, KEY, BATCH, STEPS, 0.0, 10**9)
assert {s.data.shape for s in host.batches(0, 3).addressable_shards} == {(3, 2, 4, 4, 1)}
np.testing.assert_array_equal(images_of(host, [3, 3, 1]), expected)
"""


def test_four_devices_each_hold_a_part():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_run_fed_by_the_host_is_that_of_one_fed_from_the_device_also_when_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("S2DM_JAX_DATA", str(tmp_path / "cache"))
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8))
    own = {"data.source": str(tmp_path / "images.npy")}
    train(small_config(**own), tmp_path / "device")
    output = capsys.readouterr().out
    assert "replicated on every device" in output
    assert re.search(
        "no distance to real images is measured: .*needs labels, which .*images.npy does not have, and the weights",
        output,
    )
    host = {**own, "data.max_device_memory_fraction": 0.0}
    train(small_config(**host, **{"train.steps": 3, "train.log_every": 1}), tmp_path / "host")
    train(small_config(**host), tmp_path / "host")
    assert "prefetched by the host" in capsys.readouterr().out
    expected, actual = (final_state(tmp_path / name, small_config()) for name in ("device", "host"))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    np.save(tmp_path / "images.npy", np.zeros((40, 8, 8, 1), np.uint8))
    with pytest.raises(UserError, match="its images have changed"):
        train(small_config(**host), tmp_path / "host")
