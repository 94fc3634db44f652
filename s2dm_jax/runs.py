"""Reads back what training left in a workdir: the config, the network and its moving average."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ml_collections import ConfigDict

from s2dm_jax.config import UserError, build_network, check_config, from_json

# jax and orbax take seconds to import: a wrong path is told before.
if TYPE_CHECKING:
    from s2dm_jax.unet import UNetConfig


class Run(NamedTuple):
    """A trained network and where it comes from.

    Attributes:
      config: the run's config, checked.
      network: the network that `ema` belongs to.
      ema: nested dict of float32 arrays, the moving average of the weights: what to sample from.
      step: number of training steps behind it.
    """

    config: ConfigDict
    network: "UNetConfig"
    ema: dict
    step: int


def read_config(workdir: str) -> ConfigDict:
    """The config of the run in `workdir`, once sure that the run has saved something; imports no jax.

    Raises:
      UserError: if the folder is missing, or holds no run, a config that is not ours, or no checkpoint.
    """
    path = Path(workdir)
    if not path.is_dir():
        raise UserError(f"{workdir} is not a folder; give the --workdir of a training run")
    try:
        config = from_json((path / "config.json").read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"{workdir} holds no config.json, so it is no training run; give the --workdir of one"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path / 'config.json'} is not a config of ours ({error}); give another run"
        ) from error
    try:
        check_config(config)
    except UserError as error:
        raise UserError(f"{path / 'config.json'} cannot be used: {error}") from error
    checkpoints = path / "checkpoints"
    if not checkpoints.is_dir() or not any(entry.name.isdigit() for entry in checkpoints.iterdir()):
        raise _no_checkpoint(workdir)
    return config


def load_run(workdir: str) -> Run:
    """The newest checkpoint of the run in `workdir`.

    Raises:
      UserError: as `read_config`.
    """
    config = read_config(workdir)

    import jax
    import numpy as np

    from s2dm_jax import checkpoint, unet
    from s2dm_jax.train import TrainState, make_optimizer

    network = build_network(config)
    params = unet.param_shapes(network)
    optimizer = make_optimizer(config.train.lr, config.train.grad_clip)
    like = TrainState(
        jax.ShapeDtypeStruct((), np.int32), params, params, jax.eval_shape(optimizer.init, params)
    )
    manager = checkpoint.open_checkpoints(workdir, config.train.keep_checkpoints)
    try:
        state = checkpoint.restore_latest(manager, like)
    finally:
        manager.close()
    if state is None:
        raise _no_checkpoint(workdir)
    return Run(config, network, state.ema, int(state.step))


def _no_checkpoint(workdir: str) -> UserError:
    return UserError(f"{workdir} holds no checkpoint; train the run until it has saved one")
