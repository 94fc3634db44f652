"""Trains a run, samples from it, evaluates it, exports its sampler.

  python -m s2dm_jax.main --config=configs/digits.py:s2sa --workdir=runs/digits
  python -m s2dm_jax.main --workdir=runs/digits --config.train.steps=2000      # goes on
  python -m s2dm_jax.main --mode=sample --workdir=runs/digits --config.sample.nfe=20
  python -m s2dm_jax.main --mode=evaluate --workdir=runs/digits --config.eval.nfe=10,20
  python -m s2dm_jax.main --mode=export --workdir=runs/digits

Every field of s2dm_jax/config/defaults.py, which says what each is and in which unit, can be set as
--config.GROUP.FIELD=VALUE.
"""

import contextlib
import difflib
import errno
import os
import re
import sys

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from s2dm_jax.common.errors import UserError, report_user_errors
from s2dm_jax.config.defaults import FIELDS
from s2dm_jax.config.io import config_path
from s2dm_jax.config.validate import allowed_type, check_config, check_evaluation_files
from s2dm_jax.data.cache import check_preparable, prepare_dataset
from s2dm_jax.workdir import load
from s2dm_jax.workdir.folder import prepare_workdir
from s2dm_jax.workdir.load import check_compared_runs, inherit_base_config, read_config

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, with the method after a colon: configs/digits.py:s2sa; the other modes take the run's own",
)

_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run; a run that is there goes on")

_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "sample", "evaluate", "export"],
    "Train a run, sample from one as --config.sample.* say, evaluate one as --config.eval.* say, or export "
    "its sampler as one file",
)

_COORDINATOR = flags.DEFINE_string(
    "coordinator_address",
    None,
    "Several hosts: HOST:PORT of process 0; not needed under Slurm, Open MPI and on TPU pods",
)

_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Several hosts: how many processes", 1)

_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Several hosts: which of them this is, from 0", 0)

# Ways of saying how many steps a sampler makes: one on the command line replaces another in the config.
_HOW_MANY = {"steps": 0, "nfe": 0, "timesteps": ()}

# What may be changed of a run that is there, by mode.
_GROUPS = {"sample": ("sample",), "evaluate": ("eval",), "export": ("sample", "export")}


def _given(argv: list[str]) -> dict[str, str]:
    """Flags as they stand on the command line, before absl reads them, and what follows each."""
    given = {}
    for i, argument in enumerate(argv):
        flag, has_value, value = argument.lstrip("-").partition("=")
        given[flag] = value if has_value else "".join(argv[i + 1 : i + 2])
    return given


def _check_names(given: dict[str, str]) -> None:
    """Checks that a config is named, and only fields that exist, before absl reads them."""
    for flag in given:
        if flag.startswith("config.") and flag.removeprefix("config.") not in FIELDS:
            close = difflib.get_close_matches(flag.removeprefix("config."), FIELDS, n=1, cutoff=0)
            raise UserError(f"{flag} is not a field of a config; did you mean config.{close[0]}?")
    if not given.get("config"):
        raise UserError("--config is missing; for example --config=configs/digits.py --workdir=runs/digits")


def _with_config_path(argv: list[str]) -> list[str]:
    """The arguments with `config_path` of what --config names, as --config=FILE or --config FILE."""
    found = list(argv)
    for i, argument in enumerate(argv):
        flag, has_value, value = argument.partition("=")
        if flag not in ("-config", "--config"):
            continue
        if has_value:
            found[i] = f"{flag}={config_path(value)}"
        elif i + 1 < len(argv):
            found[i + 1] = config_path(argv[i + 1])
    return found


def _own_config(given: dict[str, str]) -> list[str]:
    """The flag that makes a run's own config the config to start from, where no other is given."""
    workdir = given.get("workdir")
    if not workdir:
        mode = given.get("mode", "train")
        raise UserError(f"--workdir is missing; for example --mode={mode} --workdir=runs/digits")
    read_config(workdir)
    return [] if "config" in given else [f"--config={load.__file__}:{workdir}"]


def _parse(argv: list[str]) -> None:
    """Reads the flags; what absl or the config file object to becomes a `UserError`."""
    try:
        rest = flags.FLAGS(argv)
    except Exception as error:
        # absl's own errors, and whatever the config file raised while it ran.
        lines = str(error).strip().splitlines()
        wrong = re.match(r"flag --config\.([\w.]+)=(.*?): ", lines[0])
        if wrong and wrong[1] in FIELDS:
            allowed = allowed_type(FIELDS[wrong[1]])
            raise UserError(
                f"config.{wrong[1]}={wrong[2]!r} has the wrong type: it must be {allowed}"
            ) from error
        if isinstance(error, flags.Error):
            # An error inside the config file may come as a whole traceback; its last line says what is wrong.
            raise UserError(lines[-1].removeprefix("ValueError: ")) from error
        raise UserError(f"the config file failed with {type(error).__name__}: {lines[-1]}") from error
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is not a flag; flags start with -- (see --help)")
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; for example --workdir=runs/digits")
    _check_processes()


