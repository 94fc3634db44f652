"""CelebA-HQ, 256×256: SA-DPM's config, with the network of the DDIM code's LSUN bedrooms.

    python -m s2dm_jax.main --config=configs/celebahq256.py

The images cannot be downloaded; docs/data.md says how to get and where to put them. The objective follows the
colon: ddpm, s2_2, s2_10, s2_50, sa_2 (default), sa_3, sa_4; joined with +, as s2_10+sa_2, also with a noise
schedule: sa_2+cosine. sn and npr train a variance head on the run that --config.variance_head.base_workdir
names.

Values: SA-DPM's configs/celebahq.yml: batch 4 × 6, 900 epochs of 1,125 steps over 27,000 images, no flips, no
clipping, no dropout; sampling batch 10. λ = 0.1 for every K: SA-DPM's README gives it for K = 2. S²-DMs did
not train on this dataset. SA-DPM's code differs in one further value: --config.train.ema_start=first_step.

SA-DPM's Table 1 reports, FID at 10 / 1,000 steps: DDIM 39.29 / 24.10, with sa_2 37.66 / 20.11. The paper
says 50,000 images, the README's example draws 10,000, as here. Nothing of this has been trained here.

Hours on one H200: 29 for ddpm and s2, at the 104 ms a step measured for ddpm. The arithmetic alone, 45.3 ms a
step (3 × 248.5 G multiply-adds for each of 24 images at 790 TFLOP/s), takes 12.7 for ddpm and s2, 25.5 for sa_2.
"""

from s2dm_jax.config import HEADS, default_config, set_head, set_objective


def get_config(objective: str = "sa_2"):
    c = default_config()
    set_objective(c, "ddpm" if objective in HEADS else objective)
    if c.loss.K > 1:
        c.loss.lam = 0.1
    c.data.name = "celebahq"
    c.data.random_flip = False
    c.model.ch = 128
    c.model.ch_mult = (1, 1, 2, 2, 4, 4)
    c.model.num_res_blocks = 2
    c.model.attn_resolutions = (16,)
    c.model.dropout = 0.0
    c.train.steps = 1_012_500
    c.train.batch_size = 24
    c.train.lr = 2e-5
    c.train.grad_clip = 0.0
    c.train.ema_decay = 0.999
    c.sample.batch_size = 10
    c.eval.num_images = 10_000
    c.eval.batch_size = 10
    if objective in HEADS:
        set_head(c, objective)
        c.train.steps = 500_000
    return c
