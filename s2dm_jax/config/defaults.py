"""Every field of a config, and values derived from the fields.

A file in `configs/` starts from `default_config()` and sets what its dataset needs.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from s2dm_jax.config.datasets import CROPS, DATASETS, RESIZE_FILTERS
from s2dm_jax.config.fields import (
    INCEPTION_RESIZES,
    LOSS_PRESETS,
    MAX_BATCH,
    MAX_IMAGES,
    MAX_SEED,
    MAX_T,
    Field,
    Resumable,
)
from s2dm_jax.config.metrics import METRICS
from s2dm_jax.config.presets import HEADS
from s2dm_jax.config.training_fields import TRAINING
from s2dm_jax.diffusion.betas import BETAS
from s2dm_jax.models.network import NETWORKS
from s2dm_jax.samplers.guards import MIN_LOG_SNR
from s2dm_jax.samplers.specs import OPTIONS, SAMPLERS
from s2dm_jax.samplers.timesteps import SPACINGS

# Keys of PREDICTIONS in diffusion/, which needs jax.
_PREDICTIONS = ("epsilon", "v", "x0")
# Beyond these, float32 has no room for the scaled gradient.
LOSS_SCALES = 1e-6, 1e30

# The keyword arguments of `inference.sampler.configure_sampler` that the groups `sample` and `eval` share.
SAMPLER_OPTIONS: dict[str, Field] = {
    "timestep_spacing": Resumable(
        "auto",
        choices=SPACINGS,
        doc=(
            "spacing of the timesteps; auto: the best measured for the sampler; optimal: Analytic-DPM's dynamic "
            "programming"
        ),
    ),
    "min_log_snr": Resumable(
        MIN_LOG_SNR,
        low=-1000.0,
        high=0.0,
        doc="lowest log(alpha/sigma) of a timestep that a sampler without clipping of x_0 visits; -1000: no bound",
    ),
    "eta": Resumable(0.0, low=0.0, high=1.0, doc="DDIM's noise: 0 is deterministic, 1 has DDPM's posterior variance"),
    "clip_x0": Resumable(None, type=bool, doc="clip each step's prediction of x_0"),
    "dynamic_threshold": Resumable(
        None,
        type=float,
        low=1e-6,
        high=1.0,
        doc=(
            "clip x_0 to this quantile of each image's values, such as 0.995, and scale it into [-1, 1] (Imagen); "
            "replaces clip_x0"
        ),
    ),
    "raw_eps": Resumable(
        None, type=bool, doc="keep DDIM's ε as predicted when x_0 is clipped, like Analytic-DPM's code"
    ),
    "variance": Resumable(
        None,
        type=str,
        choices=OPTIONS["variance"],
        doc="variance of DDPM's steps; learned: from the second output of a network with model.learned_variance",
    ),
    "pndm_convention": Resumable(
        None, type=str, choices=OPTIONS["pndm_convention"], doc="which alpha_bar PNDM uses at a timestep"
    ),
    "order": Resumable(None, type=int, choices=OPTIONS["order"], doc="order of DEIS, DPM-Solver++ and UniPC"),
    "variant": Resumable(None, type=str, choices=OPTIONS["variant"], doc="B(h) of UniPC: h or e^h − 1"),
    "mean": Resumable(None, type=str, choices=OPTIONS["mean"], doc="mean of Analytic-, SN- and NPR-DPM's steps"),
    "clip_pixel": Resumable(
        None,
        type=float,
        low=1e-6,
        doc=(
            "bound on the mean absolute noise of the last noisy step of Analytic-, SN- and NPR-DPM, in grey values (0 "
            "to 255)"
        ),
    ),
    "skip_scale": Resumable(
        0, low=0, doc="scale the network's output as training with L_skip and this skip would; 0: no scaling"
    ),
    "skip_scale_tau": Resumable(0.99, low=0.0, high=1.0, doc="tau of that scaling"),
    "skip_scale_preset": Resumable("paper", choices=LOSS_PRESETS, doc="loss preset of that scaling (see loss.preset)"),
}

# All that these two groups share.
_SHARED = {
    **SAMPLER_OPTIONS,
    "ema": Resumable(
        "",
        doc=(
            "weights to use; empty: the run's EMA; weights: the raw weights; a decay: that EMA of train.ema_decays; "
            "sigma_rel=0.1: the power-function EMA of that width, which needs train.ema_sigma_rel"
        ),
    ),
    "noise_stat_images": Resumable(100, low=2, doc="training images per timestep for Analytic-DPM's noise statistic"),
}

FIELDS: dict[str, Field] = {
    "data.name": Field("digits", choices=tuple(DATASETS), doc="dataset"),
    "data.random_flip": Field(False, doc="flip training images horizontally with probability 1/2"),
    # Resumable: the hash of the images decides whether they are the same.
    "data.source": Resumable(
        "",
        path="path",
        doc="your own images: a folder, a .zip or .tar of one, an .npy or .npz; empty: the dataset data.name",
    ),
    "data.resolution": Field(0, low=0, high=1024, doc="height and width in pixels; 0: those of the dataset data.name"),
    "data.channels": Field(0, choices=(0, 1, 3), doc="1: grey, 3: RGB; 0: that of the dataset data.name"),
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
        0.4,
        low=0.0,
        high=1.0,
        doc="largest fraction of a device's memory for the images; larger datasets stream from the host",
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
        "epsilon", choices=_PREDICTIONS, doc="what the network predicts: the noise, v or the clean image"
    ),
    "model.ch": Field(128, low=32, high=4096, doc="channels at the highest resolution"),
    "model.ch_mult": Field((1, 2, 2, 2), low=1, min_length=1, doc="channel multiplier of each resolution level"),
    "model.num_res_blocks": Field(2, low=1, high=64, doc="residual blocks per resolution level"),
    "model.attn_resolutions": Field((16,), low=1, doc="resolutions with self-attention, in pixels"),
    "model.dropout": Field(0.1, low=0.0, high=0.999, doc="dropout rate in the residual blocks"),
    "model.resamp_with_conv": Field(True, doc="resample with convolutions, like the published networks"),
    # None stands for the network's own default; a network that has no such field refuses any other value.
    "model.num_heads": Field(None, type=int, low=1, high=4096, doc="heads of self-attention (improved_unet)"),
    "model.scale_shift_norm": Field(
        None, type=bool, doc="scale and shift the second norm of a block by the embedding of t (improved_unet)"
    ),
    "model.learned_variance": Field(
        None,
        type=bool,
        doc=(
            "predict a variance in as many extra output channels, for sample.variance=learned; only for converted "
            "weights, since no loss here trains it (improved_unet)"
        ),
    ),
    "model.num_classes": Field(
        None,
        type=int,
        low=0,
        high=1_000_000,
        doc=(
            "number of classes of a class-conditional network; only for converted weights, since losses and samplers "
            "here pass no labels (improved_unet)"
        ),
    ),
    "model.t_offset": Field(
        None,
        type=int,
        low=0,
        high=1,
        doc=(
            "number that the network receives for the first timestep: 0, or 1 as in Analytic-DPM's network for "
            "CIFAR-10 (improved_unet)"
        ),
    ),
    "model.t_scale": Field(
        None,
        type=float,
        low=1e-6,
        high=1e6,
        doc="factor on the timestep that the network receives, such as 1000/T for OpenAI's networks (improved_unet)",
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
        None,
        type=str,
        choices=("truncate", "plain"),
        doc="what L_skip does at timesteps with fewer steps below them than loss.skip_factors",
    ),
    "loss.window": Field(
        None, type=str, choices=("forward", "backward"), doc="direction of L_sa's window: from t upwards or downwards"
    ),
    "loss.window_boundary": Field(
        None, type=str, choices=("inner", "all"), doc="which timesteps of the window count in L_sa"
    ),
    "loss.sa_norm": Field(None, type=str, choices=("K^2", "K"), doc="divisor of L_sa"),
    "loss.use_tau_s": Field(None, type=bool, doc="weight L_sa by Theorem 1's τ_s"),
    "loss.reduction": Field(None, type=str, choices=("sum", "mean"), doc="reduction over an image's pixels"),
    "loss.antithetic": Field(None, type=bool, doc="draw half of the timesteps as mirrors T-1-t of the others"),
    "variance_head.kind": Field(
        "", choices=("", *HEADS), doc="variance head to train on another run's frozen network; empty: none"
    ),
    # Resumable: the hash of the weights decides whether it is the same network.
    "variance_head.base_workdir": Resumable("", path="path", doc="workdir of that run"),
    "variance_head.dropout": Field(False, doc="apply dropout in the frozen network"),
    **TRAINING,
    "sample.sampler": Resumable("ddim", choices=tuple(SAMPLERS), doc="sampler"),
    "sample.steps": Resumable(0, low=0, high=MAX_T, doc="number of sampling steps; 0: derived from nfe or timesteps"),
    "sample.nfe": Resumable(
        0,
        low=0,
        high=5 * MAX_T,
        doc=(
            "number of network evaluations (NFE); 0: derived from steps or timesteps, or 10 if none of the three is set"
        ),
    ),
    "sample.timesteps": Resumable((), doc="explicit timesteps, ascending; empty: derived from steps or nfe"),
    **{f"sample.{name}": field for name, field in _SHARED.items()},
    "sample.num_images": Resumable(64, low=1, high=MAX_IMAGES, doc="number of images to sample"),
    "sample.seed": Resumable(0, low=0, high=MAX_SEED, doc="seed of the sampler's noise"),
    "sample.batch_size": Resumable(500, low=1, high=MAX_BATCH, doc="images sampled at once"),
    "sample.checkpoint_step": Resumable(0, low=0, doc="training step of the checkpoint to sample from; 0: the newest"),
    "sample.output": Resumable(
        "grid",
        choices=("grid", "npz", "png"),
        doc="what --mode=sample writes: one PNG with all images, one .npz, or one PNG per image",
    ),
    "sample.interpolate": Resumable(
        0,
        low=0,
        high=MAX_BATCH,
        doc="instead write rows of this many images, interpolated between two noise images; 0: off",
    ),
    "sample.trajectory": Resumable(False, doc="instead write each step's prediction of x_0"),
    "sample.compare": Resumable(
        "", path="paths", doc="also sample from the same noise with the runs in these workdirs (a,b,…), one row each"
    ),
    "eval.samplers": Resumable("ddim", doc="samplers to evaluate (a,b,…)"),
    "eval.nfe": Resumable((10, 20, 50), low=1, min_length=1, doc="NFE to evaluate each sampler at"),
    **{f"eval.{name}": field for name, field in _SHARED.items()},
    "eval.feature_extractor": Resumable(
        "auto",
        path="path",
        doc="features to compare in: inception, classifier (trained on the dataset's labels) or your own "
        "FILE.py:function of uint8 [B, H, W, C]; auto: inception if available, classifier for the digits",
    ),
    "eval.metrics": Resumable("fid", doc=f"metrics (a,b,…): {', '.join(METRICS)}"),
    "eval.reference": Resumable(
        "auto",
        path="path",
        doc="images to compare with: train, held_out or FILE.npz with mu and sigma; auto: train for "
        "inception, as in the papers, else held_out",
    ),
    "eval.inception_resize": Resumable(
        "auto",
        choices=("auto", *INCEPTION_RESIZES),
        doc="how images are resized and scaled for Inception: tf1 (TensorFlow, torch-fidelity, EDM) or pytorch_fid; "
        "auto: tf1, but with another program's statistics as the reference it must be set",
    ),
    "eval.inception_weights": Resumable(
        "", path="URL", doc="file or URL of Inception's weights; empty: the standard ones"
    ),
    "eval.inception_sha256": Resumable("", doc="SHA-256 of Inception's weights; empty: that of the standard ones"),
    "eval.checkpoint_step": Resumable(0, low=0, doc="training step of the checkpoint to evaluate; 0: the newest"),
    "eval.num_images": Resumable(
        50_000, low=2, high=MAX_IMAGES, doc="number of images to sample for each sampler and NFE"
    ),
    "eval.batch_size": Resumable(500, low=1, high=MAX_BATCH, doc="images sampled at once"),
    "eval.seed": Resumable(0, low=0, high=MAX_SEED, doc="seed of the samplers' noise"),
    "export.path": Resumable(
        "", path="path", doc="file to write, .npz; empty: named by the sampler, in workdir/exports"
    ),
    "export.license": Resumable("", doc="license of the weights, for the model card"),
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
    """Height and width in pixels, and channels, of the images that the config trains on."""
    size, channels = DATASETS[config.data.name].shape
    return config.data.resolution or size, config.data.channels or channels


def decay_steps(config: ConfigDict) -> int:
    """The step at which the decay of the learning rate ends: `train.steps` if none is set; 0 without a decay."""
    train = config.train
    return train.decay_steps or (0 if train.lr_schedule == "constant" else train.steps)


def fixed_loss_scale(config: ConfigDict) -> float | None:
    """The factor on the loss, 1 for none, or None if it is dynamic.

    Raises:
      ValueError: for text that is neither auto, dynamic or none nor a number in the range of LOSS_SCALES.
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
    """The name of the dataset: the path of the user's own images, else `data.name`."""
    return config.data.source or config.data.name
