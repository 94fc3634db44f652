"""Converts weights between this project's runs, the published PyTorch codes, diffusers and safetensors."""

import argparse
import os
from pathlib import Path

from s2dm_jax.common.cli import Parser
from s2dm_jax.common.errors import UserError, report_user_errors
from s2dm_jax.config.io import load_config

_FORMATS = ("workdir", "ddim", "sa_dpm", "pndm", "safetensors", "diffusers")
_DESCRIPTION = """\
Reads IN, whatever it is, finds out the network from the tensors' shapes, checks every tensor against it, and
writes OUT with a model card.

IN    a run's folder, an exported sampler (.npz), a .safetensors, a diffusers folder with a UNet2DModel, or a
      PyTorch checkpoint of DDIM (ckpt.pth, converted TensorFlow weights), SA-DPM (model_*_ema.pth,
      ckpt_*.pth), PNDM or Analytic-DPM. No code of a file is run; PyTorch is not needed.
OUT   its format is --to, by default from its name: .safetensors; model_*_ema.pth for sa_dpm, another .pth for
      ddim; a folder is a run's folder, or for IN a run's folder diffusers. It must not be there yet."""
_EXAMPLES = """\
examples:
  python scripts/convert.py ckpt.pth runs/celeba
  python scripts/convert.py ema_cifar10.ckpt runs/cifar10 --digest=1fa350b9…
  python scripts/convert.py model_900_ema.pth runs/celebahq --config=configs/celebahq256.py:sa_2
  python scripts/convert.py runs/digits digits.safetensors --license=cc-by-4.0
  python scripts/convert.py runs/digits digits_diffusers --to=diffusers"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line.

    Raises:
      UserError: for a value that is not allowed.
    """
    parser = Parser(_DESCRIPTION, _EXAMPLES)
    parser.add_argument("source", metavar="IN", help="file or folder to read")
    parser.add_argument("out", metavar="OUT", help="file or folder to write")
    parser.add_argument("--to", choices=_FORMATS, default="", help="format of OUT")
    parser.add_argument("--resolution", type=int, help="pixels of a side, where the shapes do not tell")
    parser.add_argument("--digest", default="", help="the SHA-256 or MD5 that IN's file must have")
    parser.add_argument(
        "--config", default="", help="config FILE[:METHOD] that a run's folder is to go on with"
    )
    parser.add_argument(
        "--data", default="", help="data set or path of your own images, for a run's folder to go on with"
    )
    parser.add_argument("--step", type=int, help="training steps behind the weights, for a run's folder (0)")
    parser.add_argument("--license", default="", help="license of the weights, for the model card")
    args = parser.parse_args(argv)
    for name, least in (("resolution", 1), ("step", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name}={value} is out of range: it must be at least {least}")
    if not Path(args.source).exists():
        raise UserError(f"{args.source} does not exist; give a checkpoint's file, or a folder")
    if os.path.lexists(args.out) and not (os.path.isdir(args.out) and not os.listdir(args.out)):
        raise UserError(
            f"{args.out} already exists and would be overwritten; give another name, or remove it"
        )
    args.to = args.to or _format_of(args.source, args.out)
    return args


def _format_of(source: str, out: str) -> str:
    path = Path(out)
    if path.suffix == ".safetensors":
        return "safetensors"
    if path.suffix in (".pth", ".pt", ".ckpt"):
        return "sa_dpm" if path.stem.endswith("_ema") else "ddim"
    if path.suffix == ".npz":
        raise UserError(
            f"{out}: a sampler's file is made by python -m s2dm_jax.main --mode=export --workdir=RUN"
        )
    is_run = (Path(source) / "checkpoints").is_dir()
    return "diffusers" if is_run else "workdir"


def run(argv: list[str] | None) -> None:
    """Reads, checks, writes, and says what was found."""
    args = parse(argv)
    given = load_config(args.config) if args.config else None

    from s2dm_jax.config.defaults import dataset_name
    from s2dm_jax.weights.read import read_weights
    from s2dm_jax.weights.write import infer_config, write_weights

    weights = read_weights(args.source, resolution=args.resolution, digest=args.digest)
    config = infer_config(weights, given=given, data=args.data)
    if weights.card and args.step is not None:
        raise UserError(f"--step={args.step} does not go with weights of ours, whose step is {weights.step}")
    step = weights.step if weights.card else args.step or 0
    network = weights.network
    print(f"read     {args.source}: {weights.origin}")
    if weights.sha256:
        print(f"         sha256 {weights.sha256}")
    print(
        f"network  {network.resolution}×{network.resolution}×{network.in_channels}, ch {network.ch}, ch_mult "
        f"{network.ch_mult}, {network.num_res_blocks} blocks a level, attention at {network.attn_resolutions}"
    )
    told = "" if weights.schedule else ", which the file does not tell"
    print(f"schedule {config.diffusion.schedule}, T = {config.diffusion.T:,}{told}")
    source = {
        "file": Path(args.source).name,
        "format": weights.origin,
        "sha256": weights.sha256,
        "steps_there": weights.step,
        "first_step": step,
    }
    weights = weights._replace(step=step)
    write_weights(args.out, args.to, weights, config, source=source, license=args.license)
    print(f"wrote    {args.out}: {args.to}, with a model card")
    if args.to == "workdir" and not weights.card:
        guessed = "" if args.data or args.config else ", by the size of the images"
        print(f"data     {dataset_name(config)}{guessed}")
    if args.to == "workdir":
        print(f"sample   python -m s2dm_jax.main --mode=sample --workdir={args.out}")
        print(f"go on    python -m s2dm_jax.main --workdir={args.out} --config.train.steps=N")


def main(argv: list[str] | None = None) -> None:
    """Entry point: a mistake becomes one sentence and exit status 2."""
    with report_user_errors():
        run(argv)


if __name__ == "__main__":
    main()
