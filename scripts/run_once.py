"""Runs commands of `s2dm_jax.main` unless their results exist: what scripts with many runs share."""

import json
import shlex
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from s2dm_jax.common.cli import run_command
from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import read_json, write_atomic

# The config file that the comparisons train by default.
DIGITS = "configs/digits.py"


class RunFailed(UserError):
    """A run whose command failed or measured no distance; `reason` is one sentence from the command itself."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def main_command(*flags: str) -> list[str]:
    """The command that runs `s2dm_jax.main` with these flags."""
    return [sys.executable, "-m", "s2dm_jax.main", *flags]


def shell_line(command: Sequence[str]) -> str:
    """A command as it can be pasted into a shell, without the path of the interpreter."""
    return shlex.join(["python", *command[1:]])


def print_command(command: Sequence[str]) -> None:
    """Prints the `shell_line` of a command."""
    print(shell_line(command), flush=True)


def mean_cell(values: Sequence[float | None], sign: str = "") -> str:
    """Mean ± standard deviation of at least 2 values as a cell of a table; "–" where one is missing."""
    present = [value for value in values if value is not None]
    if len(present) < max(len(values), 2):
        return "–"
    return f"{statistics.mean(present):{sign}.2f} ± {statistics.stdev(present):.2f}"


def say_gaps(name: str, results: dict) -> None:
    """Prints the notes of results that lack a distance."""
    if any("frechet_distance" not in row for row in results["rows"]):
        print(f"{name} has no distance for some rows: {'; '.join(results['provenance']['notes'])}", file=sys.stderr)


def run_once(result_path: Path, workdir: Path, commands: Sequence[list[str]], nfe: Sequence[int] | None = None) -> dict:
    """The results of a run, after the commands that train and evaluate it, which are skipped if they are
    stored.

    Args:
      result_path: where the workdir's results.json is stored after the last command.
      workdir: the run that the commands train or evaluate.
      commands: run one after another.
      nfe: the NFE that the stored results must have; None: not checked.

    Raises:
      UserError: if a command fails or measures no distance, or the stored results have other NFE.
    """
    results = stored_results(result_path, nfe)
    if results is None:
        results = run_commands(result_path, workdir, commands)
        check_nfe(result_path, results, nfe)
    return results


def constant_rate(config: str) -> list[str]:
    """Flags that train a config at a constant learning rate, so that a run can be evaluated and then trained further.

    They have the digits' batch and learning rate with which the documented comparisons were made.
    """
    flags = {"lr_schedule": "constant", "lr_end": 0, "decay_steps": 0}
    if config == DIGITS:
        flags |= {"batch_size": 64, "lr": 1e-3}
    return [f"--config.train.{name}={value}" for name, value in flags.items()]


def stored_results(path: Path, nfe: Sequence[int] | None = None) -> dict | None:
    """The results stored at a path; None where there are none.

    Raises:
      UserError: for results without a distance, or with other NFE.
    """
    results = read_json(path, ("rows",), "the run is repeated")
    if results is not None:
        _check_distances(path, results)
        check_nfe(path, results, nfe)
    return results


def run_commands(
    result_path: Path,
    workdir: Path,
    commands: Sequence[list[str]],
    *,
    log: Path | None = None,
    inherited: Sequence[int] = (),
) -> dict:
    """Runs the commands of a run, stores its results at `result_path` and returns them.

    Args:
      log, inherited: of `run_command`.

    Raises:
      RunFailed: if a command fails or measures no distance.
    """
    for command in commands:
        print_command(command)
        start = log.stat().st_size if log and log.exists() else 0
        status = run_command(command, **({"log": log, "inherited": inherited} if log else {}))
        if status:
            raise RunFailed(
                f"{workdir} could not be trained or evaluated (the command above reports the reason); fix "
                "it and rerun this script to resume",
                _reason(log, start, status),
            )
    return _take_results(result_path, workdir / "results.json", log)


def _take_results(result_path: Path, made: Path, log: Path | None) -> dict:
    """Stores the results that a command has made at `result_path`, and returns them."""
    if not made.exists():
        sentence = (
            f"{made.parent} has no results: the command above measured no distance and reports the reason; fix it and "
            "rerun this script to resume"
        )
        raise RunFailed(sentence, why_unmeasured(log))
    text = made.read_text(encoding="utf-8")
    results = json.loads(text)
    _check_distances(made, results)
    result_path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(result_path, text)
    return results


def _reason(log: Path | None, start: int, status: int) -> str:
    """Why a command failed: its last error in the log from byte `start` on, else how it ended."""
    if log:
        with log.open("rb") as file:
            file.seek(start)
            lines = file.read().decode("utf-8", "replace").splitlines()
        if errors := [line for line in lines if line.startswith("error: ")]:
            return errors[-1].removeprefix("error: ")
        if lines and "Traceback (most recent call last):" in lines:
            return lines[-1]
    number = -status if status < 0 else status - 128
    if number in set(signal.Signals):
        return f"the command was terminated by {signal.Signals(number).name}"
    return f"the command exited with status {status}"


def why_unmeasured(log: Path | None) -> str:
    """Why a command that succeeded left no results, by its log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log and log.exists() else []
    found = [line for line in lines if "no distance to real images is measured" in line]
    return found[-1] if found else "the command measured no distance; its output has the reason"


def check_nfe(path: Path, results: dict, nfe: Sequence[int] | None) -> None:
    """Raises a `UserError` where results were not measured at these NFE."""
    if nfe is not None and results["eval"]["nfe"] != list(nfe):
        raise UserError(
            f"{path} was made with --nfe={','.join(map(str, results['eval']['nfe']))}; give the same --nfe, or another "
            "DIR"
        )


def _check_distances(path: Path, results: dict) -> None:
    """Raises a `RunFailed` where no row has a distance; single gaps are left in a table."""
    if not any("frechet_distance" in row for row in results["rows"]):
        names, notes = ", ".join(row["name"] for row in results["rows"]), "; ".join(results["provenance"]["notes"])
        reason = f"no distance was measured for {names} ({notes})"
        raise RunFailed(f"{path} has no distance for {names} ({notes}); fix the cause and give another DIR", reason)


def parse_nfe(text: str) -> list[int]:
    """The integers in --nfe, as "5,10"; a `UserError` for anything else."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise UserError(f"--nfe={text} is out of range: it must be integers from 1, comma-separated, such as 5,10,20")
    return [int(part) for part in parts]
