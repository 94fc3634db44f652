"""Plots the estimation gap of trained runs (SA-DPM, Figure 4); docs/objectives.md defines what it is."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from s2dm_jax.common.cli import Parser, check_matplotlib, path_argument
from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import atomic_path, check_writable, write_atomic
from s2dm_jax.common.report import report_user_errors
from s2dm_jax.common.signals import end_on_signal
from s2dm_jax.config.defaults import dataset_name
from s2dm_jax.workdir.folder import check_same_images
from s2dm_jax.workdir.load import load_run, read_config

_DESCRIPTION = """\
Noises real images to timestep START, denoises them one timestep at a time with the EMA weights of each run,
and plots the total gap of SA-DPM's Theorem 1. Every run sees the same images and the same noise.

Writes a figure and a .json with its numbers beside it. The gap is in units of the pixels, which span [-1, 1];
timesteps t are counted from 0 to T-1."""
_EXAMPLE = """\
example:
  python scripts/estimation_gap.py runs/ddpm runs/sa2 runs/sa3 --out=runs/gap.png"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line.

    Raises:
      UserError: for a value out of range, a run that cannot be read, or a missing matplotlib.
    """
    parser = Parser(_DESCRIPTION, _EXAMPLE)
    parser.add_argument(
        "workdirs",
        nargs="+",
        metavar="WORKDIR",
        type=path_argument("WORKDIR"),
        help="folder of a training run, one or more",
    )
    parser.add_argument(
        "--out",
        default="estimation_gap.png",
        type=path_argument("--out"),
        help="the .png to write (default: %(default)s)",
    )
    parser.add_argument("--start", type=int, default=300, help="timestep to noise to, at most T-1 (300)")
    parser.add_argument("--images", type=int, default=2000, help="number of images, at most all of the split (2000)")
    parser.add_argument(
        "--split",
        choices=("held_out", "train"),
        default="held_out",
        help="split to take the images from (held_out)",
    )
    parser.add_argument("--eta", type=float, default=1.0, help="1: DDPM with the posterior variance; 0: DDIM (1)")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=100,
        help="images per batch; each needs the memory of START images (100)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (0)")
    args = parser.parse_args(argv)
    for flag in ("start", "images", "batch-size"):
        value = getattr(args, flag.replace("-", "_"))
        if value < 1:
            raise UserError(f"--{flag}={value} is out of range: it must be at least 1")
    if not 0 <= args.eta <= 1:
        raise UserError(f"--eta={args.eta:g} is out of range: it must be from 0 (DDIM) to 1 (DDPM)")
    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed={args.seed} is out of range: it must be from 0 to {2**31 - 1}")
    if not args.out.endswith(".png"):
        raise UserError(f"--out={args.out} must end in .png")
    names = {dataset_name(read_config(workdir)) for workdir in args.workdirs}
    if len(names) > 1:
        raise UserError(f"the runs were trained on {' and '.join(sorted(names))}; compare runs on one dataset")
    check_matplotlib("the figure")
    return args


def measure(workdir: str, schedules: dict, args: argparse.Namespace) -> dict:
    """One run's curve and its provenance; `schedules` caches the schedules of earlier runs."""
    from s2dm_jax.config.build import build_schedule
    from s2dm_jax.data.datasets import load_dataset
    from s2dm_jax.evaluation.estimation_gap import gap_curve

    run = load_run(workdir)
    if run.ema_note:
        print(f"note: {workdir}: {run.ema_note}", file=sys.stderr)
    # Runs that share the schedule object share the compiled program.
    schedule = schedules.setdefault(run.config.diffusion.to_json(), build_schedule(run.config))
    data = load_dataset(run.config)
    check_same_images(workdir, data.digest, data.labels_digest, record=False)
    images = getattr(data, args.split)[: args.images]
    start = min(args.start, schedule.T - 1)
    curve = gap_curve(
        run.network,
        run.ema_params,
        schedule,
        images,
        start,
        eta=args.eta,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    if not np.isfinite(curve["rms"]).all():
        raise UserError(f"{workdir} has no gap: its network's output is not finite; remove the run, or retrain it")
    return {
        "workdir": workdir,
        "step": run.step,
        "loss": run.config.loss.to_dict(),
        "data": f"{len(images)} images, split {args.split}, of {data.provenance}",
        **{name: values.tolist() for name, values in curve.items()},
    }


def plot(curves: list[dict], path: Path) -> None:
    """One line per run in two panels, sampling from left to right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    titles = {"rms": "root mean square over pixels and images", "rms_of_mean": "of the mean over images"}
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        for curve in curves:
            panel.plot(curve["t"], curve[name], label=curve["workdir"])
        panel.set(xlabel="timestep t", ylabel="total gap, pixels in [−1, 1]", title=title, ylim=(0, None))
        panel.invert_xaxis()
        panel.grid(alpha=0.3)
    panels[0].legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def summary(curves: list[dict]) -> str:
    """The gap at a few timesteps and at the end, as a Markdown table."""
    from s2dm_jax.common.markdown import markdown_table

    shown = [t for t in (200, 100, 50, 20, 10, 1) if t <= min(curve["t"][0] for curve in curves)]
    header = ["run", *(f"t = {t}" for t in shown), "end, of the mean"]
    rows = [
        [
            curve["workdir"],
            *(f"{curve['rms'][curve['t'].index(t)]:.4f}" for t in shown),
            f"{curve['rms_of_mean'][-1]:.4f}",
        ]
        for curve in curves
    ]
    return markdown_table(header, rows)


def run(argv: list[str] | None) -> None:
    """Measures every run, then writes the figure and its numbers."""
    args = parse(argv)
    out = Path(args.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={args.out}: its folder cannot be created ({error.strerror})") from error
    check_writable([out.parent], "give another --out")
    curves, schedules = [], {}
    for workdir in args.workdirs:
        print(f"{workdir}: denoising from t = {args.start} …", file=sys.stderr, flush=True)
        curves.append(measure(workdir, schedules, args))
    options = {name: getattr(args, name) for name in ("start", "images", "split", "eta", "seed")}
    numbers = out.with_suffix(".json")
    text = json.dumps({"options": options, "curves": curves}, indent=1) + "\n"
    write_atomic(numbers, text)
    plot(curves, out)
    print(f"{summary(curves)}\n\nfigure: {out}, numbers: {numbers}")


def main(argv: list[str] | None = None) -> None:
    """Entry point; user errors and signals are one sentence on stderr and exit status 2 or 128 + signal."""
    with end_on_signal("run the same command again"), report_user_errors():
        run(argv)


if __name__ == "__main__":
    main()
