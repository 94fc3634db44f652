"""The datasets by name: one entry here and a file in `configs/` make a dataset."""

from typing import NamedTuple


class DatasetSpec(NamedTuple):
    """A dataset.

    Attributes:
      size: height and width in pixels.
      channels: 1 (grey) or 3 (RGB).
      title: its name in the provenance.
      builder: its name in tensorflow-datasets; empty for a bundled dataset, or one whose images only come from
        `data.source`.
      manual_files: what to download by hand if the automatic download fails.
      downloadable: whether there is an automatic download.
      crop: what `data.crop="auto"` stands for; one of CROPS. Only a dataset with a crop takes others.
      max_size: largest size that its images have, or None if any can be made.
      label: the builder's feature that is the class; empty for none.
      binary_attributes: attributes whose values, as bits, make the label if the builder has no labels.
      classes: names of those labels.
      bundled: whether it comes with a dependency and needs no preparation.
    """

    size: int
    channels: int
    title: str
    builder: str = ""
    manual_files: str = ""
    downloadable: bool = True
    crop: str = "none"
    max_size: int | None = None
    label: str = "label"
    binary_attributes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    bundled: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels, channels."""
        return self.size, self.channels


DATASETS = {
    "digits": DatasetSpec(8, 1, "digits of scikit-learn", bundled=True),
    "cifar10": DatasetSpec(32, 3, "CIFAR-10", "cifar10", "cifar-10-binary.tar.gz"),
    "celeba": DatasetSpec(
        64,
        3,
        "CelebA",
        "celeb_a",
        "img_align_celeba.zip, list_eval_partition.txt, list_attr_celeba.txt, "
        "list_landmarks_align_celeba.txt and identity_CelebA.txt",
        crop="ddim",
        binary_attributes=("Male", "Smiling"),
        classes=("female", "male", "female, smiling", "male, smiling"),
    ),
    "celebahq": DatasetSpec(
        256, 3, "CelebA-HQ 256", "celeb_a_hq/256", "data256x256.tar", downloadable=False, max_size=256
    ),
    "ffhq": DatasetSpec(64, 3, "FFHQ"),
    "afhqv2": DatasetSpec(64, 3, "AFHQv2"),
    "lsun": DatasetSpec(256, 3, "LSUN"),
}

# What `data.transforms.crop_box` cuts out.
CROPS = ("none", "center", "ddim", "center_crop_140")

# Pillow's filters by name, in lower case.
RESIZE_FILTERS = ("bilinear", "bicubic", "lanczos", "box")
