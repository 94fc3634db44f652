"""Converts weights between this project's runs, the published PyTorch codes, diffusers and safetensors."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging
from ml_collections import ConfigDict

from s2dm_jax.common.cli import Parser, path_argument
from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import check_writable
from s2dm_jax.common.jax_environment import check_jax_environment
from s2dm_jax.common.report import report_user_errors
from s2dm_jax.common.signals import end_on_signal
from s2dm_jax.config.build import schedule_ends
from s2dm_jax.config.defaults import FIELDS
from s2dm_jax.config.fields import allowed_range
from s2dm_jax.config.io import load_config
from s2dm_jax.config.presets import HEADS
from s2dm_jax.models.improved_unet import ImprovedUNet
from s2dm_jax.weights.formats import FORMATS, format_of
from s2dm_jax.weights.hub import PREFIX, check_hub_name, fetch_from_hub
from s2dm_jax.weights.improved_shapes import OPEN_FIELDS
from s2dm_jax.workdir.load import read_config

if TYPE_CHECKING:
    from s2dm_jax.weights.read import Weights

_DESCRIPTION = """\
Detects the format of IN, infers the network from the shapes of its tensors, checks every tensor against it,
and writes OUT with a model card.

IN    a run's folder, an exported sampler (.npz), a .safetensors, a diffusers folder with a UNet2DModel, or a
      PyTorch checkpoint of DDIM (ckpt.pth, converted TensorFlow weights), SA-DPM (model_*_ema.pth,
      ckpt_*.pth), PNDM, Analytic-DPM (with the variance heads of NPR- and SN-DPM) or OpenAI's
      improved-diffusion (ema_0.9999_500000.pt); or hf://OWNER/NAME[@REVISION], a diffusers folder on the
      Hugging Face Hub (extra hub). Code in a file is never executed; PyTorch is not needed.
OUT   a new file or folder in the format --to, by default the one of its name: .safetensors;
      model_*_ema.pth for sa_dpm, another .pth for ddim; .pt or .pth of an improved-diffusion network for
      improved_diffusion; with a variance head analytic_dpm; a folder is a run's folder, or diffusers if IN
      is a run's folder."""
_EXAMPLES = """\
examples:
  python scripts/convert.py ckpt.pth runs/celeba --data=celeba
  python scripts/convert.py ema_cifar10.ckpt runs/cifar10 --digest=1fa350b9…
  python scripts/convert.py model_900_ema.pth runs/celebahq --config=configs/celebahq256.py:sa_2
  python scripts/convert.py ema_0.9999_500000.pt runs/iddpm --schedule=cosine --T=4000
  python scripts/convert.py cifar10_sn.pth runs/sn --variance_head=sn --base=runs/analytic
  python scripts/convert.py hf://google/ddpm-cifar10-32 runs/cifar10
  python scripts/convert.py runs/digits digits.safetensors --license=cc-by-4.0
  python scripts/convert.py runs/digits digits_diffusers --to=diffusers"""


def _source(text: str) -> str:
    return check_hub_name(text) if text.startswith(PREFIX) else path_argument("IN")(text)


