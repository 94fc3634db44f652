"""tensorflow-datasets' own CIFAR-10, CelebA and CelebA-HQ with their archives read by Python instead of TensorFlow.

URLs, checksums, versions, features, splits and the keys of the examples are the published builders', so that what is
prepared here is the dataset that they prepare. Importing this module imports tensorflow_datasets.
"""

import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image
from tensorflow_datasets.datasets.celeb_a import celeb_a_dataset_builder as celeb_a
from tensorflow_datasets.datasets.celeb_a_hq import celeb_a_hq_dataset_builder as celeb_a_hq
from tensorflow_datasets.image_classification import cifar

from s2dm_jax.data.archives import list_tar, read_tar
from s2dm_jax.data.transforms import SUFFIXES


class Cifar10(cifar.Cifar10, skip_registration=True):  # type: ignore[call-arg]
    """CIFAR-10 from the binary version's tar: records of a label and 3×32×32 bytes."""

    published_files = cifar.Cifar10.url_infos
    # Of the instance, where a mirror has its own.
    url_infos = published_files

    def _split_generators(self, dl_manager):
        files = self._cifar_info
        archive = dl_manager.download(files.url)
        (names,) = self._members(archive, files.label_files)
        self.info.features["label"].names = names.decode().split()
        return {
            tfds.Split.TRAIN: self._generate_examples("train_", self._members(archive, files.train_files)),
            tfds.Split.TEST: self._generate_examples("test_", self._members(archive, files.test_files)),
        }

    def _members(self, archive: Path, names: Iterable[str]) -> Iterator[bytes]:
        with tarfile.open(archive) as tar:
            for name in names:
                member: Any = tar.extractfile(self._cifar_info.prefix + name)
                yield member.read()

    def _generate_examples(self, split_prefix, filepaths):
        index = 0
        for content in filepaths:
            for record in np.frombuffer(content, np.uint8).reshape(-1, 1 + 3 * 32 * 32):
                image = Image.fromarray(record[1:].reshape(3, 32, 32).transpose(1, 2, 0))
                yield index, {"id": f"{split_prefix}{index:05d}", "image": image, "label": int(record[0])}
                index += 1


class ZipImages:
    """The files of a zip by their names without folders, read on request."""

    def __init__(self, path: Path):
        self._archive = zipfile.ZipFile(path)
        self._members = {member.filename.rpartition("/")[2]: member for member in self._archive.infolist()}

    def __getitem__(self, name: str) -> bytes:
        return self._archive.read(self._members[name])


class CelebA(celeb_a.Builder, skip_registration=True):  # type: ignore[call-arg]
    """CelebA from its zip of aligned faces and four lists."""

    name = "celeb_a"
    pkg_dir_path = epath.Path(celeb_a.__file__).parent
    published_files = celeb_a.Builder.url_infos
    url_infos = published_files

    def _split_generators(self, dl_manager):
        files = dl_manager.download(
            {
                "img_align_celeba": celeb_a.IMG_ALIGNED_DATA,
                "list_eval_partition": celeb_a.EVAL_LIST,
                "list_attr_celeba": celeb_a.ATTR_DATA,
                "landmarks_celeba": celeb_a.LANDMARKS_DATA,
                "identity_celeba": celeb_a.IDENTITY_DATA,
            }
        )
        images = ZipImages(files["img_align_celeba"])
        splits = (tfds.Split.TRAIN, tfds.Split.VALIDATION, tfds.Split.TEST)
        return {split: self._generate_examples(index, files, images) for index, split in enumerate(splits)}


class CelebAHQ(celeb_a_hq.Builder, skip_registration=True):  # type: ignore[call-arg]
    """CelebA-HQ from a tar that was made by hand."""

    name = "celeb_a_hq"
    pkg_dir_path = epath.Path(celeb_a_hq.__file__).parent

    def _split_generators(self, dl_manager):
        archive = dl_manager.manual_dir / self.builder_config.file_name
        return {tfds.Split.TRAIN: self._generate_examples(archive)}

    def _generate_examples(self, archive):
        names = [member.name for member in list_tar(archive)]
        images = {index for index, name in enumerate(names) if name.lower().endswith(SUFFIXES)}
        for index, data in read_tar(archive, names, images):
            if isinstance(data, Exception):
                raise data
            yield names[index], {"image": data, "image/filename": names[index]}


BUILDERS = {builder.name: builder for builder in (Cifar10, CelebA, CelebAHQ)}
