"""Recognises what an unreadable file really is."""

import os
import zipfile


def kind_of_file(path: str | os.PathLike) -> str:
    """What an unreadable data file really is, such as "it is empty"; "" if its first bytes do not show it."""
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, for which git lfs pull fetches the file"
    if start.lstrip()[:1] == b"<":
        return "it is a web page"
    if start.startswith(b"PK\3\4") and not zipfile.is_zipfile(path):
        return "it is cut short"
    return ""
