"""Finds the network's tensors in a checkpoint, however training codes nest them: wrappers, prefixes, buffers.

The values are whatever a reader has in place of tensors; only their names and nesting are looked at.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# Keys of a training checkpoint, the likeliest first: an EMA, then the weights that training changes.
_EMA_KEYS = ("ema", "state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "ema_params", "params_ema")
_WEIGHTS_KEYS = ("state_dict", "model", "model_state_dict", "model_dict", "net", "network", "unet", "params", "weights")
# Components of names that wrappers put in: of DataParallel, torch.compile, FSDP, activation checkpointing.
_WRAPPER = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# A tensor that every network of either kind has, and networks beside it, as autoencoders, do not: what is in front of
# its name is in front of all.
_MARK = re.compile(r"(|.*\.)(?:temb\.dense|time_embed)\.0\.weight")
# What may be in front of the names of other networks.
_PREFIXES = ("model.", "diffusion_model.", "denoise_fn.", "unet.", "net.", "network.")
# Tensors that are no weights: noise schedules, counters, loss weights.
_BUFFER = re.compile(
    r"(.*\.)?(betas|alphas|log_snr|logvar|loss_weight|p2_loss_weight|initted|step|num_updates|decay|n_averaged|num_batches_tracked"
    r"|(sqrt_|log_|posterior_|lvlb_|sqrt_recip_|sqrt_recipm1_|one_minus_|sqrt_one_minus_|log_one_minus_)"
    r"[a-z0-9_]*(alphas?|cumprod|variance|mean|coef|weights)[a-z0-9_]*|alphas_cumprod(_prev)?)"
)
_MAX_DEPTH = 8


class Found(NamedTuple):
    """A network's tensors in a checkpoint.

    Attributes:
      ema: by the network's own names; the weights if there is no EMA.
      params: the weights that training changes, if they differ.
      step: training steps, if the checkpoint records them.
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
      key: of the state_dict, such as "model.ema" or "0"; "" to search for it.

    Raises:
      ValueError: if there is none under `key`, or several and none with a recognized name; for an EMA that cannot be
        read.
    """
    states = _states(contents, is_tensor)
    step = _step(contents)
    if key:
        own, note = strip_names(*_under_key(states, key))
        return Found(own, None, step, f"the state_dict {key}{note}")
    if not states:
        return None
    ema = _ema_key(states)
    weights = _first({name: state for name, state in states.items() if not _is_ema(name)}, _WEIGHTS_KEYS)
    chosen = ema or weights or (next(iter(states)) if len(states) == 1 else None)
    if chosen is None:
        raise ValueError(f"it holds several state_dicts: {describe_states(states)}; name one with --key")
    own, note = strip_names(states[chosen])
    params = strip_names(states[weights])[0] if ema and weights else None
    if params is not None and params.keys() != own.keys():
        params = None
    name = f"the state_dict {chosen}" if chosen else "a PyTorch state_dict"
    # torch_ema and score_sde list the EMA in the order of the weights.
    if not ema and (listed := _listed_ema(contents, is_tensor)):
        names = [name for name in states[chosen] if not _BUFFER.fullmatch(name)]
        if len(names) != len(listed):
            raise ValueError(
                f"its EMA is a list of {len(listed)} tensors, which cannot be assigned to the {len(names)} weights of "
                f"{name}; --key={chosen} takes the weights themselves"
            )
        return Found(strip_names(dict(zip(names, listed, strict=True)))[0], own, step, f"{name}, with its EMA{note}")
    return Found(own, params, step, f"{name}{', the EMA' if ema else ''}{note}")


def strip_names(state: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Any], str]:
    """A state_dict without buffers, wrappers, and other prefixes of the network's names; and what was removed.

    Args:
      prefix: of the network; "" to find it: the EMA's, if one state_dict has several.

    Raises:
      ValueError: if there are several, and not one of them is an EMA.
    """
    kept = {name: value for name, value in state.items() if not _BUFFER.fullmatch(name)}
    buffers, kept = sorted(state.keys() - kept.keys()), _with_dots(kept)
    wrappers = max(("".join(match[0] for match in _WRAPPER.finditer(name)) for name in kept), key=len, default="")
    bare = {_WRAPPER.sub("", name): value for name, value in kept.items()}
    if len(bare) < len(kept):
        raise ValueError(f"it holds tensors of one name with and without {wrappers}")
    prefix = _WRAPPER.sub("", prefix) or _prefix(bare)
    own = {name.removeprefix(prefix): value for name, value in bare.items() if name.startswith(prefix)}
    note = ""
    if len(own) < len(bare):
        note = f", of {len(bare)} tensors the {len(own)} of {'the EMA' if _is_ema(prefix) else prefix.rstrip('.')}"
    if wrappers or prefix:
        note += f"; prefix {wrappers}{prefix} taken off"
    if buffers:
        shown = ", ".join(buffers[:3]) + (", …" if len(buffers) > 3 else "")
        note += f"; without the buffers {shown}"
    return own, note


def _prefix(state: Mapping[str, Any]) -> str:
    """What is in front of the names of a network's tensors in a state_dict; "" if nothing."""
    found = [match[1] for name in state if (match := _MARK.fullmatch(name))]
    # Beside the EMA there is a copy of the weights, as lucidrains' online_model.
    chosen = [prefix for prefix in found if _is_ema(prefix)] or found
    if len(chosen) > 1:
        keys = ", ".join(prefix.rstrip(".") or "(no prefix)" for prefix in chosen)
        raise ValueError(f"it holds several networks, whose names begin with {keys}; name one with --key")
    if chosen:
        return chosen[0]
    prefix = ""
    while shared := next((p for p in _PREFIXES if state and all(n.startswith(prefix + p) for n in state)), ""):
        prefix += shared
    return prefix


