"""Config files: found, loaded, to JSON and back."""

import json
import os
import runpy
from pathlib import Path

from ml_collections import ConfigDict

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import user_path
from s2dm_jax.config.defaults import FIELDS, default_config


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
        if not kind or not isinstance(value, str) or not value or (kind == "URL" and "://" in value):
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
    try:
        config = runpy.run_path(path)["get_config"](*objective)
    except ValueError as error:
        raise UserError(f"--config={name}: {error}") from error
    except Exception as error:
        raise UserError(f"--config={name} failed with {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={name}: get_config must return a ConfigDict, not {type(config).__name__}")
    return config
