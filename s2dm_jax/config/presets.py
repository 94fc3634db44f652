"""The papers' objectives, noise schedules and variance heads by name."""

from ml_collections import ConfigDict

# What both papers trained: S²-DMs' skips (section 4), SA-DPM's K with the λ that its section on λ prefers.
OBJECTIVES = {
    "ddpm": {},
    "s2_2": {"skip": 2},
    "s2_10": {"skip": 10},
    "s2_50": {"skip": 50},
    "sa_2": {"K": 2, "lam": 1.0},
    "sa_3": {"K": 3, "lam": 0.3},
    "sa_4": {"K": 4, "lam": 0.2},
}

# Short names for what the papers mostly use.
ALIASES = {"s2": "s2_10", "sa": "sa_2", "s2sa": "s2_10+sa_2"}

OBJECTIVE_SCHEDULES = ("linear", "cosine")

# Variance heads of a trained network (SN-, NPR-DPM), which a config file takes in the place of an objective.
HEADS = ("sn", "npr")


def full_objective_name(objective: str) -> str:
    """The canonical name of an objective: "s2sa" and "sa_2+s2_10" are "s2_10+sa_2"; other text as it is."""
    parts, known = _parts(objective), [*OBJECTIVES, *OBJECTIVE_SCHEDULES]
    return "+".join(sorted(parts, key=known.index)) if set(parts) <= set(known) else objective


def _parts(objective: str) -> list[str]:
    return [name for part in objective.split("+") for name in ALIASES.get(part, part).split("+")]


def set_objective(config: ConfigDict, objective: str) -> None:
    """Sets the objective and the noise schedule of a name such as "s2_10" or "s2_10+sa_2+cosine".

    Raises:
      ValueError: for an unknown part, or for two parts that set the same thing.
    """
    parts = _parts(objective)
    for part in parts:
        if part not in OBJECTIVES and part not in OBJECTIVE_SCHEDULES:
            raise ValueError(
                f"objective {objective!r} is not valid; choose one of {', '.join((*OBJECTIVES, *ALIASES))}, combine an "
                f"s2_ and an sa_ objective as in s2_10+sa_2, add +{' or +'.join(OBJECTIVE_SCHEDULES)}, or choose a "
                f"variance head: {' or '.join(HEADS)}"
            )
    kinds = ["schedule" if part in OBJECTIVE_SCHEDULES else part.split("_")[0] for part in parts]
    if len(set(kinds)) < len(kinds) or ("ddpm" in kinds and {"s2", "sa"} & set(kinds)):
        raise ValueError(
            f"objective {objective!r} names parts that exclude one another; combine at most one s2_, one sa_ and one "
            "schedule, or ddpm and a schedule"
        )
    for part in parts:
        if part in OBJECTIVE_SCHEDULES:
            config.diffusion.schedule = part
        else:
            config.loss.update(OBJECTIVES[part])


def set_head(config: ConfigDict, kind: str) -> None:
    """Makes a config that of a variance head, with the released code's Adam: 1e-4, no clipping."""
    config.variance_head.kind = kind
    config.train.update(lr=1e-4, grad_clip=0.0)
    config.sample.update(sampler=kind, timestep_spacing="linspace")
    config.eval.update(samplers=kind, timestep_spacing="linspace")
