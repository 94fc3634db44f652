"""How `scripts/reproduce.py` reproduces a table: its commands, the folders of its runs, its cost on one H100.

`args` are the parsed flags of that script: table, out, seed, images, steps, scale, network, preset.
"""

import argparse
import sys
from pathlib import Path

from papers.presets import T, model_of, released_fields, sampling_steps, workdir_parts
from papers.sa_dpm import UNET_CONFIG, UNET_STEPS
from papers.types import Model, Table, TableRow
from run_once import main_command

from s2dm_jax.config.defaults import FIELDS
from s2dm_jax.samplers.specs import nfe_of

# Multiply-adds (G) of one forward pass, counted by `models.flops.forward_flops` for the networks of
# configs/, and the batch size of a train step.
_COST = {
    "cifar10": (6.222, 128),
    "cifar10_improved": (8.383, 128),
    "celeba64": (24.05, 128),
    "celebahq256": (248.5, 24),
    "digits": (0.0131, 64),
}
# Multiply-adds (G) of the FID Inception for one image.
_INCEPTION_COST = 5.5
# FLOP/s of large matrix products, measured on an H100 in bfloat16.
_H100_FLOPS = 790e12
# Train steps of a variance head, from the released code.
_HEAD_STEPS = 500_000

# --scale=digits: train steps of a model for which a paper uses _LONGEST_TRAINING, most sampling steps,
# images, images of Analytic-DPM's statistic.
_DIGITS_STEPS = 200
_LONGEST_TRAINING = 800_000
_DIGITS_MAX_SAMPLING_STEPS = 20
_DIGITS_IMAGES = 100
_DIGITS_STATISTIC_IMAGES = 10


def scaled(table: Table, args: argparse.Namespace) -> Table:
    """The table itself, with --network=unet that of DDIM's network, with --scale=digits a short one on the digits."""
    table = table._replace(rows=tuple(row._replace(model=model_of(row.model, args)) for row in table.rows))
    if args.network == "unet":
        table = table._replace(rows=tuple(map(_on_unet, table.rows)))
    if args.scale == "full":
        return table

    def on_digits(row: TableRow) -> TableRow:
        steps = _digits_steps(row.model.steps, args)
        statistic = {"noise_stat_images": _DIGITS_STATISTIC_IMAGES} if row.sampler == "analytic" else {}
        return row._replace(
            model=row.model._replace(dataset="digits", steps=steps, flip=False),
            options={**row.options, **statistic},
            released={name: value for name, value in row.released.items() if name not in statistic},
        )

    columns = tuple(steps for steps in table.columns if steps <= _DIGITS_MAX_SAMPLING_STEPS)
    if table.columns and not columns:
        columns = (_DIGITS_MAX_SAMPLING_STEPS,)
    return table._replace(columns=columns, rows=tuple(map(on_digits, table.rows)))


def _on_unet(row: TableRow) -> TableRow:
    if row.model.dataset != "cifar10_improved":
        return row
    return row._replace(model=row.model._replace(dataset=UNET_CONFIG, steps=UNET_STEPS))


def num_images(args: argparse.Namespace) -> int:
    """Number of images behind each value of a table."""
    return args.images or (_DIGITS_IMAGES if args.scale == "digits" else 50_000)


def head_steps(args: argparse.Namespace) -> int:
    """Train steps of a variance head."""
    return _HEAD_STEPS if args.scale == "full" else _digits_steps(_HEAD_STEPS, args)


def _digits_steps(steps: int, args: argparse.Namespace) -> int:
    """Train steps on the digits in place of a paper's number of steps."""
    return max(1, round((args.steps or _DIGITS_STEPS) * min(1, steps / _LONGEST_TRAINING)))


def workdir_of(model: Model, args: argparse.Namespace, variance_head: str = "") -> Path:
    """The workdir of a model, or of a variance head on it, named by everything that determines it."""
    parts = [model.dataset, model.schedule, f"skip{model.skip}", f"K{model.K}", f"lam{model.lam:g}"]
    parts += [f"flip{int(model.flip)}", f"seed{args.seed}", f"steps{model.steps}"]
    parts += [variance_head, f"steps{head_steps(args)}"] if variance_head else []
    parts += workdir_parts(model, args)
    return Path(args.out) / "runs" / "_".join(parts)


def nfe_by_steps(table: Table, row: TableRow, preset: str = "paper") -> dict[int, int]:
    """NFE for each number of sampling steps in the columns that the row's sampler supports."""
    found = {}
    for steps in table.columns:
        try:
            found[steps] = nfe_of(row.sampler, sampling_steps(row, steps, preset))
        except ValueError:
            # Fewer steps than the sampler needs.
            continue
    return found


