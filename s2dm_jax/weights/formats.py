"""The formats that weights are written in; no jax, so that a command line is checked before its import."""

from pathlib import Path

from s2dm_jax.common.errors import UserError
from s2dm_jax.workdir.folder import checkpoint_folder

# "workdir": a run's folder. The files of the published PyTorch codes are "ddim", "sa_dpm" and "pndm" of DDIM's UNet,
# "improved_diffusion" of OpenAI's, and "analytic_dpm" of both, with a variance head.
FORMATS = ("workdir", "ddim", "sa_dpm", "pndm", "analytic_dpm", "improved_diffusion", "safetensors", "diffusers")

# What the names of files in each format end with.
SUFFIXES = {
    "ddim": (".pth",),
    "sa_dpm": (".pth",),
    "pndm": (".pth",),
    "analytic_dpm": (".pth", ".pt", ".ckpt"),
    "improved_diffusion": (".pt", ".pth"),
    "safetensors": (".safetensors",),
}


def format_of(source: str, out: str, network: str = "unet", variance_head: bool = False) -> str:
    """The entry of FORMATS that the name of the output `out` implies; for a folder it depends on what `source` is.

    Args:
      network: its name in NETWORKS.
      variance_head: whether the output is to have one.
    """
    path = Path(out)
    if path.suffix == ".safetensors":
        return "safetensors"
    if path.suffix in (".pth", ".pt", ".ckpt"):
        if variance_head or network == "improved_unet":
            return "analytic_dpm" if variance_head or path.suffix == ".ckpt" else "improved_diffusion"
        return "sa_dpm" if path.stem.endswith("_ema") else "ddim"
    if path.suffix == ".npz":
        raise UserError(f"{out}: an exported sampler is written by python -m s2dm_jax.main --mode=export --workdir=RUN")
    return "diffusers" if checkpoint_folder(source).is_dir() else "workdir"
