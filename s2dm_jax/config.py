"""Configs as plain data: the fields with their defaults, the JSON round trip, what is built from them.

jax is imported only by the functions that build something from a config: a mistake must be told before
seconds of imports.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

if TYPE_CHECKING:
    from s2dm_jax.losses import Objective
    from s2dm_jax.schedule import NoiseSchedule
    from s2dm_jax.unet import UNetConfig


class UserError(Exception):
    """A mistake of the user's, told in one sentence; `main` prints it and exits with status 2."""


def default_config() -> ConfigDict:
    """Every field with its default; a file in `configs/` sets what its data set needs."""
    c = ConfigDict()

    c.data = ConfigDict()
    c.data.name = "digits"
    c.data.random_flip = False
    # Your own images: a folder, a .zip or .tar of one, an .npy or .npz; empty: the data set `name`.
    c.data.source = ""
    # Pixels of a side, channels; 0: as the data set `name` has them.
    c.data.size = 0
    c.data.channels = 0
    # "auto": "ddim" for CelebA, "center" for your own images, "none" for the rest; `images.crop_box`.
    c.data.crop = "auto"
    c.data.resize = "bilinear"
    # The largest share of your own images that may be damaged or unfit; those are skipped.
    c.data.bad_limit = 0.01
    # The largest share of a device's memory that images may take; larger sets are read as training goes.
    c.data.device_share = 0.4

    c.diffusion = ConfigDict()
    c.diffusion.schedule = "linear"
    c.diffusion.T = 1000

    c.model = ConfigDict()
    c.model.ch = 128
    c.model.ch_mult = (1, 2, 2, 2)
    c.model.num_res_blocks = 2
    c.model.attn_resolutions = (16,)
    c.model.dropout = 0.1
    c.model.resamp_with_conv = True
    c.model.dtype = "auto"
    # Computes activations again in the backward pass instead of keeping them: less memory, more time.
    c.model.remat = False

    c.loss = ConfigDict()
    c.loss.preset = "paper"
    c.loss.skip = 0
    c.loss.tau = 0.99
    c.loss.K = 1
    c.loss.lam = 0.0
    # None: as the preset has it. `losses.Objective` says what each means.
    c.loss.skip_noise = placeholder(str)
    c.loss.skip_factors = placeholder(int)
    c.loss.skip_edge = placeholder(str)
    c.loss.window = placeholder(str)
    c.loss.window_ends = placeholder(str)
    c.loss.sa_norm = placeholder(str)
    c.loss.tau_s = placeholder(bool)
    c.loss.reduction = placeholder(str)
    c.loss.antithetic = placeholder(bool)

    # A second head, "sn" or "npr", trained on the frozen network of another run (its workdir), whose dropout
    # is on or off.
    c.head = ConfigDict()
    c.head.kind = ""
    c.head.base = ""
    c.head.dropout = False

    c.train = ConfigDict()
    c.train.steps = 500_000
    c.train.batch_size = 128
    c.train.lr = 2e-4
    c.train.grad_clip = 1.0
    c.train.ema_rate = 0.9999
    c.train.ema_start = "initial"
    c.train.seed = 0
    c.train.log_every = 100
    c.train.sample_every = 5_000
    c.train.checkpoint_every = 5_000
    c.train.keep_checkpoints = 3
    # Also kept for good: one checkpoint in this many steps (0: none), and the one with the lowest mean of
    # this metric since the one before ("": none).
    c.train.keep_every = 0
    c.train.keep_best = ""
    # A loss or gradient that is not finite: "stop" the run, or "skip" the step.
    c.train.on_nan = "stop"
    # Parts of a batch that go through the network one after another; their gradients are averaged.
    c.train.accumulate = 1
    # Splits weights, average and moments over the devices instead of copying them to each.
    c.train.split_state = False
    # Steps to trace into workdir/profile, after the first chunk; 0: none.
    c.train.profile_steps = 0

    c.sample = ConfigDict()
    c.sample.method = "ddim"
    # How far apart: a number of steps, or of network evaluations, or your own levels; the others stay 0 or
    # empty. Where none is given there are 10 evaluations.
    c.sample.steps = 0
    c.sample.nfe = 0
    c.sample.timesteps = ()
    c.sample.grid = "uniform"
    c.sample.eta = 0.0
    # Options of some methods; None: as the method has it.
    c.sample.clip_x0 = placeholder(bool)
    c.sample.variance = placeholder(str)
    c.sample.convention = placeholder(str)
    c.sample.order = placeholder(int)
    c.sample.form = placeholder(str)
    c.sample.clip_pixel = placeholder(float)
    # Training images per level behind Analytic-DPM's statistic.
    c.sample.ms_eps_images = 100
    # The skip of `losses.skip_scale`; 0: the network as it is.
    c.sample.skip_scale = 0
    c.sample.skip_scale_tau = 0.99
    c.sample.skip_scale_preset = "paper"
    c.sample.num_images = 64
    c.sample.seed = 0
    c.sample.batch_size = 500
    # The training step whose checkpoint to sample from; 0: the newest.
    c.sample.checkpoint = 0
    # --mode=sample: "grid" (one PNG), "png" (one for each image) or "npz"; or else rows of pictures between
    # two noises (how many), every level's prediction, or the same noise through other workdirs (a,b,…).
    c.sample.output = "grid"
    c.sample.interpolate = 0
    c.sample.trajectory = False
    c.sample.compare = ""

    c.eval = ConfigDict()
    # Samplers (a,b,…), each at these numbers of network evaluations.
    c.eval.methods = "ddim"
    c.eval.nfe = (10, 20, 50)
    c.eval.grid = "uniform"
    # Options of some methods, used by those that have them; None: as the method has it.
    c.eval.eta = 0.0
    c.eval.clip_x0 = placeholder(bool)
    c.eval.variance = placeholder(str)
    c.eval.convention = placeholder(str)
    c.eval.order = placeholder(int)
    c.eval.form = placeholder(str)
    c.eval.clip_pixel = placeholder(float)
    # Training images per level behind Analytic-DPM's statistic.
    c.eval.ms_eps_images = 100
    # The skip of `losses.skip_scale`; 0: the network as it is.
    c.eval.skip_scale = 0
    # What images are compared in: "inception", "classifier" (trained on the data set's labels), your own
    # "FILE.py:function" of uint8 [B, H, W, C]; "auto": the classifier for the digits, else Inception if it
    # can be had. And by what: fid, kid, is, pr, fid_inf (a,b,…).
    c.eval.features = "auto"
    c.eval.metrics = "fid"
    # Compared with: "train", "held_out", or FILE.npz with mu and sigma; "auto": train for Inception, as the
    # papers do, else held_out.
    c.eval.reference = "auto"
    # File or URL of Inception's weights, and its SHA-256; empty: the standard ones.
    c.eval.inception_weights = ""
    c.eval.inception_sha256 = ""
    # The training step whose checkpoint to evaluate; 0: the newest. A training's own is always its last.
    c.eval.checkpoint = 0
    c.eval.num_images = 50_000
    c.eval.batch_size = 500
    c.eval.seed = 0

    c.export = ConfigDict()
    # Empty: named by the sampler, in the run's folder.
    c.export.path = ""
    c.export.license = ""
    return c


