"""Reads a network's weights from any file or folder that we know, checked against the network they belong to.

No code of a file is run. What carries checksums is checked against them; for what carries none, a digest can
be given, and what was checked is said.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeGuard, TypeVar

import numpy as np
import safetensors

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.hashing import digest_of_file, sha256_of_tensors
from s2dm_jax.config.build import build_network
from s2dm_jax.models.unet import UNet
from s2dm_jax.weights import diffusers_names, model_card, torch_names
from s2dm_jax.weights.torch_pickle import Tensor, open_torch, read_note
from s2dm_jax.workdir.load import checked_config, load_run

SUMS = "SHA256SUMS"

OURS = "s2dm_jax."

_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"

# The second head of NPR- and SN-DPM models, on the same network.
_SECOND_HEAD = ("norm_out2.", "conv_out2.")

_PREFIX = "module."

Described = TypeVar("Described")


class Weights(NamedTuple):
    """A network with its weights, and what their file tells about them.

    Attributes:
      network: the shape; dropout is 0 where the file does not tell it.
      ema_params: nested dict of float32 arrays, the moving average; the weights themselves where there is
        none.
      params: the weights that training changes; `ema_params` where there are no others.
      card: the model card in a file of ours (`model_card.make_card`), with its config; else None.
      schedule: (name, T), where the file has it.
      step: training steps that the file says are behind them.
      origin: one line: format, what was taken from it, how it was checked.
      sha256: of the file, or of the file with the weights in a folder; "" for a run's folder.
    """

    network: UNet
    ema_params: dict
    params: dict
    card: dict | None
    schedule: tuple[str, int] | None
    step: int
    origin: str
    sha256: str


def read_weights(path: str, *, resolution: int | None = None, digest: str = "") -> Weights:
    """The weights in a run's folder, a diffusers folder, an exported sampler, a `.safetensors` or a `.pth`.

    Args:
      path: of the file or folder.
      resolution: of the images, where shapes do not tell it (`torch_names.infer_network`).
      digest: SHA-256 or MD5 that the file, or the file with the weights in a folder, must have.

    Raises:
      UserError: for a file that is missing, damaged, hostile, or of another network; one sentence that names
        the tensor and both shapes, where it is a tensor's shape.
    """
    place = Path(path)
    if not place.exists():
        raise UserError(f"{path} does not exist; give a checkpoint's file, or a folder")
    try:
        if place.is_dir() and (place / "checkpoints").is_dir():
            return _read_run(path, "a run's folder")
        if place.is_dir():
            return _read_diffusers(place, digest)
        if place.suffix == ".npz":
            return _read_run(path, "an exported sampler, its checksums agree")
        sha256 = _check_digest(place, digest)
        if place.suffix == ".safetensors":
            return _read_safetensors(place, resolution, digest)._replace(sha256=sha256)
        return _read_torch(place, resolution, digest)._replace(sha256=sha256)
    except ValueError as error:
        raise UserError(f"{path} cannot be used: {error}") from error


def _check_digest(path: Path, digest: str) -> str:
    algorithm = {0: "sha256", 32: "md5", 64: "sha256"}.get(len(digest))
    if algorithm is None:
        raise ValueError(f"--digest={digest} is neither a SHA-256 (64 digits) nor an MD5 (32 digits)")
    found = digest_of_file(path, algorithm)
    if digest and found != digest.lower():
        raise ValueError(f"its {algorithm} is {found}, not {digest.lower()}; fetch it again")
    return found if algorithm == "sha256" else digest_of_file(path)


def _checked(has_checksums: bool, digest: str) -> str:
    if has_checksums:
        return "its checksums agree"
    return "it has the digest given" if digest else "it has no checksums: compare its SHA-256 with its publisher's"


def _read_run(path: str, kind: str) -> Weights:
    run = load_run(path)
    if run.variance_head is not None:
        raise UserError(
            f"{path} is the run of a second head, which other formats have no place for; give its base, "
            f"{run.config.variance_head.base_workdir}"
        )
    schedule = (run.config.diffusion.schedule, run.config.diffusion.T)
    card = model_card.card_of_run(run, path)
    return Weights(torch_names.as_unet(run.network), run.ema_params, run.params, card, schedule, run.step, kind, "")


def _read_safetensors(path: Path, resolution: int | None, digest: str) -> Weights:
    state, metadata = load_safetensors(path)
    card = metadata.get(f"{OURS}card")
    origin = f"a safetensors file{' of ours' if card else ''}; {_checked(bool(card), digest)}"
    return _fit(state, None, card, resolution, origin, 0, path)


def _fit(
    ema: dict,
    params: dict | None,
    card: str | None,
    resolution: int | None,
    origin: str,
    step: int,
    path: Path,
) -> Weights:
    """The weights in the network that their card describes, or else their shapes."""
    shapes = {name: value.shape for name, value in ema.items()}
    schedule, known = None, None
    if card is not None:
        known = model_card.parse_card(card)
        config = checked_config(json.dumps(known["config"]), path)
        network, step = torch_names.as_unet(build_network(config)), known["step"]
        schedule = (config.diffusion.schedule, config.diffusion.T)
    else:
        network = torch_names.infer_network(shapes, resolution)
    ema = torch_names.from_torch(_finite(ema), network)
    params = ema if params is None else torch_names.from_torch(_finite(params), network)
    return Weights(network, ema, params, known, schedule, step, origin, "")


def load_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """A safetensors file's tensors and its metadata, checked against the digest that we write there.

    Raises:
      ValueError: for a file that is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, TypeError) as error:
        raise ValueError(f"it is damaged or no safetensors file ({error}); fetch it again") from error
    said = {name: value for name, value in metadata.items() if name != f"{OURS}sha256"}
    ours = any(name.startswith(OURS) for name in metadata)
    if ours and metadata.get(f"{OURS}sha256") != sha256_of_tensors(state, said):
        raise ValueError("its tensors or metadata are not those that it was written with; fetch it again")
    return state, metadata


