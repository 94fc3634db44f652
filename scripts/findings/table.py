"""The trainings, their evaluations, and the claim that each comparison tests: the data of scripts/evidence.py."""

from collections.abc import Mapping
from typing import Any, NamedTuple

SKIPS = (2, 10, 50)


class Training(NamedTuple):
    """A training: what its config has beside the preset's fields.

    Attributes:
      objective: what follows the colon of --config.
      length: train steps in units of the preset's; the learning rate decays over all of them.
      fields: of the config.
      cost: network evaluations per image and step.
    """

    objective: str
    length: int = 1
    fields: Mapping[str, Any] = {}
    cost: int = 1


_MEAN = {"loss.reduction": "mean"}
_UNCLIPPED = {"train.grad_clip": 0.0}
_RELEASED = {"loss.preset": "released"}

# By name, of which folders and results are named. A training that differs from another in one thing is its pair.
TRAININGS = {
    "ddpm": Training("ddpm"),
    **{f"s2_{skip}": Training(f"s2_{skip}") for skip in SKIPS},
    # All that the released code of S²-DMs has but L_skip: the mean over pixels, and half of the t mirrored.
    "ddpm_mean_mirrored": Training("ddpm", fields={**_MEAN, "loss.antithetic": True}),
    **{f"s2_{skip}_released": Training(f"s2_{skip}", fields=_RELEASED) for skip in SKIPS},
    **{
        f"{objective}{name}": Training(objective, fields=fields)
        for objective in ("ddpm", "s2_10")
        for name, fields in {
            "_mean": _MEAN,
            "_unclipped": _UNCLIPPED,
            "_mean_unclipped": {**_MEAN, **_UNCLIPPED},
        }.items()
    },
    **{f"sa_{K}": Training(f"sa_{K}", cost=K) for K in (2, 3, 4)},
    "s2_10+sa_2": Training("s2_10+sa_2", cost=2),
    **{f"ddpm_x{length}": Training("ddpm", length) for length in (2, 3, 4)},
    **{f"s2_10_x{length}": Training("s2_10", length) for length in (2, 4)},
    **{f"sa_2_x{length}": Training("sa_2", length, cost=2) for length in (2, 4)},
}


class Evaluation(NamedTuple):
    """What is measured of a trained network.

    Attributes:
      fields: of the config's group eval.
      nfe: network evaluations per image; None for the preset's.
      kind: "distances", or "gap" for the estimation gap.
    """

    fields: Mapping[str, Any] = {}
    nfe: tuple[int, ...] | None = None
    kind: str = "distances"


# As in the papers' tables.
_DDIM = {"samplers": "ddim", "timestep_spacing": "uniform"}
_SAMPLERS = {"samplers": "ddim,ddpm,s_pndm,deis,dpmpp,unipc", "timestep_spacing": "auto"}
# Of ancestral sampling, whose chain has a bound; an image takes 1,000 evaluations, as does sampling one.
_BITS = {"samplers": "ddpm", "timestep_spacing": "uniform", "metrics": "bits_per_dim", "num_images": 100}


def _scaled(preset: str, skip: int) -> dict[str, Any]:
    return {"skip_scale": skip, "skip_scale_preset": preset}


# By name. "" is measured at the end of the training. `paper_10` scales the output by the factor that training with
# L_skip leads to, in preset `paper`, skip 10.
EVALUATIONS = {
    "": Evaluation(_DDIM),
    **{
        f"{preset}_{skip}": Evaluation({**_DDIM, **_scaled(preset, skip)})
        for preset in ("paper", "released")
        for skip in SKIPS
    },
    "1000": Evaluation(_DDIM, (1000,)),
    "1000_paper_10": Evaluation({**_DDIM, **_scaled("paper", 10)}, (1000,)),
    "ancestral": Evaluation({"samplers": "ddpm", "timestep_spacing": "uniform"}, (10, 50)),
    "samplers": Evaluation(_SAMPLERS, (10,)),
    "samplers_paper_10": Evaluation({**_SAMPLERS, **_scaled("paper", 10)}, (10,)),
    "bits": Evaluation(_BITS, (10,)),
    "bits_paper_10": Evaluation({**_BITS, **_scaled("paper", 10)}, (10,)),
    "gap": Evaluation(kind="gap"),
}


