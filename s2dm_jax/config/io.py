"""Config files: finding and loading them, writing and reading them as JSON."""

import contextlib
import inspect
import json
import os
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

from ml_collections import ConfigDict, FrozenConfigDict

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import user_path
from s2dm_jax.config.defaults import FIELDS, default_config
from s2dm_jax.config.fields import allowed_type
from s2dm_jax.config.presets import full_objective_name

# The fields of betas that stand for what a config without them was trained with.
_BETAS_BEFORE_0_3 = {
    "linear": {"beta_start": 1e-4, "beta_end": 2e-2},
    "quadratic": {"beta_start": 1e-4, "beta_end": 2e-2},
    "sigmoid": {"beta_start": 1e-4, "beta_end": 2e-2},
    "const": {"beta_end": 2e-2},
}
# What urllib fetches.
_URL = re.compile("(https?|ftp|file)://", re.IGNORECASE)


def split_config(name: str) -> tuple[str, list[str]]:
    """The path in FILE[:OBJECTIVE], or else of the file that comes with this package under the name; the objective, if
    there is one, in a list. The name of the file may have colons.

    Raises:
      UserError: if there is neither.
    """
    parts = name.split(":")
    for length in range(len(parts), 0, -1):
        written, objective = ":".join(parts[:length]), parts[length:]
        # As URLs those with a slash after the colon are no paths of the user's.
        if not (objective and objective[0].startswith("/")):
            file = str(user_path(written, "--config"))
            if os.path.isfile(file):
                return file, [":".join(objective)] if objective else []
    file, *objective = name.split(":", 1)
    if os.path.isdir(file):
        advice = "give its config.json" if os.path.isfile(f"{file}/config.json") else "give a file in it"
        raise UserError(f"--config={name}: {file} is a folder; {advice}")
    package = Path(__file__).parents[1]
    # A wheel has the configs inside the package, a clone beside it.
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    packaged = {f"configs/{path.name}": path for path in sorted(folder.glob("*.py"))}
    if os.path.normpath(file) not in packaged:
        raise UserError(f"--config={name}: no such file; the configs that come with s2dm_jax are {', '.join(packaged)}")
    return str(packaged[os.path.normpath(file)]), objective


def config_path(name: str) -> str:
    """FILE[:OBJECTIVE] with the path of the file; raises as `split_config`."""
    file, objective = split_config(name)
    return ":".join([file, *objective])


def expand_paths(config: ConfigDict) -> None:
    """Makes the paths in a config's fields those that `files.user_path` reads, in place.

    Raises:
      UserError: as `files.user_path`.
    """
    for name, value in flatten(config).items():
        kind = FIELDS[name].path if name in FIELDS else ""
        if not kind or not isinstance(value, str) or not value or (kind == "URL" and _URL.match(value)):
            continue
        group, key = name.split(".")
        written = [path.strip() for path in value.split(",") if path.strip()] if kind == "paths" else [value.strip()]
        config[group][key] = ",".join(str(user_path(path, f"config.{name}")) for path in written)


def flatten(config: ConfigDict) -> dict:
    """Every field of every group as {"group.name": value}."""
    flat: dict = {}
    for group, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{group}.{name}": v for name, v in value.items()}
        else:
            flat[group] = value
    return flat


