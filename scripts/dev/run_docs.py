"""Executes the code blocks of README.md, CONTRIBUTING.md and docs/*.md, page by page, in order."""

import contextlib
import io
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

from s2dm_jax.common.cli import Parser
from s2dm_jax.common.report import report_user_errors

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_DESCRIPTION = """\
The fence of a code block names its language: sh (commands), python, diff (a change to the package), or text,
which is not executed. A block without a language is sh if every line is a command. Each block is executed
here, or a comment right above it gives the reason why not; anything else is an error:

  <!-- not run: needs a GPU -->

Each page runs in its own folder, which looks like a clone and has the files that pages rely on: PATH, a folder of
40 images; my_images.zip, an archive of them; and, except for the README, runs/digits from the README's first
command. The diffs of a page are applied to its copy of the package first. Its Python blocks share one
namespace; code that a block needs but does not show is in a comment above it:

  <!-- before:
  import jax
  -->

Training and evaluation are shortened by the flags in _SHORT and _SMALL. Installation, pytest and ruff are
left to .ci/run."""
_EXAMPLE = """\
examples (all pages: about 5 minutes of CPU time, two pages in parallel):
  python scripts/dev/run_docs.py
  python scripts/dev/run_docs.py README.md docs/data.md"""

# Flags appended to `python -m s2dm_jax.main`, by mode, and to a script.
_SHORT = {
    "train": [
        "--config.train.steps=4",
        "--config.sample.num_images=4",
        "--config.eval.num_images=16",
        "--config.eval.nfe=10",
    ],
    "sample": ["--config.sample.num_images=4", "--config.sample.noise_stat_images=2"],
    "evaluate": ["--config.eval.num_images=16", "--config.eval.noise_stat_images=2"],
    "export": [],
    "scripts/estimation_gap.py": ["--images=10"],
}
# More of them where another config than the digits' is trained; Inception's weights are not downloaded.
_SMALL = [
    "--config.model.ch=32",
    "--config.model.ch_mult=1,1,1",
    "--config.model.num_res_blocks=1",
    "--config.train.batch_size=4",
    "--config.eval.inception_weights=none",
]
_ENVIRONMENT = {
    # As in tests/conftest.py: most of the time is compiling programs that run once.
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
}
# A command that takes longer must be marked as not run.
_TIMEOUT_SECONDS = 300
_PYTHON = re.compile(r"(\S*/)?python3?")
_COMMAND = re.compile(r"(\S*/)?(python3?|pip|ruff|git|cd|export|srun|sbatch|mpirun|[A-Z_]+=\S*)")


class PageError(Exception):
    """An error on a page, with its place."""


class Block(NamedTuple):
    """A fenced or indented block of code.

    Attributes:
      page: its file.
      line: number of its first line, from 1.
      kind: "sh", "python", "diff", "text", or "" where neither the fence nor the lines determine it.
      text: the code.
      not_run: the reason in the comment above it, or "".
      before: Python to execute first, from the comment above it.
    """

    page: Path
    line: int
    kind: str
    text: str
    not_run: str
    before: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page, in order."""
    above = ""
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            fenced = token.type == "fence"
            not_run = re.search(r"<!-- not run: (.*?\S) -->", above, re.DOTALL)
            before = re.search(r"<!-- before:\n(.*?)-->", above, re.DOTALL)
            yield Block(
                page,
                token.map[0] + 1 + fenced,
                _kind(token.info.strip(), token.content),
                token.content,
                not_run[1] if not_run else "",
                before[1] if before else "",
            )
        above = above + token.content if token.type == "html_block" else ""


def _kind(name: str, text: str) -> str:
    name = {"bash": "sh", "shell": "sh"}.get(name, name)
    starts = [bool(_COMMAND.fullmatch(line.split()[0])) for line in _lines(text)]
    if name == "text":
        # A command in a text block must be named sh.
        return "" if any(starts) else "text"
    if name == "" and starts and all(starts):
        return "sh"
    return name if name in ("sh", "python", "diff") else ""


def _lines(text: str) -> list[str]:
    """The lines without comments and empty lines, after joining those that end in a backslash."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def commands(text: str) -> list[list[str]]:
    """The words of each command in lines of shell; `a && b` are two.

    Raises:
      PageError: for shell beyond a sequence of commands.
    """
    found = []
    for line in _lines(text):
        words = shlex.split(line, comments=True)
        if {"|", ">", "<", ";", "&", "||", "\\"} & set(words) or "<<" in line or "$(" in line:
            raise PageError(f"{line!r} is more than commands joined by &&")
        while "&&" in words:
            found.append(words[: words.index("&&")])
            words = words[words.index("&&") + 1 :]
        found.append(words)
    return found


def arguments(words: list[str]) -> list[str]:
    """The arguments of the Python interpreter, whatever launches it; [] for other commands."""
    python = next((i for i, word in enumerate(words) if _PYTHON.fullmatch(word)), None)
    return [] if python is None else words[python + 1 :]


def done_by_ci(words: list[str]) -> bool:
    """Whether .ci/run covers a command: installation, the test suite, ruff, mypy."""
    args = arguments(words)
    if args[:2] == ["-m", "pytest"]:
        return "slow" not in args
    return args[:2] in (["-m", "venv"], ["-m", "pip"]) or Path(words[0]).name in ("pip", "ruff", "mypy")


def _shortened(args: list[str]) -> list[str]:
    if args[:2] != ["-m", "s2dm_jax.main"]:
        return [*args, *_SHORT.get(args[0], [])]
    flags = dict(word.lstrip("-").partition("=")[::2] for word in args[2:])
    mode, config = flags.get("mode", "train"), flags.get("config", "configs/digits.py")
    small = _SMALL if mode == "train" and not config.startswith("configs/digits.py") else []
    return [*args, *_SHORT[mode], *small]


