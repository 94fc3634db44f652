"""How the stage `evidence` spends its time: sizes, equal shares of seconds, and what is rescaled. Imports no jax."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpu_stages.parts import Settings

OBJECTIVES = ("ddpm", "s2_10", "s2_50", "sa_2")

# Skips whose factor (`objectives.skip_scale`) the output of an objective's network is multiplied by while sampling. A
# network trained with L_skip has learnt the factor of its skip and is sampled as it is; the plain network with a factor
# is its control. No factor belongs to L_sa.
RESCALED = {"ddpm": (10, 50)}

# The time that distances take is expected to be longer by this factor than that of their batches alone.
_SAFETY = 1.2
_DIFFERENT = 1.1

_STATE = "evidence.json"


class Size(NamedTuple):
    """What is trained and measured on a kind of device.

    Attributes:
      objectives: of `OBJECTIVES`.
      fields: of the config, in place of those of configs/cifar10.py.
      chunk: steps of one program.
      classifier_steps: None for the library's own number.
      num_images, eval_batch, nfe: of every distance.
      least, most: seconds that an objective is trained in a run.
      compiling, measuring: seconds expected of a program's compilation and of distances at every NFE, unless measured.
      margin: seconds left over at the end of the stage.
    """

    objectives: tuple[str, ...]
    fields: Mapping[str, Any]
    chunk: int
    classifier_steps: int | None
    num_images: int
    eval_batch: int
    nfe: tuple[int, ...]
    least: float
    most: float
    compiling: float
    measuring: float
    margin: float

    @property
    def num_batches(self) -> int:
        """Of every distance."""
        return -(-self.num_images // self.eval_batch)


# Four networks of 825 thousand weights and their EMA take 13 MB in float16.
_GPU = {
    "model.ch": 32,
    "model.ch_mult": (1, 1, 2),
    "model.num_res_blocks": 1,
    "model.attn_resolutions": (16, 8),
    "model.dropout": 0.0,
    # The objectives are unchanged: their loss is that of the noise, whatever the output stands for. After seconds of
    # training, samples of a network whose output is the noise are plain colours, further from real images than noise.
    "model.prediction": "v",
    "train.batch_size": 256,
    "train.lr": 2e-3,
    # Averages 200 steps: a share may have no more than a thousand.
    "train.ema_decay": 0.995,
}
_CPU = {**_GPU, "data.resolution": 16, "model.attn_resolutions": (8,), "train.batch_size": 32, "train.ema_decay": 0.98}
_TINY = {
    **_CPU,
    "data.resolution": 8,
    "model.ch_mult": (1,),
    "model.attn_resolutions": (),
    "train.batch_size": 8,
    "train.ema_decay": 0.8,
}
# That of a CPU is for tries by hand.
SIZES = {
    "gpu": Size(OBJECTIVES, _GPU, 50, None, 10_000, 500, (10, 20, 50), 8.0, 600.0, 40.0, 6.0, 4.0),
    "cpu": Size(OBJECTIVES, _CPU, 10, 300, 256, 64, (10, 20), 8.0, 600.0, 20.0, 12.0, 4.0),
    "tiny": Size(("ddpm", "s2_10"), _TINY, 4, 20, 32, 16, (2, 4), 0.1, 0.5, 4.0, 1.0, 0.5),
}


def size_of(settings: Settings) -> Size:
    """The size that the settings ask for."""
    return SIZES["tiny" if settings.tiny else settings.device]


def equal_shares(
    trained: Mapping[str, float], costs: Mapping[str, float], seconds: float, least: float, most: float
) -> dict[str, float]:
    """Seconds of training for each objective of a run, after which all that it trains were trained for equally long.

    As many objectives as get at least `least` seconds each, those first that were trained least.

    Args:
      trained: seconds that earlier runs trained each.
      costs: seconds that each takes in this run besides its training.
      seconds: of the run.
      least, most: of a share; a larger one is cut.
    """
    order = sorted(trained, key=trained.__getitem__)
    for count in range(len(order), 0, -1):
        chosen = order[:count]
        training = seconds - sum(costs[name] for name in chosen)
        total = (training + sum(trained[name] for name in chosen)) / count
        shares = {name: min(total - trained[name], most) for name in chosen}
        if min(shares.values()) >= least:
            return shares
    return {}


def measuring_seconds(size: Size, batch_seconds: Mapping[str, float]) -> float:
    """Seconds that the distances at every NFE take, from those of a batch at each (as text), if they are measured."""
    if not batch_seconds:
        return size.measuring
    return _SAFETY * size.num_batches * sum(batch_seconds[str(nfe)] for nfe in size.nfe)


Distance = tuple[str, int, int]


def missing_distances(records: Mapping[str, Mapping[str, Any]], nfe: Sequence[int]) -> list[Distance]:
    """Objective, skip of the rescaling (0: none) and NFE of what is not measured yet, the rescaled ones last."""
    wanted = [(name, 0) for name in records]
    wanted += [(name, skip) for name in records for skip in RESCALED.get(name, ())]
    found = {(name, row["skip_scale"], row["nfe"]) for name, record in records.items() for row in record["rows"]}
    return [(*each, n) for each in wanted for n in nfe if (*each, n) not in found]


class State(NamedTuple):
    """What the parts of this run have to know of each other, also in another process.

    Attributes:
      batch_seconds: of sampling a batch, by NFE as text; empty until it is measured.
      level: seconds that this run's first objective was trained in all runs together, which the others aim at, or None.
    """

    batch_seconds: dict[str, float]
    level: float | None


def has_state(scratch: Path) -> bool:
    """Whether a part of this run, in this or another process, has left its state."""
    return (scratch / _STATE).exists()


def read_state(scratch: Path) -> State:
    """What the parts before left."""
    return State(**json.loads((scratch / _STATE).read_text(encoding="utf-8")))


def write_state(scratch: Path, state: State) -> None:
    """Leaves the state for the following parts."""
    (scratch / _STATE).write_text(json.dumps(state._asdict()), encoding="utf-8")


def comparison_line(records: Mapping[str, Mapping[str, Any]], anchors: Mapping[str, float], nfe: Sequence[int]) -> str:
    """The distances of all objectives so far, and how long each was trained, as a line of Markdown."""
    parts = []
    for name in (name for name in OBJECTIVES if name in records):
        record = records[name]
        found = {(row["skip_scale"], row["nfe"]): row["frechet_distance"] for row in record["rows"]}
        for skip in (0, *RESCALED.get(name, ())):
            cells = [f"{found[skip, n]:.2f}" if (skip, n) in found else "–" for n in nfe]
            label = f"{name} rescaled (skip {skip})" if skip else f"{name} ({record['seconds']:.0f} s)"
            if not skip or set(cells) != {"–"}:
                parts.append(f"{label} {' / '.join(cells)}")
    evaluations = " / ".join(map(str, nfe))
    ends = f"real images {anchors['floor']:.2f}, noise {anchors['ceiling']:.2f}"
    return f"Fréchet distance at {evaluations} evaluations: {'; '.join(parts)}; {ends}"


def notes_of(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a reader of the comparison has to know about the times."""
    notes, seconds = [], [record["seconds"] for record in records.values()]
    if max(seconds) > _DIFFERENT * min(seconds):
        notes.append("not trained for equal times")
    devices = sorted({session["device"] for record in records.values() for session in record["sessions"]})
    if len(devices) > 1:
        notes.append(f"trained on {' and '.join(devices)}, whose seconds are not comparable")
    return notes