def _check_processes() -> None:
    """Checks the flags of several hosts against each other."""
    coordinator, count, number = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    if coordinator is None or count is None or number is None:
        said = {"coordinator_address": coordinator, "num_processes": count, "process_id": number}
        missing = [name for name, value in said.items() if value is None]
        if len(missing) == len(said):
            return
        raise UserError(
            f"--{missing[0]} is missing: --coordinator_address=HOST:PORT, --num_processes=N and "
            "--process_id=I go together"
        )
    if not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(
            f"--coordinator_address={coordinator} is not HOST:PORT; for example "
            "--coordinator_address=node0:1234"
        )
    if number >= count:
        raise UserError(
            f"--process_id={number} is out of range: with --num_processes={count} it must be from 0 to "
            f"{count - 1}"
        )
    if _MODE.value != "train":
        raise UserError(
            f"--coordinator_address does not go with --mode={_MODE.value}, which is for one process"
        )


def run(argv: list[str]) -> None:
    """Checks the flags, the config and the folder, then does what --mode says; writes nothing before."""
    app.define_help_flags()
    given = _given(argv[1:])
    if any(flag.startswith("help") for flag in given):
        # absl shows it and exits with status 1, as for a mistake.
        with contextlib.suppress(SystemExit):
            _parse(argv)
        return
    # A folder that holds a run goes on with the run's config where no other is given.
    goes_on = "config" not in given and os.path.isfile(f"{given.get('workdir', '')}/config.json")
    if given.get("mode") in _GROUPS or goes_on:
        argv = [argv[0], *_own_config(given), *argv[1:]]
    _check_names(_given(argv[1:]))
    argv = _with_config_path(argv)
    _parse(argv)
    config = _CONFIG.value
    named = [name for name in _HOW_MANY if f"config.sample.{name}" in given]
    if named:
        config.sample.update({name: value for name, value in _HOW_MANY.items() if name not in named})
    if _MODE.value == "train":
        config = _head_config(given, config)
        check_config(config)
        check_preparable(config)
        check_evaluation_files(config)
        prepare_workdir(_WORKDIR.value, config)
        prepare_dataset(config)
    else:
        config = _config_of_run(given, config)
    # Orbax logs with a traceback what it also raises, and what is raised is told in one sentence.
    logging.set_verbosity(logging.FATAL)
    # Compiled programs are kept, so that a second start takes seconds; the user's own settings win.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/s2dm_jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

    # jax takes seconds to import: mistakes are told before.
    if _MODE.value == "sample":
        from s2dm_jax.inference.sample import sample

        sample(config, _WORKDIR.value)
        return
    if _MODE.value == "export":
        from s2dm_jax.weights.export import export

        export(config, _WORKDIR.value)
        return
    from s2dm_jax.devices.distributed import initialize_distributed
    from s2dm_jax.devices.sharding import set_cpu_device_count

    # Evaluation too, so that a run's own and a later one are the same.
    set_cpu_device_count(config.train.batch_size // (_NUM_PROCESSES.value or 1))
    if _MODE.value == "evaluate":
        from s2dm_jax.evaluation.evaluate import evaluate_run

        evaluate_run(config, _WORKDIR.value)
    else:
        from s2dm_jax.training.loop import train

        initialize_distributed(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        train(config, _WORKDIR.value)


def _head_config(given: dict[str, str], config: ConfigDict) -> ConfigDict:
    """The config of a head with what it has from its base; any other config as it is."""
    for flag in given:
        if config.variance_head.kind and flag.startswith(
            ("config.data.", "config.diffusion.", "config.model.")
        ):
            raise UserError(
                f"--{flag} cannot be changed with config.variance_head.kind={config.variance_head.kind!r}, "
                "which takes it from the run in config.variance_head.base_workdir"
            )
    return inherit_base_config(config)


def _config_of_run(given: dict[str, str], config: ConfigDict) -> ConfigDict:
    """The run's own config with the groups that the mode is about of the config given, checked."""
    groups = _GROUPS[_MODE.value]
    can = [f"config.{group}." for group in groups]
    for flag in given:
        if flag.startswith("config.") and not flag.startswith(tuple(can)):
            raise UserError(
                f"--{flag} cannot be changed with --mode={_MODE.value}, which takes it from the run; only "
                f"{' and '.join(f'--{group}*' for group in can)} can"
            )
    own = read_config(_WORKDIR.value)
    for group in groups:
        own[group] = config[group]
    check_config(own)
    if "sample" in groups:
        check_compared_runs(own)
    else:
        check_evaluation_files(own)
    return own


@report_user_errors()
def main() -> None:
    """Entry point: a mistake, and a full disk, become one sentence and exit status 2."""
    try:
        run(sys.argv)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        where = f" at {error.filename}" if error.filename else ""
        raise UserError(
            f"writing failed{where} ({error.strerror}); the checkpoints are untouched; make room, and the "
            "same command goes on"
        ) from error


if __name__ == "__main__":
    main()
