"""A small archive of images in two classes, for rehearsals of the stage `evidence` without CIFAR-10."""

import io
import tarfile
from pathlib import Path

_COUNTS = {"train": 150, "test": 50}
_SIZE = 32


def synthetic_archive(folder: Path) -> Path:
    """Makes a tar of 400 JPEGs of 32 × 32 pixels in train/ and test/, warm stripes and cold discs, if it is missing."""
    import numpy as np
    from PIL import Image

    path = folder / "synthetic.tar"
    if path.exists():
        return path
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:_SIZE, :_SIZE] / _SIZE

    def stripes():
        wave = 0.5 + 0.5 * np.sin(2 * np.pi * (rng.uniform(2, 4) * rows + rng.uniform()))
        return wave[..., None] * np.array([255, 160, 40])

    def disc():
        centre = rng.uniform(0.3, 0.7, 2)
        inside = np.hypot(rows - centre[0], columns - centre[1]) < rng.uniform(0.15, 0.3)
        return np.where(inside[..., None], [40, 120, 255], [10, 10, 60])

    with tarfile.open(path, "w") as archive:
        for split, count in _COUNTS.items():
            for name, draw in {"stripes": stripes, "disc": disc}.items():
                for index in range(count):
                    pixels = np.clip(draw() + rng.normal(0, 8, (_SIZE, _SIZE, 3)), 0, 255).astype(np.uint8)
                    file = io.BytesIO()
                    Image.fromarray(pixels).save(file, "JPEG", quality=90)
                    member = tarfile.TarInfo(f"{split}/{name}/{index:04d}.jpg")
                    member.size = file.tell()
                    file.seek(0)
                    archive.addfile(member, file)
    return path
