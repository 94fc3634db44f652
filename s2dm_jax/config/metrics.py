"""The metrics by name: a record here and a function in `evaluation/metrics.py` make a metric."""

from typing import NamedTuple

from s2dm_jax.common.errors import UserError


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
      function: its name; it returns one float for each of `results`, a single one bare. "" for "bits_per_dim", which is
        one of the network on real images (`evaluation/bits_per_dim.py`).
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


# By their names in `config.eval.metrics`, in the order of the table of results.
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
    "bits_per_dim": Metric(
        function="",
        requires=(),
        results=("bits_per_dim", "bits_per_dim_se"),
        columns=(Column("bits/dim", "bits_per_dim", "bits_per_dim_se", digits=3),),
    ),
}


def split_names(text: str) -> list[str]:
    """The names in "a,b, c"."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_metrics(text: str) -> list[str]:
    """The metrics that "fid,kid" names, in the order of METRICS; "fid" is always among them.

    Raises:
      ValueError: for an unknown one.
    """
    names = split_names(text)
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metrics={text!r} names {name!r}; choose among {', '.join(METRICS)}")
    return [name for name in METRICS if name in names or name == "fid"]


def check_num_images(names: list[str], num_images: int, dimensions: int) -> None:
    """Checks the minimum that depends on the number of features; `config.validate` checks the others."""
    for name in names:
        needed = METRICS[name].min_images_per_feature * dimensions
        if num_images < needed:
            raise UserError(
                f"config.eval.num_images={num_images} is too few for {name} in {dimensions} features, which needs "
                f"{needed}"
            )
