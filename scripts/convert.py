"""Converts weights between this project's runs, the published PyTorch codes, diffusers and safetensors."""

import argparse
import os
from pathlib import Path

from absl import logging

from s2dm_jax.common.cli import Parser, path_argument
from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import check_writable
from s2dm_jax.common.jax_environment import check_jax_environment
from s2dm_jax.common.report import report_user_errors
from s2dm_jax.common.signals import end_on_signal
from s2dm_jax.config.build import schedule_ends
from s2dm_jax.config.io import load_config
from s2dm_jax.weights.formats import FORMATS, format_of
from s2dm_jax.weights.hub import PREFIX, check_hub_name, fetch_from_hub

_DESCRIPTION = """\
Detects the format of IN, infers the network from the shapes of its tensors, checks every tensor against it,
and writes OUT with a model card.

IN    a run's folder, an exported sampler (.npz), a .safetensors, a diffusers folder with a UNet2DModel, or a
      PyTorch checkpoint of DDIM (ckpt.pth, converted TensorFlow weights), SA-DPM (model_*_ema.pth,
      ckpt_*.pth), PNDM or Analytic-DPM; or hf://OWNER/NAME[@REVISION], a diffusers folder on the Hugging Face
      Hub (extra hub). Code in a file is never executed; PyTorch is not needed.
OUT   a new file or folder in the format --to, by default the one of its name: .safetensors; model_*_ema.pth
for
      sa_dpm, another .pth for ddim; a folder is a run's folder, or diffusers if IN is a run's folder."""
_EXAMPLES = """\
examples:
  python scripts/convert.py ckpt.pth runs/celeba --data=celeba
  python scripts/convert.py ema_cifar10.ckpt runs/cifar10 --digest=1fa350b9…
  python scripts/convert.py model_900_ema.pth runs/celebahq --config=configs/celebahq256.py:sa_2
  python scripts/convert.py hf://google/ddpm-cifar10-32 runs/cifar10
  python scripts/convert.py runs/digits digits.safetensors --license=cc-by-4.0
  python scripts/convert.py runs/digits digits_diffusers --to=diffusers"""


def _source(text: str) -> str:
    return check_hub_name(text) if text.startswith(PREFIX) else path_argument("IN")(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line.

    Raises:
      UserError: for a value that is not allowed.
    """
    parser = Parser(_DESCRIPTION, _EXAMPLES)
    parser.add_argument("source", metavar="IN", type=_source, help="file or folder to read, or hf://OWNER/NAME")
    parser.add_argument("out", metavar="OUT", type=path_argument("OUT"), help="file or folder to write")
    parser.add_argument("--to", choices=FORMATS, default="", help="format of OUT (default: by its name)")
    parser.add_argument("--resolution", type=int, help="height and width in pixels, where the shapes leave it open")
    parser.add_argument("--key", default="", help="where the state_dict is in a file with several, such as model.ema")
    parser.add_argument(
        "--ema", default="", help="which weights of a run's folder, as config.sample.ema (default: the run's EMA)"
    )
    parser.add_argument("--digest", default="", help="the SHA-256 or MD5 that the file IN must have")
    parser.add_argument(
        "--config", default="", help="config FILE[:OBJECTIVE] for the run's folder to continue training with"
    )
    parser.add_argument(
        "--data",
        default="",
        type=path_argument("--data"),
        help="dataset, or path of your own images, for the run's folder to continue training on",
    )
    parser.add_argument("--step", type=int, help="train steps behind the weights, for a run's folder (0)")
    parser.add_argument("--license", default="", help="license of the weights, for the model card")
    args = parser.parse_args(argv)
    for name, low in (("resolution", 1), ("step", 0)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise UserError(f"--{name}={value} is out of range: it must be at least {low}")
    if not args.source.startswith(PREFIX) and not Path(args.source).exists():
        raise UserError(f"{args.source} does not exist; give the file of a checkpoint, or a folder")
    if os.path.lexists(args.out) and not (os.path.isdir(args.out) and not os.listdir(args.out)):
        raise UserError(f"{args.out} already exists and would be overwritten; give another name, or remove it")
    check_writable([Path(args.out).absolute().parent], "give another place for OUT")
    args.to = args.to or format_of(args.source, args.out)
    return args


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
    from s2dm_jax.weights.write import infer_config, write_weights

    check_devices()
    weights = read_weights(str(place), resolution=args.resolution, digest=args.digest, key=args.key, ema=args.ema)
    config = infer_config(weights, given=given_config, data=args.data)
    if weights.model_card and args.step is not None:
        raise UserError(
            f"--step={args.step} is not allowed for weights written by s2dm_jax, whose step is {weights.step}"
        )
    step = weights.step if weights.model_card else args.step or 0
    network = weights.network
    print(f"read     {origin or args.source}: {weights.description}")
    if weights.sha256:
        print(f"         sha256 {weights.sha256}")
    print(
        f"network  {network.resolution}×{network.resolution}×{network.in_channels}, ch {network.ch}, ch_mult "
        f"{network.ch_mult}, {network.num_res_blocks} blocks per resolution, attention at "
        f"{network.attn_resolutions}"
    )
    assumed = "" if weights.schedule else " (assumed: the file does not have it)"
    diffusion = config.diffusion
    print(f"schedule {diffusion.schedule}, T = {diffusion.T:,}{schedule_ends(diffusion)}{assumed}")
    source = {
        "file": origin or Path(args.source).name,
        "format": weights.description,
        "sha256": weights.sha256,
        "steps_there": weights.step,
        "first_step": step,
    }
    weights = weights._replace(step=step)
    write_weights(args.out, args.to, weights, config, source=source, license=args.license)
    print(f"wrote    {args.out}: {args.to}, with a model card")
    if args.to == "workdir" and not weights.model_card:
        name, note = dataset_name(config), "" if args.data or args.config else " (guessed from the size of the images)"
        if name == UNKNOWN:
            note = ": to train or evaluate, convert with --data=NAME or PATH, or give --config.data.source=PATH"
        print(f"data     {name}{note}")
    if args.to == "workdir":
        print(f"sample   python -m s2dm_jax.main --mode=sample --workdir={args.out}")
        print(f"resume   python -m s2dm_jax.main --workdir={args.out} --config.train.steps=N")


def main(argv: list[str] | None = None) -> None:
    """Entry point; user errors and signals are one sentence on stderr and exit status 2 or 128 + signal."""
    with end_on_signal("nothing was written; run the same command again"), report_user_errors():
        run(argv)


if __name__ == "__main__":
    main()
