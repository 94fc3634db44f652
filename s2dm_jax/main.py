"""Trains a run, samples from it, evaluates it, exports its sampler.

  python -m s2dm_jax.main --config=configs/digits.py                           # runs/digits_s2_10+sa_2
  python -m s2dm_jax.main --config=configs/digits.py:ddpm --workdir=runs/digits
  python -m s2dm_jax.main --workdir=runs/digits --config.train.steps=2000      # resumes
  python -m s2dm_jax.main --mode=sample --workdir=runs/digits --config.sample.nfe=20
  python -m s2dm_jax.main --mode=evaluate --workdir=runs/digits --config.eval.nfe=10,20
  python -m s2dm_jax.main --mode=export --workdir=runs/digits

`python -m s2dm_jax` and, once installed, `s2dm-jax` are the same command. Every field of the config is a
flag, --config.GROUP.FIELD=VALUE.
"""

import os
import sys

# As a command; other code that imports this module has its own handlers.
if __name__ == "__main__" or os.path.basename(sys.argv[0]) == "s2dm-jax":
    from s2dm_jax.common.signals import end_on_interrupt

    end_on_interrupt()

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from s2dm_jax.common.compilation_cache import set_compilation_cache
from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import check_writable, user_path
from s2dm_jax.common.jax_environment import check_jax_environment, check_platforms
from s2dm_jax.common.report import report_user_errors
from s2dm_jax.common.signals import end_on_signal, install_handlers, signal_advice
from s2dm_jax.config.command_line import (
    check_processes,
    check_values,
    describe_flag_error,
    describe_stray_argument,
    describe_unknown_field,
    drop_foreign_options,
    reset_fields,
)
from s2dm_jax.config.defaults import FIELDS
from s2dm_jax.config.fields import fields_help
from s2dm_jax.config.io import default_workdir, expand_paths, load_config
from s2dm_jax.config.validate import check_config, check_evaluation_files, check_names
from s2dm_jax.data.cache import check_preparable, prepare_dataset
from s2dm_jax.samplers.specs import sampler_name
from s2dm_jax.training.wandb_run import check_wandb
from s2dm_jax.workdir.folder import evaluation_folder, output_folder, prepare_workdir
from s2dm_jax.workdir.load import check_compared_runs, ema_of_run, inherit_base_config, read_config

# Three ways to set the number of sampling steps: one on the command line replaces another in the config.
_STEP_FIELDS = ("steps", "nfe", "timesteps")

# The groups of a run's config that a mode may change.
_GROUPS = {"sample": ("sample",), "evaluate": ("eval",), "export": ("sample", "export")}

# What is said after a signal that ends the command; `training/loop.py` has its own from the first step on.
_AFTER_SIGNAL = {
    "train": "no new step was trained; run the same command again",
    "sample": "no file was left half-written; run the same command again",
    "evaluate": "the rows measured so far are cached; run the same command to measure the others",
    "export": "nothing was exported; run the same command again",
}


def _define_flags() -> flags.FlagValues:
    """The flags other than the config's fields; in their own object, because absl's is global."""
    values = flags.FlagValues()
    config = "Config FILE[:OBJECTIVE], such as configs/digits.py:s2_10; default: the config of the run in --workdir"
    mode = (
        "Train a run, sample from one (config.sample), evaluate one (config.eval), or export its sampler as one file "
        "(config.sample, config.export)"
    )
    out = "Output folder of the modes sample, evaluate and export; default: the run's own folder"
    address = "Multi-host: HOST:PORT of process 0; not needed under Slurm, under Open MPI and on TPU pods"
    flags.DEFINE_string("config", None, config, values)
    workdir = "Folder of the run, which is resumed if it exists; default: runs/FILE_OBJECTIVE, named after --config"
    flags.DEFINE_string("workdir", None, workdir, values)
    flags.DEFINE_string("out", "", out, values)
    flags.DEFINE_enum("mode", "train", ["train", *_GROUPS], mode, values)
    flags.DEFINE_string("coordinator_address", None, address, values)
    flags.DEFINE_integer("num_processes", None, "Multi-host: number of processes", 1, flag_values=values)
    flags.DEFINE_integer("process_id", None, "Multi-host: index of this process, from 0", 0, flag_values=values)
    flags.DEFINE_boolean("help", False, "Show this help", values, short_name="h")
    return values


def _parse(values: flags.FlagValues, argv: Sequence[str], known_only: bool = False) -> list[str]:
    """Reads the flags of `values`; absl's errors become a `UserError`."""
    try:
        return values(argv, known_only=known_only)
    except (flags.Error, ValueError) as error:
        raise UserError(describe_flag_error(str(error).strip(), values)) from error


