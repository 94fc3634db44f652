"""How the command line changes a config: values after a space, fields set to None, options of another sampler, and
error messages.
"""

import difflib
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from s2dm_jax.common.errors import UserError
from s2dm_jax.config.defaults import FIELDS
from s2dm_jax.config.fields import Field, allowed_type
from s2dm_jax.config.metrics import split_names
from s2dm_jax.samplers.specs import OPTIONS, SAMPLERS, sampler_name

_LARGEST_PORT = 65_535
_FIELD = re.compile(r"--?config\.([^=]*)(=?)(.*)", re.DOTALL)


def check_values(arguments: Sequence[str], names: Iterable[str]) -> None:
    """Raises a `UserError` if a flag of `names`, or a field that needs a value, is followed by another flag.

    absl would read `--workdir --mode=sample` as a folder named `--mode=sample`.
    """
    fields = {f"config.{name}" for name, field in FIELDS.items() if field.type is not bool}
    needing = fields | set(names)
    for argument, following in itertools.pairwise(arguments):
        name = argument.lstrip("-")
        if argument.startswith("-") and name in needing and (following.startswith("--") or following == "-h"):
            raise UserError(f"--{name} has no value: it is followed by {following}; give --{name}=VALUE")


def check_processes(values: flags.FlagValues, mode: str) -> None:
    """Raises a `UserError` if the multi-host flags are incomplete or invalid, or not allowed with `mode`."""
    names = ("coordinator_address", "num_processes", "process_id")
    hosts: list[Any] = [values[name].value for name in names]
    missing = [name for name, value in zip(names, hosts, strict=True) if value is None]
    if missing == list(names):
        return
    if missing:
        raise UserError(
            f"--{missing[0]} is missing: --coordinator_address=HOST:PORT, --num_processes=N and --process_id=I must be "
            "given together"
        )
    coordinator, count, number = hosts
    port = re.fullmatch(r".+:(\d{1,5})", coordinator)
    if not port or int(port[1]) > _LARGEST_PORT:
        raise UserError(
            f"--coordinator_address={coordinator} is not HOST:PORT; for example --coordinator_address=node0:1234"
        )
    if number >= count:
        raise UserError(
            f"--process_id={number} is out of range: with --num_processes={count} it must be from 0 to {count - 1}"
        )
    if mode != "train":
        raise UserError(f"--coordinator_address cannot be combined with --mode={mode}, which runs in a single process")


def _nothing(field: Field) -> Any:
    """The value of a field that means "not set"; Ellipsis if it has none."""
    if field.type is tuple and not field.min_length:
        return ()
    return field.default if field.default in (None, "") else ...


def reset_fields(config: ConfigDict, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Sets back, in place, the optional fields that the command line gives as `=None`, `=none` or `=`.

    They become None, or the empty text or list that is their default; lists that may be empty become empty.

    Returns:
      The arguments without those of these fields, and the names of the fields. The last of several values counts.
    """
    values: dict[str, list[tuple[int, int, str]]] = {}
    for index, argument in enumerate(arguments):
        match = _FIELD.fullmatch(argument)
        if match and match[1] in FIELDS and _nothing(FIELDS[match[1]]) is not Ellipsis:
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
            config[group][key] = _nothing(FIELDS[name])
            reset.append(name)
        for first, end, value in given:
            if name in reset or value == "none":
                dropped |= set(range(first, end))
    return [argument for index, argument in enumerate(arguments) if index not in dropped], reset


def drop_foreign_options(config: ConfigDict, named: Iterable[str]) -> list[str]:
    """Resets, in place, options of the config that the samplers named on the command line do not have.

    An option that is named on the command line itself stays, and `validate.check_config` refuses it.

    Args:
      named: the fields that the command line sets, such as "sample.sampler".

    Returns:
      One sentence for each option that is reset.
    """
    named, notes = set(named), []
    for group, key in (("sample", "sampler"), ("eval", "samplers")):
        options = config[group]
        samplers = [sampler_name(name) for name in split_names(options[key])]
        if f"{group}.{key}" not in named or not set(samplers) <= SAMPLERS.keys():
            continue
        for name in ("timestep_spacing", "skip_scale", "eta", *OPTIONS):
            field = f"{group}.{name}"
            value, default = options[name], FIELDS[field].default
            if value == default or field in named or _applies(name, value, samplers, options.mean):
                continue
            options[name] = default
            notes.append(f"config.{field}={value!r} is not an option of {', '.join(samplers)}: using {default!r}")
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


def describe_flag_error(message: str, values: flags.FlagValues) -> str:
    """absl's message about a wrong flag, as one sentence with the value and what is allowed."""
    if wrong := re.match(r"flag --config\.([\w.]+)=(.*?): ", message, re.DOTALL):
        return f"config.{wrong[1]}={wrong[2]!r} has the wrong type: it must be {allowed_type(FIELDS[wrong[1]])}"
    if wrong := re.match(r"flag --(\w+)=(.*?): ", message, re.DOTALL):
        parser: Any = values[wrong[1]].parser
        if choices := getattr(parser, "enum_values", None):
            return f"--{wrong[1]}={wrong[2]} is not valid; choose one of {', '.join(choices)}"
        return f"--{wrong[1]}={wrong[2]} is not {parser.syntactic_help}"
    if unknown := re.match(r"Unknown command line flag '(?:no)?([^']*)'", message):
        return f"--{unknown[1]} is not a flag; {_suggestion(unknown[1], '', values)}"
    if missing := re.match(r"Missing value for flag --(.*)", message):
        return f"--{missing[1]} has no value; give --{missing[1]}=VALUE"
    return message.removeprefix("ERROR:: ")


def describe_unknown_field(name: str) -> str:
    """The error for --config.NAME, which is no field."""
    group = [field for field in FIELDS if field.startswith(f"{name.rstrip('.')}.")]
    if group:
        return f"config.{name.rstrip('.')} is a group of fields; set one of them, such as --config.{group[0]}=VALUE"
    (close,) = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0)
    return f"config.{name} is not a field of a config; did you mean config.{close}?"


def describe_stray_argument(argument: str, arguments: Sequence[str]) -> str:
    """The error for an argument that is neither a flag nor a flag's value."""
    before = dict(itertools.pairwise(reversed(arguments))).get(argument, "")
    name = before.lstrip("-").removeprefix("config.")
    if name in FIELDS and FIELDS[name].type is bool:
        return f"{argument!r} is not a flag; set a field that is True or False by --config.{name}={argument}"
    if argument.startswith("-"):
        return f"{argument!r} follows --, after which nothing is read as a flag; put it before the --"
    name, equals, value = argument.partition("=")
    suggestion = _suggestion(name, f"{equals}{value}") if equals else "flags start with --"
    return f"{argument!r} is not a flag; {suggestion} (see --help)"


def _suggestion(name: str, value: str, values: Iterable[str] = ()) -> str:
    """What was probably meant by the name of a flag."""
    name = name.removeprefix("config.")
    if name in FIELDS:
        return f"did you mean --config.{name}{value or '=VALUE'}?"
    # Of fields of one name, the first.
    fields = {spelling: f"--config.{field}" for field in reversed(FIELDS) for spelling in (field, field.split(".")[1])}
    possible = fields | {flag: f"--{flag}" for flag in values}
    close = difflib.get_close_matches(name, possible, n=1, cutoff=0.6)
    return f"did you mean {possible[close[0]]}{value}?" if close else "see --help"
