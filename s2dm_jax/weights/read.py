"""Reads a network's weights from a file or folder of any supported format, checked against their network.

Code in a file is never executed. Checksums are verified; for a file without any, the caller can give a digest.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.file_kinds import kind_of_file
from s2dm_jax.common.files import user_path
from s2dm_jax.common.hashing import digest_of_file, sha256_of_tensors
from s2dm_jax.config.build import build_network, schedule_spec
from s2dm_jax.config.ema import parse_choice
from s2dm_jax.diffusion.betas import ScheduleSpec, same_betas
from s2dm_jax.models.improved_unet import ImprovedUNet
from s2dm_jax.models.unet import UNet
from s2dm_jax.models.variance_head import Head
from s2dm_jax.weights import (
    diffusers_improved,
    diffusers_names,
    improved_shapes,
    model_card,
    nesting,
    published,
    torch_names,
)
from s2dm_jax.weights.torch_pickle import open_torch, read_note
from s2dm_jax.workdir.folder import checkpoint_folder
from s2dm_jax.workdir.load import checked_config, load_run

SUMS = "SHA256SUMS"
# Of what s2dm_jax writes into a safetensors file's metadata.
METADATA_PREFIX = "s2dm_jax."

_WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"


class Weights(NamedTuple):
    """A network with its weights and their file's metadata.

    Attributes:
      network: the shape; dropout is 0 if the file does not state it.
      ema_params: nested dict of float32 arrays, the EMA; the weights themselves if there is none.
      params: the weights that training changes; `ema_params` if there are no others.
      model_card: the model card (`model_card.make_card`) in a file written by s2dm_jax, with its config; else None.
      schedule: if the file has it.
      step: training steps so far, according to the file.
      description: one line: format, what was taken from it, how it was checked.
      sha256: of the file, or of the file with the weights in a folder; "" for a run's folder.
      head: the variance head stored with the network, with the EMA of its weights; its kind is "" if the file does not
        state it.
      assumed: values assumed for what the file leaves open; None if it leaves nothing open, and for DDIM's UNet.
    """

    network: UNet | ImprovedUNet
    ema_params: dict
    params: dict
    model_card: dict | None
    schedule: ScheduleSpec | None
    step: int
    description: str
    sha256: str
    head: Head | None = None
    assumed: improved_shapes.Assumed | None = None


def read_weights(
    path: str,
    *,
    resolution: int | None = None,
    digest: str = "",
    key: str = "",
    ema: str = "",
    stated: Mapping[str, Any] | None = None,
) -> Weights:
    """The weights in a run's folder, a diffusers folder, an exported sampler, a `.safetensors` or a `.pth`.

    Args:
      resolution: of the images in pixels, if the shapes leave it open (`torch_names.infer_network`).
      digest: SHA-256 or MD5 that the file, or the file with the weights in a folder, must have.
      key: which state_dict of a file with several, such as "model.ema"; "" to search for it.
      ema: which weights of a run, as in `config.sample.ema`; "" for its EMA.
      stated: values of `improved_shapes.OPEN_FIELDS`, which the state_dict of an improved-diffusion UNet leaves open.

    Raises:
      UserError: for a file that is missing, damaged, unsafe, or of another network, naming the tensor and both shapes.
    """
    place = user_path(path, "path")
    path = str(place)
    if not place.exists():
        raise UserError(f"{path} does not exist; give a checkpoint file or a folder")
    try:
        if checkpoint_folder(place).is_dir():
            return _read_run(path, "a run's folder", ema)
        if ema:
            raise ValueError(f"ema={ema!r} is for a run's folder")
        if place.is_dir():
            return _read_diffusers(place, digest)
        if place.suffix == ".npz":
            return _read_run(path, "an exported sampler, its checksums agree")
        return _read_file(place, resolution, digest, key, stated or {})
    except ValueError as error:
        raise UserError(f"{path} cannot be used: {error}") from error


def _check_digest(path: Path, digest: str) -> str:
    """The file's SHA-256; ValueError if the file has another digest than the one given."""
    algorithm = {0: "sha256", 32: "md5", 64: "sha256"}.get(len(digest))
    if algorithm is None:
        raise ValueError(f"--digest={digest} is neither a SHA-256 (64 digits) nor an MD5 (32 digits)")
    found = digest_of_file(path, algorithm)
    if digest and found != digest.lower():
        raise ValueError(f"its {algorithm} is {found}, not {digest.lower()}; fetch it again")
    return found if algorithm == "sha256" else digest_of_file(path)


def _how_checked(has_checksums: bool, digest: str) -> str:
    if has_checksums:
        return "its checksums agree"
    return "it has the given digest" if digest else "it has no checksums: compare its SHA-256 with the publisher's"