# What the state_dict of an improved-diffusion UNet does not tell.
_OPEN_FIELDS = {name: field for name, field in FIELDS.items() if name.split(".")[1] in OPEN_FIELDS}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line.

    Raises:
      UserError: for a value that is not allowed.
    """
    parser = Parser(_DESCRIPTION, _EXAMPLES)
    parser.add_argument("source", metavar="IN", type=_source, help="file or folder to read, or hf://OWNER/NAME")
    parser.add_argument("out", metavar="OUT", type=path_argument("OUT"), help="file or folder to write")
    parser.add_argument("--to", choices=FORMATS, default="", help="format of OUT (default: by its name)")
    parser.add_argument("--resolution", type=int, help="height and width in pixels, if the shapes do not determine it")
    parser.add_argument("--key", default="", help="path of the state_dict in a file with several, such as model.ema")
    parser.add_argument(
        "--ema", default="", help="which weights of a run's folder, as config.sample.ema (default: the run's EMA)"
    )
    parser.add_argument(
        "--ema-file",
        default="",
        type=path_argument("--ema-file"),
        help="file with the EMA, if IN has only the raw weights, as OpenAI's model*.pt",
    )
    parser.add_argument("--digest", default="", help="the SHA-256 or MD5 that the file IN must have")
    parser.add_argument(
        "--config", default="", help="config FILE[:OBJECTIVE] with which the run's folder OUT continues training"
    )
    parser.add_argument(
        "--data",
        default="",
        type=path_argument("--data"),
        help="dataset, or path of your own images, on which the run's folder OUT continues training",
    )
    parser.add_argument(
        "--variance_head", choices=HEADS, default="", help="kind of the variance head in IN, to write its run's folder"
    )
    parser.add_argument(
        "--base",
        default="",
        type=path_argument("--base"),
        help="run's folder of the variance head's frozen network, written if it does not exist",
    )
    for name, field in _OPEN_FIELDS.items():
        help = f"config.{name}, which the file of an improved-diffusion network does not store"
        parser.add_argument(f"--{name.split('.')[1]}", type=field.type, choices=field.choices, help=help)
    parser.add_argument("--step", type=int, help="train steps of the weights, for a run's folder (0)")
    parser.add_argument("--license", default="", help="license of the weights, for the model card")
    args = parser.parse_args(argv)
    for name, low in (("resolution", 1), ("step", 0)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise UserError(f"--{name}={value} is out of range: it must be at least {low}")
    for name, field in _OPEN_FIELDS.items():
        value = getattr(args, name.split(".")[1])
        if value is not None and field.low is not None and not field.low <= value <= field.high:
            raise UserError(f"--{name.split('.')[1]}={value} is out of range: it must be {allowed_range(field)}")
    if args.base and os.path.abspath(args.base) == os.path.abspath(args.out):
        raise UserError(
            f"--base={args.base} is also OUT, the run of the variance head; give another folder for its base"
        )
    if not args.source.startswith(PREFIX) and not Path(args.source).exists():
        raise UserError(f"{args.source} does not exist; give the file of a checkpoint, or a folder")
    if os.path.lexists(args.out) and not (os.path.isdir(args.out) and not os.listdir(args.out)):
        raise UserError(f"{args.out} already exists and would be overwritten; give another name, or remove it")
    check_writable([Path(args.out).absolute().parent], "give another place for OUT")
    # Whatever network it turns out to be, some names are wrong.
    format_of(args.source, args.out)
    return args


def _stated(args: argparse.Namespace, given: ConfigDict | None) -> dict[str, Any]:
    """What is known of OPEN_FIELDS: from the flags, which also change the config, and else from the config or base."""
    stated, known = {}, given
    if not given and args.base and Path(args.base).exists():
        known = read_config(args.base)
    for name in _OPEN_FIELDS:
        group, key = name.split(".")
        value = getattr(args, key)
        if value is not None and given:
            given[group][key] = value
        if value is None and known and known.model.name == "improved_unet":
            value = known[group][key]
            # None there stands for the network's own default.
            value = getattr(ImprovedUNet, key) if value is None else value
        if value is not None:
            stated[key] = value
    return stated


def _check_flags(weights: "Weights", args: argparse.Namespace, given: ConfigDict | None) -> "Weights":
    """The weights with the kind of their variance head; raises a `UserError` for flags that are not for such a file."""
    for name in OPEN_FIELDS:
        if getattr(args, name) is not None and not weights.assumed:
            raise UserError(
                f"--{name}={getattr(args, name)} is only for a state_dict of an improved-diffusion network, which does "
                "not store it; remove the flag"
            )
    head, kind = weights.head, args.variance_head or (given.variance_head.kind if given else "")
    if kind and not head:
        raise UserError(f"{args.source} holds no variance head ({weights.description}); remove --variance_head")
    if head and kind and head.kind not in ("", kind):
        raise UserError(f"--variance_head={kind} contradicts {args.source}, whose head is {head.kind}; remove the flag")
    if head:
        weights = weights._replace(head=head._replace(kind=kind or head.kind))
    to_run = bool(weights.head and weights.head.kind) and _format(weights, args) == "workdir"
    if to_run != bool(args.base):
        raise UserError(
            "the run of a variance head needs that of its frozen network: give --base=FOLDER, which is written if it "
            "does not exist"
            if to_run
            else f"--base={args.base} is only for the run of a variance head; give --variance_head, or remove --base"
        )
    return weights


def _with_ema(weights: "Weights", ema: "Weights", source: str, file: str) -> "Weights":
    """The weights of one file with the EMA in another; a `UserError` where they do not belong together."""
    if weights.params is not weights.ema_params or weights.model_card:
        raise UserError(f"{source} already contains an EMA ({weights.description}); remove --ema-file")
    if ema.network != weights.network or (weights.step and ema.step and ema.step != weights.step):
        raise UserError(
            f"--ema-file={file} does not belong to {source}: their networks or steps differ ({ema.step:,} and "
            f"{weights.step:,}); give the EMA of the same step"
        )
    description = f"{weights.description}; the EMA of {Path(file).name}, sha256 {ema.sha256}"
    return weights._replace(ema_params=ema.ema_params, description=description)


def _format(weights: "Weights", args: argparse.Namespace) -> str:
    from s2dm_jax.models.network import network_name

    has_head = bool(weights.head and weights.head.kind)
    return args.to or format_of(args.source, args.out, network_name(weights.network), has_head)


def _print_weights(weights: "Weights", config: ConfigDict, source: str, stated: Mapping[str, Any]) -> None:
    """Prints what was read, and what was assumed because the file does not store it."""
    network = weights.network
    print(f"read     {source}: {weights.description}")
    if weights.sha256:
        print(f"         sha256 {weights.sha256}")
    print(
        f"network  {config.model.name}, {network.resolution}×{network.resolution}×{network.in_channels}, ch "
        f"{network.ch}, ch_mult {network.ch_mult}, {network.num_res_blocks} blocks per resolution, attention at "
        f"{network.attn_resolutions}{_of_improved(network)}"
    )
    diffusion = config.diffusion
    note = "" if weights.schedule or "schedule" in stated else " (assumed: not stored in the file)"
    print(f"schedule {diffusion.schedule}, T = {diffusion.T:,}{schedule_ends(diffusion)}{note}")
    if weights.assumed:
        named = {name: value for name, value in weights.assumed._asdict().items() if hasattr(network, name)}
        assumed = ", ".join(f"{name} {value:g}" for name, value in named.items() if name not in stated)
        if assumed:
            flags = " ".join(f"--{name}" for name in OPEN_FIELDS)
            print(f"assumed  {assumed}, as {weights.assumed.whose}: not stored in the file; change with {flags}")


def _of_improved(network: Any) -> str:
    """What an improved-diffusion network has beside the fields of DDIM's, as the end of a sentence."""
    if not isinstance(network, ImprovedUNet):
        return ""
    parts = [f"{network.num_heads} heads", f"scale-shift norms {'on' if network.scale_shift_norm else 'off'}"]
    parts += ["learned variance"] * network.learned_variance
    parts += [f"{network.num_classes} classes"] * bool(network.num_classes)
    return f", {', '.join(parts)}, reads t as (t + {network.t_offset})·{network.t_scale:g}"


