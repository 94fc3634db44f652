"""The runs of a sweep: one for each objective, combination of values and seed, checked before any trains."""

import contextlib
import io
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import write_atomic
from s2dm_jax.common.version import __version__
from s2dm_jax.config.command_line import describe_unknown_field
from s2dm_jax.config.defaults import FIELDS
from s2dm_jax.config.io import default_workdir, flatten, split_config
from s2dm_jax.config.presets import full_objective_name
from s2dm_jax.main import training_config
from s2dm_jax.workdir.folder import check_same_run

PLAN = "plan.json"
_SEED = "train.seed"


class Request(NamedTuple):
    """The request on a sweep's command line.

    Attributes:
      config: FILE, or FILE:OBJECTIVE where `objectives` is empty.
      objectives: what may follow the colon; empty for one run of `config` as it is.
      seeds: training seeds.
      vary: the values, as text, of each field that is varied.
      fields: flags --config.GROUP.FIELD=VALUE of all runs.
    """

    config: str
    objectives: list[str]
    seeds: list[int]
    vary: dict[str, list[str]]
    fields: list[str]


class Run(NamedTuple):
    """A training with one evaluation.

    Attributes:
      name: unique; of its results and its log.
      folder: name of the folder it trains in, which runs share that differ in fields of `eval` alone.
      objective: its row in the report, with `values`.
      values: the varied fields as text, by name.
      seed: of the training.
      flags: of `s2dm_jax.main`, but --workdir.
      steps: of the network that is evaluated.
      evaluation: the group `eval` of its config as plain data.
    """

    name: str
    folder: str
    objective: str
    values: dict[str, str]
    seed: int
    flags: list[str]
    steps: int
    evaluation: dict


