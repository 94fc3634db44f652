"""Runs the pieces in several processes, each of which runs many without restarting Python."""

import argparse
import contextlib
import gc
import json
import os
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from findings.pieces import Piece, job_of, stored
from findings.table import EVALUATIONS
from run_once import RunFailed, why_unmeasured
from sweeps.jobs import Job, Outcome, is_under_way, outcome_of, run_job

from s2dm_jax import main
from s2dm_jax.common.compilation_cache import set_compilation_cache
from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import write_atomic
from s2dm_jax.common.version import __version__

# JAX keeps the programs of all runs, of which the next ones use few.
_PIECES_BETWEEN_CLEARING = 10
_SECONDS_OF_WAITING = 0.5
_NUMERICS = ("jax_default_matmul_precision", "XLA_FLAGS")
# Of what is logged along a training.
_LOGGED = ("loss_simple", "loss_skip", "loss_sequence", "grad_norm")


class Worker:
    """A process that makes what is not made yet and not under way in another one.

    Args:
      pieces: in the order in which they are made.
      out: folder of the evidence.
      commit: of this code.
    """

    def __init__(self, pieces: Sequence[Piece], out: Path, commit: str | None):
        self.pieces, self.out, self.commit = {piece.name: piece for piece in pieces}, out, commit
        self.made: set[str] = set()
        self.tried: set[str] = set()
        self.began = time.time()
        self.schedules: dict = {}

    def work(self) -> None:
        """Returns once nothing is left that this process could make.

        Raises:
          SystemExit: after a signal, once the training under way is saved.
        """
        while piece := self._next():
            before = time.monotonic()
            run_job(job_of(piece, self.out), self.out, self._stored, self._run)
            if len(self.tried) % _PIECES_BETWEEN_CLEARING == 0:
                _clear()
            if (found := stored(piece, self.out)) is not None:
                missing = len(left(list(self.pieces.values()), self.out))
                print(f"{piece.name}: {line_of(found)} ({time.monotonic() - before:.0f} s; {missing} left)", flush=True)

    def _stored(self, job: Job) -> dict | None:
        return stored(self.pieces[job.name], self.out)

    def _next(self) -> Piece | None:
        """The first piece that can be made now, after waiting for what other processes make; None for none."""
        while True:
            waits = False
            for piece in self.pieces.values():
                if piece.name in self.tried or self._is_made(piece) or self._has_failed(piece):
                    continue
                if is_under_way(job_of(piece, self.out), self.out):
                    waits = True
                elif piece.needs is None or self._is_made(self.pieces[piece.needs]):
                    return piece
            if not waits:
                return None
            time.sleep(_SECONDS_OF_WAITING)

    def _is_made(self, piece: Piece) -> bool:
        if piece.name not in self.made and stored(piece, self.out) is not None:
            self.made.add(piece.name)
        return piece.name in self.made

    def _has_failed(self, piece: Piece) -> bool:
        """Whether it failed since this process began; what failed before is tried again."""
        path = self.out / "failures" / f"{piece.name}.json"
        return path.exists() and path.stat().st_mtime > self.began

    def _run(self, job: Job, log: Path, lock: TextIO) -> None:
        """Makes a piece and stores its numbers; what is printed goes to the log.

        Raises:
          RunFailed: with the reason.
        """
        piece, began = self.pieces[job.name], time.monotonic()
        self.tried.add(piece.name)
        if piece.needs and not (job.workdir / "config.json").exists():
            reason = (
                f"its network is not in {job.workdir}, because it was trained elsewhere; copy that folder, or remove "
                f"{self.out / 'results' / piece.folder}*.json to train it here"
            )
            raise RunFailed(f"{piece.name}: {reason}", reason)
        with (
            log.open("a", encoding="utf-8") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            try:
                found = self._measure_gap(piece, job) if _is_gap(piece) else self._run_main(job, log)
            except RunFailed:
                raise
            except UserError as error:
                print(f"error: {error}", flush=True)
                raise RunFailed(f"{job.workdir}: {error}", str(error)) from error
            except Exception as error:
                # Another run may be fine: each is isolated from what goes wrong in one.
                traceback.print_exc()
                raise RunFailed(
                    f"{job.workdir}: {error}", f"{type(error).__name__}: {error}".splitlines()[0]
                ) from error
        content = {**_header(piece, self.commit), "seconds": round(time.monotonic() - began, 1), **found}
        job.result_path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(job.result_path, json.dumps(content) + "\n")

    def _run_main(self, job: Job, log: Path) -> dict[str, Any]:
        main.run(job.commands[0][2:])
        results = job.workdir / "results.json"
        if not results.exists():
            raise RunFailed(f"{job.workdir} has no results", why_unmeasured(log))
        return compact(json.loads(results.read_text(encoding="utf-8")), curve_of(job.workdir / "metrics.jsonl"))

    def _measure_gap(self, piece: Piece, job: Job) -> dict[str, Any]:
        import jax
        from estimation_gap import measure

        start, images = (int(flag.partition("=")[2]) for flag in piece.flags)
        options = argparse.Namespace(start=start, images=images, split="held_out", eta=1.0, seed=0, batch_size=100)
        found = measure(str(job.workdir), self.schedules, options)
        shown = {name: found[name] for name in ("step", "data", "t", "rms", "rms_of_mean")}
        return {"device": jax.devices()[0].device_kind, "jax": jax.__version__, **shown}


def _is_gap(piece: Piece) -> bool:
    return EVALUATIONS[piece.evaluation].kind == "gap"


def _header(piece: Piece, commit: str | None) -> dict[str, Any]:
    return {
        "training": piece.training,
        "evaluation": piece.evaluation,
        "seed": piece.seed,
        "flags": piece.flags,
        "commit": commit,
        "s2dm_jax": __version__,
    }


def compact(results: dict, curve: dict[str, list[float]]) -> dict[str, Any]:
    """What the report needs of results.json, and what was logged along the training."""
    provenance = results["provenance"]
    shown = ("metric", "distance", "num_images", "jax", "device", "activations", "notes", *_NUMERICS)
    return {
        "step": results["step"],
        **{name: provenance[name] for name in shown if name in provenance},
        "rows": results["rows"],
        **({"bits_per_dim": _without_terms(results["bits_per_dim"])} if "bits_per_dim" in results else {}),
        "along": curve,
    }


def _without_terms(bound: dict) -> dict[str, Any]:
    variances = bound["variances"].items()
    return {"variances": {name: {k: v for k, v in found.items() if k != "terms"} for name, found in variances}}


def curve_of(path: Path) -> dict[str, list[float]]:
    """What was logged along a training, by name, with the steps as "step"."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    lines = [line for line in lines if "loss_simple" in line]
    names = [name for name in _LOGGED if all(name in line for line in lines)]
    return {name: [line[name] for line in lines] for name in ("step", *names)} if lines else {}


def line_of(found: dict) -> str:
    """The numbers of a piece on one line."""
    if "rows" not in found:
        return f"gap {found['rms'][-1]:.4f}"
    if "bits_per_dim" in found:
        bounds = found["bits_per_dim"]["variances"].items()
        return ", ".join(f"{bound['bits_per_dim']:.3f} bits/dim ({name} variance)" for name, bound in bounds)
    cells = [f"{row['frechet_distance']:.2f}" for row in found["rows"] if row["nfe"] and "frechet_distance" in row]
    return " / ".join(cells) or "no distance"


def _clear() -> None:
    import jax

    jax.clear_caches()
    gc.collect()


def left(pieces: Sequence[Piece], out: Path) -> list[Piece]:
    """The pieces that are not finished."""
    return [piece for piece in pieces if stored(piece, out) is None]


def outcome(pieces: Sequence[Piece], out: Path) -> Outcome:
    """The results of the finished pieces, why others failed, and which are left, by name."""
    by_name = {piece.name: piece for piece in pieces}
    return outcome_of([job_of(piece, out) for piece in pieces], out, lambda job: stored(by_name[job.name], out))


def set_environment(processes: int, number: int | None = None) -> None:
    """What JAX reads before it is imported, where the user has not set it; process `number` takes its share of cores.

    Two processes of one thread each make more steps a second on a CPU than one of two threads, or two that compete.
    """
    if number is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[number % len(cores) :: processes])
    # Float32 on every device, where a GPU would round to TF32: L_skip moves the output by a few tenths of a percent.
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    if processes > 1:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    set_compilation_cache()