def _help(values: flags.FlagValues) -> str:
    own = values.module_help(values.find_module_defining_flag("mode")).split(":\n", 1)[1]
    fields = f"fields of the config (a config file sets its own defaults):\n{fields_help(FIELDS)}"
    return f"{__doc__}\nflags:\n{own}\n\n{fields}"


def _workdir(values: flags.FlagValues) -> str:
    # One that is given empty, as by --workdir=$UNSET, is a mistake.
    if values.workdir is None and values.config:
        return default_workdir(values.config)
    if values.workdir is None and values.mode == "train":
        raise UserError("--config is missing; for example --config=configs/digits.py")
    if not values.workdir:
        raise UserError(f"--workdir is missing; for example --mode={values.mode} --workdir=runs/digits")
    return str(user_path(values.workdir, "--workdir"))


def _out(values: flags.FlagValues) -> str:
    if values.out and values.mode == "train":
        raise UserError(f"--out={values.out} cannot be used with --mode=train, which writes to --workdir")
    return str(user_path(values.out, "--out")) if values.out else ""


def _outputs(mode: str, config: ConfigDict, workdir: str, out: str) -> list[Path]:
    """The folders that a mode writes to."""
    if mode == "sample":
        return [output_folder(workdir, out, "samples")]
    if mode == "evaluate":
        run = evaluation_folder(workdir, out)
        return [run, run / "evaluations", run / "evaluations" / "points"]
    if config.export.path and out:
        raise UserError(
            f"--out={out} cannot be combined with config.export.path={config.export.path}; give one of the two"
        )
    return [Path(config.export.path).parent if config.export.path else output_folder(workdir, out, "exports")]


def _starting_config(values: flags.FlagValues, workdir: str) -> ConfigDict:
    """The config that the command line changes: that of --config, else that of the run in the workdir."""
    is_run = values.mode in _GROUPS or os.path.isfile(f"{workdir}/config.json")
    if values.config is None and is_run:
        return read_config(workdir)
    if values.config is None and os.path.isfile(workdir):
        raise UserError(
            f"--workdir={workdir} is a file, but training needs a folder; an exported sampler can be used with "
            "--mode=sample and --mode=evaluate"
        )
    if not values.config:
        raise UserError("--config is missing; for example --config=configs/digits.py --workdir=runs/digits")
    config = load_config(values.config)
    check_names(config)
    return config


def _set_fields(values: flags.FlagValues, config: ConfigDict, arguments: list[str]) -> list[str]:
    """Sets the config's fields from flags such as --config.train.lr=1e-3; returns the names of those set."""
    for argument in arguments:
        field = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if field and field[1] not in FIELDS:
            raise UserError(describe_unknown_field(field[1]))
    arguments, reset = reset_fields(config, arguments)
    # The file's name has been read: the config itself takes the place of its flag.
    delattr(values, "config")
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
    rest = _parse(values, arguments)
    if len(rest) > 1:
        raise UserError(describe_stray_argument(rest[1], arguments))
    flag: Any = values["config"]
    named = [*flag.override_values, *reset]
    config.sample.sampler = sampler_name(config.sample.sampler)
    if steps := [name for name in _STEP_FIELDS if f"sample.{name}" in named]:
        others = [name for name in _STEP_FIELDS if name not in steps]
        config.sample.update({name: FIELDS[f"sample.{name}"].default for name in others})
    for note in drop_foreign_options(config, named):
        print(f"note: {note}", file=sys.stderr)
    return named


def _read_flags(argv: Sequence[str]) -> tuple[flags.FlagValues, list[str]]:
    """The flags beside the config's fields, and the arguments that are left."""
    values = _define_flags()
    check_values(argv, ("config", "workdir", "out", "mode", "coordinator_address", "num_processes", "process_id"))
    return values, _parse(values, argv, known_only=True)


def _named_config(values: flags.FlagValues, workdir: str, arguments: list[str]) -> tuple[ConfigDict, list[str]]:
    """The config with the fields that the command line sets, unchecked, and their names."""
    config = _starting_config(values, workdir)
    named = _set_fields(values, config, arguments)
    expand_paths(config)
    return config, named


def training_config(argv: Sequence[str]) -> ConfigDict:
    """The checked config that a command would train, from its arguments as in `sys.argv`; writes nothing.

    Raises:
      UserError: for a wrong flag or config.
    """
    values, arguments = _read_flags(argv)
    workdir = _workdir(values)
    config = _training_config(*_named_config(values, workdir, arguments), workdir)
    check_wandb(config)
    return config