def split_fields(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags --config.GROUP.FIELD=VALUE of a command line, each as one argument, and the other arguments."""
    fields, others, following = [], [], False
    for index, argument in enumerate(argv):
        if following:
            following = False
        elif match := re.fullmatch(r"--?(no)?config\.([^=]*)(=.*)?", argument, re.DOTALL):
            field = FIELDS.get(match[2])
            # A value after a space, which a field of True or False does not take.
            following = match[3] is None and field is not None and field.type is not bool
            if following and (index + 1 == len(argv) or argv[index + 1].startswith("--")):
                raise UserError(f"{argument} has no value; give {argument}=VALUE")
            fields.append(f"{argument}={argv[index + 1]}" if following else argument)
        else:
            others.append(argument)
    return fields, others


def parse_vary(texts: Sequence[str]) -> dict[str, list[str]]:
    """The values of each field from "train.lr=1e-3,3e-4"; in "model.ch_mult=1,2;1,2,2" semicolons part them.

    Raises:
      UserError: for an unknown field, one that runs do not depend on, one that is named twice, or fewer than two
        values.
    """
    found: dict[str, list[str]] = {}
    for text in texts:
        name, equals, listed = text.partition("=")
        name = name.strip().removeprefix("--").removeprefix("config.")
        if name not in FIELDS:
            raise UserError(f"--vary={text}: {describe_unknown_field(name)}")
        if name == _SEED:
            raise UserError(f"--vary={text}: give seeds with --seeds; the report averages over them")
        if name.startswith(("sample.", "export.")):
            raise UserError(
                f"--vary={text}: config.{name} does not affect the results of a run; give a field of another group"
            )
        if name in found:
            raise UserError(f"--vary={text}: config.{name} is varied twice; give all of its values at once")
        several = FIELDS[name].type is tuple or name in ("eval.samplers", "eval.metrics")
        separator = ";" if ";" in listed or several else ","
        found[name] = [value.strip() for value in listed.split(separator)]
        if not equals or len(found[name]) < 2:
            example = "1,2;1,2,2" if several else "A,B"
            raise UserError(
                f"--vary={text} needs at least two values, such as --vary='{name}={example}'; set a single value with "
                f"--config.{name}=…"
            )
    return found


def parse_seeds(text: str) -> list[int]:
    """The seeds in "0,1,2" or "0-4"; a `UserError` for anything else, and for one that is given twice."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"--seeds={text} is not a list of seeds: it must be integers from 0, such as 0,1,2 or 0-4")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    _check_unique("--seeds", text, seeds)
    return seeds


def parse_objectives(text: str) -> list[str]:
    """The full names of the objectives in "ddpm,s2,s2sa"; a `UserError` for an empty one, and for one named twice."""
    names = [full_objective_name(name.strip()) for name in text.split(",")]
    if not all(names):
        raise UserError(f"--objectives={text} has an empty name; give names such as ddpm,s2_10,sa_2")
    _check_unique("--objectives", text, names)
    return names


def _check_unique(flag: str, text: str, values: Sequence) -> None:
    if twice := [value for value in values if values.count(value) > 1]:
        raise UserError(f"{flag}={text} has {twice[0]} twice; give each once")


def plan_runs(request: Request, out: Path) -> list[Run]:
    """All runs of a sweep in the folder `out`, in order: seed by seed, so that what is done early can be compared.

    Raises:
      UserError: for a run that the main command would refuse, and for values that make two runs one.
    """
    split_config(request.config)
    _check_fields(request)
    runs = []
    for seed in request.seeds:
        for objective in request.objectives or [""]:
            for values in itertools.product(*request.vary.values()):
                runs.append(_run(request, out, objective, dict(zip(request.vary, values, strict=True)), seed))
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            varied = ", ".join(f"{name}={value}" for name, value in run.values.items())
            raise UserError(f"--vary has {varied} twice; give each value once, in one spelling")
    return runs


def _check_fields(request: Request) -> None:
    """The flags of all runs set no field that the sweep sets."""
    if request.objectives and split_config(request.config)[1]:
        raise UserError(f"--config={request.config} names an objective, and so does --objectives; give one of the two")
    for flag in request.fields:
        name = re.sub(r"^--?(no)?config\.", "", flag).partition("=")[0]
        if name == _SEED:
            raise UserError(f"{flag} is not allowed here; use --seeds, as in --seeds={flag.partition('=')[2] or 0}")
        if name in request.vary:
            raise UserError(f"{flag} sets the field that --vary={name}=… varies; give one of the two")


def _run(request: Request, out: Path, objective: str, values: Mapping[str, str], seed: int) -> Run:
    """One run, its config checked as the main command would."""
    config_flag = f"--config={request.config}" + (f":{objective}" if objective else "")
    flags = [config_flag, *request.fields, *(f"--config.{name}={value}" for name, value in values.items())]
    flags.append(f"--config.{_SEED}={seed}")
    # The first check needs a folder, which no run has; the second is against the one that is there.
    config = _checked(flags, out / "runs")
    fields = flatten(config)
    label = objective or Path(default_workdir(request.config)).name
    shown = {name: text_of(fields[name]) for name in values}
    trained = {name: text for name, text in shown.items() if not name.startswith("eval.")}
    folder = _name(label, trained, seed)
    name = _safe("_".join([folder, *_parts({key: text for key, text in shown.items() if key not in trained})]))
    workdir = out / "runs" / folder
    if (workdir / "config.json").exists():
        config = _checked(flags, workdir)
        check_same_run(workdir / "config.json", str(workdir), config)
    evaluation = json.loads(json.dumps(config.eval.to_dict()))
    return Run(name, folder, label, shown, seed, flags, config.eval.checkpoint_step or config.train.steps, evaluation)


def _checked(flags: Sequence[str], workdir: Path) -> Any:
    # The notes on options that a sampler has not come from the run itself.
    with contextlib.redirect_stderr(io.StringIO()):
        return training_config(["sweep", *flags, f"--workdir={workdir}"])


def text_of(value: Any) -> str:
    """A field's value as on the command line."""
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _parts(values: Mapping[str, str]) -> list[str]:
    return [f"{name.split('.')[1]}={value}" for name, value in values.items()]


def _name(label: str, values: Mapping[str, str], seed: int) -> str:
    """A name such as s2_10_lr=0.001_seed0."""
    return _safe("_".join([label, *_parts(values), f"seed{seed}"]))


def _safe(text: str) -> str:
    # Checkpoints cannot be written to a path with brackets or a backslash.
    return re.sub(r"[^\w.+=-]+", "-", text)


def write_plan(out: Path, request: Request, runs: Sequence[Run]) -> None:
    """Writes the plan of a sweep to its folder, `PLAN`."""
    content = {"s2dm_jax": __version__, "request": request._asdict(), "runs": [run._asdict() for run in runs]}
    write_atomic(out / PLAN, json.dumps(content, indent=1) + "\n")


def read_plan(out: Path) -> list[Run]:
    """The runs of the sweep in a folder.

    Raises:
      UserError: where there is none, or it cannot be read.
    """
    path = out / PLAN
    try:
        return [Run(**run) for run in json.loads(path.read_text(encoding="utf-8"))["runs"]]
    except FileNotFoundError as error:
        raise UserError(f"--out={out} holds no sweep; give --config, and what to train") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the plan of a sweep ({error}); give --config and the rest again") from error
