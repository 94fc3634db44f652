"""Small archives in the published formats of CIFAR-10 and CelebA, and a web server on this machine that serves them."""

import contextlib
import hashlib
import http.server
import io
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

# The program of the command line where TensorFlow cannot be imported.
COMMAND_WITHOUT_TENSORFLOW = """
import sys
from importlib.machinery import PathFinder

class WithoutTensorFlow(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "tensorflow" else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTensorFlow
from s2dm_jax.main import main
main()
"""


def small_picture(seed, width, height):
    """A smooth picture: its corners' colours, enlarged."""
    corners = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)


def make_cifar10(folder, per_file=4):
    """cifar-10-binary.tar.gz with `per_file` images in each of its files; returns images and labels of both splits."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6 * per_file, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, 6 * per_file)
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as archive:

        def add(name, data):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))

        for i, name in enumerate([*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]):
            rows = range(per_file * i, per_file * (i + 1))
            add(name, b"".join(bytes([labels[r]]) + images[r].transpose(2, 0, 1).tobytes() for r in rows))
        classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        add("batches.meta.txt", "\n".join(classes).encode() + b"\n\n")
    count = 5 * per_file
    return images[:count], labels[:count], images[count:], labels[count:]


def make_celeba(folder):
    """The five files of CelebA with 14 faces: 8 for training, 2 for validation, 4 for the test."""
    names = [f"{i:06d}.jpg" for i in range(1, 15)]
    decoded = {}
    with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
        archive.writestr("img_align_celeba/", "")
        for i, name in enumerate(names):
            buffer = io.BytesIO()
            small_picture(i, 178, 218).save(buffer, "JPEG", quality=90)
            archive.writestr(f"img_align_celeba/{name}", buffer.getvalue())
            decoded[name] = Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
    split = [0] * 8 + [1] * 2 + [2] * 4
    (folder / "list_eval_partition.txt").write_text(
        "".join(f"{name} {part}\n" for name, part in zip(names, split, strict=True))
    )
    from tensorflow_datasets.datasets.celeb_a import celeb_a_dataset_builder as celeb_a

    def table(file, headings, value):
        rows = "".join(f"{n} {' '.join(str(value(i, h)) for h in headings)}\n" for i, n in enumerate(names))
        (folder / file).write_text(f"{len(names)}\n{' '.join(headings)}\n{rows}")

    def attribute(i, heading):
        wanted = {"Male": i % 2 == 0, "Smiling": i % 3 == 0}
        return 1 if wanted.get(heading) else -1

    table("list_attr_celeba.txt", celeb_a.ATTR_HEADINGS, attribute)
    table("list_landmarks_align_celeba.txt", celeb_a.LANDMARK_HEADINGS, lambda i, h: i)
    (folder / "identity_CelebA.txt").write_text("".join(f"{name} {i}\n" for i, name in enumerate(names)))
    labels = [(i % 2 == 0) + 2 * (i % 3 == 0) for i in range(14)]
    return [decoded[name] for name in names], labels


def write_checksums(folder):
    """Writes what a mirror says of its files."""
    lines = [
        f"http://mirror/{p.name}\t{p.stat().st_size}\t{hashlib.sha256(p.read_bytes()).hexdigest()}\t{p.name}\n"
        for p in sorted(folder.iterdir())
        if p.name != "checksums.tsv"
    ]
    (folder / "checksums.tsv").write_text("".join(lines))


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.split("?")[0].strip("/")
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.server.requests.append((self.path, start))
        plan = self.server.faults.get(name, [])
        fault = plan.pop(0) if plan else None
        path = Path(self.server.folder, name)
        if isinstance(fault, int):
            return self.send_error(fault)
        if isinstance(fault, str):
            return self.answer(200, fault.encode())
        if not path.is_file():
            return self.send_error(404)
        content = path.read_bytes()
        ranges = "Range" in self.headers and fault is not no_ranges
        if ranges and start >= len(content):
            return self.send_error(416)
        content = content[start:] if ranges else content
        return self.answer(206 if ranges else 200, content, sent=len(content) // 2 if fault is cut else None)

    def answer(self, status, content, sent=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:sent])

    def log_message(self, *_):
        pass


def cut():
    """The fault of an answer that ends in the middle."""


def no_ranges():
    """The fault of a server that answers with the whole file whatever it is asked for."""


@contextlib.contextmanager
def mirror(folder):
    """A web server on this machine that serves a folder.

    Its `url`; `requests`, the path and first byte of each; `faults`, for each file what happens to the next requests:
    a status, a page's text, `cut` or `no_ranges`.
    """
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.folder, server.requests, server.faults = folder, [], {}
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
