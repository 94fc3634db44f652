"""The fields of the group `train`."""

from s2dm_jax.config.ema import EMA_RAMPUP_RATIO, MAX_SIGMA_REL, MIN_SIGMA_REL
from s2dm_jax.config.fields import MAX_BATCH, MAX_SEED, MAX_STEPS, Field, Resumable

# In float32, 1 − beta is positive.
_MAX_BETA = 0.999999

TRAINING: dict[str, Field] = {
    "train.steps": Resumable(500_000, low=1, high=MAX_STEPS, doc="total number of optimizer steps"),
    "train.batch_size": Field(128, low=1, high=MAX_BATCH, doc="global batch size, over all devices"),
    "train.lr": Field(2e-4, low=1e-12, high=10.0, doc="Adam's learning rate"),
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
    "train.adam_b1": Field(0.9, low=0.0, high=_MAX_BETA, doc="Adam's beta_1, the decay of the mean of the gradients"),
    "train.adam_b2": Field(
        0.999, low=0.0, high=_MAX_BETA, doc="Adam's beta_2, the decay of the mean of the squared gradients"
    ),
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
        0.0, low=0.0, high=1e15, doc="half-life of the EMA in images, which replaces ema_decay; 0: use ema_decay"
    ),
    "train.ema_rampup_ratio": Field(
        EMA_RAMPUP_RATIO,
        low=0.0,
        high=1.0,
        doc="with ema_halflife_images, the half-life is at most this share of the images seen (EDM); 0: no ramp-up",
    ),
    "train.ema_decays": Field(
        (), entries=float, low=0.0, high=1.0, doc="decays of further EMAs besides the main one, such as 0.999,0.9999"
    ),
    "train.ema_sigma_rel": Field(
        (),
        entries=float,
        low=MIN_SIGMA_REL,
        high=MAX_SIGMA_REL,
        doc=(
            "relative widths of power-function EMAs (Karras et al. 2024), such as 0.05,0.1, from whose snapshots the "
            "EMA of any width can be synthesised after training"
        ),
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
    "train.max_to_keep": Resumable(3, low=1, high=MAX_STEPS, doc="number of newest checkpoints to keep"),
    "train.keep_period": Resumable(
        0, low=0, high=MAX_STEPS, doc="also keep one checkpoint in this many steps permanently; 0: none"
    ),
    "train.keep_best": Resumable(
        "", doc="also keep the checkpoint with the lowest mean of this metric since the previous one; empty: none"
    ),
    "train.on_nonfinite": Resumable(
        "stop",
        choices=("stop", "skip"),
        doc="what to do on a loss or gradient that is not finite: stop the run or skip the step",
    ),
    "train.grad_accum_steps": Field(
        1,
        low=1,
        high=MAX_BATCH,
        doc=(
            "gradient accumulation: number of equal parts of a batch, computed one after another; their gradients are "
            "averaged"
        ),
    ),
    "train.shard_state": Resumable(False, doc="shard weights, EMA and Adam's moments over the devices (ZeRO)"),
    "train.profile_steps": Resumable(
        0, low=0, high=MAX_STEPS, doc="number of steps to trace into workdir/profile; 0: none"
    ),
    "train.wandb": Resumable(
        "", choices=("", "online", "offline"), doc="also log to Weights & Biases; empty: do not (needs the extra wandb)"
    ),
    "train.wandb_project": Resumable("s2dm_jax", doc="Weights & Biases project"),
}
