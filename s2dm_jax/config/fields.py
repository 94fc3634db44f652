"""A config field's description: default, type, bounds or choices, and one sentence for `--help`."""

import dataclasses
import functools
import textwrap
from typing import Any, Literal

# Keys of PRESETS in diffusion/objectives.py, which needs jax.
LOSS_PRESETS = ("paper", "released")
# Keys of PIPELINES in evaluation/inception.py, which needs jax; the first is the default's.
INCEPTION_RESIZES = ("tf1", "pytorch_fid")
MAX_SEED = 2**31 - 1
# Beyond reason: what is larger is a slip of the keyboard, and would hang or end in a traceback.
MAX_T, MAX_STEPS, MAX_BATCH, MAX_IMAGES = 100_000, 10**9, 2**20, 10**8


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a config.

    Attributes:
      default: the value if a config file sets none; None if the loss preset, the network or the sampler decides.
      doc: one sentence for `--help`.
      low, high: smallest and largest value, both allowed, or None for no bound; for a tuple, of each entry.
      min_length: fewest entries of a tuple.
      choices: the only values allowed, or None for any.
      resumable: whether a run may resume with another value.
      entries: int or float, the type of a tuple's entries.
      path: whether a value may be a path: "path", "paths" separated by commas, "URL" for a path or a URL, "" for none.
      type: int, float, bool, str or tuple; by default that of `default`.
    """

    default: Any
    _: dataclasses.KW_ONLY
    doc: str
    low: float | None = None
    high: float | None = None
    min_length: int = 0
    choices: tuple | None = None
    resumable: bool = False
    entries: Any = int
    path: Literal["", "path", "paths", "URL"] = ""
    type: Any = None

    def __post_init__(self):
        object.__setattr__(self, "type", self.type or type(self.default))


# A field that a run may resume with another value.
Resumable = functools.partial(Field, resumable=True)


def allowed_type(field: Field) -> str:
    """The type of a field's values in words, as in "an integer"."""
    if field.entries is float:
        return f"a tuple of numbers {allowed_range(field)}, separated by commas"
    if field.type is tuple:
        return f"a tuple of {'' if field.low is None else 'positive '}integers such as 1,2,2"
    return {int: "an integer", float: "a finite number", bool: "True or False", str: "a name"}[field.type]


def allowed_range(field: Field) -> str:
    """The bounds of a number's field in words, as in "at least 1"."""
    return f"at least {field.low}" if field.high is None else f"from {field.low} to {_number(field.high)}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)


def allowed_choices(field: Field) -> str:
    """The choices of a field, as in "one of grid, npz, png"."""
    return "one of " + ", ".join(str(choice) or "nothing" for choice in field.choices or ())


def fields_help(fields: dict[str, Field]) -> str:
    """Each field of {"group.name": field} as text: its flag and doc, then its default and allowed values."""
    lines = []
    for name, field in fields.items():
        if field.choices:
            allowed = allowed_choices(field)
        elif field.type in (int, float) and field.low is not None:
            allowed = allowed_range(field)
        else:
            allowed = "" if field.type is str else allowed_type(field)
        if field.default is None:
            own = {"loss": ", the loss preset's", "model": ", the network's own", "diffusion": ""}
            source = own.get(name.split(".")[0], ", the sampler's own")
            default = f"None{source}"
        else:
            default = repr(",".join(map(str, field.default)) if field.type is tuple else field.default)
        text = f"--config.{name}: {field.doc}"
        lines += textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
        lines.append(f"    (default: {default}{'; ' if allowed else ''}{allowed})")
    return "\n".join(lines)