def _read_diffusers(folder: Path, digest: str) -> Weights:
    has_sums = (folder / SUMS).exists()
    if has_sums:
        _check_sums(folder)
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    weights = [unet / f"{_DIFFUSERS_WEIGHTS}{suffix}" for suffix in (".safetensors", ".bin")]
    weights = [path for path in weights if path.exists()]
    if not (unet / "config.json").exists() or not weights:
        raise ValueError(
            "it is neither a run's folder nor one of diffusers, which has a UNet2DModel's config.json and "
            f"{_DIFFUSERS_WEIGHTS}.safetensors"
        )
    network = _described(unet / "config.json", diffusers_names.read_unet_config)
    schedule = None
    if (scheduler / "scheduler_config.json").exists():
        name, T, prediction = _described(scheduler / "scheduler_config.json", diffusers_names.read_scheduler_config)
        schedule, network = (name, T), dataclasses.replace(network, prediction=prediction)
    sha256 = _check_digest(weights[0], digest)
    card = None
    if weights[0].suffix == ".safetensors":
        state, metadata = load_safetensors(weights[0])
        card = metadata.get(f"{OURS}card")
    else:
        state, _, _, has_sums = _load_torch(weights[0])
    state, network = diffusers_names.from_diffusers(_finite(state), network)
    origin = f"a diffusers folder; {_checked(has_sums, digest)}"
    if card is not None:
        found = _fit(state, None, card, None, origin, 0, weights[0])
        described = (network.resolution, network.attn_resolutions, network.prediction, schedule)
        other = found.network
        if described != (other.resolution, other.attn_resolutions, other.prediction, found.schedule):
            raise ValueError(f"its configs are not those that {weights[0].name} was written with")
        return found._replace(sha256=sha256)
    params = torch_names.from_torch(state, network)
    return Weights(network, params, params, None, schedule, 0, origin, sha256)


