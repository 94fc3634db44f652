"""The command line: `python -m s2dm_jax.main --config=configs/digits.py --workdir=DIR`."""

import difflib
import os
import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from s2dm_jax.config import FIELDS, UserError, allowed_type, check_config, prepare_workdir

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with the method after a colon: configs/digits.py:s2sa"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; a run that is there goes on")
_MODE = flags.DEFINE_enum("mode", "train", ["train"], "What to do")


def _check_names(argv: list[str]) -> None:
    """Checks that the config file and the fields named on the command line exist, before absl reads them."""
    path = None
    for i, argument in enumerate(argv):
        flag, has_value, value = argument.lstrip("-").partition("=")
        if flag == "config":
            path = value if has_value else "".join(argv[i + 1 : i + 2])
        elif flag.startswith("config.") and flag.removeprefix("config.") not in FIELDS:
            close = difflib.get_close_matches(flag.removeprefix("config."), FIELDS, n=1, cutoff=0)
            raise UserError(f"{flag} is not a field of a config; did you mean config.{close[0]}?")
    if not path:
        raise UserError("--config is missing; for example --config=configs/digits.py --workdir=runs/digits")
    if not os.path.isfile(path.split(":")[0]):
        raise UserError(f"--config={path}: there is no such file; the configs are in the folder configs/")


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


def run(argv: list[str]) -> None:
    """Checks the flags, the config and the folder, then trains; nothing is written before all is checked."""
    app.define_help_flags()
    if not any(a.lstrip("-").startswith("help") for a in argv[1:]):
        _check_names(argv[1:])
    _parse(argv)
    check_config(_CONFIG.value)
    prepare_workdir(_WORKDIR.value, _CONFIG.value)
    logging.set_verbosity(logging.ERROR)
    # Compiled programs are kept, so that a second start takes seconds; the user's own settings win.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/s2dm_jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

    # jax takes seconds to import: mistakes are told before.
    from s2dm_jax.train import train

    train(_CONFIG.value, _WORKDIR.value)


def main() -> None:
    """Entry point: a `UserError` becomes one sentence and exit status 2."""
    try:
        run(sys.argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