def run(argv: list[str] | None) -> None:
    """Reads, checks and writes weights, and prints what they are."""
    args = parse(argv)
    given_config = load_config(args.config) if args.config else None
    place, origin = fetch_from_hub(args.source) if args.source.startswith(PREFIX) else (args.source, "")
    # Orbax logs with a traceback what it also raises.
    logging.set_verbosity(logging.FATAL)

    check_jax_environment()

    from s2dm_jax.config.defaults import dataset_name
    from s2dm_jax.data.sources import UNKNOWN
    from s2dm_jax.devices.hardware import check_devices
    from s2dm_jax.weights.read import read_weights
    from s2dm_jax.weights.write import infer_config, write_head_run, write_weights

    check_devices()
    stated = _stated(args, given_config)
    choice = {"resolution": args.resolution, "stated": stated}
    weights = read_weights(str(place), **choice, digest=args.digest, key=args.key, ema=args.ema)
    if args.ema_file:
        weights = _with_ema(weights, read_weights(args.ema_file, **choice), args.source, args.ema_file)
    weights = _check_flags(weights, args, given_config)
    config = infer_config(weights, given=given_config, data=args.data)
    if weights.model_card and args.step is not None:
        raise UserError(
            f"--step={args.step} is not allowed for weights written by s2dm_jax, whose step is {weights.step}"
        )
    step = weights.step if weights.model_card else args.step or 0
    _print_weights(weights, config, origin or args.source, stated)
    source = {
        "file": origin or Path(args.source).name,
        "format": weights.description,
        "sha256": weights.sha256,
        "steps_there": weights.step,
        "first_step": step,
    }
    weights = weights._replace(step=step)
    kind = _format(weights, args)
    if args.base:
        write_head_run(args.out, weights, config, base=args.base, source=source, license=args.license)
    else:
        write_weights(args.out, kind, weights, config, source=source, license=args.license)
        if weights.head and not weights.head.kind and kind != "analytic_dpm":
            print(
                "note     the variance head is not written; to write its run, give --variance_head=sn or npr, and "
                "--base"
            )
    print(f"wrote    {args.out}: {kind}, with a model card")
    if kind == "workdir" and not weights.model_card:
        name, note = dataset_name(config), "" if args.data or args.config else " (guessed from the size of the images)"
        if name == UNKNOWN:
            note = ": to train or evaluate, convert with --data=NAME or PATH, or give --config.data.source=PATH"
        print(f"data     {name}{note}")
    if kind == "workdir":
        print(f"sample   python -m s2dm_jax.main --mode=sample --workdir={args.out}")
        print(f"resume   python -m s2dm_jax.main --workdir={args.out} --config.train.steps=N")


def main(argv: list[str] | None = None) -> None:
    """Entry point; user errors and signals are one sentence on stderr and exit status 2 or 128 + signal."""
    with end_on_signal("nothing was written; run the same command again"), report_user_errors():
        run(argv)


if __name__ == "__main__":
    main()
