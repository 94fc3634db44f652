"""The evaluation plan: (sampler, NFE) points and metrics. Imports no jax, like `samplers/specs.py`."""

from typing import NamedTuple

import numpy as np

from s2dm_jax.samplers.specs import OPTIONS, SAMPLERS
from s2dm_jax.samplers.timesteps import TimestepSpec, plan_timesteps

FEATURES = ("auto", "inception", "classifier")
REFERENCES = ("auto", "train", "held_out")


class Column(NamedTuple):
    """A column of the table of results: "title" over "value ± error".

    Attributes:
      title: may hold {distance} and {score}, their names in the chosen features.
      value: key in a row of results.json.
      error: key of the standard error or deviation, or "" for none.
      scale: what value and error are multiplied by.
      digits: decimals.
    """

    title: str
    value: str
    error: str = ""
    scale: float = 1.0
    digits: int = 2


class Metric(NamedTuple):
    """A metric of samples against a reference, computed by a function of `evaluation/metrics.py`.

    Attributes:
      function: its name; it returns one float for each of `results`, a single one bare.
      requires: its arguments in order, of "mean", "cov" (float64 [D], [D, D]), "features" (float32 [N, D]) and "logits"
        (float32 [N, L]) of the samples, and "reference_mean", "reference_cov", "reference_features".
      results: keys in a row of results.json.
      columns: of the table.
      min_images, min_images_per_feature: the smallest num_images, in all and for each of D features.
      max_images: the rows of features and logits that the function gets; None for all.
    """

    function: str
    requires: tuple[str, ...]
    results: tuple[str, ...]
    columns: tuple[Column, ...]
    min_images: int = 2
    min_images_per_feature: int = 0
    max_images: int | None = None


# The metrics by their names in `config.eval.metrics`, in the order of the table: a new one is a record and a function.
METRICS = {
    "fid": Metric(
        function="frechet_distance",
        requires=("mean", "cov", "reference_mean", "reference_cov"),
        results=("frechet_distance",),
        columns=(Column("{distance}", "frechet_distance"),),
    ),
    "kid": Metric(
        function="kid",
        requires=("reference_features", "features"),
        results=("kid", "kid_se"),
        columns=(Column("KID × 1000", "kid", "kid_se", scale=1e3),),
        min_images=20,
    ),
    "inception_score": Metric(
        function="inception_score",
        requires=("logits",),
        results=("inception_score", "inception_score_std"),
        columns=(Column("{score}", "inception_score", "inception_score_std"),),
        min_images=10,
    ),
    "precision_recall": Metric(
        function="precision_recall",
        requires=("reference_features", "features"),
        results=("precision", "recall"),
        columns=(Column("precision", "precision", digits=3), Column("recall", "recall", digits=3)),
        min_images=4,
        # As in ADM's evaluator: three sets of distances between 10,000 and 10,000 images.
        max_images=10_000,
    ),
    "fid_infinity": Metric(
        function="fid_infinity",
        requires=("features", "reference_mean", "reference_cov"),
        results=("fid_infinity", "fid_infinity_se"),
        columns=(Column("{distance}, N → ∞", "fid_infinity", "fid_infinity_se"),),
        min_images_per_feature=4,
    ),
}


class EvalPoint(NamedTuple):
    """A sampler at an NFE, a line of the table of results; `options` are its keyword arguments besides defaults."""

    sampler: str
    nfe: int
    timestep_spacing: str
    options: dict

    @property
    def name(self) -> str:
        """The sampler with its options, as in the table: "ddim, eta 1"."""
        spacing = {} if self.timestep_spacing == "uniform" else {"timestep_spacing": self.timestep_spacing}
        return ", ".join([self.sampler, *(f"{name} {value}" for name, value in (spacing | self.options).items())])

    def timesteps(self, T: int) -> np.ndarray:
        """The timesteps [S] that it visits, ascending; for the spacing "optimal" as many others."""
        spec = TimestepSpec(nfe=self.nfe, timestep_spacing=self.timestep_spacing)
        return plan_timesteps(T, self.sampler, spec, **self.options)


def split_names(text: str) -> list[str]:
    """The names in "a,b, c"."""
    return [name.strip() for name in text.split(",") if name.strip()]


def plan_evaluation(T: int, fields: dict) -> tuple[list[EvalPoint], list[str]]:
    """The points that a config's group `eval` requests, sampler by sampler, and one sentence for each skipped pair.

    A pair of sampler and NFE that is impossible, as F-PNDM with 10, is skipped. An option applies to those of the
    samplers that have it.

    Raises:
      ValueError: for an unknown or repeated sampler, an option that no sampler has, an NFE that no sampler can run
        with, a sampler that can run with none. The message begins with the name of a field.
    """
    # "pndm" is the papers' name.
    samplers = ["f_pndm" if name == "pndm" else name for name in split_names(fields["samplers"])]
    for name in samplers:
        if name not in SAMPLERS:
            raise ValueError(f"samplers={fields['samplers']!r} names {name!r}; there are {', '.join(SAMPLERS)}")
    if not samplers or len(set(samplers)) < len(samplers):
        raise ValueError(f"samplers={fields['samplers']!r} must name at least one sampler, none of them twice")
    if fields["timestep_spacing"] == "optimal" and any(SAMPLERS[name].requires != "ms_eps" for name in samplers):
        raise ValueError(f"timestep_spacing='optimal' is only for analytic, not for samplers={fields['samplers']!r}")
    requested = {name: fields[name] for name in OPTIONS if fields[name] is not None}
    if fields["eta"]:
        requested["eta"] = fields["eta"]
    for name, value in requested.items():
        if not any(name in SAMPLERS[sampler].options for sampler in samplers):
            owners = ", ".join(sampler for sampler, spec in SAMPLERS.items() if name in spec.options)
            raise ValueError(f"{name}={value!r} is no option of {', '.join(samplers)}, only of {owners}")
    points, skipped = [], {}
    for sampler in samplers:
        options = {name: value for name, value in requested.items() if name in SAMPLERS[sampler].options}
        for nfe in fields["nfe"]:
            point = EvalPoint(sampler, nfe, fields["timestep_spacing"], options)
            try:
                point.timesteps(T)
                points.append(point)
            except ValueError as error:
                skipped[sampler, nfe] = str(error)
    # A sampler or an NFE without any point is an error.
    for request in (*samplers, *fields["nfe"]):
        if not any(request in (point.sampler, point.nfe) for point in points):
            raise ValueError(next(reason for pair, reason in skipped.items() if request in pair))
    return points, [f"no {sampler} at {nfe}: {reason}" for (sampler, nfe), reason in skipped.items()]


def parse_metrics(text: str) -> list[str]:
    """The metrics that "fid,kid" names, in the order of METRICS; "fid" is always among them.

    Raises:
      ValueError: for an unknown one.
    """
    names = split_names(text)
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metrics={text!r} names {name!r}; there are {', '.join(METRICS)}")
    return [name for name in METRICS if name in names or name == "fid"]