def _read_run(path: str, kind: str, ema: str = "") -> Weights:
    run = load_run(path, ema=ema)
    schedule = schedule_spec(run.config)
    card = model_card.card_of_run(run, path)
    kind += f", {parse_choice(ema).words}" * bool(ema) + f"; {run.ema_note}" * bool(run.ema_note)
    network, head = torch_names.as_published(run.network), run.variance_head
    params = run.params if head is None else run.ema_params
    return Weights(network, run.ema_params, params, card, schedule, run.step, kind, "", head)


def _read_file(path: Path, resolution: int | None, digest: str, key: str, stated: Mapping[str, Any]) -> Weights:
    sha256 = _check_digest(path, digest)
    if path.suffix == ".safetensors":
        ema, text = _load_safetensors(path)
        params, step, has_checksums = None, 0, bool(text)
        kind = "a safetensors file written by s2dm_jax"
        if not text:
            ema, note = nesting.strip_names(ema, f"{key}." if key else "")
            kind = f"a safetensors file{note}"
    else:
        ema, params, step, kind, has_checksums = _load_torch(path, key)
        text = read_note(path)
    ema, beside = torch_names.split_head(ema)
    card = schedule = assumed = None
    if text is None:
        network, assumed = _infer(ema, resolution, stated)
        step = step or published.step_in_name(path)
    else:
        card, network, schedule = _read_card(text, path)
        step = card["step"]
    ema = torch_names.from_torch(_finite(ema), network)
    params = ema if params is None else torch_names.from_torch(_finite(torch_names.split_head(params)[0]), network)
    head, note = _read_head(beside, network, card)
    origin = f"{kind}{note}; {_how_checked(has_checksums, digest)}"
    return Weights(network, ema, params, card, schedule, step, origin, sha256, head, assumed)


def _read_head(
    state: Mapping[str, np.ndarray], network: UNet | ImprovedUNet, card: dict | None
) -> tuple[Head | None, str]:
    """The variance head beside a network, and what the description says of it."""
    if not state:
        return None, ""
    try:
        params = torch_names.head_from_torch(_finite(state), network)
    except ValueError as error:
        return None, f", without its variance head, which cannot be used ({error})"
    return Head(card["config"]["variance_head"]["kind"] if card else "", params), ", with a variance head"


def _infer(
    state: Mapping[str, np.ndarray], resolution: int | None, stated: Mapping[str, Any]
) -> tuple[UNet | ImprovedUNet, improved_shapes.Assumed | None]:
    """The network of a state_dict's shapes; where they are another's, the ValueError lists what is there."""
    shapes = {name: value.shape for name, value in state.items()}
    try:
        if improved_shapes.is_improved(shapes):
            return improved_shapes.infer_improved(shapes, resolution, stated)
        return torch_names.infer_network(shapes, resolution), None
    except ValueError as error:
        if "these are not the weights of" not in str(error):
            raise
        shown = ", ".join(list(state)[:3]) + (", …" if len(state) > 3 else "")
        raise ValueError(f"{error}; it holds {len(state)} tensors: {shown or 'none'}") from error


def _read_card(text: str, path: Path) -> tuple[dict, UNet | ImprovedUNet, ScheduleSpec]:
    """The model card in a file, with the network and schedule of its config."""
    card = model_card.parse_card(text)
    config = checked_config(json.dumps(card["config"]), path)
    return card, torch_names.as_published(build_network(config)), schedule_spec(config)


