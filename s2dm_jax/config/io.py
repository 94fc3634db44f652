"""Config files: found, loaded, to JSON and back."""

import json
import os
import runpy
from pathlib import Path

from ml_collections import ConfigDict

from s2dm_jax.common.errors import UserError
from s2dm_jax.config.defaults import default_config


def config_path(name: str) -> str:
    """FILE[:OBJECTIVE] with the path of the file, or else of that which comes with this package under the name.

    Raises:
      UserError: where there is neither.
    """
    file, colon, objective = name.partition(":")
    if os.path.isfile(file):
        return name
    package = Path(__file__).parents[1]
    # A wheel has the configs inside the package, a clone beside it.
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    packaged = {f"configs/{path.name}": path for path in sorted(folder.glob("*.py"))}
    if os.path.normpath(file) not in packaged:
        raise UserError(
            f"--config={name}: there is no such file; those that come with s2dm_jax are {', '.join(packaged)}"
        )
    return f"{packaged[os.path.normpath(file)]}{colon}{objective}"


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
