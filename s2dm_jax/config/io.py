"""Config files: found, loaded, to JSON and back."""

import json
import os
import re
import runpy
from pathlib import Path

from ml_collections import ConfigDict, FrozenConfigDict

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import user_path
from s2dm_jax.config.defaults import FIELDS, default_config

# What urllib fetches.
_URL = re.compile("(https?|ftp|file)://", re.IGNORECASE)


def config_path(name: str) -> str:
    """FILE[:OBJECTIVE] with the path of the file, or else of that which comes with this package under the name.

    Raises:
      UserError: where there is neither.
    """
    file, colon, objective = name.partition(":")
    if not objective.startswith("/"):
        file = str(user_path(file, "--config"))
    if os.path.isfile(file):
        return f"{file}{colon}{objective}"
    package = Path(__file__).parents[1]
    # A wheel has the configs inside the package, a clone beside it.
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    packaged = {f"configs/{path.name}": path for path in sorted(folder.glob("*.py"))}
    if os.path.normpath(file) not in packaged:
        raise UserError(
            f"--config={name}: there is no such file; those that come with s2dm_jax are {', '.join(packaged)}"
        )
    return f"{packaged[os.path.normpath(file)]}{colon}{objective}"


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
        written = value.split(",") if kind == "paths" else [value]
        config[group][key] = ",".join(str(user_path(path.strip(), f"config.{name}")) for path in written)


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
    """The config that `to_json` wrote, with tuples for lists; fields that are newer get their default."""
    config = default_config()
    for group, values in json.loads(text).items():
        for name, value in values.items():
            config[group][name] = tuple(value) if isinstance(value, list) else value
    return config


def load_config(name: str) -> ConfigDict:
    """The config that FILE[:OBJECTIVE] names, as --config of the main command line does.

    Raises:
      UserError: where there is no such file, and for whatever the file raises.
    """
    path, *objective = config_path(name).split(":", 1)
    if path.endswith(".json"):
        return _load_json(name, path, objective)
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise UserError(f"--config={name} defines no function get_config; see configs/digits.py for one that does")
        config = get_config(*objective)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"--config={name}: {error}") from error
    except SystemExit as error:
        raise UserError(f"--config={name} ends the program, by sys.exit({error.code!r}); it must not") from error
    except Exception as error:
        raise UserError(f"--config={name} failed with {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        returned = "nothing" if config is None else f"a {type(config).__name__}"
        raise UserError(
            f"--config={name}: get_config returns {returned}; it must return a ConfigDict, from "
            "s2dm_jax.config.default_config()"
        )
    # A FrozenConfigDict too can then be changed on the command line.
    return ConfigDict(config) if isinstance(config, FrozenConfigDict) else config


def _load_json(name: str, path: str, objective: list[str]) -> ConfigDict:
    """The config in a JSON file, such as a run's config.json; fields that it has not get their default."""
    if objective:
        raise UserError(f"--config={name}: a .json file has no objectives; give it without :{objective[0]}")
    try:
        return from_json(Path(path).read_text(encoding="utf-8"))
    except KeyError as error:
        # ConfigDict repeats the name in a sentence, with others that are close.
        reason = f"{str(error.args[0]).splitlines()[0]} is not a field"
    except (OSError, ValueError, TypeError) as error:
        reason = str(error)
    except AttributeError:
        reason = "it is no object of groups of fields"
    raise UserError(
        f"--config={name} is not the config of a run as JSON ({reason}); give a config.json, or a Python file such as "
        "configs/digits.py"
    )