def make_clone(folder: Path, pages: list[Path]) -> None:
    """Makes `folder` look like a clone: links to every file, copies of the folders that the pages' diffs
    change.
    """
    folder.mkdir(parents=True)
    diffs = [block.text for page in pages for block in blocks(page) if block.kind == "diff"]
    changed = {name.split("/")[0] for text in diffs for name in re.findall(r"^\+\+\+ (\S+)", text, re.M)}
    for entry in ROOT.iterdir():
        if entry.name in changed:
            shutil.copytree(entry, folder / entry.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif not entry.name.startswith(".") and entry.name != "runs":
            (folder / entry.name).symlink_to(entry)
    for text in diffs:
        apply_diff(folder, text)


def apply_diff(folder: Path, text: str) -> None:
    """Applies a diff without line numbers: a hunk's place is found by its text.

    Raises:
      PageError: where the old lines of a hunk are not in the file exactly once.
    """
    for part in re.split(r"^\+\+\+ ", text, flags=re.M)[1:]:
        name, _, body = part.partition("\n")
        path = folder / name
        for hunk in re.split(r"^@@.*\n", body, flags=re.M):
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] in " -")
            new = "".join(line[1:] for line in lines if line[0] in " +")
            content = path.read_text(encoding="utf-8") if path.exists() else ""
            if old and content.count(old) != 1:
                raise PageError(f"{name} has the old lines of the diff {content.count(old)} times:\n{old}")
            path.write_text(content.replace(old, new) if old else content + new, encoding="utf-8")


def make_images(folder: Path) -> None:
    """Writes the images that pages call PATH and my_images.zip."""
    import numpy as np
    from PIL import Image

    (folder / "PATH").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)):
        Image.fromarray(pixels).save(folder / "PATH" / f"{i:02d}.png")
    shutil.make_archive(str(folder / "my_images"), "zip", folder / "PATH")


def run_page(page: Path, folder: Path) -> None:
    """Executes a page's blocks in `folder`, its clone.

    Raises:
      PageError: for a block that is neither executable nor marked, or a command that fails.
    """
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        if block.not_run or block.kind in ("text", "diff"):
            continue
        if block.kind == "python":
            _run_python(block, namespace, folder)
        elif block.kind == "sh":
            for words in commands(block.text):
                if not done_by_ci(words):
                    _run_command(block.place, words, folder)
        else:
            raise PageError(f"{block.place}: name the block sh, python or text, or give the reason why it is not run")


def _run_python(block: Block, namespace: dict, folder: Path) -> None:
    began = time.monotonic()
    # Line numbers of tracebacks are the page's.
    code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")
    here = Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            exec(block.before, namespace)
            exec(code, namespace)
    finally:
        os.chdir(here)
    print(f"{time.monotonic() - began:6.1f} s  {block.place}  Python", flush=True)


def _run_command(place: str, words: list[str], folder: Path) -> None:
    if not _PYTHON.fullmatch(words[0]):
        raise PageError(f"{place}: {words[0]} is not run here; give the reason in a comment above the block")
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *_shortened(words[1:])],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise PageError(f"{place}: {shlex.join(words)} took longer than {_TIMEOUT_SECONDS} s") from error
    print(f"{time.monotonic() - began:6.1f} s  {place}  {shlex.join(words)}", flush=True)
    if done.returncode:
        raise PageError(f"{place}: status {done.returncode} of\n  {shlex.join(words)}\n{done.stdout}")


def run(pages: list[Path]) -> list[str]:
    """Executes pages, two at a time, each in its own process and clone; returns the errors.

    Raises:
      PageError: if the training that all pages rely on fails.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ.update(_ENVIRONMENT, JAX_COMPILATION_CACHE_DIR=str(folder / "compiled"))
        os.environ.update({name: str(folder / name) for name in ("S2DM_JAX_DATA", "S2DM_JAX_CACHE")})
        base = folder / "base"
        make_clone(base, [])
        make_images(base)
        first = ["python", "-m", "s2dm_jax.main", "--config=configs/digits.py", "--workdir=runs/digits"]
        _run_command("first of all", first, base)
        # Fresh processes: each has its own working directory, and imports the package of its clone.
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            return [error for error in pool.map(_run_in_clone, pages, repeat(base)) if error]


def _run_in_clone(page: Path, base: Path) -> str:
    """Executes a page in a clone beside `base`, with its files and runs; returns the error, or ""."""
    clone = base.with_name(page.stem)
    try:
        make_clone(clone, [page])
        for name in ("PATH", "my_images.zip"):
            (clone / name).symlink_to(base / name)
        # A reader of the README starts without runs.
        if page != PAGES[0]:
            shutil.copytree(base / "runs", clone / "runs")
        sys.path.insert(0, str(clone))
        run_page(page, clone)
    except PageError as error:
        return str(error)
    return ""


def main(argv: list[str] | None = None) -> None:
    """Entry point: exit status 1 if a block failed, which ends its page."""
    parser = Parser(_DESCRIPTION, _EXAMPLE)
    parser.add_argument("pages", nargs="*", metavar="PAGE", type=Path, help="Markdown files (default: all)")
    with report_user_errors():
        pages = [page.resolve() for page in parser.parse_args(argv).pages] or PAGES
    try:
        errors = run(pages)
    except PageError as error:
        errors = [str(error)]
    for message in errors:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(bool(errors))


if __name__ == "__main__":
    main()
