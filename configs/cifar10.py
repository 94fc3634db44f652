"""CIFAR-10, 32×32: network and training of the DDIM code, which both papers keep.

    python -m s2dm_jax.main --config=configs/cifar10.py

The first run downloads 170 MB and prepares them (docs/data.md). The objective follows the
colon: ddpm, s2_2, s2_10 (default), s2_50, sa_2, sa_3, sa_4; joined with +, as s2_10+sa_2, also with a noise
schedule: sa_2+cosine. sn and npr train a variance head on the run that --config.variance_head.base_workdir
names.

Values: the DDIM code's configs/cifar10.yml, where S²-DMs' code has the same. Steps: 600,000 (S²-DMs,
section 4), SA-DPM alone 468,000 (1,200 epochs of 390, SA-DPM's configs/cifar10.yml). λ by K: SA-DPM, Table 4.
SA-DPM's code differs in two further values: --config.data.random_flip=False
--config.train.ema_start=first_step.

The papers report, FID of 50,000 images at 10 / 1,000 steps: S²-DMs' Table 1, DDIM 18.32 / 4.54, with s2_10
15.63 / 4.21; SA-DPM's Table 4, DDPM 41.41 / 5.92, with sa_2 30.51 / 4.33. Nothing of this has been trained
here.

Hours on one H100: 3.4 for ddpm and s2, at the 20.2 ms a step measured for ddpm. The arithmetic alone, 6.05 ms a
step at 790 TFLOP/s, takes 1.0 for ddpm and s2, 1.6 for sa_2 and 2.0 for s2_10+sa_2.
"""

from s2dm_jax.config import HEADS, default_config, set_head, set_objective


def get_config(objective: str = "s2_10"):
    c = default_config()
    set_objective(c, "ddpm" if objective in HEADS else objective)
    only_sa = c.loss.K > 1 and not c.loss.skip
    c.data.name = "cifar10"
    c.data.random_flip = True
    c.model.ch = 128
    c.model.ch_mult = (1, 2, 2, 2)
    c.model.num_res_blocks = 2
    c.model.attn_resolutions = (16,)
    c.model.dropout = 0.1
    c.train.steps = 468_000 if only_sa else 600_000
    c.train.batch_size = 128
    c.train.lr = 2e-4
    c.train.grad_clip = 1.0
    c.train.ema_decay = 0.9999
    c.eval.num_images = 50_000
    if objective in HEADS:
        set_head(c, objective)
        c.train.steps = 500_000
    return c