# Pixels of a side, channels.
IMAGES = {"digits": (8, 1), "cifar10": (32, 3), "celeba": (64, 3), "celebahq": (256, 3)}

# What both papers trained: S²-DMs' skips (section 4), SA-DPM's K with the λ that its section on λ prefers.
METHODS = {
    "ddpm": {},
    "s2_2": {"skip": 2},
    "s2_10": {"skip": 10},
    "s2_50": {"skip": 50},
    "sa_2": {"K": 2, "lam": 1.0},
    "sa_3": {"K": 3, "lam": 0.3},
    "sa_4": {"K": 4, "lam": 0.2},
}
SCHEDULES = ("linear", "cosine")
# Second heads of a trained network (SN-, NPR-DPM), as methods of a config.
HEADS = ("sn", "npr")

_DEFAULT = default_config()
FIELDS = {f"{group}.{name}": _DEFAULT[group].get_type(name) for group in _DEFAULT for name in _DEFAULT[group]}
OPTIONAL = {
    f"{group}.{name}" for group in _DEFAULT for name, value in _DEFAULT[group].items() if value is None
}


def packaged_configs() -> dict[str, Path]:
    """The config files that come with this package, by the name that --config has for them."""
    here = Path(__file__).parent
    # A wheel has them inside the package, a clone beside it.
    folder = here / "configs" if (here / "configs").is_dir() else here.parent / "configs"
    return {f"configs/{path.name}": path for path in sorted(folder.glob("*.py"))}


