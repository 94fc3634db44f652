"""What a file is that cannot be read as what it should be."""

import os
import zipfile


def kind_of_file(path: str | os.PathLike) -> str:
    """What a file that cannot be read is in the place of data, as "it is empty"; "" if its start does not tell."""
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, and git lfs pull fetches the file"
    if start.lstrip()[:1] == b"<":
        return "it is a web page"
    if start.startswith(b"PK\3\4") and not zipfile.is_zipfile(path):
        return "it is cut short"
    return ""