class Finding(NamedTuple):
    """A claim and the runs that test it.

    Attributes:
      title: of its section and its figure.
      claim: quoted from the paper; `source` says where.
      pairs: (a, b): a less b, seed by seed. Each is TRAINING or TRAINING|EVALUATION.
      seeds: at most; more where differences are small.
      kind: of its table and figure, in `report.KINDS`.
      quantity: the key of a row, or what is logged along the training; "a/b" is a ratio.
      expected: the range of the quantity that the paper gives.
    """

    title: str
    claim: str
    source: str
    pairs: tuple[tuple[str, str], ...]
    seeds: int = 5
    kind: str = "distances"
    quantity: str = "frechet_distance"
    expected: tuple[float, float] | None = None


_S2, _SA = "S²-DMs (arXiv 2401.01520v1)", "SA-DPM"
_SHORTER = (
    "by adding L_skip, the model requires fewer training steps to achieve excellent performance",
    f"{_S2}, section 4.1",
)

# In the order in which they are made: the most valuable first.
FINDINGS = {
    "skip": Finding(
        "L_skip against plain training, and against plain training with its output rescaled",
        "We observed that the S²-DMs consistently produces higher quality samples than DDIMs and PNDMs across "
        "different "
        "sampling steps.",
        f"{_S2}, section 4.1",
        tuple(
            pair
            for skip in SKIPS
            for pair in (
                (f"s2_{skip}", "ddpm"),
                (f"ddpm|paper_{skip}", "ddpm"),
                (f"s2_{skip}", f"ddpm|paper_{skip}"),
            )
        ),
    ),
    "released": Finding(
        "The released code of S²-DMs: a second noise, the mean over pixels, mirrored timesteps",
        "We also ensured that all parameters were kept consistent",
        f"{_S2}, section 4",
        (
            ("ddpm_mean_mirrored", "ddpm"),
            *(
                pair
                for skip in SKIPS
                for pair in (
                    (f"s2_{skip}_released", "ddpm"),
                    (f"s2_{skip}_released", "ddpm_mean_mirrored"),
                    (f"ddpm_mean_mirrored|released_{skip}", "ddpm_mean_mirrored"),
                    (f"s2_{skip}_released", f"ddpm_mean_mirrored|released_{skip}"),
                    (f"ddpm|released_{skip}", "ddpm"),
                )
            ),
        ),
        seeds=3,
    ),
    "sequence": Finding(
        "L_sa at equal train steps",
        "SA-2-DPM (λ = 1), SA-3-DPM (λ = 0.3), and SA-4-DPM (λ = 0.2) consistently outperform DPM for all numbers of "
        "sampling timesteps.",
        f"{_SA}, ablation study on the weight λ",
        (*((f"sa_{K}", "ddpm") for K in (2, 3, 4)), ("s2_10+sa_2", "ddpm"), ("s2_10+sa_2", "sa_2")),
        seeds=3,
    ),
    "evaluations": Finding(
        "L_sa at equal network evaluations in training",
        "This suggests a significant advantage of our new loss to improve both training and inference in DPMs.",
        f"{_SA}, image generation",
        (*((f"sa_{K}", f"ddpm_x{K}") for K in (2, 3, 4)), ("s2_10+sa_2", "s2_10_x2"), ("sa_2_x2", "ddpm_x4")),
        seeds=3,
    ),
    "reduction": Finding(
        "Sum against mean over pixels, with and without clipping of the gradient",
        "We also ensured that all parameters were kept consistent",
        f"{_S2}, section 4; the released code takes the mean where its baseline takes the sum",
        (
            *(
                pair
                for name in ("ddpm", "s2_10")
                for pair in (
                    (f"{name}_mean", name),
                    (f"{name}_mean_unclipped", f"{name}_unclipped"),
                    (f"{name}_unclipped", name),
                )
            ),
            ("s2_10_mean", "ddpm_mean"),
            ("s2_10_unclipped", "ddpm_unclipped"),
        ),
        seeds=3,
    ),
    "longer": Finding(
        "Training four times as long",
        *_SHORTER,
        (
            ("s2_10", "ddpm_x2"),
            ("s2_10_x4", "ddpm_x4"),
            ("ddpm_x4|paper_10", "ddpm_x4"),
            ("s2_10_x4", "ddpm_x4|paper_10"),
            ("sa_2_x4", "ddpm_x4"),
        ),
        seeds=3,
    ),
    "ratio": Finding(
        "L_skip in units of L_simple along the training",
        "the average value of L_skip is approximately 80-100 times larger than that of L_0",
        f"{_S2}, section 3.3",
        tuple((f"s2_{skip}{end}", "") for end in ("", "_released") for skip in SKIPS),
        kind="along",
        quantity="loss_skip/loss_simple",
        expected=(80, 100),
        seeds=3,
    ),
    "norms": Finding(
        "Norms of the gradient before it is clipped at 1",
        "We also ensured that all parameters were kept consistent",
        f"{_S2}, section 4",
        tuple((name, "") for name in ("ddpm", "ddpm_mean", "s2_10", "s2_10_mean", "s2_10_released")),
        kind="along",
        quantity="grad_norm",
        seeds=3,
    ),
    "gap": Finding(
        "The estimation gap while sampling",
        "with SA-2-DPM, at the final timestep of the denoising process, the total gap term is reduced by approximately "
        "2.5 times compared to the base model",
        f"{_SA}, evaluation on the estimation gap (Figure 4)",
        (
            *((f"sa_{K}|gap", "ddpm|gap") for K in (2, 3, 4)),
            ("s2_10|gap", "ddpm|gap"),
            ("sa_2|gap", "ddpm_x2|gap"),
            ("sa_2_x4|gap", "ddpm_x4|gap"),
        ),
        seeds=3,
        kind="gap",
        quantity="rms",
        expected=(2.5, 2.5),
    ),
    "samplers": Finding(
        "Other samplers, each with its best timesteps, at 10 network evaluations",
        "it is not limited to DDIMs sampling methods but is also applicable to other accelerated sampling approaches",
        f"{_S2}, section 4.1",
        (
            ("s2_10|samplers", "ddpm|samplers"),
            ("ddpm|samplers_paper_10", "ddpm|samplers"),
            ("s2_10|samplers", "ddpm|samplers_paper_10"),
            ("sa_2|samplers", "ddpm|samplers"),
        ),
        seeds=3,
    ),
    "ancestral": Finding(
        "L_sa with DDPM's sampling, as in SA-DPM's Table 4",
        "all the tested SA-K-DPM methods yield better results compared to the vanilla DPM",
        f"{_SA}, ablation study on the weight λ",
        (
            *((f"sa_{K}|ancestral", "ddpm|ancestral") for K in (2, 3, 4)),
            ("sa_2|ancestral", "ddpm_x2|ancestral"),
        ),
        seeds=3,
    ),
    "thousand": Finding(
        "All 1,000 timesteps",
        "SA-DPM exhibits a substantial performance improvement over the original DPM, regardless of whether the "
        "number of "
        "timesteps is small or large",
        f"{_SA}, image generation",
        (
            ("s2_10|1000", "ddpm|1000"),
            ("s2_10|1000", "ddpm|1000_paper_10"),
            ("sa_2|1000", "ddpm|1000"),
            ("sa_2|1000", "ddpm_x2|1000"),
        ),
        seeds=3,
    ),
    "bits": Finding(
        "Bits per dimension, the bound that both papers start from",
        "optimizing the ELBO corresponds to minimizing denoising score matching goals",
        f"{_S2}, section 2",
        (
            *((f"s2_{skip}|bits", "ddpm|bits") for skip in SKIPS),
            ("s2_10|bits", "ddpm|bits_paper_10"),
            *((f"sa_{K}|bits", "ddpm|bits") for K in (2, 3, 4)),
            ("sa_2|bits", "ddpm_x2|bits"),
        ),
        seeds=3,
        quantity="bits_per_dim",
    ),
}
