"""The pieces of the findings, one for each training and each evaluation, all checked before the first one runs."""

import contextlib
import io
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from findings.presets import PRESETS, Preset
from findings.table import EVALUATIONS, FINDINGS, TRAININGS, Finding
from run_once import main_command
from sweeps.jobs import Job
from sweeps.plan import text_of

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import read_json, write_atomic
from s2dm_jax.main import training_config

PLAN = "plan.json"

# Fields that the command line may not set, for they are what is compared.
_SET = ("train.seed", "train.steps", "train.decay_steps", "eval.nfe", "eval.samplers", "eval.metrics")


class Request(NamedTuple):
    """What the runs of a folder have in common.

    Attributes:
      preset: its name.
      config: file in place of the preset's, or "".
      steps: of a training of length 1, in place of the preset's, or 0.
      fields: flags --config.GROUP.FIELD=VALUE of all runs.
    """

    preset: str
    config: str
    steps: int
    fields: list[str]

    @property
    def size(self) -> Preset:
        """The preset with what replaces it."""
        preset = PRESETS[self.preset]
        return preset._replace(config=self.config or preset.config, steps=self.steps or preset.steps)

    @property
    def text(self) -> str:
        """As on the command line."""
        named = {"preset": self.preset, "config": self.config, "steps": self.steps}
        return " ".join([*(f"--{name}={value}" for name, value in named.items() if value), *self.fields])


class Piece(NamedTuple):
    """A training with its first evaluation, or another evaluation of that training.

    Attributes:
      training, evaluation: names in the tables.
      seed: of the training.
      flags: of `s2dm_jax.main`, but --workdir; for the gap START and the number of images.
    """

    training: str
    evaluation: str
    seed: int
    flags: list[str]

    @property
    def folder(self) -> str:
        return f"{self.training}_seed{self.seed}"

    @property
    def name(self) -> str:
        return self.folder + (f"_{self.evaluation}" if self.evaluation else "")

    @property
    def needs(self) -> str | None:
        """Name of the piece that this one needs, or None."""
        return self.folder if self.evaluation else None


def split_arm(arm: str) -> tuple[str, str]:
    """The names of training and evaluation in TRAINING or TRAINING|EVALUATION."""
    training, _, evaluation = arm.partition("|")
    return training, evaluation


def arms_of(finding: Finding) -> list[str]:
    """What a finding compares, each once."""
    return list(dict.fromkeys(arm for pair in finding.pairs for arm in reversed(pair) if arm))


def findings_of(preset: Preset, only: Collection[str] = ()) -> dict[str, Finding]:
    """The findings of a preset by name, in their order: all, or those named; with what it has time for."""
    found = {}
    for name in preset.findings:
        if not only or name in only:
            whole = FINDINGS[name]
            pairs = tuple(pair for pair in whole.pairs if all(_is_short(arm, preset) for arm in pair))
            found[name] = whole._replace(pairs=pairs, seeds=min(whole.seeds, preset.seeds))
    return found


def _is_short(arm: str, preset: Preset) -> bool:
    return not arm or TRAININGS[split_arm(arm)[0]].length <= preset.longest


def plan(request: Request, only: Collection[str] = (), seeds: int | None = None) -> list[Piece]:
    """All pieces, in the order in which they run: seed by seed, so that stopping leaves complete pairs; in a seed as
    the findings come.

    Args:
      only: names of findings; none for all.
      seeds: at most.
    """
    found: dict[str, Piece] = {}
    findings = findings_of(request.size, only).values()
    most = min(max((finding.seeds for finding in findings), default=0), seeds or math.inf)
    for seed in range(int(most)):
        for finding in findings:
            if seed >= finding.seeds:
                continue
            arms = [split_arm(arm) for arm in arms_of(finding)]
            # All that is trained before what is evaluated in other ways.
            for training, evaluation in [(training, "") for training, _ in arms] + arms:
                piece = Piece(training, evaluation, seed, flags_of(request, training, evaluation, seed))
                found.setdefault(piece.name, piece)
    return list(found.values())


