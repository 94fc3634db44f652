"""CelebA, 64×64: network and training of the DDIM code, which both papers keep.

    python -m s2dm_jax.main --config=configs/celeba64.py

The first run downloads 1.5 GB and prepares them; when Google Drive refuses, the error says which file to put
where by hand (docs/data.md). The objective follows the colon: ddpm, s2_2, s2_10 (default), s2_50,
sa_2, sa_3, sa_4; joined with +, as s2_10+sa_2, also with a noise schedule: sa_2+cosine. sn and npr train a
variance head on the run that --config.variance_head.base_workdir names.

Values: the DDIM code's configs/celeba.yml, where S²-DMs' code has the same; 162,770 training images, rows
57…185 and columns 25…153, then 64×64. Steps: 400,000 (S²-DMs, section 4), SA-DPM alone 1,525,200 (1,200
epochs of 1,271, SA-DPM's configs/celeba.yml). λ by K: SA-DPM, Table 4, where it is CIFAR-10's. SA-DPM's code
differs in one further value: --config.train.ema_start=first_step.

The papers report, FID of 50,000 images at 10 / 1,000 steps: S²-DMs' Table 2, DDIM 13.15 / 4.07, with s2_10
11.97 / 3.13; SA-DPM's Table 2, DDIM 20.54 / 3.40, with sa_2 12.88 / 2.98. Nothing of this has been trained
here.

Hours on one H200: 6.1 for ddpm and s2, at the 54.7 ms a step measured for ddpm. The arithmetic alone, 23.4 ms a
step at 790 TFLOP/s, takes 2.6 for ddpm and s2, 19.8 for sa_2 and 5.2 for s2_10+sa_2.
"""

from s2dm_jax.config import HEADS, default_config, set_head, set_objective


def get_config(objective: str = "s2_10"):
    c = default_config()
    set_objective(c, "ddpm" if objective in HEADS else objective)
    only_sa = c.loss.K > 1 and not c.loss.skip
    c.data.name = "celeba"
    c.data.random_flip = True
    c.model.ch = 128
    c.model.ch_mult = (1, 2, 2, 2, 4)
    c.model.num_res_blocks = 2
    c.model.attn_resolutions = (16,)
    c.model.dropout = 0.1
    c.train.steps = 1_525_200 if only_sa else 400_000
    c.train.batch_size = 128
    c.train.lr = 2e-4
    c.train.grad_clip = 1.0
    c.train.ema_decay = 0.9999
    c.sample.batch_size = 100
    c.eval.num_images = 50_000
    c.eval.batch_size = 100
    if objective in HEADS:
        set_head(c, objective)
        c.train.steps = 500_000
    return c
