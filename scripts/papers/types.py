"""What a table or figure of a paper is made of: what is trained, how it is sampled, what is reported."""

from typing import NamedTuple


class Model(NamedTuple):
    """What is trained.

    Attributes:
      dataset: name of a file in configs/.
      steps: of training.
      skip, K, lam: of the loss; 0, 1 and 0 for plain training.
      schedule: of the noise.
      flip: whether images are mirrored at random.
    """

    dataset: str
    steps: int
    skip: int = 0
    K: int = 1
    lam: float = 0.0
    schedule: str = "linear"
    flip: bool = True


class TableRow(NamedTuple):
    """One line of a table, or one picture of a figure.

    Attributes:
      label: what the paper calls it.
      model: what is sampled from.
      method: one of `specs.SAMPLERS`.
      options: the sampler's fields of the group `eval`.
      paper: the reported figure for each column; None where there is none.
      head: "sn" or "npr" where the sampler needs a second head on the model.
    """

    label: str
    model: Model
    method: str
    options: dict
    paper: tuple = ()
    head: str = ""


class Table(NamedTuple):
    """A table or figure.

    Attributes:
      title: what it shows.
      kind: "fid" or "inception_score" (a table of that metric), "curves" (of FID), "grid" (samples), "rows"
        (the same noise through several models), "interpolation", "gap" (`scripts/estimation_gap.py`),
        "training" or "sampling" (seconds).
      columns: sampling steps.
      lines: its lines.
      note: what the paper leaves open, or what is done differently here.
    """

    title: str
    kind: str
    columns: tuple[int, ...]
    lines: tuple[TableRow, ...]
    note: str = ""


# A method and its options.
DDIM: tuple[str, dict] = ("ddim", {})

PNDM: tuple[str, dict] = ("f_pndm", {})

# "One type of DDPM" of the DDIM code.
ETA_1: tuple[str, dict] = ("ddim", {"eta": 1.0})