def run(argv: Sequence[str]) -> None:
    """Checks the flags, the config and the folder, then does what --mode says; writes nothing before.

    Raises:
      UserError: for a wrong flag, config or folder.
    """
    values, arguments = _read_flags(argv)
    if values.help:
        print(_help(values))
        return
    mode, workdir, out = values.mode, _workdir(values), _out(values)
    config, named = _named_config(values, workdir, arguments)
    check_processes(values, mode)
    if mode == "train":
        config = _training_config(config, named, workdir)
        if not values.process_id:
            check_wandb(config)
        _show_default(values, workdir)
        _prepare_jax()
        prepare_workdir(workdir, config)
        prepare_dataset(config, check_platforms)
    else:
        config = _config_of_run(config, named, mode, workdir)
        check_writable(_outputs(mode, config, workdir, out), "give --out=DIR to write elsewhere")
        _show_default(values, workdir)
        _prepare_jax()
    with signal_advice(_AFTER_SIGNAL[mode]):
        _start(values, config, workdir, out)


def _show_default(values: flags.FlagValues, workdir: str) -> None:
    if values.workdir is None:
        print(f"workdir: {workdir}", flush=True)


def _prepare_jax() -> None:
    """Sets and checks what JAX reads from the environment, before it is imported."""
    # A second start finds the compiled programs and takes seconds; the user's own settings win.
    set_compilation_cache()
    check_jax_environment()


def _start(values: flags.FlagValues, config: ConfigDict, workdir: str, out: str) -> None:
    """Does what --mode says with checked values."""
    mode = values.mode
    # Orbax logs with a traceback what it also raises, and what it raises is reported in one sentence.
    logging.set_verbosity(logging.FATAL)
    # jax takes seconds to import: user errors are reported before.
    if mode == "train":
        from s2dm_jax.devices.distributed import initialize_distributed, noticing_lost_processes
        from s2dm_jax.devices.hardware import check_devices
        from s2dm_jax.training.loop import train

        initialize_distributed(values.coordinator_address, values.num_processes, values.process_id)
        install_handlers()
        check_devices()
        with noticing_lost_processes():
            train(config, workdir)
    elif mode == "evaluate":
        from s2dm_jax.evaluation.evaluate import evaluate_run

        evaluate_run(config, workdir, out)
    elif mode == "sample":
        from s2dm_jax.inference.sample import sample

        sample(config, workdir, out)
    else:
        from s2dm_jax.weights.export import export

        export(config, workdir, out)


def _training_config(config: ConfigDict, named: Iterable[str], workdir: str) -> ConfigDict:
    """The checked config to train; that of a variance head gets the groups of its base run."""
    for name in named:
        if config.variance_head.kind and name.startswith(("data.", "diffusion.", "model.")):
            raise UserError(
                f"--config.{name} cannot be changed with config.variance_head.kind={config.variance_head.kind!r}, "
                "which takes it from the run in config.variance_head.base_workdir"
            )
    config = inherit_base_config(config)
    # A run that is resumed, or the base of a variance head, was trained with its schedule.
    check_config(config, trained=bool(config.variance_head.kind) or os.path.isfile(f"{workdir}/config.json"))
    check_preparable(config)
    check_evaluation_files(config)
    return config


def _config_of_run(config: ConfigDict, named: Iterable[str], mode: str, workdir: str) -> ConfigDict:
    """The run's own config with the groups of `config` that the mode may change, checked."""
    groups, named = _GROUPS[mode], set(named)
    own = read_config(workdir)
    # The images may have moved; their hashes are compared before they are used.
    if mode in ("sample", "evaluate") and "data.source" in named and own.data.source and config.data.source:
        own.data.source = config.data.source
        named.remove("data.source")
    for name in sorted(named):
        if name.split(".")[0] not in groups:
            raise UserError(
                f"--config.{name} cannot be changed with --mode={mode}, which takes it from the run; only "
                f"{' and '.join(f'--config.{group}.*' for group in groups)} can"
            )
    for group in groups:
        own[group] = config[group]
    check_config(own, trained=True)
    chosen = own[groups[0]]
    # An export is of the newest checkpoint.
    ema_of_run(workdir, own, chosen.ema, 0 if mode == "export" else chosen.checkpoint_step, group=groups[0])
    if "sample" in groups:
        check_compared_runs(own)
    else:
        check_evaluation_files(own)
        check_preparable(own)
    return own


def main() -> None:
    """Entry point: a user error, a full disk or a signal becomes one sentence and exit status 2 or 128 + signal."""
    with end_on_signal("run the same command again"), report_user_errors():
        run(sys.argv)


if __name__ == "__main__":
    main()
