"""Weights in and out: the published PyTorch names and layouts to ours and back.

Paths are the same in both; only the last part's name and the layout differ, as `_leaf_to_torch` says.
"""

from collections.abc import Mapping

import numpy as np
from flax import traverse_util

from s2dm_jax.unet import UNetConfig, param_shapes

# Convolutions with a 1×1 kernel in the published code, matrix products here.
_POINTWISE = ("q", "k", "v", "proj_out", "nin_shortcut")


def to_torch(params: dict) -> dict[str, np.ndarray]:
    """Parameters under the published DDIM/SA-DPM/PNDM state_dict's names and in its layouts.

    Args:
      params: nested dict as from `unet.init_params`.

    Returns:
      Flat dict of arrays: convolutions OIHW, matrices [out, in].
    """
    flat = traverse_util.flatten_dict(params, sep=".")
    return dict(_leaf_to_torch(name, np.asarray(value)) for name, value in flat.items())


def from_torch(state: Mapping[str, np.ndarray], config: UNetConfig) -> dict:
    """Parameters from a published state_dict (`reference.md` 1.3), the inverse of `to_torch`.

    Args:
      state: torch name → array; no `module.` prefix.
      config: the network that the parameters belong to.

    Returns:
      Nested dict of float32 numpy arrays.

    Raises:
      ValueError: naming the first tensor that is missing, not known, or of another shape.
    """
    shapes = traverse_util.flatten_dict(param_shapes(config), sep=".")
    flat, known = {}, set()
    for name, leaf in shapes.items():
        torch_name, expected = _leaf_to_torch(name, np.broadcast_to(np.float32(0), leaf.shape))
        known.add(torch_name)
        if torch_name not in state:
            raise ValueError(f"the checkpoint lacks the tensor {torch_name} of shape {expected.shape}")
        value = np.asarray(state[torch_name], np.float32)
        if value.shape != expected.shape:
            raise ValueError(f"{torch_name} has shape {value.shape}, but the network needs {expected.shape}")
        flat[name] = _leaf_from_torch(name, value)
    unknown = sorted(set(state) - known)
    if unknown:
        raise ValueError(f"the network has no place for the checkpoint's tensor {unknown[0]}")
    return traverse_util.unflatten_dict(flat, sep=".")


def _leaf_to_torch(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    module, leaf = name.rsplit(".", 1)
    if leaf == "bias":
        return name, value
    if leaf == "kernel":
        if value.ndim == 4:
            value = value.transpose(3, 2, 0, 1)
        elif module.rsplit(".", 1)[-1] in _POINTWISE:
            value = value.T[:, :, None, None]
        else:
            value = value.T
    return f"{module}.weight", value


def _leaf_from_torch(name: str, value: np.ndarray) -> np.ndarray:
    if not name.endswith(".kernel"):
        return value
    if value.ndim == 2:
        return value.T
    if name.split(".")[-2] in _POINTWISE:
        return value[:, :, 0, 0].T
    return value.transpose(2, 3, 1, 0)
