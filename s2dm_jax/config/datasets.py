"""The data sets by name."""

from typing import NamedTuple

# Pixels of a side, channels.
DATASETS = {"digits": (8, 1), "cifar10": (32, 3), "celeba": (64, 3), "celebahq": (256, 3)}


class Source(NamedTuple):
    """A data set of tensorflow-datasets.

    Attributes:
      builder: its name there.
      title: its name in the provenance.
      files: what to get by hand when the download fails.
    """

    builder: str
    title: str
    files: str


SOURCES = {
    "cifar10": Source("cifar10", "CIFAR-10", "cifar-10-binary.tar.gz"),
    "celeba": Source(
        "celeb_a",
        "CelebA",
        "img_align_celeba.zip, list_eval_partition.txt, list_attr_celeba.txt, "
        "list_landmarks_align_celeba.txt and identity_CelebA.txt",
    ),
    "celebahq": Source("celeb_a_hq/256", "CelebA-HQ 256", "data256x256.tar"),
}

CELEBA_CLASSES = ["female", "male", "female, smiling", "male, smiling"]