def _with_dots(state: dict[str, Any]) -> dict[str, Any]:
    """A state_dict in which the EMA's names of latent diffusion, without dots, are those of the weights."""
    dotless = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": name for name in state}
    return {
        f"model_ema.{dotless[name].removeprefix('model.')}" if name in dotless else name: value
        for name, value in state.items()
    }


def _is_ema(name: str) -> bool:
    return "ema" in re.split("[._]", name)


def _ema_key(states: Mapping[str, Mapping]) -> str | None:
    """The key of the EMA's state_dict, or None."""
    found = {name: state for name, state in states.items() if _is_ema(name)}
    known = _first(found, _EMA_KEYS)
    if known is None and len(found) > 1:
        raise ValueError(f"it holds several EMAs: {describe_states(found)}; name one with --key")
    return known or next(iter(found), None)


def _listed_ema(contents: object, is_tensor: Callable[[object], bool]) -> list | None:
    """The EMA where it is a list of tensors."""
    groups = contents.items() if isinstance(contents, Mapping) else ()
    for name, group in groups:
        if isinstance(name, str) and _is_ema(name) and isinstance(group, Mapping):
            values = group.get("shadow_params")
            if isinstance(values, list | tuple) and values and all(map(is_tensor, values)):
                return list(values)
    return None


def _under_key(states: Mapping[str, dict], key: str) -> tuple[dict, str]:
    """The state_dict of a key, or the one with names that begin with it, and that prefix."""
    if key in states:
        return states[key], ""
    for name, state in states.items():
        prefix = f"{key.removeprefix(f'{name}.')}."
        if any(_WRAPPER.sub("", tensor).startswith(prefix) for tensor in state):
            return state, prefix
    raise ValueError(f"it has no state_dict under --key={key}; there are: {describe_states(states)}")


def describe_states(states: Mapping[str, Mapping]) -> str:
    """The state_dicts of a checkpoint by their keys, with the number of tensors of each."""
    return ", ".join(f"{key or 'the file itself'} ({len(state)} tensors)" for key, state in states.items()) or "none"


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
            if name == key or name.endswith(f".{key}"):
                return name
        for name in states:
            if name.startswith(f"{key}."):
                return name
    return None


def _step(contents: object) -> int:
    if isinstance(contents, Mapping):
        for name in ("step", "global_step", "iteration", "iter"):
            if type(contents.get(name)) is int:
                return contents[name]
    return 0
