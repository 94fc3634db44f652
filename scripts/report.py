"""Writes a self-contained HTML page about one or more evaluated runs."""

import argparse
from pathlib import Path

from s2dm_jax.common.cli import Parser, check_matplotlib, path_argument
from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import check_writable
from s2dm_jax.common.report import report_user_errors
from s2dm_jax.common.signals import end_on_signal
from s2dm_jax.workdir.load import read_config

_DESCRIPTION = """\
Collects results.json (tables and provenance), the newest grid of samples and the loss curves of each run. Runs that
differ only in config.train.seed become one row with mean and standard deviation. The page
needs no network connection and no other file."""
_EXAMPLE = """\
examples:
  python scripts/report.py runs/digits
  python scripts/report.py runs/ddpm runs/s2 --out=runs/report.html --plot=runs/distances.png"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line.

    Raises:
      UserError: for a folder that holds no run, another suffix, or a missing matplotlib.
    """
    parser = Parser(_DESCRIPTION, _EXAMPLE)
    parser.add_argument(
        "workdirs",
        nargs="+",
        metavar="WORKDIR",
        type=path_argument("WORKDIR"),
        help="folder of an evaluated run, one or more",
    )
    parser.add_argument(
        "--out", default="report.html", type=path_argument("--out"), help="the page to write (default: %(default)s)"
    )
    parser.add_argument(
        "--plot", type=path_argument("--plot"), help="also write the plot of distances to a .png or .svg"
    )
    args = parser.parse_args(argv)
    if not args.out.endswith(".html"):
        raise UserError(f"--out={args.out} must end in .html")
    if args.plot and not args.plot.endswith((".png", ".svg")):
        raise UserError(f"--plot={args.plot} must end in .png or .svg")
    for workdir in args.workdirs:
        read_config(workdir)
    for path in filter(None, (args.out, args.plot)):
        if not Path(path).absolute().parent.is_dir():
            raise UserError(f"{path} cannot be written: its folder does not exist")
        check_writable([Path(path).absolute().parent], "give another --out or --plot")
    check_matplotlib("the page")
    return args


def main(argv: list[str] | None = None) -> None:
    """Entry point; user errors and signals are one sentence on stderr and exit status 2 or 128 + signal."""
    with end_on_signal("run the same command again"), report_user_errors():
        args = parse(argv)
        from s2dm_jax.common.files import atomic_path, write_atomic
        from s2dm_jax.evaluation.comparison import plot_distances, read_evaluated
        from s2dm_jax.evaluation.html_report import report_page

        write_atomic(Path(args.out), report_page(args.workdirs))
        print(f"page: {args.out}")
        if args.plot:
            with atomic_path(args.plot) as temporary:
                plot_distances(read_evaluated(args.workdirs)).savefig(temporary, dpi=150)
            print(f"plot: {args.plot}")


if __name__ == "__main__":
    main()
