"""Every field of a config, and what is read off the fields.

A file in `configs/` starts from `default_config()` and sets what its dataset needs.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from s2dm_jax.config.datasets import CROPS, DATASETS, RESIZE_FILTERS
from s2dm_jax.config.ema import EMA_RAMPUP_RATIO, MAX_SIGMA_REL, MIN_SIGMA_REL
from s2dm_jax.config.fields import LOSS_PRESETS, MAX_BATCH, MAX_SEED, MAX_STEPS, MAX_T, Field, Resumable
from s2dm_jax.config.presets import HEADS
from s2dm_jax.config.sampling_fields import SAMPLING
from s2dm_jax.diffusion.betas import BETAS
from s2dm_jax.models.network import NETWORKS

# Keys of PREDICTIONS in diffusion/, which needs jax.
_PREDICTIONS = ("epsilon", "v", "x0")
# Beyond these, float32 has no room for the scaled gradient.
LOSS_SCALES = 1e-6, 1e30
# In float32, 1 − beta is positive.
_MAX_BETA = 0.999999

FIELDS: dict[str, Field] = {
    "data.name": Field("digits", choices=tuple(DATASETS), doc="dataset"),
    "data.random_flip": Field(False, doc="flip half of the training images from left to right"),
    # Resumable: the hash of the images decides whether they are the same.
    "data.source": Resumable(
        "",
        path="path",
        doc="your own images: a folder, a .zip or .tar of one, an .npy or .npz; empty: the dataset data.name",
    ),
    "data.resolution": Field(0, low=0, high=1024, doc="pixels of a side; 0: as the dataset data.name"),
    "data.channels": Field(0, choices=(0, 1, 3), doc="1: grey, 3: RGB; 0: as the dataset data.name"),
    "data.crop": Field(
        "auto",
        choices=("auto", *CROPS),
        doc="crop before resizing; auto: ddim for CelebA, center for your own images, none for the rest",
    ),
    "data.resize": Field("bilinear", choices=RESIZE_FILTERS, doc="Pillow's filter for resizing, antialiased"),
    "data.max_invalid_fraction": Resumable(
        0.01, low=0.0, high=1.0, doc="largest fraction of your own images that may be skipped as corrupt or unsupported"
    ),
    "data.max_device_memory_fraction": Resumable(
        0.4, low=0.0, high=1.0, doc="fraction of a device's memory for images; larger datasets stream from the host"
    ),
    "diffusion.schedule": Field("linear", choices=tuple(BETAS), doc="noise schedule"),
    "diffusion.T": Field(1000, low=2, high=MAX_T, doc="number of timesteps"),
    "diffusion.beta_start": Field(
        None, type=float, low=1e-8, high=0.999, doc="beta of the first step; None: 1e-4 scaled by 1000/T"
    ),
    "diffusion.beta_end": Field(
        None, type=float, low=1e-8, high=0.999, doc="beta of the last step; None: 0.02 scaled by 1000/T"
    ),
    "model.name": Field("unet", choices=tuple(NETWORKS), doc="network"),
    "model.prediction": Field(
        "epsilon", choices=_PREDICTIONS, doc="what the network's output is: the noise, v or the clean image"
    ),
    "model.ch": Field(128, low=32, high=4096, doc="channels at the highest resolution"),
    "model.ch_mult": Field((1, 2, 2, 2), low=1, min_length=1, doc="factor on the channels at each resolution level"),
    "model.num_res_blocks": Field(2, low=1, high=64, doc="residual blocks per resolution level"),
    "model.attn_resolutions": Field((16,), low=1, doc="resolutions with self-attention, in pixels"),
    "model.dropout": Field(0.1, low=0.0, high=0.999, doc="dropout rate in the residual blocks"),
    "model.resamp_with_conv": Field(True, doc="resample with convolutions, as the published networks"),
    # None stands for the network's own default; a network that has no such field refuses any other value.
    "model.num_heads": Field(None, type=int, low=1, high=4096, doc="heads of self-attention (improved_unet)"),
    "model.scale_shift_norm": Field(
        None, type=bool, doc="scale and shift the second norm of a block by the embedding of t (improved_unet)"
    ),
    "model.learned_variance": Field(
        None,
        type=bool,
        doc="as many output channels again, for sample.variance=learned; only in converted weights, since no loss "
        "trains them (improved_unet)",
    ),
    "model.num_classes": Field(
        None,
        type=int,
        low=0,
        high=1_000_000,
        doc="classes of a class-conditional network; only in converted weights, since nothing here gives the network "
        "labels (improved_unet)",
    ),
    "model.t_offset": Field(
        None,
        type=int,
        low=0,
        high=1,
        doc="timestep that the network is given for the first: 0, or 1 as Analytic-DPM's for CIFAR-10 (improved_unet)",
    ),
    "model.t_scale": Field(
        None,
        type=float,
        low=1e-6,
        high=1e6,
        doc="factor on the timestep that the network is given, such as 1000/T for OpenAI's (improved_unet)",
    ),
    "model.dtype": Field(
        "auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        doc="dtype of the activations; auto: float32 on CPU, where bfloat16 is slower, else bfloat16",
    ),
    "model.remat": Resumable(False, doc="recompute activations in the backward pass: less memory, more time"),
    "loss.preset": Field("paper", choices=LOSS_PRESETS, doc="options as in the papers or in their released code"),
    "loss.skip": Field(0, low=0, doc="skip of L_skip (S²-DMs); 0: without L_skip"),
    "loss.tau": Field(0.99, low=0.0, high=1.0, doc="weight of L_simple; L_skip gets 1 − tau"),
    "loss.K": Field(1, low=1, high=MAX_T, doc="timesteps in the window of L_sa (SA-DPM); 1: without L_sa"),
    "loss.lam": Field(0.0, low=0.0, doc="weight λ of L_sa"),
    "loss.skip_noise": Field(
        None, type=str, choices=("shared", "independent", "expected"), doc="target noise of L_skip"
    ),
    "loss.skip_factors": Field(None, type=int, low=0, doc="one-step alphas multiplied in alpha_skip"),
    "loss.skip_boundary": Field(
        None, type=str, choices=("truncate", "plain"), doc="L_skip at timesteps with fewer steps below than factors"
    ),
    "loss.window": Field(None, type=str, choices=("forward", "backward"), doc="L_sa's window from t on or up to t"),
    "loss.window_boundary": Field(None, type=str, choices=("inner", "all"), doc="timesteps of the window in L_sa"),
    "loss.sa_norm": Field(None, type=str, choices=("K^2", "K"), doc="divisor of L_sa"),
    "loss.use_tau_s": Field(None, type=bool, doc="weight L_sa by Theorem 1's τ_s"),
    "loss.reduction": Field(None, type=str, choices=("sum", "mean"), doc="reduction over an image's pixels"),
    "loss.antithetic": Field(None, type=bool, doc="draw half of the timesteps as mirrors of the others"),
    "variance_head.kind": Field(
        "", choices=("", *HEADS), doc="variance head to train on another run's frozen network; empty: none"
    ),
    # Resumable: the hash of the weights decides whether it is the same network.
    "variance_head.base_workdir": Resumable("", path="path", doc="workdir of that run"),
    "variance_head.dropout": Field(False, doc="whether the frozen network's dropout is on"),
    "train.steps": Resumable(500_000, low=1, high=MAX_STEPS, doc="optimizer steps in total"),
    "train.batch_size": Field(128, low=1, high=MAX_BATCH, doc="global batch size, over all devices"),
    "train.lr": Field(2e-4, low=1e-12, high=10.0, doc="learning rate of Adam"),
    "train.warmup_steps": Field(
        0, low=0, high=MAX_STEPS, doc="steps over which the learning rate rises linearly from 0; 0: none"
    ),
    "train.lr_schedule": Field(
        "constant", choices=("constant", "cosine", "linear"), doc="decay of the learning rate after the warm-up"
    ),
    "train.lr_end": Field(0.0, low=0.0, high=10.0, doc="learning rate after a cosine or linear decay"),
    "train.decay_steps": Field(
        0, low=0, high=MAX_STEPS, doc="step at which a decay, which starts after the warm-up, ends; 0: train.steps"
    ),
    "train.adam_b1": Field(0.9, low=0.0, high=_MAX_BETA, doc="Adam's decay of the mean of the gradients"),
    "train.adam_b2": Field(0.999, low=0.0, high=_MAX_BETA, doc="Adam's decay of the mean of their squares"),
    "train.adam_eps": Field(1e-8, low=1e-20, high=1.0, doc="Adam's epsilon"),
    "train.weight_decay": Field(
        0.0, low=0.0, high=1e6, doc="weight decay of AdamW, times the learning rate, on all weights; 0: Adam"
    ),
    "train.grad_clip": Field(1.0, low=0.0, doc="largest global norm of the gradient; 0: no clipping"),
    "train.loss_scale": Field(
        "auto",
        doc="factor on the loss whose gradient is taken: dynamic, none or a number such as 1024; auto: dynamic for "
        "model.dtype=float16, else none",
    ),
    "train.loss_scale_growth_interval": Field(
        2000, low=1, high=MAX_STEPS, doc="steps without an overflow after which a dynamic loss scale doubles"
    ),
    "train.ema_decay": Field(0.9999, low=0.0, high=1.0, doc="decay of the EMA of the weights per step"),
    "train.ema_start": Field("initial", choices=("initial", "first_step"), doc="weights that the EMA starts from"),
    "train.ema_halflife_images": Field(
        0.0, low=0.0, high=1e15, doc="half-life of the EMA in images, in the place of ema_decay; 0: ema_decay"
    ),
    "train.ema_rampup_ratio": Field(
        EMA_RAMPUP_RATIO,
        low=0.0,
        high=1.0,
        doc="with ema_halflife_images, the half-life is at most this share of the images seen (EDM); 0: no ramp-up",
    ),
    "train.ema_decays": Field(
        (), entries=float, low=0.0, high=1.0, doc="decays of further EMAs beside the main one, such as 0.999,0.9999"
    ),
    "train.ema_sigma_rel": Field(
        (),
        entries=float,
        low=MIN_SIGMA_REL,
        high=MAX_SIGMA_REL,
        doc="relative widths of power-function EMAs (Karras et al. 2024), such as 0.05,0.1, from whose snapshots that "
        "of any width is synthesised after the training",
    ),
    "train.ema_snapshot_every": Resumable(
        0, low=0, high=MAX_STEPS, doc="steps between snapshots of the power-function EMAs; 0: checkpoint_every"
    ),
    "train.ema_snapshot_dtype": Resumable(
        "float32", choices=("float32", "float16"), doc="dtype of the snapshots' files; float16 halves them"
    ),
    "train.seed": Field(0, low=0, high=MAX_SEED, doc="seed of everything random in training"),
    "train.log_every": Resumable(100, low=1, high=MAX_STEPS, doc="steps between logged metrics"),
    "train.sample_every": Resumable(5_000, low=1, high=MAX_STEPS, doc="steps between saved sample grids"),
    "train.checkpoint_every": Resumable(5_000, low=1, high=MAX_STEPS, doc="steps between checkpoints"),
    "train.max_to_keep": Resumable(3, low=1, high=MAX_STEPS, doc="newest checkpoints to keep"),
    "train.keep_period": Resumable(
        0, low=0, high=MAX_STEPS, doc="also keep one checkpoint in this many steps for good; 0: none"
    ),
    "train.keep_best": Resumable(
        "", doc="also keep the checkpoint with the lowest mean of this metric since the one before; empty: none"
    ),
    "train.on_nonfinite": Resumable(
        "stop", choices=("stop", "skip"), doc="a loss or gradient that is not finite: stop the run or skip the step"
    ),
    "train.grad_accum_steps": Field(
        1,
        low=1,
        high=MAX_BATCH,
        doc="parts of a batch that are computed one after another; their gradients are averaged",
    ),
    "train.shard_state": Resumable(False, doc="shard weights, EMA and Adam's moments over the devices (ZeRO)"),
    "train.profile_steps": Resumable(0, low=0, high=MAX_STEPS, doc="steps to trace into workdir/profile; 0: none"),
    "train.wandb": Resumable(
        "", choices=("", "online", "offline"), doc="log to Weights & Biases as well; empty: not (extra wandb)"
    ),
    "train.wandb_project": Resumable("s2dm_jax", doc="project of Weights & Biases"),
    **SAMPLING,
}


def default_config() -> ConfigDict:
    """A config with the default of every field; a field whose default is None accepts its type as well."""
    config = ConfigDict()
    for name, field in FIELDS.items():
        group, key = name.split(".")
        if group not in config:
            config[group] = ConfigDict()
        config[group][key] = placeholder(field.type) if field.default is None else field.default
    return config


def image_shape(config: ConfigDict) -> tuple[int, int]:
    """Pixels of a side and channels of the images that the config trains on."""
    size, channels = DATASETS[config.data.name].shape
    return config.data.resolution or size, config.data.channels or channels


def decay_steps(config: ConfigDict) -> int:
    """The step at which the decay of the learning rate ends: `train.steps` where none is set; 0 without a decay."""
    train = config.train
    return train.decay_steps or (0 if train.lr_schedule == "constant" else train.steps)


def fixed_loss_scale(config: ConfigDict) -> float | None:
    """The factor on the loss, 1 for none, or None where it is dynamic.

    Raises:
      ValueError: for text that is neither a known word nor a number in the range of LOSS_SCALES.
    """
    text = config.train.loss_scale
    if text == "auto":
        text = "dynamic" if config.model.dtype == "float16" else "none"
    if text in ("dynamic", "none"):
        return None if text == "dynamic" else 1.0
    scale, (low, high) = float(text), LOSS_SCALES
    if not low <= scale <= high:
        raise ValueError(f"{text} is not from {low} to {high}")
    return scale


def dataset_name(config: ConfigDict) -> str:
    """What the images are called: the path of the user's own, else the dataset's name."""
    return config.data.source or config.data.name
