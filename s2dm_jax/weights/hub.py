"""Diffusers folders on the Hugging Face Hub, hf://OWNER/NAME[@REVISION]; needs huggingface_hub, the extra `hub`."""

import contextlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from s2dm_jax.common.errors import UserError

PREFIX = "hf://"

# Where `read.read_weights` looks for the network, in this order, and for what belongs to it.
_UNETS = ("unet_ema/", "unet/", "")
_OTHERS = re.compile(r"(?:(?:unet_ema|unet|scheduler)/)?[^/]+\.json|SHA256SUMS")
_WEIGHTS = re.compile(r"diffusion_pytorch_model(\.[^/]*)?\.(safetensors|bin)")


def check_hub_name(text: str) -> str:
    """Returns hf://OWNER/NAME[@REVISION] as it is; raises a `UserError` for another form."""
    if not re.fullmatch(r"hf://[\w.-]+/[\w.-]+(@[\w./-]+)?", text):
        raise UserError(
            f"{text} does not name a model on the Hugging Face Hub; give hf://OWNER/NAME or hf://OWNER/NAME@REVISION"
        )
    return text


def fetch_from_hub(text: str) -> tuple[Path, str]:
    """Downloads the network of a diffusers folder into the Hub's own cache, except for files that are already there.

    Returns:
      The folder, and hf://OWNER/NAME@COMMIT.

    Raises:
      UserError: for a name or revision that does not exist or is not accessible, a failed download, and a repository
        without a diffusers network; if huggingface_hub is not installed.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError(f"{text} needs huggingface_hub; install it with pip install 's2dm_jax[hub]'")
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    name, _, revision = text.removeprefix(PREFIX).partition("@")
    endpoint = os.environ.get("HF_ENDPOINT") or None
    if not sys.stderr.isatty():
        disable_progress_bars()
    with _as_user_error(text):
        info = huggingface_hub.HfApi(endpoint=endpoint).model_info(name, revision=revision or None)
        files = _needed_files([file.rfilename for file in info.siblings or ()])
        paths = [huggingface_hub.hf_hub_download(name, file, revision=info.sha, endpoint=endpoint) for file in files]
    if not files:
        raise UserError(
            f"{text} holds no diffusers network: a diffusion_pytorch_model.safetensors with its config.json is needed"
        )
    return Path(paths[-1]).parents[len(Path(files[-1]).parts) - 1], f"{PREFIX}{name}@{info.sha}"


@contextlib.contextmanager
def _as_user_error(text: str) -> Iterator[None]:
    """For the block, what the Hub's client raises becomes a `UserError`."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(f"{text} is gated: accept its conditions on its page, and log in with hf auth login") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{text}: the model has no such revision; give a branch, tag or commit after the @") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{text}: the Hub has no model of this name, or it is private; check the name, or log in with hf auth login"
        ) from error
    except Exception as error:
        # What the client raises for a connection differs between its versions.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{text} cannot be fetched ({reason}); check the network and run the same command again, which reuses "
            "complete files, or download the folder yourself and give its path"
        ) from error


def _needed_files(names: list[str]) -> list[str]:
    """The files of a repository that `read.read_weights` reads; [] where there is no network."""
    for unet in _UNETS:
        found = {name: _WEIGHTS.fullmatch(name.removeprefix(unet)) for name in names if name.startswith(unet)}
        # A variant, as fp16, only where there are no full weights; a pickle only where there is nothing else.
        weights = sorted((match[1] or "", match[2] == "bin", name) for name, match in found.items() if match)
        weights = [entry for entry in weights if "-of-" not in entry[0]]
        if weights:
            return [*sorted(name for name in names if _OTHERS.fullmatch(name)), weights[0][2]]
    return []