def config_path(name: str) -> str:
    """FILE[:METHOD] as it is where there is such a file, else with the path of the packaged one of that name.

    Raises:
      UserError: where there is neither.
    """
    file, colon, method = name.partition(":")
    if os.path.isfile(file):
        return name
    packaged = packaged_configs()
    if os.path.normpath(file) not in packaged:
        raise UserError(
            f"--config={name}: there is no such file; those that come with s2dm_jax are {', '.join(packaged)}"
        )
    return f"{packaged[os.path.normpath(file)]}{colon}{method}"


def set_method(config: ConfigDict, method: str) -> None:
    """Sets the objective and the noise schedule that a name such as "s2_10", "s2_10+sa_2+cosine" stands for.

    Raises:
      ValueError: for an unknown part, or for two parts that set the same thing.
    """
    parts = method.split("+")
    for part in parts:
        if part not in METHODS and part not in SCHEDULES:
            raise ValueError(
                f"method {method!r} is not known; choose one of {', '.join(METHODS)}, one of s2_ with one of "
                f"sa_ as in s2_10+sa_2, and {' or '.join(SCHEDULES)} after another +"
            )
    kinds = ["schedule" if part in SCHEDULES else part.split("_")[0] for part in parts]
    if len(set(kinds)) < len(kinds) or ("ddpm" in kinds and {"s2", "sa"} & set(kinds)):
        raise ValueError(
            f"method {method!r} names things that exclude one another; join at most one s2_, one sa_ and one "
            "schedule, or ddpm and a schedule"
        )
    for part in parts:
        if part in SCHEDULES:
            config.diffusion.schedule = part
        else:
            config.loss.update(METHODS[part])


def set_head(config: ConfigDict, kind: str) -> None:
    """Makes a config that of a second head, with the released code's Adam: 1e-4, no clipping."""
    config.head.kind = kind
    config.train.lr = 1e-4
    config.train.grad_clip = 0.0
    config.sample.method = kind
    config.sample.grid = "linspace"
    config.eval.methods = kind
    config.eval.grid = "linspace"


def image_shape(config: ConfigDict) -> tuple[int, int]:
    """Pixels of a side and channels of the images that the config trains on."""
    size, channels = IMAGES[config.data.name]
    return config.data.size or size, config.data.channels or channels


def data_label(config: ConfigDict) -> str:
    """What the images are called: the path of the user's own, else the data set's name."""
    return config.data.source or config.data.name


def flatten(config: ConfigDict) -> dict:
    """Every field of every group as {"group.name": value}."""
    flat: dict = {}
    for group, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{group}.{name}": v for name, v in value.items()}
        else:
            flat[group] = value
    return flat


def to_json(config: ConfigDict) -> str:
    """The config as JSON text."""
    return json.dumps(config.to_dict(), indent=1) + "\n"


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote, with tuples for lists; fields that are newer get their default."""
    config = default_config()
    for group, values in json.loads(text).items():
        for name, value in values.items():
            config[group][name] = tuple(value) if isinstance(value, list) else value
    return config


def build_schedule(config: ConfigDict) -> "NoiseSchedule":
    """The `NoiseSchedule` that the config names."""
    from s2dm_jax.schedule import SCHEDULES

    return SCHEDULES[config.diffusion.schedule](config.diffusion.T)


def build_objective(config: ConfigDict) -> "Objective":
    """The `losses.Objective` that the config names: its preset with the options that are not None."""
    from s2dm_jax.losses import PRESETS

    values = {name: value for name, value in config.loss.items() if name != "preset" and value is not None}
    return PRESETS[config.loss.preset](**values)


def build_network(config: ConfigDict) -> "UNetConfig":
    """The `unet.UNetConfig` that the config names."""
    import jax

    from s2dm_jax.unet import UNetConfig

    model = config.model.to_dict()
    if model["dtype"] == "auto":
        # Convolutions in bfloat16 are slower than in float32 on CPU.
        model["dtype"] = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    resolution, channels = image_shape(config)
    return UNetConfig(resolution=resolution, in_channels=channels, out_channels=channels, **model)
