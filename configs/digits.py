"""Handwritten digits, 8×8: the default that needs no download and trains in minutes on two CPU cores.

    python -m s2dm_jax.main --config=configs/digits.py --workdir=runs/digits

The method follows a colon: `digits.py:ddpm` (plain), `:s2` (skip-step term), `:sa` (sequence-aware term),
`:s2sa` (both, the default). `:sn` and `:npr` train a second head on the network of the run that
--config.variance_head.base_workdir names.
"""

from s2dm_jax.config import HEADS, default_config, set_head

METHODS = {
    "ddpm": {},
    "s2": {"skip": 10},
    "sa": {"K": 2, "lam": 1.0},
    "s2sa": {"skip": 10, "K": 2, "lam": 1.0},
}


def get_config(method: str = "s2sa"):
    if method not in METHODS and method not in HEADS:
        raise ValueError(f"method {method!r} is not known; choose one of {', '.join((*METHODS, *HEADS))}")
    c = default_config()
    c.data.name = "digits"
    c.model.ch = 32
    c.model.ch_mult = (1, 2)
    c.model.num_res_blocks = 1
    c.model.attn_resolutions = (4,)
    c.model.dropout = 0.0
    c.loss.update(METHODS.get(method, {}))
    c.train.steps = 1_050
    c.train.batch_size = 64
    c.train.lr = 1e-3
    c.train.ema_decay = 0.99
    c.train.log_every = 20
    c.train.sample_every = 350
    c.train.checkpoint_every = 350
    c.eval.num_images = 500
    if method in HEADS:
        set_head(c, method)
        c.train.lr = 1e-3
        c.train.steps = 500
    return c
