"""LSUN bedrooms or churches, 256×256: network and training of the DDIM code.

    python -m s2dm_jax.main --config=configs/lsun256.py --config.data.source=PATH

PATH is a folder, zip or tar of the images, which docs/data.md exports from LSUN's LMDB. The objective follows
the colon: ddpm (default), s2_2, s2_10, s2_50, sa_2, sa_3, sa_4; joined with +, as s2_10+sa_2, also with a noise
schedule: sa_2+cosine. sn and npr train a variance head on the run that --config.variance_head.base_workdir
names.

Values: the DDIM code's configs/bedroom.yml, where church.yml has the same: batch 64, no clipping, no dropout;
sampling batch 32. Its number of steps is not stated; 2,400,000 is DDPM's for bedrooms (Ho et al. 2020, appendix
B), who have --config.train.steps=1200000 for churches. λ by K: SA-DPM, Table 4, where it is CIFAR-10's. Neither
paper trained on these images, and nothing of this has been trained here.

Hours on one H100: not measured. Computed from 121 ms a step, 3 × 248.5 G multiply-adds for each of 64 images
at 790 TFLOP/s: no less than 80 for ddpm and s2, 161 for sa_2.
"""

from s2dm_jax.config import HEADS, default_config, set_head, set_objective


def get_config(objective: str = "ddpm"):
    c = default_config()
    set_objective(c, "ddpm" if objective in HEADS else objective)
    c.data.name = "lsun"
    c.data.random_flip = True
    c.model.ch = 128
    c.model.ch_mult = (1, 1, 2, 2, 4, 4)
    c.model.num_res_blocks = 2
    c.model.attn_resolutions = (16,)
    c.model.dropout = 0.0
    c.train.steps = 2_400_000
    c.train.batch_size = 64
    c.train.lr = 2e-5
    c.train.grad_clip = 0.0
    c.train.ema_decay = 0.999
    c.sample.batch_size = 32
    c.eval.num_images = 50_000
    c.eval.batch_size = 32
    if objective in HEADS:
        set_head(c, objective)
        c.train.steps = 500_000
    return c
