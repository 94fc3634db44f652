"""The files below a folder, links followed, each listed once."""

import collections
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Tree(NamedTuple):
    """What is below a folder, by relative paths with "/".

    Attributes:
      files: all of them.
      unreadable: the folders that cannot be read, with the reason; links without a suffix that lead nowhere, too.
      repeated: links to folders whose files are among `files` already, such as those that lead back to a parent folder.
    """

    files: list[str]
    unreadable: dict[str, OSError]
    repeated: list[str]


def walk_folder(root: Path, preferred: Callable[[str], bool] = lambda name: False) -> Tree:
    """Everything below a folder; links to folders are followed after all folders, so that none is read twice.

    Links whose names are `preferred` come first, so that their names are the files'.
    """
    tree, seen = Tree([], {}, []), set()
    folders, links = [""], collections.deque[str]()
    while folders or links:
        relative = folders.pop() if folders else links.popleft()
        try:
            status = (root / relative).stat()
            if (status.st_dev, status.st_ino) in seen:
                tree.repeated.append(relative)
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(root / relative), key=lambda entry: entry.name)
        except OSError as error:
            tree.unreadable[relative] = error
            continue
        first: list[str] = []
        for entry in entries:
            name = f"{relative}/{entry.name}" if relative else entry.name
            if entry.is_dir(follow_symlinks=False):
                folders.append(name)
            elif entry.is_symlink() and os.path.isdir(entry.path):
                (first if preferred(entry.name) else links).append(name)
            elif entry.is_symlink() and not os.path.exists(entry.path) and not os.path.splitext(name)[1]:
                tree.unreadable[name] = OSError(errno.ENOENT, "a link that leads nowhere")
            else:
                tree.files.append(name)
        folders += first
    return tree
