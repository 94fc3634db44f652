"""Shows in minutes what a GPU does with this project: whether it computes the right numbers, how fast, why, and how the
objectives compare.

  right     golden values of the published code, bfloat16, K timesteps in one call, exact resume, exported samplers
  fast      train steps beside PyTorch, sampling, Inception features, 50,000 images; rates, memory, compile times
  why       the most expensive kernels and the idle time of a train step; XLA options one by one
  evidence  short trainings with each objective, equal in time, compared at 10, 20 and 50 evaluations; needs --images

Each stage has a share of the time and processes of its own. Every part of a stage writes its result to OUT/STAGE.json
and a line to OUT/summary.md as soon as it ends; one that fails leaves its last 40 lines there, and the next one starts.

examples:
  python scripts/benchmarks/gpu.py --seconds=480 --images=cifar10_jpeg.tar.xz --out=gpu_h100
  python scripts/benchmarks/gpu.py --only=right,fast.cifar10 --out=gpu_h100_again
  python scripts/benchmarks/gpu.py --device=cpu --tiny --out=rehearsal
"""

import argparse
import datetime
import functools
import importlib
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from gpu_stages.parts import Part, Settings
from gpu_stages.records import SUMMARY, Records, say
from gpu_stages.supervise import Job, run_job

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import user_path
from s2dm_jax.common.report import report_user_errors
from s2dm_jax.data.sources import check_source, list_images
from s2dm_jax.data.splits import split_and_label
from s2dm_jax.workdir.metadata import git_commit


class Stage(NamedTuple):
    """A stage: the share of the time that is over when it ends, and how many of its parts run at once."""

    until: float
    processes: int


# Correctness needs no quiet machine; everything else is measured.
STAGES = {
    "right": Stage(0.16, 6),
    "fast": Stage(0.6, 1),
    "why": Stage(0.78, 1),
    "evidence": Stage(1.0, 1),
}
# The time boxes of the parts are meant for a run of this length.
_USUAL_SECONDS = 480
_TINY_PROCESSES = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--seconds", type=float, default=_USUAL_SECONDS, help="time for all stages (default: 480)")
    parser.add_argument("--images", type=Path, help="archive or folder of CIFAR-10's images, for the stage evidence")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="device (default: gpu)")
    parser.add_argument(
        "--tiny", action="store_true", help="rehearse with small networks (the figures are not meaningful)"
    )
    parser.add_argument("--only", default="", help="stages and parts to run, such as right,fast.cifar10 (default: all)")
    parser.add_argument(
        "--resume", type=Path, help="results of an earlier run, whose evidence is continued (default: OUT)"
    )
    parser.add_argument("--commit", help="commit of this code, if there is no git repository")
    arguments = parser.parse_args()
    # A time limit of the caller's, or a terminal that is closed, ends the workers too.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit)
    with report_user_errors():
        sys.exit(run(arguments))


def _exit(number: int, _: Any) -> None:
    # What follows, such as a second one, must not keep the workers from being ended.
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def run(arguments: argparse.Namespace) -> int:
    """Runs the stages and returns the exit status: 1 if a part was wrong, failed or timed out."""
    began = time.time()
    selected = select_parts(arguments.only)
    read_paths(arguments)
    _check(arguments, "evidence" in selected)
    about = {
        "date": datetime.date.today().isoformat(),
        "commit": arguments.commit or git_commit(),
        "seconds": arguments.seconds,
        "tiny": arguments.tiny,
    }
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        records = Records(arguments.out, {stage: list(parts) for stage, parts in selected.items()}, about)
    except OSError as error:
        raise UserError(f"--out={arguments.out} cannot be written ({error.strerror}); give another folder") from error
    stopping, found = threading.Event(), threading.Event()
    # A process that was killed may still write into it.
    with tempfile.TemporaryDirectory(prefix="s2dm_jax_gpu_", ignore_cleanup_errors=True) as scratch:
        try:
            for stage, parts in selected.items():
                settings = Settings(
                    device=arguments.device,
                    tiny=arguments.tiny,
                    out=arguments.out.resolve(),
                    scratch=Path(scratch),
                    resume=(arguments.resume or arguments.out).resolve(),
                    images=arguments.images and arguments.images.resolve(),
                    deadline=began + STAGES[stage].until * arguments.seconds,
                )
                time_scale = 1.0 if arguments.tiny else arguments.seconds / _USUAL_SECONDS
                report = functools.partial(records.add, stage)
                job = Job(_module(stage), parts, settings, report, time_scale, stopping, found)
                processes = STAGES[stage].processes
                run_job(job, min(processes, _TINY_PROCESSES) if arguments.tiny else processes)
        finally:
            records.append_tables()
    failures = records.failures()
    say(f"\n{time.time() - began:.0f} s; summary: {arguments.out / SUMMARY}\n")
    say(f"not right: {', '.join(failures)}\n" if failures else "every part that ran is right\n")
    return 1 if failures else 0


def select_parts(only: str) -> dict[str, dict[str, Part]]:
    """The parts of each stage that `only` names, in order; all if it is empty."""
    tables = {stage: importlib.import_module(_module(stage)).PARTS for stage in STAGES}
    known = [*tables, *(f"{stage}.{name}" for stage, parts in tables.items() for name in parts)]
    wanted = only.split(",") if only else list(tables)
    if unknown := [name for name in wanted if name not in known]:
        raise UserError(f"--only has {unknown[0]!r}; it must name stages or parts of {', '.join(known)}")
    selected = {
        stage: {name: part for name, part in parts.items() if {stage, f"{stage}.{name}"} & set(wanted)}
        for stage, parts in tables.items()
    }
    return {stage: parts for stage, parts in selected.items() if parts}


def _module(stage: str) -> str:
    return f"gpu_stages.{stage}"


def read_paths(arguments: argparse.Namespace) -> None:
    """Makes the paths those that `files.user_path` reads, in place."""
    for name in ("out", "images", "resume"):
        if path := getattr(arguments, name):
            setattr(arguments, name, user_path(path, f"--{name}"))


def _check(arguments: argparse.Namespace, uses_images: bool) -> None:
    """Raises a `UserError` for options that would fail only after minutes."""
    if not arguments.seconds > 0:
        raise UserError(f"--seconds={arguments.seconds:g} is out of range; it must be above 0")
    if arguments.images and not arguments.images.exists():
        raise UserError(f"--images={arguments.images} does not exist; give an archive or a folder of images")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"--out={arguments.out} is a file; give a folder")
    if arguments.resume and not arguments.resume.is_dir():
        raise UserError(f"--resume={arguments.resume} is not a folder; give the --out of an earlier run")
    if arguments.device == "cpu" and not arguments.tiny:
        raise UserError("--device=cpu needs --tiny: the full networks take hours on a CPU")
    if arguments.images and uses_images:
        check_images(arguments.images)


def check_images(images: Path) -> None:
    """Raises a `UserError` for images without classes, or none; it reads the names in an archive."""
    source = str(images)
    try:
        if check_source(source) == "array":
            return
        names = list_images(source).names
    except UserError as error:
        raise UserError(str(error).replace("config.data.source", "--images")) from error
    if len(split_and_label(names).classes if names else ()) < 2:
        found = f"{len(names):,} images without folders by class" if names else "no images"
        raise UserError(f"--images={images} has {found}; give CIFAR-10's, such as train/cat/1.jpg and test/cat/1.jpg")


if __name__ == "__main__":
    main()
