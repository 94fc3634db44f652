"""Runs commands of `s2dm_jax.main` unless their results exist: what scripts with many runs share."""

import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from s2dm_jax.common.cli import run_command
from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import read_json, write_atomic


def main_command(*flags: str) -> list[str]:
    """The command that runs `s2dm_jax.main` with these flags."""
    return [sys.executable, "-m", "s2dm_jax.main", *flags]


def print_command(command: Sequence[str]) -> None:
    """Prints a command as it can be pasted into a shell, without the path of the interpreter."""
    print(shlex.join(["python", *command[1:]]), flush=True)


def mean_cell(values: Sequence[float | None], sign: str = "") -> str:
    """Mean ± standard deviation of at least 2 values as a cell of a table; "–" where one is missing."""
    present = [value for value in values if value is not None]
    if len(present) < len(values):
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
    results = read_json(result_path, ("rows",), "it is made again")
    if results is None:
        for command in commands:
            print_command(command)
            if run_command(command):
                raise UserError(
                    f"{workdir} could not be trained or evaluated; the command above reports why; fix that "
                    "and rerun this script to resume"
                )
        made = workdir / "results.json"
        if not made.exists():
            raise UserError(
                f"{workdir} has no results, for the command above measured no distance, and says why; mend that and "
                "rerun this script, which resumes"
            )
        text = made.read_text(encoding="utf-8")
        _check_distances(made, json.loads(text))
        result_path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(result_path, text)
        results = json.loads(text)
    _check_distances(result_path, results)
    if nfe is not None and results["eval"]["nfe"] != list(nfe):
        raise UserError(
            f"{result_path} was made with --nfe={','.join(map(str, results['eval']['nfe']))}; give the same "
            "--nfe, or another DIR"
        )
    return results


def _check_distances(path: Path, results: dict) -> None:
    """Raises a `UserError` where no row has a distance; single gaps are left in a table."""
    if not any("frechet_distance" in row for row in results["rows"]):
        names, notes = ", ".join(row["name"] for row in results["rows"]), "; ".join(results["provenance"]["notes"])
        raise UserError(f"{path} has no distance for {names} ({notes}); mend that, and give another DIR")


def parse_nfe(text: str) -> list[int]:
    """The integers in --nfe, as "5,10"; a `UserError` for anything else."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise UserError(f"--nfe={text} is out of range: it must be integers from 1, comma-separated, such as 5,10,20")
    return [int(part) for part in parts]
