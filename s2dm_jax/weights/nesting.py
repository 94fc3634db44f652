"""Finds the network's tensors in a checkpoint as training codes nest them: wrappers, prefixes, buffers.

The values are whatever a reader has in place of tensors; only their names and nesting are looked at.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# Keys of a training checkpoint, the likeliest first: an EMA, then the weights that training changes.
_EMA_KEYS = ("ema", "state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "ema_params", "params_ema")
_WEIGHTS_KEYS = ("state_dict", "model", "model_state_dict", "model_dict", "net", "network", "unet", "params", "weights")
# In front of every name of a tensor: wrappers of PyTorch, torch.compile, Lightning, and of diffusion codes. Of several
# copies in one dict, as lucidrains' EMA has them, the EMA counts.
_EMA_PREFIXES = ("ema_model.", "model_ema.", "ema.")
_PREFIXES = (
    *_EMA_PREFIXES,
    "module.",
    "_orig_mod.",
    "online_model.",
    "model.",
    "diffusion_model.",
    "denoise_fn.",
    "unet.",
    "net.",
    "network.",
)
# Tensors that are no weights: noise schedules, counters, loss weights.
_BUFFER = re.compile(
    r"(.*\.)?(betas|alphas|log_snr|logvar|loss_weight|p2_loss_weight|initted|step|num_updates|decay|num_batches_tracked"
    r"|(sqrt_|log_|posterior_|lvlb_|sqrt_recip_|sqrt_recipm1_|one_minus_|sqrt_one_minus_|log_one_minus_)"
    r"[a-z0-9_]*(alphas?|cumprod|variance|mean|coef|weights)[a-z0-9_]*|alphas_cumprod(_prev)?)"
)
_MAX_DEPTH = 3


class Found(NamedTuple):
    """A network's tensors in a checkpoint.

    Attributes:
      ema: by the network's own names; the weights where there is no EMA.
      params: the weights that training changes, where they are others.
      step: training steps, as far as the checkpoint tells.
      description: which entry was taken, and what was taken off its names.
    """

    ema: dict[str, Any]
    params: dict[str, Any] | None
    step: int
    description: str


def find_state(contents: object, is_tensor: Callable[[object], bool], key: str = "") -> Found | None:
    """The state_dict in nested dicts and lists, the EMA if there is one; None if there is no state_dict.

    Args:
      contents: what a checkpoint holds.
      is_tensor: whether a value stands for a tensor.
      key: where the state_dict is, as "model.ema" or "0"; "" to look for it.

    Raises:
      ValueError: if there is none under `key`, or several and none has a known name.
    """
    states = _states(contents, is_tensor)
    step = _step(contents)
    if key:
        if key not in states:
            raise ValueError(f"it has no state_dict under --key={key}; there are: {describe_states(states)}")
        own, note = strip_names(states[key])
        return Found(own, None, step, f"the state_dict {key}{note}")
    if not states:
        return None
    ema, weights = (_first(states, keys) for keys in (_EMA_KEYS, _WEIGHTS_KEYS))
    chosen = ema or weights or (next(iter(states)) if len(states) == 1 else None)
    if chosen is None:
        raise ValueError(f"it holds several state_dicts: {describe_states(states)}; name one with --key")
    own, note = strip_names(states[chosen])
    params = strip_names(states[weights])[0] if ema and weights else None
    if params is not None and params.keys() != own.keys():
        params = None
    name = f"the state_dict {chosen}" if chosen else "a PyTorch state_dict"
    return Found(own, params, step, f"{name}{', the EMA' if ema else ''}{note}")


def strip_names(state: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """A state_dict without buffers and without the wrappers' prefixes, and a note of what was taken off."""
    kept = {name: value for name, value in state.items() if not _BUFFER.fullmatch(name)}
    buffers, removed, copies = sorted(state.keys() - kept.keys()), "", ""
    while kept and (prefix := _shared_prefix(kept)):
        others = [name for name in kept if not name.startswith(prefix)]
        kept = {name.removeprefix(prefix): value for name, value in kept.items() if name.startswith(prefix)}
        removed += prefix
        if others:
            copies = f", of {len(kept) + len(others)} tensors the {len(kept)} of the EMA"
    # DataParallel wraps single modules too.
    if any(name.startswith("module.") for name in kept):
        kept, removed = {name.removeprefix("module."): value for name, value in kept.items()}, removed + "module."
    note = copies + (f"; prefix {removed} taken off" if removed else "")
    if buffers:
        shown = ", ".join(buffers[:3]) + (", …" if len(buffers) > 3 else "")
        note += f"; without the buffers {shown}"
    return kept, note


def describe_states(states: Mapping[str, Mapping]) -> str:
    """The state_dicts of a checkpoint by their keys, with the number of tensors of each."""
    return ", ".join(f"{key or 'the file itself'} ({len(state)} tensors)" for key, state in states.items()) or "none"


def _shared_prefix(state: Mapping[str, Any]) -> str:
    counts = Counter(prefix for prefix in _PREFIXES for name in state if name.startswith(prefix))
    for prefix in _EMA_PREFIXES:
        # Beside the EMA its copy of the weights, as online_model.
        if counts[prefix]:
            return prefix
    return next((prefix for prefix in _PREFIXES if counts[prefix] == len(state)), "")


def _states(contents: object, is_tensor: Callable[[object], bool], key: str = "", depth: int = 0) -> dict[str, dict]:
    """Every state_dict in nested dicts and lists, by its dotted key."""
    entries: dict[Any, Any] = {}
    if isinstance(contents, Mapping):
        entries = dict(contents)
    elif isinstance(contents, list | tuple):
        entries = dict(enumerate(contents))
    tensors = {name: value for name, value in entries.items() if isinstance(name, str) and is_tensor(value)}
    # A state_dict names modules; counters that are tensors stand alone.
    found = {key: tensors} if any("." in name for name in tensors) else {}
    if depth < _MAX_DEPTH and not found:
        for name, value in entries.items():
            if name not in ("optimizer", "opt", "optimizer_states", "optimizer_state_dict"):
                found |= _states(value, is_tensor, f"{key}.{name}" if key else str(name), depth + 1)
    return found


def _first(states: Mapping[str, Mapping], keys: tuple[str, ...]) -> str | None:
    """The state_dict whose key, or the last part of whose key, comes first in `keys`."""
    for key in keys:
        for name in states:
            if name == key or name.endswith(f".{key}") or name.startswith(f"{key}."):
                return name
    return None


def _step(contents: object) -> int:
    if isinstance(contents, Mapping):
        for name in ("step", "global_step", "iteration", "iter"):
            if type(contents.get(name)) is int:
                return contents[name]
    return 0
