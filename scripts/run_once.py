"""Runs commands of `s2dm_jax.main` unless their results exist: what scripts with many runs share."""

import json
import shlex
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


def run_once(result_path: Path, workdir: Path, commands: Sequence[list[str]], nfe: Sequence[int] | None = None) -> dict:
    """The results of a run, after the commands that train and evaluate it, which are skipped if they are
    stored.

    Args:
      result_path: where the workdir's results.json is stored after the last command.
      workdir: the run that the commands train or evaluate.
      commands: run one after another.
      nfe: the NFE that the stored results must have; None: not checked.

    Raises:
      UserError: if a command fails, or the stored results have other NFE.
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
        result_path.parent.mkdir(parents=True, exist_ok=True)
        text = (workdir / "results.json").read_text(encoding="utf-8")
        write_atomic(result_path, text)
        results = json.loads(text)
    if nfe is not None and results["eval"]["nfe"] != list(nfe):
        raise UserError(
            f"{result_path} was made with --nfe={','.join(map(str, results['eval']['nfe']))}; give the same "
            "--nfe, or another DIR"
        )
    return results
