"""CIFAR-10, 32×32: the network and training of Analytic-DPM's code, improved-diffusion's UNet.

    python -m s2dm_jax.main --config=configs/cifar10_improved.py

SA-DPM's CIFAR-10 tables most likely come from this network. The first run downloads 170 MB and prepares them
(docs/data.md). The objective follows the colon: sa_2 (default), sa_3, sa_4, ddpm, s2_2, s2_10, s2_50; joined with +,
as s2_10+sa_2, also with a noise schedule: sa_2+cosine. sn and npr train a variance head on the run that
--config.variance_head.base_workdir names.

Values: Analytic-DPM's profiles/ddpm/cifar10/base.py and train.py: AdamW without weight decay, which is Adam, no
clipping of gradients, no flips, independent timesteps, and a network that counts them from 1. λ by K: SA-DPM, Table 4.
That code picks the checkpoint by the FID of 1,000 images: with its own trainings the one of step 400,000 (linear
schedule) and 160,000 (cosine).

SA-DPM reports, FID of 50,000 images at 10 / 1,000 steps, Table 2: DDPM 41.41 / 5.92, with sa_2 30.51 / 4.33; with the
cosine schedule 34.98 / 4.95 and 24.59 / 4.05. Nothing of this has been trained here.
"""

from s2dm_jax.config import HEADS, default_config, set_head, set_objective


def get_config(objective: str = "sa_2"):
    c = default_config()
    set_objective(c, "ddpm" if objective in HEADS else objective)
    c.data.name = "cifar10"
    c.data.random_flip = False
    c.model.name = "improved_unet"
    c.model.ch = 128
    c.model.ch_mult = (1, 2, 2, 2)
    c.model.num_res_blocks = 3
    c.model.attn_resolutions = (16, 8)
    c.model.num_heads = 4
    c.model.scale_shift_norm = True
    c.model.dropout = 0.3
    c.model.t_offset = 1
    c.loss.antithetic = False
    c.train.steps = 500_000
    c.train.batch_size = 128
    c.train.lr = 1e-4
    c.train.weight_decay = 0.0
    c.train.grad_clip = 0.0
    c.train.ema_decay = 0.9999
    c.eval.num_images = 50_000
    if objective in HEADS:
        set_head(c, objective)
    return c
