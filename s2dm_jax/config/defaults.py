"""Configs as plain data: the fields with their defaults, the JSON round trip, what is built from them.

jax is imported only by the functions that build something from a config: a mistake must be told before
seconds of imports.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from s2dm_jax.config.datasets import DATASETS


def default_config() -> ConfigDict:
    """Every field with its default; a file in `configs/` sets what its data set needs."""
    c = ConfigDict()

    c.data = ConfigDict()
    c.data.name = "digits"
    c.data.random_flip = False
    # Your own images: a folder, a .zip or .tar of one, an .npy or .npz; empty: the data set `name`.
    c.data.source = ""
    # Pixels of a side, channels; 0: as the data set `name` has them.
    c.data.resolution = 0
    c.data.channels = 0
    # "auto": "ddim" for CelebA, "center" for your own images, "none" for the rest; `transforms.crop_box`.
    c.data.crop = "auto"
    c.data.resize = "bilinear"
    # The largest share of your own images that may be damaged or unfit; those are skipped.
    c.data.max_invalid_fraction = 0.01
    # The largest share of a device's memory that images may take; larger sets are read as training goes.
    c.data.max_device_memory_fraction = 0.4

    c.diffusion = ConfigDict()
    c.diffusion.schedule = "linear"
    c.diffusion.T = 1000

    c.model = ConfigDict()
    # The network, and what its output is: epsilon, v or x0 (`diffusion/parameterization.py`).
    c.model.name = "unet"
    c.model.prediction = "epsilon"
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
    # None: as the preset has it. `objectives.Objective` says what each means.
    c.loss.skip_noise = placeholder(str)
    c.loss.skip_factors = placeholder(int)
    c.loss.skip_boundary = placeholder(str)
    c.loss.window = placeholder(str)
    c.loss.window_boundary = placeholder(str)
    c.loss.sa_norm = placeholder(str)
    c.loss.use_tau_s = placeholder(bool)
    c.loss.reduction = placeholder(str)
    c.loss.antithetic = placeholder(bool)

    # A second head, "sn" or "npr", trained on the frozen network of another run (its workdir), whose dropout
    # is on or off.
    c.variance_head = ConfigDict()
    c.variance_head.kind = ""
    c.variance_head.base_workdir = ""
    c.variance_head.dropout = False

    c.train = ConfigDict()
    c.train.steps = 500_000
    c.train.batch_size = 128
    c.train.lr = 2e-4
    c.train.grad_clip = 1.0
    c.train.ema_decay = 0.9999
    c.train.ema_start = "initial"
    c.train.seed = 0
    c.train.log_every = 100
    c.train.sample_every = 5_000
    c.train.checkpoint_every = 5_000
    c.train.max_to_keep = 3
    # Also kept for good: one checkpoint in this many steps (0: none), and the one with the lowest mean of
    # this metric since the one before ("": none).
    c.train.keep_period = 0
    c.train.keep_best = ""
    # A loss or gradient that is not finite: "stop" the run, or "skip" the step.
    c.train.on_nonfinite = "stop"
    # Parts of a batch that go through the network one after another; their gradients are averaged.
    c.train.grad_accum_steps = 1
    # Splits weights, average and moments over the devices instead of copying them to each.
    c.train.shard_state = False
    # Steps to trace into workdir/profile, after the first chunk; 0: none.
    c.train.profile_steps = 0

    c.sample = ConfigDict()
    c.sample.sampler = "ddim"
    # How far apart: a number of steps, or of network evaluations, or your own levels; the others stay 0 or
    # empty. Where none is given there are 10 evaluations.
    c.sample.steps = 0
    c.sample.nfe = 0
    c.sample.timesteps = ()
    c.sample.timestep_spacing = "uniform"
    c.sample.eta = 0.0
    # Options of some methods; None: as the method has it.
    c.sample.clip_x0 = placeholder(bool)
    c.sample.variance = placeholder(str)
    c.sample.pndm_convention = placeholder(str)
    c.sample.order = placeholder(int)
    c.sample.mean = placeholder(str)
    c.sample.clip_pixel = placeholder(float)
    # Training images per level behind Analytic-DPM's statistic.
    c.sample.noise_stat_images = 100
    # The skip of `objectives.skip_scale`; 0: the network as it is.
    c.sample.skip_scale = 0
    c.sample.skip_scale_tau = 0.99
    c.sample.skip_scale_preset = "paper"
    c.sample.num_images = 64
    c.sample.seed = 0
    c.sample.batch_size = 500
    # The training step whose checkpoint to sample from; 0: the newest.
    c.sample.checkpoint_step = 0
    # --mode=sample: "grid" (one PNG), "png" (one for each image) or "npz"; or else rows of pictures between
    # two noises (how many), every level's prediction, or the same noise through other workdirs (a,b,…).
    c.sample.output = "grid"
    c.sample.interpolate = 0
    c.sample.trajectory = False
    c.sample.compare = ""

    c.eval = ConfigDict()
    # Samplers (a,b,…), each at these numbers of network evaluations.
    c.eval.samplers = "ddim"
    c.eval.nfe = (10, 20, 50)
    c.eval.timestep_spacing = "uniform"
    # Options of some methods, used by those that have them; None: as the method has it.
    c.eval.eta = 0.0
    c.eval.clip_x0 = placeholder(bool)
    c.eval.variance = placeholder(str)
    c.eval.pndm_convention = placeholder(str)
    c.eval.order = placeholder(int)
    c.eval.mean = placeholder(str)
    c.eval.clip_pixel = placeholder(float)
    # Training images per level behind Analytic-DPM's statistic.
    c.eval.noise_stat_images = 100
    # The skip of `objectives.skip_scale`; 0: the network as it is.
    c.eval.skip_scale = 0
    # What images are compared in: "inception", "classifier" (trained on the data set's labels), your own
    # "FILE.py:function" of uint8 [B, H, W, C]; "auto": the classifier for the digits, else Inception if it
    # can be had. And by what: fid, kid, is, pr, fid_infinity (a,b,…).
    c.eval.feature_extractor = "auto"
    c.eval.metrics = "fid"
    # Compared with: "train", "held_out", or FILE.npz with mu and sigma; "auto": train for Inception, as the
    # papers do, else held_out.
    c.eval.reference = "auto"
    # File or URL of Inception's weights, and its SHA-256; empty: the standard ones.
    c.eval.inception_weights = ""
    c.eval.inception_sha256 = ""
    # The training step whose checkpoint to evaluate; 0: the newest. A training's own is always its last.
    c.eval.checkpoint_step = 0
    c.eval.num_images = 50_000
    c.eval.batch_size = 500
    c.eval.seed = 0

    c.export = ConfigDict()
    # Empty: named by the sampler, in the run's folder.
    c.export.path = ""
    c.export.license = ""
    return c


_DEFAULT = default_config()

FIELDS = {f"{group}.{name}": _DEFAULT[group].get_type(name) for group in _DEFAULT for name in _DEFAULT[group]}

OPTIONAL = {
    f"{group}.{name}" for group in _DEFAULT for name, value in _DEFAULT[group].items() if value is None
}


def image_shape(config: ConfigDict) -> tuple[int, int]:
    """Pixels of a side and channels of the images that the config trains on."""
    size, channels = DATASETS[config.data.name]
    return config.data.resolution or size, config.data.channels or channels


def dataset_name(config: ConfigDict) -> str:
    """What the images are called: the path of the user's own, else the data set's name."""
    return config.data.source or config.data.name
