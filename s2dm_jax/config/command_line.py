"""How the command line changes a config: values after a space, fields set to None, options of another sampler."""

import itertools
import re
from collections.abc import Iterable, Sequence

from ml_collections import ConfigDict

from s2dm_jax.common.errors import UserError
from s2dm_jax.config.defaults import FIELDS
from s2dm_jax.config.metrics import split_names
from s2dm_jax.samplers.specs import OPTIONS, SAMPLERS

# The defaults of optional fields.
_NOTHING = (None, "", ())
_FIELD = re.compile(r"--?config\.([^=]*)(=?)(.*)", re.DOTALL)


def check_values(arguments: Sequence[str], names: Iterable[str]) -> None:
    """Raises a `UserError` where a flag of `names`, or a field that needs a value, is followed by another flag.

    absl would take `--workdir --mode=sample` for a folder of the name `--mode=sample`.
    """
    fields = {f"config.{name}" for name, field in FIELDS.items() if field.type is not bool}
    needing = fields | set(names)
    for argument, following in itertools.pairwise(arguments):
        name = argument.lstrip("-")
        if argument.startswith("-") and name in needing and (following.startswith("--") or following == "-h"):
            raise UserError(f"--{name} has no value: it is followed by {following}; give --{name}=VALUE")


def reset_fields(config: ConfigDict, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Sets back, in place, the optional fields that the command line gives as `=None`, `=none` or `=`.

    They become None, or the empty text or list that is their default.

    Returns:
      The arguments without those of these fields, and the names of the fields. The last of several values counts.
    """
    values: dict[str, list[tuple[int, int, str]]] = {}
    for index, argument in enumerate(arguments):
        match = _FIELD.fullmatch(argument)
        if match and match[1] in FIELDS and FIELDS[match[1]].default in _NOTHING:
            separate = not match[2] and index + 1 < len(arguments) and arguments[index + 1].lower() == "none"
            value = arguments[index + 1] if separate else match[3]
            if match[2] and not value:
                value = "none"
            values.setdefault(match[1], []).append((index, index + 1 + separate, value.lower()))
    dropped: set[int] = set()
    reset = []
    for name, given in values.items():
        if given[-1][2] == "none":
            group, key = name.split(".")
            config[group][key] = FIELDS[name].default
            reset.append(name)
        for first, end, value in given:
            if name in reset or value == "none":
                dropped |= set(range(first, end))
    return [argument for index, argument in enumerate(arguments) if index not in dropped], reset


def drop_foreign_options(config: ConfigDict, named: Iterable[str]) -> list[str]:
    """Resets, in place, options of the config that the samplers named on the command line do not have.

    An option that is named on the command line itself stays, and `validate.check_config` refuses it.

    Args:
      named: the fields that the command line sets, as "sample.sampler".

    Returns:
      One sentence for each option that is reset.
    """
    named, notes = set(named), []
    for group, key in (("sample", "sampler"), ("eval", "samplers")):
        options = config[group]
        samplers = ["f_pndm" if name == "pndm" else name for name in split_names(options[key])]
        if f"{group}.{key}" not in named or not set(samplers) <= SAMPLERS.keys():
            continue
        for name in ("timestep_spacing", "skip_scale", "eta", *OPTIONS):
            field = f"{group}.{name}"
            value, default = options[name], FIELDS[field].default
            if value == default or field in named or _applies(name, value, samplers, options.mean):
                continue
            options[name] = default
            notes.append(f"config.{field}={value!r} is no option of {', '.join(samplers)}: {default!r} is used")
    return notes


def _applies(name: str, value: object, samplers: list[str], mean: str | None) -> bool:
    """Whether a value of an option that is not the default suits the samplers: one of them, or all where it must."""
    specs = [SAMPLERS[sampler] for sampler in samplers]
    if name == "timestep_spacing":
        return value != "optimal" or all(spec.requires == "ms_eps" for spec in specs)
    if name == "skip_scale":
        return not any(spec.requires in ("sn", "npr") for spec in specs)
    if name == "eta":
        return any("eta" in spec.options and ("mean" not in spec.options or mean == "ddim") for spec in specs)
    return any(name in spec.options for spec in specs)