def to_json(config: ConfigDict) -> str:
    """The config as JSON text."""
    return json.dumps(config.to_dict(), indent=1) + "\n"


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote, with tuples for lists; fields that it lacks get their default.

    A config written before 0.3 has no betas: it gets those that every T used then.
    """
    config, stored = default_config(), json.loads(text)
    for group, values in stored.items():
        for name, value in values.items():
            config[group][name] = tuple(value) if isinstance(value, list) else value
    if config.diffusion.T != 1000 and "beta_end" not in stored.get("diffusion", {"beta_end": None}):
        config.diffusion.update(_BETAS_BEFORE_0_3.get(config.diffusion.schedule, {}))
    return config


def _reason(error: Exception) -> str:
    """An error's message about a config, worded to name the field."""
    text = str(error)
    pattern = r"Could not override field '(\w+)'.*?\. (.*) is of original type <class '(\w+)"
    if wrong := re.match(pattern, text, re.DOTALL):
        value = repr(wrong[2]) if wrong[3] == "str" else wrong[2]
        types = {allowed_type(field) for name, field in FIELDS.items() if name.endswith(f".{wrong[1]}")}
        return f"{wrong[1]}={value} has the wrong type: it must be {' or '.join(sorted(types)) or 'a group of fields'}"
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON at line {error.lineno}, column {error.colno}" if error.doc.strip() else "it is empty"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    # ConfigDict lists all fields.
    sentence, listed, _ = text.partition(". Other fields present")
    return (sentence.strip("'") if listed else sentence).strip().partition("\n")[0]


def load_config(name: str) -> ConfigDict:
    """The config that FILE[:OBJECTIVE] names, as --config of the main command line does.

    Raises:
      UserError: for a missing file, and for whatever the file raises.
    """
    path, objective = split_config(name)
    if path.endswith(".json"):
        return _load_json(name, path, objective)
    with _as_user_error(name):
        config = _config_function(name, path)(*objective)
        if isinstance(config, ConfigDict):
            # Placeholders that must be filled raise only now.
            flatten(config)
    if not isinstance(config, ConfigDict):
        returned = "nothing" if config is None else f"a {type(config).__name__}"
        raise UserError(
            f"--config={name}: get_config returns {returned}; it must return a ConfigDict, from "
            "s2dm_jax.config.default_config()"
        )
    # A FrozenConfigDict too can then be changed on the command line.
    return ConfigDict(config) if isinstance(config, FrozenConfigDict) else config


def default_workdir(name: str) -> str:
    """The run's default folder, runs/FILE_OBJECTIVE for FILE[:OBJECTIVE], such as runs/cifar10_s2_10.

    If the name has no objective, the default of the file's `get_config` is used, if that has one.

    Raises:
      UserError: as `load_config`.
    """
    path, objective = split_config(name)
    if not objective and not path.endswith(".json"):
        with _as_user_error(name):
            parameters = inspect.signature(_config_function(name, path)).parameters.values()
        objective = [str(one.default) for one in parameters if one.default is not one.empty][:1]
    run = "_".join([Path(path).stem, *map(full_objective_name, objective)])
    # Checkpoints cannot be written to a path with brackets or a backslash.
    return "runs/" + re.sub(r"[^\w.+-]+", "-", run)


def _config_function(name: str, path: str) -> Callable:
    get_config = runpy.run_path(path).get("get_config")
    if get_config is None:
        raise UserError(
            f"--config={name} does not define the function get_config; see configs/digits.py for an example"
        )
    return get_config


@contextlib.contextmanager
def _as_user_error(name: str) -> Iterator[None]:
    """For the block, whatever a config file raises becomes a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"--config={name}: {_reason(error)}") from error
    except SystemExit as error:
        raise UserError(f"--config={name} calls sys.exit({error.code!r}), which a config file must not do") from error
    except Exception as error:
        raise UserError(f"--config={name} failed with {type(error).__name__}: {_reason(error)}") from error


def _load_json(name: str, path: str, objective: list[str]) -> ConfigDict:
    """The config in a JSON file, such as a run's config.json; fields that it lacks get their default."""
    if objective:
        raise UserError(f"--config={name}: a .json file has no objectives; give it without :{objective[0]}")
    try:
        return from_json(Path(path).read_text(encoding="utf-8"))
    except KeyError as error:
        # ConfigDict repeats the name in a sentence, with others that are close.
        reason = f"{str(error.args[0]).splitlines()[0]} is not a field"
    except (OSError, ValueError, TypeError) as error:
        reason = _reason(error)
    except AttributeError:
        reason = "it is not an object of field groups"
    raise UserError(
        f"--config={name} is not the config of a run as JSON ({reason}); give a config.json, or a Python file such as "
        "configs/digits.py"
    )
