"""Identifies the parts of the published PyTorch codes' checkpoints: EMA, weights, step."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

from s2dm_jax.weights import nesting
from s2dm_jax.weights.torch_pickle import Tensor

# As OpenAI's code names its checkpoints; it reads the step from there too.
_IMPROVED_NAME = re.compile(r"(?:model|ema_[\d.]+_)(\d+)\.pt")


def step_in_name(path: Path) -> int:
    """The training steps in a name such as ema_0.9999_500000.pt; 0 for other names."""
    match = _IMPROVED_NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def identify(contents: object, key: str) -> tuple[dict, dict | None, int, str]:
    """EMA, weights if they differ, step and kind of a published checkpoint."""
    if isinstance(contents, list) and contents and _is_state(contents[0]) and not key:
        step = contents[3] if len(contents) > 3 and type(contents[3]) is int else 0
        params = _plain(contents[0])
        if len(contents) > 4 and _is_state(contents[-1]):
            return _plain(contents[-1]), params, step, "a DDIM training checkpoint, with its EMA"
        return params, None, step, "a DDIM training checkpoint; it has no EMA"
    if isinstance(contents, dict) and _is_state(contents.get("model_dict")) and not key:
        step = contents["step"] if type(contents.get("step")) is int else 0
        params, ema = _plain(contents["model_dict"]), _ema_in_optimizer(contents)
        if ema:
            return ema, params, step, "a SA-DPM training checkpoint, with the EMA in its optimizer"
    found = nesting.find_state(contents, lambda value: isinstance(value, Tensor), key)
    if found is not None:
        return found.ema, found.params, found.step, found.description
    held = type(contents).__name__
    if isinstance(contents, dict):
        held = f"a dict of {', '.join(map(str, list(contents)[:5])) or 'nothing'}"
    raise ValueError(f"it holds {held}, but a state_dict of tensors is needed, alone or inside dicts or lists")


def _is_state(value: object) -> TypeGuard[dict[str, Tensor]]:
    pairs = value.items() if isinstance(value, dict) else ()
    return bool(pairs) and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in pairs)


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's own tensors: without prefixes and buffers."""
    return nesting.strip_names(state)[0]


def _ema_in_optimizer(contents: dict) -> dict[str, Tensor] | None:
    """SA-DPM's optimizer numbers the weights in the state_dict's order, and has each one's EMA."""
    optimizer = contents.get("optimizer")
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("state"), dict):
        return None
    numbers = [n for group in optimizer.get("param_groups", ()) for n in group.get("params", ())]
    emas = [optimizer["state"].get(number, {}).get("ema") for number in numbers]
    names = list(contents["model_dict"])
    if len(emas) != len(names) or not all(isinstance(ema, Tensor) for ema in emas):
        return None
    return _plain(dict(zip(names, emas, strict=True)))
