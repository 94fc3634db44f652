"""A workdir's run on Weights & Biases, besides metrics.jsonl and TensorBoard; needs wandb, the extra `wandb`."""

import contextlib
import json
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import write_atomic
from s2dm_jax.config.io import to_json

ID_FILE = "wandb_run_id"

# Without a network, the end of a run would wait for the upload for ever.
_FINISH_SECONDS = 60.0


def check_wandb(config: ConfigDict) -> None:
    """Raises a `UserError` if `config.train.wandb` needs a missing package, or the mode "online" a missing login."""
    mode = config.train.wandb
    if not mode:
        return
    with _python_hooks_restored():
        wandb = _import_wandb(mode)
        try:
            ready = mode == "offline" or wandb.login(prompt=False, verify=False)
        except Exception as error:
            # As for a key of the wrong length.
            raise UserError(f"config.train.wandb={mode!r} cannot log in ({_reason(error)}); run wandb login") from error
    if not ready:
        raise UserError(
            f"config.train.wandb={mode!r} needs a login; run wandb login, set WANDB_API_KEY, or choose offline"
        )


class WandbRun:
    """A live run on Weights & Biases, which later trainings in the workdir continue by the id in `ID_FILE`.

    A failure of its service is reported once and ends the logging here, not the training.
    """

    def __init__(self, workdir: Path, config: ConfigDict):
        """Starts the workdir's run, or resumes it.

        Args:
          workdir: the run's folder; wandb's own files are in its folder wandb/.
          config: the run's, logged as W&B's config.

        Raises:
          UserError: if wandb is missing or cannot start the run.
        """
        id_path = workdir / ID_FILE
        run_id = id_path.read_text(encoding="utf-8").strip() if id_path.exists() else ""
        if not run_id:
            run_id = uuid.uuid4().hex
            write_atomic(id_path, f"{run_id}\n")
        with _python_hooks_restored():
            self._wandb = _import_wandb(config.train.wandb)
            online = config.train.wandb == "online"
            if online:
                print("connecting to Weights & Biases …", flush=True)
            self._run = self._start(workdir, config, run_id)
        if online:
            print(f"wandb    {self._run.url}", flush=True)

    def _start(self, workdir: Path, config: ConfigDict, run_id: str) -> Any:
        mode, project = config.train.wandb, config.train.wandb_project
        try:
            return self._wandb.init(
                project=project,
                id=run_id,
                resume="allow",
                name=workdir.resolve().name,
                dir=str(workdir),
                mode=mode,
                config=json.loads(to_json(config)),
                allow_val_change=True,
                settings=_settings(self._wandb, mode),
            )
        except Exception as error:
            raise UserError(
                f"config.train.wandb={mode!r} cannot start run {run_id} of config.train.wandb_project={project!r} "
                f"({_reason(error)}); fix that, or choose offline and upload it later with wandb sync"
            ) from error

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Logs `values` after `step` steps.

        A resumed run computes steps again, to the same numbers: wandb ignores those that its run has.
        """
        self._attempt(lambda run: run.log(values, step=step))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Logs an image, uint8 [H, W, C]."""
        self._attempt(lambda run: run.log({name: self._wandb.Image(image)}, step=step))

    def results(self, results: dict) -> None:
        """Puts the numbers of an evaluation, `evaluate.evaluate`'s, into the run's summary."""
        summary = {}
        for row in results["rows"]:
            place = f"eval/{row['name']}" + (f"/nfe_{row['nfe']}" if row["nfe"] else "")
            numbers = {key: value for key, value in row.items() if isinstance(value, float)}
            summary.update({f"{place}/{key}": value for key, value in numbers.items()})
        for variance, bound in results.get("bits_per_dim", {}).get("variances", {}).items():
            summary[f"eval/bits_per_dim/{variance}"] = bound["bits_per_dim"]
        self._attempt(lambda run: run.summary.update(summary))

    def close(self) -> None:
        """Ends the run; as failed, if called while an exception propagates."""
        failed = sys.exc_info()[0] is not None
        self._attempt(lambda run: run.finish(exit_code=int(failed)))
        if self._run is None:
            # At the exit of the process, wandb would report the same failure with a traceback.
            with contextlib.suppress(Exception, SystemExit):
                self._wandb.teardown()

    def _attempt(self, action: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            self._run = None
            print(
                f"warning: Weights & Biases accepts no more data from this run ({_reason(error)}); "
                "training is not affected, and metrics.jsonl has every metric",
                file=sys.stderr,
            )


def _import_wandb(mode: str) -> Any:
    try:
        import wandb
    except ImportError:
        wandb = None
    # A folder wandb/ in the current one, as wandb itself leaves, is a package without anything in it.
    if not hasattr(wandb, "init"):
        raise UserError(f"config.train.wandb={mode!r} needs wandb; install it with pip install 's2dm_jax[wandb]'")
    wandb.setup(settings=_settings(wandb, mode))
    return wandb


@contextlib.contextmanager
def _python_hooks_restored() -> Iterator[None]:
    """wandb replaces these hooks to learn how the process ends, which `WandbRun.close` says."""
    hooks = sys.excepthook, sys.exit
    try:
        yield
    finally:
        sys.excepthook, sys.exit = hooks


def _settings(wandb: Any, mode: str) -> Any:
    """Nothing printed, no output captured, no wait without an end, and a run that the user has open left alone."""
    return wandb.Settings(
        mode=mode,
        silent=True,
        console="off",
        reinit="create_new",
        finish_timeout=_FINISH_SECONDS,
        finish_timeout_raises=True,
    )


def _reason(error: Exception) -> str:
    """The first line of an error's text, or else its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]