def _load_safetensors(path: Path) -> tuple[dict[str, np.ndarray], str | None]:
    """A file's tensors and the text of its model card, checked against the digest that s2dm_jax writes there."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except AttributeError as error:
        # numpy has no such type.
        kind = str(error).rpartition("attribute ")[2].strip("'")
        raise ValueError(f"its tensors are of type {kind}, which is not supported; save them as float32") from error
    except (safetensors.SafetensorError, OSError, TypeError) as error:
        reason = kind_of_file(path) or str(error).removeprefix("Error while deserializing header: ")
        raise ValueError(f"it is damaged or not a safetensors file ({reason}); fetch it again") from error
    digest = metadata.pop(f"{METADATA_PREFIX}sha256", None)
    written_here = digest is not None or any(name.startswith(METADATA_PREFIX) for name in metadata)
    if written_here and digest != sha256_of_tensors(state, metadata):
        raise ValueError("its tensors or metadata have changed since it was written; fetch it again")
    return state, metadata.get(f"{METADATA_PREFIX}card")


def _read_diffusers(folder: Path, digest: str) -> Weights:
    has_checksums = (folder / SUMS).exists()
    if has_checksums:
        _check_sums(folder)
    # Google's checkpoints have everything in one folder; diffusers' training scripts have the EMA beside the weights.
    candidates = [folder / "unet_ema", folder / "unet"]
    unet = next((path for path in candidates if path.is_dir()), folder)
    scheduler = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    note = "; the EMA, unet_ema, was taken" if unet == candidates[0] else ""
    # Between the name's parts a variant may have its own, as fp16.
    names = [f"{_DIFFUSERS_WEIGHTS}{variant}{suffix}" for variant in ("", ".*") for suffix in (".safetensors", ".bin")]
    weights = next((path for name in names for path in sorted(unet.glob(name))), None)
    if weights is None or not (unet / "config.json").exists():
        raise ValueError(
            "it is neither a run's folder nor a diffusers folder, which has a UNet2DModel's config.json and "
            f"{_DIFFUSERS_WEIGHTS}.safetensors{_inside(folder, unet)}"
        )
    network: UNet | ImprovedUNet = _described(unet / "config.json", diffusers_improved.read_unet_config)
    if weights.stem != _DIFFUSERS_WEIGHTS:
        note += f"; the variant {weights.name} was taken"
    if unused := _described(unet / "config.json", diffusers_names.unused_network_options):
        note += f"; these options of its network are ignored: {', '.join(unused)}"
    schedule = text = card = None
    if (scheduler / "scheduler_config.json").exists():
        described_by = scheduler / "scheduler_config.json"
        schedule, prediction = _described(described_by, diffusers_names.read_scheduler_config)
        if unused := _described(described_by, diffusers_names.unused_scheduler_options):
            note += f"; these sampling options of its scheduler are ignored: {', '.join(unused)}"
        network = dataclasses.replace(network, prediction=prediction)
    sha256 = _check_digest(weights, digest)
    if weights.suffix == ".safetensors":
        state, text = _load_safetensors(weights)
    else:
        state, *_, has_checksums = _load_torch(weights)
    if isinstance(network, ImprovedUNet):
        state = diffusers_improved.from_diffusers(_finite(state), network)
    else:
        state, network = diffusers_names.from_diffusers(_finite(state), network)
    if text is not None:
        described, read = (network.resolution, network.attn_resolutions, network.prediction), schedule
        card, network, schedule = _read_card(text, weights)
        same = described == (network.resolution, network.attn_resolutions, network.prediction)
        if not same or read is None or not same_betas(read, schedule):
            raise ValueError(f"its configs have changed since {weights.name} was written")
    params = torch_names.from_torch(state, network)
    step = card["step"] if card else 0
    origin = f"a diffusers folder{note}; {_how_checked(has_checksums, digest)}"
    return Weights(network, params, params, card, schedule, step, origin, sha256)


def _inside(folder: Path, unet: Path) -> str:
    """What in a folder may have been meant, as the end of a sentence."""
    if any(unet.glob(f"{_DIFFUSERS_WEIGHTS}-*-of-*")):
        return "; its weights are in several parts: save them as one"
    files = [path for path in folder.iterdir() if path.suffix in _WEIGHTS_SUFFIXES]
    folders = [path.parent for path in folder.glob("*/unet*")]
    return f"; give what is in it, such as {min(files or folders)}" if files or folders else ""


def _check_sums(folder: Path) -> None:
    lines = (folder / SUMS).read_text(errors="replace", encoding="utf-8").splitlines()
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    read = [path for pattern in ("*.json", "*/*.json", "*/*.safetensors") for path in folder.glob(pattern)]
    names = {path.relative_to(folder).as_posix() for path in read} - {model_card.CARD}
    for name in sorted(names | listed.keys()):
        if name not in names or digest_of_file(folder / name) != listed.get(name):
            raise ValueError(
                f"{name} does not match {SUMS}; fetch it again, or delete {SUMS} if it was changed on purpose"
            )


def _described(path: Path, read: Callable[[dict], Any]) -> Any:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is {kind_of_file(path)[6:] or 'not JSON'}; fetch it again") from error
    if not isinstance(described, dict):
        raise ValueError(f"{path.name} is not an object of fields; fetch it again")
    try:
        return read(described)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} does not describe a network or schedule of s2dm_jax: {error}") from error


def _load_torch(path: Path, key: str = "") -> tuple[dict, dict | None, int, str, bool]:
    """The arrays of `published.identify` with step and kind, and whether checksums cover them."""
    with open_torch(path) as (contents, read, has_checksums):
        try:
            ema, params, step, kind = published.identify(contents, key)
        except ValueError as error:
            # The file is whole: what it holds is not what is needed.
            raise UserError(f"{path} cannot be used: {error}") from error
        ema = {name: read(tensor) for name, tensor in ema.items()}
        params = params and {name: read(tensor) for name, tensor in params.items()}
    return ema, params, step, kind, has_checksums


def _finite(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every tensor as float32, checked to be finite, and to be of floats: integers are quantised weights."""
    for name, value in state.items():
        if value.dtype.kind in "iub":
            raise ValueError(f"the tensor {name} is of type {value.dtype}, but floating-point weights are needed")
    state = {name: np.asarray(value, np.float32) for name, value in state.items()}
    for name, value in state.items():
        if not np.isfinite(value).all():
            raise ValueError(f"the tensor {name} of shape {value.shape} holds values that are not finite")
    return state
