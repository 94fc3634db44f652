"""Sizes of the evidence: what each preset of scripts/evidence.py trains, how long, and how it is measured."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from findings.table import FINDINGS


class Preset(NamedTuple):
    """Sizes of it all.

    Attributes:
      config: its file.
      steps: of a training of length 1.
      fields: of the config; as many images at once for every objective.
      nfe: network evaluations per image, of each evaluation that has none of its own.
      most_nfe: any above are left out, or this one is in their place.
      findings: which of `FINDINGS`.
      longest: pairs with a training of a greater length are left out.
      seeds: at most.
      gap: START and number of images of the estimation gap.
    """

    config: str
    steps: int
    fields: Mapping[str, Any]
    nfe: tuple[int, ...]
    most_nfe: int
    findings: tuple[str, ...]
    longest: int
    seeds: int
    gap: tuple[int, int]


_DIGITS = {
    "model.dtype": "float32",
    "train.batch_size": 64,
    "train.log_every": 50,
    "train.lr": 2e-3,
    "train.lr_schedule": "cosine",
    "train.lr_end": 1e-4,
}
# A network of 825 thousand weights, as in the stage `evidence` of scripts/benchmarks/gpu.py, for minutes of a GPU.
_CIFAR10 = {
    **_DIGITS,
    "model.ch": 32,
    "model.ch_mult": "1,1,2",
    "model.num_res_blocks": 1,
    "model.attn_resolutions": "16,8",
    "model.dropout": 0.0,
    # After seconds of training, samples of a network whose output is the noise are plain colours.
    "model.prediction": "v",
    "train.batch_size": 256,
    "train.ema_decay": 0.995,
    "eval.num_images": 10_000,
    "eval.feature_extractor": "classifier",
}
_TINY = {
    **_DIGITS,
    "model.ch_mult": "1",
    "model.attn_resolutions": "none",
    "train.batch_size": 8,
    "train.log_every": 2,
    "train.ema_decay": 0.5,
    "eval.num_images": 66,
}
_WITHOUT_LONG = tuple(name for name in FINDINGS if name not in ("evaluations", "longer", "ancestral", "thousand"))

PRESETS = {
    "digits": Preset(
        "configs/digits.py", 1_400, _DIGITS, (5, 10, 20, 50, 100), 1000, tuple(FINDINGS), 4, 5, (300, 200)
    ),
    "cifar10": Preset("configs/cifar10.py", 4_000, _CIFAR10, (10, 20, 50), 100, _WITHOUT_LONG, 1, 3, (300, 200)),
    "tiny": Preset("configs/digits.py", 4, _TINY, (2, 4), 4, tuple(FINDINGS), 4, 5, (3, 4)),
}
