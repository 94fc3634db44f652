"""Handwritten digits, 8×8: the default that needs no download and trains in minutes on two CPU cores.

    python -m s2dm_jax.main --config=configs/digits.py

The objective follows the colon: ddpm, s2_2, s2_10, s2_50, sa_2, sa_3, sa_4; joined with +, as s2_10+sa_2
(default), also with a noise schedule: sa_2+cosine. For short, s2 is s2_10, sa is sa_2 and s2sa both. sn and
npr train a variance head on the run that --config.variance_head.base_workdir names.
"""

from s2dm_jax.config import HEADS, default_config, set_head, set_objective


def get_config(objective: str = "s2_10+sa_2"):
    c = default_config()
    set_objective(c, "ddpm" if objective in HEADS else objective)
    c.data.name = "digits"
    c.model.ch = 32
    c.model.ch_mult = (1, 2)
    c.model.num_res_blocks = 1
    c.model.attn_resolutions = (4,)
    c.model.dropout = 0.0
    c.train.log_every = 20
    c.train.sample_every = 350
    c.train.checkpoint_every = 350
    c.eval.num_images = 500
    if objective in HEADS:
        set_head(c, objective)
        c.train.steps = 500
        c.train.batch_size = 64
        c.train.lr = 1e-3
    else:
        c.train.steps = c.train.decay_steps = 1_400
        # As many network evaluations a step with K = 2 as without L_sa.
        c.train.batch_size = 64 if c.loss.K == 1 else 32
        c.train.lr = 2e-3
        c.train.lr_schedule = "cosine"
        # A run that is resumed with more steps goes on learning.
        c.train.lr_end = 1e-4
    c.train.ema_decay = 0.99
    return c
