"""Training and held-out images and labels, inferred from the paths of the images."""

import re
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

_HELD_OUT_FRACTION = 0.1
# Names of folders, as train, Training, train2017; test, val, validation, dev, held-out.
_TRAIN_WORD = r"train(?:ing)?"
_HELD_OUT_WORD = r"(?:test(?:ing)?|val(?:id(?:ation)?)?|eval(?:uation)?|dev|held[-_]?out|holdout)"
_TRAIN = re.compile(rf"{_TRAIN_WORD}[-_]?\d*", re.IGNORECASE)
_HELD_OUT = re.compile(rf"{_HELD_OUT_WORD}[-_]?\d*", re.IGNORECASE)
# As in train_64x64 beside valid_64x64, seg_train beside seg_test, trainA beside testA: what is around the word.
_AROUND = {
    "train": re.compile(rf"(.*){_TRAIN_WORD}(.*)", re.IGNORECASE),
    "held out": re.compile(rf"(.*){_HELD_OUT_WORD}(.*)", re.IGNORECASE),
}
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
    """Split and label of every image, from its relative path with "/"; a folder that cannot be read ends in one.

    Folders that all images share are ignored. At the first level of folders that has names of both kinds, as train/
    and test/ (`_TRAIN`, `_HELD_OUT`), else as seg_train/ and seg_test/ (`_AROUND`), they are the splits, and images
    outside them belong to neither. Without them a tenth of all, drawn with seed 0 from the sorted names, is held out.
    The other folders are the labels, sorted; those of trainA/ and trainB/ are A and B.
    """
    parents = [[p for p in name.split("/")[:-1] if p not in ("", ".", "..")] for name in names]
    while all(parents) and len({parent[0] for parent in parents}) == 1:
        parents = [parent[1:] for parent in parents]
    level, kind_of = _split_level(parents)
    if level is None:
        used, held_out = np.ones(len(names), bool), np.empty(len(names), bool)
        held_out[np.argsort(np.array(names, object), kind="stable")] = held_out_mask(len(names))
        split = f"split    no folders such as train/ and test/: {_drawn(held_out)}"
    else:
        found = [kind_of.get(_folder(parent, level), ("", "")) for parent in parents]
        kinds = np.array([kind for kind, _ in found])
        used, held_out = kinds != "", kinds == "held out"
        split = f"split    {_counts(parents, level, ~held_out & used)} for training, "
        split += f"{_counts(parents, level, held_out)} held out"
        if not used.all():
            split += f"; left out, outside these folders: {_counts(parents, level, ~used)}"
        above = {tuple(parent[:level]) for parent, member in zip(parents, used, strict=True) if member}
        first = level if len(above) == 1 else 0
        several = len({around for _, around in kind_of.values()}) > 1
        label_of = [[around] if several and around else [] for _, around in found]
        parents = [
            parent[first:level] + label + _below(parent, level) for parent, label in zip(parents, label_of, strict=True)
        ]
    folders = np.array(["/".join(parent) or "." for parent in parents], object)
    # Folders of images that belong to no split are no classes, nor are those that cannot be read.
    members = used & np.array([not name.endswith("/") for name in names], bool)
    classes, labels = np.unique(
        np.where(members, folders, folders[members][0] if members.any() else "."), return_inverse=True
    )
    return Splits(used, held_out, labels, classes.tolist(), f"{split}\n{_describe_classes(classes.tolist())}")


def split_array(values: np.ndarray) -> Splits:
    """Split and label of every image of an array, whose labels, integers [N], are mapped to their sorted order.

    A tenth, drawn with seed 0, is held out.
    """
    held_out, (found, labels) = held_out_mask(len(values)), np.unique(values, return_inverse=True)
    classes = list(map(str, found))
    description = f"split    {_drawn(held_out)}\n{_describe_classes(classes)}"
    return Splits(np.ones(len(values), bool), held_out, labels, classes, description)


def _drawn(held_out: np.ndarray) -> str:
    return f"{held_out.sum():,} of {len(held_out):,} images, drawn at random, are held out"


def _describe_classes(classes: list[str]) -> str:
    """The number of classes and the first of their names, in a line."""
    if classes == ["."]:
        return "classes  none: the images are not in folders by class"
    shown = ", ".join(classes[:_MAX_NAMES]) + (", …" if len(classes) > _MAX_NAMES else "")
    return f"classes  {len(classes):,}: {shown}"


def held_out_mask(count: int) -> np.ndarray:
    """Which images are held out if the source has no split: bool [count], a tenth, drawn with seed 0."""
    mask = np.zeros(count, bool)
    mask[np.random.default_rng(0).permutation(count)[: max(1, round(_HELD_OUT_FRACTION * count))]] = True
    return mask


def is_split(path: str) -> bool:
    """Whether a folder of the path has a name as train/ or test/."""
    return any(_TRAIN.fullmatch(name) or _HELD_OUT.fullmatch(name) for name in path.split("/"))


def _split_level(parents: list[list[str]]) -> tuple[int | None, dict[str, tuple[str, str]]]:
    """The level of the folders that are splits, and `_kinds` of them; None if there are none."""
    for level in range(max(map(len, parents), default=0)):
        counts = Counter(_folder(parent, level) for parent in parents)
        kinds = _kinds(counts.keys())
        if kinds and (level == 0 or sum(counts[name] for name in kinds) >= _MIN_SHARE * len(parents)):
            return level, kinds
    return None, {}


def _kinds(folders: Collection[str]) -> dict[str, tuple[str, str]]:
    """Of the folders that are splits "train" or "held out", and what is around that word; empty without both kinds."""
    exact = {name: "train" if _TRAIN.fullmatch(name) else "held out" for name in folders if name and is_split(name)}
    if len(set(exact.values())) == 2:
        return {name: (kind, "") for name, kind in exact.items()}
    found = {kind: {name: _around(name, pattern) for name in folders} for kind, pattern in _AROUND.items()}
    common = {around for around in found["train"].values() if around is not None} & set(found["held out"].values())
    return {name: (kind, around) for kind, each in found.items() for name, around in each.items() if around in common}


def _around(name: str, pattern: re.Pattern) -> str | None:
    """What is before and after the word of a kind in a name, without digits and separators; None without the word."""
    match = pattern.fullmatch(name)
    return None if match is None else re.sub(r"[\d\W_]+", "", match[1] + match[2]).lower()


def _folder(parent: list[str], level: int) -> str:
    return parent[level] if len(parent) > level else ""


def _below(parent: list[str], level: int) -> list[str]:
    """The folders below a split, without repetitions of it, as in train/train/."""
    below = parent[level + 1 :]
    while below and below[0] == parent[level]:
        below = below[1:]
    return below


def _counts(parents: list[list[str]], level: int, members: np.ndarray) -> str:
    """The images of each folder of a level, as "train/ 1,000, training/ 20"."""
    pairs = zip(parents, members, strict=True)
    folders = Counter(_folder(parent, level) for parent, member in pairs if member)
    named = folders.most_common(_MAX_NAMES)
    return ", ".join(f"{folder + '/' if folder else 'no folder'} {count:,}" for folder, count in named)