def train_command(table: Table, row: TableRow, args: argparse.Namespace) -> list[str]:
    """The command that trains the row's model, unless it is trained, and evaluates it."""
    model, workdir = row.model, workdir_of(row.model, args, row.variance_head)
    steps = head_steps(args) if row.variance_head else model.steps
    train = {"seed": args.seed, "steps": steps}
    evaluation = {
        "samplers": row.sampler,
        "nfe": ",".join(map(str, nfe_by_steps(table, row, args.preset).values())) or 10,
        "metrics": "fid,inception_score" if table.kind == "inception_score" else "fid",
        "num_images": num_images(args),
        **row.options,
    }
    if args.scale == "digits":
        train |= {"log_every": 20, "sample_every": steps, "checkpoint_every": steps}
    groups = {"train": train, "eval": evaluation}
    if row.variance_head:
        groups["variance_head"] = {"base_workdir": workdir_of(model, args)}
    else:
        groups["loss"] = {"skip": model.skip, "K": model.K, "lam": model.lam}
        groups["diffusion"] = {"schedule": model.schedule}
        groups["data"] = {"random_flip": model.flip}
    for group, fields in released_fields(row, args).items():
        groups[group] |= fields
    flags = [f"--config.{group}.{name}={value}" for group, fields in groups.items() for name, value in fields.items()]
    config = f"--config=configs/{model.dataset}.py:{row.variance_head or 'ddpm'}"
    return main_command(config, f"--workdir={workdir}", *flags)


def gpu_hours(table: Table, args: argparse.Namespace) -> tuple[float, float]:
    """Hours of training and of evaluation on one H100, from arithmetic alone: a lower bound."""
    models = {row.model for row in table.rows}

    def inherited_steps(model):
        # A longer training continues the run of the same model with fewer steps.
        same = (other.steps for other in models if other._replace(steps=model.steps) == model)
        return max((steps for steps in same if steps < model.steps), default=0)

    training = 0.0
    for model in models:
        macs, batch = _COST[model.dataset]
        # Forward and backward pass cost three forward passes.
        training += 3 * 2e9 * macs * batch * model.K * (model.steps - inherited_steps(model))
    for model, _ in {(row.model, row.variance_head) for row in table.rows if row.variance_head}:
        # A variance head needs only the forward pass of the frozen network.
        macs, batch = _COST[model.dataset]
        training += 2e9 * macs * batch * head_steps(args)
    evaluation = sum(
        2e9 * num_images(args) * (_COST[row.model.dataset][0] * nfe + _INCEPTION_COST)
        for row in table.rows
        for nfe in nfe_by_steps(table, row, args.preset).values()
    )
    statistics = {(row.model, count) for row in table.rows if (count := _statistic_images(row, args))}
    evaluation += sum(2e9 * count * T * _COST[model.dataset][0] for model, count in statistics)
    return training / _H100_FLOPS / 3600, evaluation / _H100_FLOPS / 3600


def _statistic_images(row: TableRow, args: argparse.Namespace) -> int:
    """Images behind each of the T numbers of a row's statistic; 0 for rows without one."""
    if row.sampler != "analytic":
        return 0
    fields = {**row.options, **released_fields(row, args).get("eval", {})}
    return fields.get("noise_stat_images", FIELDS["eval.noise_stat_images"].default)


def image_commands(table: Table, args: argparse.Namespace) -> list[list[str]]:
    """The commands that make the images of a figure from its runs; they print where they write them."""
    if table.kind == "gap":
        workdirs = dict.fromkeys(str(workdir_of(row.model, args)) for row in table.rows)
        out = Path(args.out) / f"{args.table}{'_released' if args.preset == 'released' else ''}.png"
        return [[sys.executable, "scripts/estimation_gap.py", *workdirs, f"--out={out}"]]
    commands = []
    for rows in _sampled_together(table):
        row = rows[0]
        workdir, *compared = dict.fromkeys(str(workdir_of(row.model, args)) for row in rows)
        fields = {name: row.options[name] for name in ("eta", "timestep_spacing") if name in row.options}
        fields |= {"sampler": row.sampler, "num_images": 64 if table.kind == "grid" else 8}
        if compared:
            fields["compare"] = ",".join(compared)
        if table.kind == "interpolation":
            fields["interpolate"] = 11
        for nfe in nfe_by_steps(table, row, args.preset).values():
            flags = [f"--config.sample.{name}={value}" for name, value in {**fields, "nfe": nfe}.items()]
            commands.append(main_command("--mode=sample", f"--workdir={workdir}", *flags))
    return commands


def _sampled_together(table: Table) -> list[list[TableRow]]:
    """The rows of a figure by the command that makes their images: one sampler for several models, or one row."""
    if table.kind != "compare":
        return [[row] for row in table.rows]
    samplers = list(dict.fromkeys(row.sampler for row in table.rows))
    return [[row for row in table.rows if row.sampler == sampler] for sampler in samplers]