def _check_sums(folder: Path) -> None:
    listed = {}
    for line in (folder / SUMS).read_text(errors="replace", encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        listed[name] = digest
    read = [path for pattern in ("*.json", "*/*.json", "*/*.safetensors") for path in folder.glob(pattern)]
    names = {path.relative_to(folder).as_posix() for path in read} - {"model_card.json"}
    for name in sorted(names | listed.keys()):
        if name not in names or digest_of_file(folder / name) != listed.get(name):
            raise ValueError(
                f"{name} is not as {SUMS} says; fetch it again, or delete {SUMS} if it was changed on purpose"
            )


def _described(path: Path, read: Callable[[dict], Described]) -> Described:
    try:
        return read(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} does not describe a network or schedule of ours: {error}") from error


def _read_torch(path: Path, resolution: int | None, digest: str) -> Weights:
    ema, params, (kind, step), has_checksums = _load_torch(path)
    return _fit(ema, params, read_note(path), resolution, f"{kind}; {_checked(has_checksums, digest)}", step, path)


def _load_torch(path: Path) -> tuple[dict, dict | None, tuple[str, int], bool]:
    """Names and arrays of the moving average and, where there are other ones, of the weights."""
    with open_torch(path) as (contents, read, has_checksums):
        ema, params, kind, step = _identify(contents)
        ema = {name: read(tensor) for name, tensor in ema.items()}
        params = params and {name: read(tensor) for name, tensor in params.items()}
    return ema, params, (kind, step), has_checksums


def _identify(contents: object) -> tuple[dict, dict | None, str, int]:
    """What of a published checkpoint's contents is which (`reference.md` 1.3)."""
    if _is_state(contents):
        return _plain(contents), None, "a PyTorch state_dict", 0
    if isinstance(contents, list) and contents and _is_state(contents[0]):
        step = contents[3] if len(contents) > 3 and type(contents[3]) is int else 0
        params = _plain(contents[0])
        if len(contents) > 4 and _is_state(contents[-1]):
            return _plain(contents[-1]), params, "a DDIM training checkpoint, with its moving average", step
        return params, None, "a DDIM training checkpoint; it has no moving average", step
    if isinstance(contents, dict) and _is_state(contents.get("model_dict")):
        step = contents.get("step", 0)
        step = step if type(step) is int else 0
        params, ema = _plain(contents["model_dict"]), _ema_in_optimizer(contents)
        if ema:
            return ema, params, "a SA-DPM training checkpoint, with the moving average in its optimizer", step
        return params, None, "a SA-DPM training checkpoint; it has no moving average", step
    found = type(contents).__name__
    if isinstance(contents, dict):
        found = f"a dict of {', '.join(map(str, list(contents)[:5]))}"
    raise ValueError(f"it holds {found}, where a state_dict, DDIM's list or SA-DPM's dict with model_dict is needed")


def _is_state(value: object) -> TypeGuard[dict[str, Tensor]]:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = _PREFIX if all(name.startswith(_PREFIX) for name in state) else ""
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in state.items() if not name.startswith(_SECOND_HEAD)}


def _ema_in_optimizer(contents: dict) -> dict[str, Tensor] | None:
    """SA-DPM's optimizer numbers the weights in the state_dict's order, and keeps each one's average."""
    optimizer = contents.get("optimizer")
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("state"), dict):
        return None
    numbers = [n for group in optimizer.get("param_groups", ()) for n in group.get("params", ())]
    kept = [optimizer["state"].get(number, {}) for number in numbers]
    names = list(contents["model_dict"])
    if len(kept) != len(names) or not all(isinstance(k.get("ema"), Tensor) for k in kept):
        return None
    return _plain({name: k["ema"] for name, k in zip(names, kept, strict=True)})


def _finite(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every tensor as float32, once sure that all of it are numbers."""
    for name, value in state.items():
        if not np.isfinite(np.asarray(value, np.float32)).all():
            raise ValueError(f"the tensor {name} of shape {value.shape} holds values that are not finite")
    return {name: np.asarray(value, np.float32) for name, value in state.items()}


def to_state(params: dict) -> dict[str, np.ndarray]:
    """Nested parameters as a contiguous published state_dict, in the order of the published code."""
    order = {name: i for i, name in enumerate(("temb", "conv_in", "down", "mid", "up", "norm_out", "conv_out"))}
    state = torch_names.to_torch(params)
    names = sorted(state, key=lambda name: order[name.split(".")[0]])
    return {name: np.ascontiguousarray(state[name]) for name in names}
