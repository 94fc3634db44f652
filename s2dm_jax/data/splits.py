"""Training and held-out images and labels, read off the paths of the images."""

import re
from collections import Counter
from typing import NamedTuple

import numpy as np

_HELD_OUT_FRACTION = 0.1
# Names of folders, as train, Training, train2017; test, val, validation, dev, held-out.
_TRAIN = re.compile(r"train(ing)?[-_]?\d*", re.IGNORECASE)
_HELD_OUT = re.compile(r"(test(ing)?|val(id(ation)?)?|eval(uation)?|dev|held[-_]?out|holdout)[-_]?\d*", re.IGNORECASE)
# Below the first level, folders of these names are splits only if they have this share of the images.
_MIN_SHARE = 0.5
_MAX_NAMES = 10


class Splits(NamedTuple):
    """The split and the label of each of N images.

    Attributes:
      used: bool [N], whether the image belongs to a split.
      held_out: bool [N].
      labels: int64 [N].
      classes: the name of each label, "." for no folder.
      description: the split and the classes in words, a line each.
    """

    used: np.ndarray
    held_out: np.ndarray
    labels: np.ndarray
    classes: list[str]
    description: str


def split_and_label(names: list[str]) -> Splits:
    """Split and label of every image, from its relative path with "/".

    Folders that all images share do not count. At the first level of folders that has names of both kinds, as train/
    and test/ (`_TRAIN`, `_HELD_OUT`), they are the splits, and images beside them belong to neither. Without them a
    tenth of all, drawn with seed 0 from the sorted names, is held out. The other folders are the labels, sorted.
    """
    parents = [[p for p in name.split("/")[:-1] if p not in ("", ".", "..")] for name in names]
    while all(parents) and len({parent[0] for parent in parents}) == 1:
        parents = [parent[1:] for parent in parents]
    level = _split_level(parents)
    if level is None:
        used, held_out = np.ones(len(names), bool), np.empty(len(names), bool)
        held_out[np.argsort(np.array(names, object), kind="stable")] = held_out_mask(len(names))
        split = "split    no folders such as train/ and test/: "
        split += f"{held_out.sum():,} of {len(names):,} images, drawn at random, are held out"
    else:
        kinds = np.array([_kind(parent, level) for parent in parents])
        used, held_out = kinds != "", kinds == "held out"
        split = f"split    {_counts(parents, level, ~held_out & used)} for training, "
        split += f"{_counts(parents, level, held_out)} held out"
        if not used.all():
            split += f"; left out, beside them: {_counts(parents, level, ~used)}"
        above = {tuple(parent[:level]) for parent, member in zip(parents, used, strict=True) if member}
        first = level if len(above) == 1 else 0
        parents = [parent[first:level] + parent[level + 1 :] for parent in parents]
    folders = np.array(["/".join(parent) or "." for parent in parents], object)
    # The folders of images that belong to no split are no classes.
    classes, labels = np.unique(np.where(used, folders, folders[used][0] if used.any() else "."), return_inverse=True)
    return Splits(used, held_out, labels, classes.tolist(), f"{split}\n{describe_classes(classes.tolist())}")


def describe_classes(classes: list[str]) -> str:
    """The number of classes and the first of their names, in a line."""
    shown = ", ".join(classes[:_MAX_NAMES]) + (", …" if len(classes) > _MAX_NAMES else "")
    return f"classes  {len(classes):,}: {shown}"


def held_out_mask(count: int) -> np.ndarray:
    """Which images are held out where the source has no split: bool [count], a tenth, drawn with seed 0."""
    mask = np.zeros(count, bool)
    mask[np.random.default_rng(0).permutation(count)[: max(1, round(_HELD_OUT_FRACTION * count))]] = True
    return mask


def _split_level(parents: list[list[str]]) -> int | None:
    for level in range(max(map(len, parents), default=0)):
        kinds = Counter(_kind(parent, level) for parent in parents)
        share = 1 - kinds[""] / len(parents)
        if kinds["train"] and kinds["held out"] and (level == 0 or share >= _MIN_SHARE):
            return level
    return None


def _kind(parent: list[str], level: int) -> str:
    name = parent[level] if len(parent) > level else ""
    return "train" if _TRAIN.fullmatch(name) else "held out" if _HELD_OUT.fullmatch(name) else ""


def _counts(parents: list[list[str]], level: int, members: np.ndarray) -> str:
    """The images of each folder of a level, as "train/ 1,000, training/ 20"."""
    pairs = zip(parents, members, strict=True)
    folders = Counter("".join(parent[level : level + 1]) for parent, member in pairs if member)
    named = folders.most_common(_MAX_NAMES)
    return ", ".join(f"{folder + '/' if folder else 'no folder'} {count:,}" for folder, count in named)
