"""FFHQ, 64×64: SA-DPM's released config, with the network of the DDIM code's CelebA.

    python -m s2dm_jax.main --config=configs/ffhq64.py --config.data.source=PATH

PATH is a folder, zip or tar of the 70,000 images, of any size (docs/data.md). The objective follows the colon:
ddpm, s2_2, s2_10, s2_50, sa_2 (default), sa_3, sa_4; joined with +, as s2_10+sa_2, also with a noise schedule:
sa_2+cosine. sn and npr train a variance head on the run that --config.variance_head.base_workdir names.

Values: SA-DPM's configs/ffhq64.yml: batch 4 × 64, 1,500 epochs of 273 steps over 70,000 images; sampling batch
500. λ = 0.5 for every K: SA-DPM's README gives it for K = 2. The paper reports no FID on this dataset, and
S²-DMs did not train on it. SA-DPM's code differs in one further value: --config.train.ema_start=first_step.
Nothing of this has been trained here.

Hours on one H100: not measured. Computed from 46.8 ms a step, the arithmetic alone at 790 TFLOP/s: no less
than 5.3 for ddpm and s2, 10.6 for sa_2.
"""

from s2dm_jax.config import HEADS, default_config, set_head, set_objective


def get_config(objective: str = "sa_2"):
    c = default_config()
    set_objective(c, "ddpm" if objective in HEADS else objective)
    if c.loss.K > 1:
        c.loss.lam = 0.5
    c.data.name = "ffhq"
    c.data.random_flip = True
    c.model.ch = 128
    c.model.ch_mult = (1, 2, 2, 2, 4)
    c.model.num_res_blocks = 2
    c.model.attn_resolutions = (16,)
    c.model.dropout = 0.1
    c.train.steps = 409_500
    c.train.batch_size = 256
    c.train.lr = 2e-4
    c.train.grad_clip = 1.0
    c.train.ema_decay = 0.9999
    c.sample.batch_size = 500
    c.eval.num_images = 50_000
    if objective in HEADS:
        set_head(c, objective)
        c.train.steps = 500_000
    return c
