"""The fields of sampling, evaluation and export, which may change after the training."""

from s2dm_jax.config.fields import LOSS_PRESETS, MAX_BATCH, MAX_IMAGES, MAX_SEED, MAX_T, Field, Resumable
from s2dm_jax.config.metrics import METRICS
from s2dm_jax.samplers.guards import MIN_LOG_SNR
from s2dm_jax.samplers.specs import OPTIONS, SAMPLERS
from s2dm_jax.samplers.timesteps import SPACINGS

# The keyword arguments of `inference.sampler.configure_sampler` that the groups `sample` and `eval` share.
SAMPLER_OPTIONS: dict[str, Field] = {
    "timestep_spacing": Resumable(
        "auto",
        choices=SPACINGS,
        doc="spacing of the timesteps; auto: the sampler's best; optimal: Analytic-DPM's dynamic programme",
    ),
    "min_log_snr": Resumable(
        MIN_LOG_SNR,
        low=-1000.0,
        high=0.0,
        doc="lowest log(alpha/sigma) of a timestep that is visited where x_0 is not clipped; -1000: no bound",
    ),
    "eta": Resumable(0.0, low=0.0, high=1.0, doc="DDIM's noise: 0 is deterministic, 1 has DDPM's posterior variance"),
    "clip_x0": Resumable(None, type=bool, doc="clip each step's prediction of x_0"),
    "dynamic_threshold": Resumable(
        None,
        type=float,
        low=1e-6,
        high=1.0,
        doc="clip x_0 to this quantile of each image's values, such as 0.995, and scale it into [-1, 1] (Imagen); in "
        "the place of clip_x0",
    ),
    "raw_eps": Resumable(
        None, type=bool, doc="keep DDIM's ε as predicted where x_0 is clipped, as Analytic-DPM's code"
    ),
    "variance": Resumable(
        None,
        type=str,
        choices=OPTIONS["variance"],
        doc="variance of DDPM's steps; learned: by the second output of a network that has model.learned_variance",
    ),
    "pndm_convention": Resumable(
        None, type=str, choices=OPTIONS["pndm_convention"], doc="which alpha_bar PNDM reads at a timestep"
    ),
    "order": Resumable(None, type=int, choices=OPTIONS["order"], doc="order of DEIS, DPM-Solver++ and UniPC"),
    "variant": Resumable(None, type=str, choices=OPTIONS["variant"], doc="B(h) of UniPC: h or e^h − 1"),
    "mean": Resumable(None, type=str, choices=OPTIONS["mean"], doc="mean of Analytic-, SN- and NPR-DPM's steps"),
    "clip_pixel": Resumable(
        None,
        type=float,
        low=1e-6,
        doc="bound on the mean absolute noise of the last noisy step of Analytic-, SN- and NPR-DPM, in grey "
        "values of 255",
    ),
    "skip_scale": Resumable(
        0, low=0, doc="scale the network's output as training with L_skip and this skip would; 0: no scaling"
    ),
    "skip_scale_tau": Resumable(0.99, low=0.0, high=1.0, doc="tau of that scaling"),
    "skip_scale_preset": Resumable("paper", choices=LOSS_PRESETS, doc="loss preset of that scaling, as loss.preset"),
}

# All that these two groups share.
_SHARED = {
    **SAMPLER_OPTIONS,
    "ema": Resumable(
        "",
        doc="weights to use; empty: the run's EMA; weights: those without an average; a decay of train.ema_decays; "
        "sigma_rel=0.1: the power-function EMA of that width, with train.ema_sigma_rel",
    ),
    "noise_stat_images": Resumable(100, low=2, doc="training images per timestep for Analytic-DPM's noise statistic"),
}

SAMPLING: dict[str, Field] = {
    "sample.sampler": Resumable("ddim", choices=tuple(SAMPLERS), doc="sampler"),
    "sample.steps": Resumable(0, low=0, high=MAX_T, doc="sampling steps; 0: from nfe or timesteps"),
    "sample.nfe": Resumable(
        0,
        low=0,
        high=5 * MAX_T,
        doc="number of network evaluations; 0: from steps or timesteps, or 10 without any of the three",
    ),
    "sample.timesteps": Resumable((), doc="explicit timesteps, ascending; empty: from steps, nfe"),
    **{f"sample.{name}": field for name, field in _SHARED.items()},
    "sample.num_images": Resumable(64, low=1, high=MAX_IMAGES, doc="images to sample"),
    "sample.seed": Resumable(0, low=0, high=MAX_SEED, doc="seed of the sampler's noise"),
    "sample.batch_size": Resumable(500, low=1, high=MAX_BATCH, doc="images sampled at once"),
    "sample.checkpoint_step": Resumable(0, low=0, doc="training step of the checkpoint to sample from; 0: the newest"),
    "sample.output": Resumable(
        "grid",
        choices=("grid", "npz", "png"),
        doc="what --mode=sample writes: one PNG with all images, one .npz, or one PNG per image",
    ),
    "sample.interpolate": Resumable(
        0, low=0, high=MAX_BATCH, doc="write rows of this many images between two noises instead; 0: off"
    ),
    "sample.trajectory": Resumable(False, doc="write each step's prediction of x_0 instead"),
    "sample.compare": Resumable(
        "", path="paths", doc="write the same noise through these workdirs (a,b,…) as well, row by row"
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
    "eval.inception_weights": Resumable(
        "", path="URL", doc="file or URL of Inception's weights; empty: the standard ones"
    ),
    "eval.inception_sha256": Resumable("", doc="SHA-256 of Inception's weights; empty: that of the standard ones"),
    "eval.checkpoint_step": Resumable(0, low=0, doc="training step of the checkpoint to evaluate; 0: the newest"),
    "eval.num_images": Resumable(50_000, low=2, high=MAX_IMAGES, doc="images to sample for each sampler and NFE"),
    "eval.batch_size": Resumable(500, low=1, high=MAX_BATCH, doc="images sampled at once"),
    "eval.seed": Resumable(0, low=0, high=MAX_SEED, doc="seed of the samplers' noise"),
    "export.path": Resumable(
        "", path="path", doc="file to write, .npz; empty: named by the sampler, in workdir/exports"
    ),
    "export.license": Resumable("", doc="license of the weights, for the model card"),
}
