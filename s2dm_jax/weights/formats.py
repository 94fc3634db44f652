"""The formats that weights are written in; no jax, so that a command line is checked before its import."""

from pathlib import Path

from s2dm_jax.common.errors import UserError
from s2dm_jax.workdir.folder import checkpoint_folder

# "workdir": a run's folder. "ddim", "sa_dpm", "pndm": the files of the published PyTorch codes.
FORMATS = ("workdir", "ddim", "sa_dpm", "pndm", "safetensors", "diffusers")


def format_of(source: str, out: str) -> str:
    """The entry of FORMATS that the name of the output `out` stands for; a folder's depends on what `source` is."""
    path = Path(out)
    if path.suffix == ".safetensors":
        return "safetensors"
    if path.suffix in (".pth", ".pt", ".ckpt"):
        return "sa_dpm" if path.stem.endswith("_ema") else "ddim"
    if path.suffix == ".npz":
        raise UserError(f"{out}: an exported sampler is written by python -m s2dm_jax.main --mode=export --workdir=RUN")
    return "diffusers" if checkpoint_folder(source).is_dir() else "workdir"
