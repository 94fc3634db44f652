"""What `scripts/reproduce.py` does for a table: its commands, where their runs lie, what they cost.

`args` is its command line: out, seed, images, steps, scale.
"""

import argparse
import sys
from pathlib import Path

from papers.types import Model, Table, TableRow

from s2dm_jax.samplers.specs import nfe_of

# Multiply-adds of one forward pass in G (shared/spec/design.md; the digits' network in configs/digits.py) and
# the batch of a training step.
_COST = {
    "cifar10": (6.222, 128),
    "celeba64": (24.05, 128),
    "celebahq256": (248.5, 24),
    "digits": (0.0131, 64),
}

_INCEPTION_COST = 5.5

# An H100 in bfloat16, measured (shared/spec/design.md).
_TFLOPS = 790e12

# Of a second head: the released code's.
_HEAD_STEPS = 500_000

_DIGITS_STEPS = 200

_DIGITS_LONGEST = 800_000

_DIGITS_MOST = 20

_DIGITS_IMAGES = 100


def scaled(table: Table, args: argparse.Namespace) -> Table:
    """The table as it is, or on the digits with short trainings, few steps and few images."""
    if args.scale == "full":
        return table

    def model(of):
        return of._replace(dataset="digits", steps=_on_digits(of.steps, args), flip=False)

    columns = [steps for steps in table.columns if steps <= _DIGITS_MOST] or [_DIGITS_MOST] * bool(
        table.columns
    )
    lines = tuple(line._replace(model=model(line.model)) for line in table.lines)
    return table._replace(columns=tuple(columns), lines=lines)


def images_of(args: argparse.Namespace) -> int:
    """Images in a cell."""
    return args.images or (_DIGITS_IMAGES if args.scale == "digits" else 50_000)


def head_steps(args: argparse.Namespace) -> int:
    """Training steps of a second head."""
    return _HEAD_STEPS if args.scale == "full" else _on_digits(_HEAD_STEPS, args)


def _on_digits(steps: int, args: argparse.Namespace) -> int:
    """Training steps on the digits for so many of a paper's."""
    return max(1, round((args.steps or _DIGITS_STEPS) * min(1, steps / _DIGITS_LONGEST)))


def workdir_of(model: Model, args: argparse.Namespace, head: str = "") -> Path:
    """The folder of the run, or of a second head on it, named by all that it is."""
    parts = [model.dataset, model.schedule, f"skip{model.skip}", f"K{model.K}", f"lam{model.lam:g}"]
    parts += [f"flip{int(model.flip)}", f"seed{args.seed}", f"steps{model.steps}"]
    parts += [head, f"steps{head_steps(args)}"] if head else []
    return Path(args.out) / "runs" / "_".join(parts)


def budgets(table: Table, line: TableRow) -> dict[int, int]:
    """Network evaluations by sampling steps, of the steps that the method can make."""
    found = {}
    for steps in table.columns:
        try:
            found[steps] = nfe_of(line.method, steps)
        except ValueError:
            continue
    return found


def train_command(table: Table, line: TableRow, args: argparse.Namespace) -> list[str]:
    """The command that trains the line's model, if it is not there, and evaluates it."""
    model, workdir = line.model, workdir_of(line.model, args, line.head)
    steps = head_steps(args) if line.head else model.steps
    train = {"seed": args.seed, "steps": steps}
    if args.scale == "digits":
        train |= {"log_every": 20, "sample_every": steps, "checkpoint_every": steps}
    evaluation = {
        "samplers": line.method,
        "nfe": ",".join(map(str, budgets(table, line).values())) or 10,
        "metrics": "fid,is" if table.kind == "inception_score" else "fid",
        "num_images": images_of(args),
        **line.options,
    }
    if args.scale == "digits" and line.method == "analytic":
        evaluation["noise_stat_images"] = 10
    groups = {"train": train, "eval": evaluation}
    if line.head:
        groups["variance_head"] = {"base_workdir": workdir_of(model, args)}
    else:
        groups["loss"] = {"skip": model.skip, "K": model.K, "lam": model.lam}
        groups["diffusion"] = {"schedule": model.schedule}
        groups["data"] = {"random_flip": model.flip}
    flags = [
        f"--config.{group}.{name}={value}"
        for group, fields in groups.items()
        for name, value in fields.items()
    ]
    config = f"--config=configs/{model.dataset}.py:{line.head or 'ddpm'}"
    return [sys.executable, "-m", "s2dm_jax.main", config, f"--workdir={workdir}", *flags]


def gpu_hours(table: Table, args: argparse.Namespace) -> tuple[float, float]:
    """Hours on one H100 for training and for evaluating, of the arithmetic alone: a floor."""
    models = {line.model for line in table.lines}

    def done_before(model):
        alike = (other.steps for other in models if other._replace(steps=model.steps) == model)
        return max((steps for steps in alike if steps < model.steps), default=0)

    training = 0.0
    for model in models:
        macs, batch = _COST[model.dataset]
        training += 3 * 2e9 * macs * batch * model.K * (model.steps - done_before(model))
    # A head learns on the frozen network's way forward.
    for model, _ in {(line.model, line.head) for line in table.lines if line.head}:
        macs, batch = _COST[model.dataset]
        training += 2e9 * macs * batch * head_steps(args)
    images = images_of(args)
    sampling = sum(
        2e9 * images * (_COST[line.model.dataset][0] * nfe + _INCEPTION_COST)
        for line in table.lines
        for nfe in budgets(table, line).values()
    )
    return training / _TFLOPS / 3600, sampling / _TFLOPS / 3600


def picture_commands(table: Table, args: argparse.Namespace) -> list[list[str]]:
    """The commands that make a figure's pictures from its runs, which print where they leave them."""
    workdirs = [str(workdir_of(line.model, args)) for line in table.lines]
    if table.kind == "gap":
        out = Path(args.out) / f"{args.table}.png"
        return [[sys.executable, "scripts/estimation_gap.py", *dict.fromkeys(workdirs), f"--out={out}"]]
    main, commands = [sys.executable, "-m", "s2dm_jax.main", "--mode=sample"], []
    rows = table.kind == "rows"
    for line, workdir in list(zip(table.lines, workdirs, strict=True))[: 1 if rows else None]:
        said = {name: value for name, value in line.options.items() if name in ("eta", "grid")}
        said |= {"sampler": line.method, "num_images": 8 if rows or table.kind == "interpolation" else 64}
        if rows:
            said["compare"] = ",".join(other for other in dict.fromkeys(workdirs) if other != workdir)
        if table.kind == "interpolation":
            said["interpolate"] = 11
        for nfe in budgets(table, line).values():
            fields = {**said, "nfe": nfe}
            flags = [f"--config.sample.{name}={value}" for name, value in fields.items()]
            commands.append([*main, f"--workdir={workdir}", *flags])
    return commands