def flags_of(request: Request, training: str, evaluation: str, seed: int) -> list[str]:
    """The flags of a piece, later ones counting."""
    size, chosen = request.size, EVALUATIONS[evaluation]
    if chosen.kind == "gap":
        return [f"--start={size.gap[0]}", f"--images={size.gap[1]}"]
    fields: dict[str, Any] = {"eval.nfe": _nfe_of(size, chosen.nfe)}
    fields |= {f"eval.{name}": value for name, value in chosen.fields.items()}
    if evaluation:
        # The run has its own images; those of the command line may have moved.
        given = [
            flag for flag in request.fields if flag.removeprefix("--config.").startswith(("eval.", "data.source="))
        ]
        return ["--mode=evaluate", *given, *_flags(fields)]
    trained = TRAININGS[training]
    steps = trained.length * size.steps
    fields = {
        **size.fields,
        # No grid of samples but the last; a run of several lengths is saved after each.
        "train.sample_every": steps,
        "train.checkpoint_every": size.steps,
        **trained.fields,
        "train.steps": steps,
        "train.decay_steps": steps,
        "train.seed": seed,
        **fields,
    }
    own = _flags({name: value for name, value in fields.items() if name in (*_SET, *trained.fields)})
    shared = _flags({name: value for name, value in fields.items() if name not in (*_SET, *trained.fields)})
    return [f"--config={size.config}:{trained.objective}", *shared, *request.fields, *own]


def _nfe_of(size: Preset, nfe: Sequence[int] | None) -> list[int]:
    return sorted({min(each, size.most_nfe) for each in nfe or size.nfe})


def _flags(fields: Mapping[str, Any]) -> list[str]:
    return [f"--config.{name}={text_of(value)}" for name, value in fields.items()]


def check(request: Request, pieces: Sequence[Piece], out: Path) -> None:
    """Checks each training as the main command would.

    Raises:
      UserError: for one that it would refuse, and for a flag that sets what is compared.
    """
    compared = {*_SET, *(name for training in TRAININGS.values() for name in training.fields)}
    for flag in request.fields:
        name = flag.removeprefix("--").removeprefix("no").removeprefix("config.").partition("=")[0]
        if name in compared or name.startswith("loss."):
            raise UserError(
                f"{flag} sets a field that the findings compare; remove it, or edit scripts/findings/table.py"
            )
    for piece in pieces:
        if not piece.evaluation:
            # The notes on options that a sampler has not come from the run itself.
            with contextlib.redirect_stderr(io.StringIO()):
                training_config(["evidence", *piece.flags, f"--workdir={out / 'runs' / piece.folder}"])


def job_of(piece: Piece, out: Path) -> Job:
    """How a piece is made; those of one training wait for one another."""
    workdir = out / "runs" / piece.folder
    command = main_command(*piece.flags, f"--workdir={workdir}")
    return Job(piece.name, piece.folder, workdir, result_path(piece, out), [command])


def result_path(piece: Piece, out: Path) -> Path:
    """Where the numbers of a piece are stored."""
    return out / "results" / f"{piece.name}.json"


def stored(piece: Piece, out: Path) -> dict | None:
    """The stored numbers of a piece if its flags are the same, else None."""
    found = read_json(result_path(piece, out), ("flags",), "the run is repeated")
    return found if found and found["flags"] == piece.flags else None


def write_plan(out: Path, request: Request) -> None:
    """Writes the request to the folder.

    Raises:
      UserError: for a folder of another request, or of something else.
    """
    if (out / PLAN).exists():
        before = read_plan(out)
        if before != request:
            raise UserError(
                f"--out={out} holds runs of other flags ({before.text}); give the same flags, or another --out"
            )
    elif out.exists() and any(not each.name.startswith(".") for each in out.iterdir()):
        raise UserError(f"--out={out} holds files but no evidence; give a new or an empty folder")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / PLAN, json.dumps(request._asdict(), indent=1) + "\n")


def read_plan(out: Path) -> Request:
    """The request of a folder.

    Raises:
      UserError: where there is none, or it cannot be read.
    """
    try:
        return Request(**json.loads((out / PLAN).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UserError(f"--out={out} holds no evidence; remove --report to create it") from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{out / PLAN} cannot be read ({error}); give another --out") from error
