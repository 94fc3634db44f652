"""The names of the files in a run's folder. Imports no jax."""

import os
from pathlib import Path

from s2dm_jax.common.errors import UserError

# The model card, in the folder of a run that was made from converted weights.
CARD = "model_card.json"


def checkpoint_folder(workdir: str | os.PathLike) -> Path:
    """Where a run's checkpoints are, each in a folder named by its step."""
    return Path(workdir) / "checkpoints"


def checkpoint_steps(workdir: str | os.PathLike) -> list[int]:
    """The steps of the complete checkpoints of a run, ascending."""
    try:
        names = os.listdir(checkpoint_folder(workdir))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(
            f"{checkpoint_folder(workdir)} cannot be read ({error.strerror}); get permission to read it, or give "
            "another run"
        ) from error
    return sorted(int(name) for name in names if name.isdigit())
