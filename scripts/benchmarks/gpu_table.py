"""Writes the figures of a run of gpu.py into docs/benchmarks.md, one section for each card.

The section of the same card is replaced; others stay. Nothing is written for a rehearsal.

examples:
  python scripts/benchmarks/gpu_table.py gpu_h100
  python scripts/benchmarks/gpu_table.py gpu_h100 --commit=1a2b3c4 --page=-
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import user_path, write_atomic
from s2dm_jax.common.markdown import markdown_table
from s2dm_jax.common.report import report_user_errors

_PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
_BEGIN, _END = "<!-- gpu tables -->\n", "<!-- end of gpu tables -->\n"
_STAGES = ("right", "fast", "why", "evidence")
# Parts of the stage "fast" whose result is a line, not a row of the table of steps.
_STEP_TITLES = {
    "cifar10": "CIFAR-10",
    "objectives": "CIFAR-10, in one run",
    "celeba64": "CelebA 64",
    "celebahq256": "CelebA-HQ 256",
    "cifar10_K2_torch": "CIFAR-10, K = 2",
    "celeba64_torch": "CelebA 64",
}

Record = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", type=Path, help="the --out of gpu.py")
    parser.add_argument("--page", default=str(_PAGE), help="Markdown page to write into; - prints the section")
    parser.add_argument("--commit", help="commit that was measured, if the run did not record it")
    arguments = parser.parse_args()
    with report_user_errors():
        stages = read_stages(user_path(arguments.folder, "DIR"))
        machine = next(record["machine"] for record in stages.values() if "device" in record["machine"])
        text = section(stages, {**machine, "commit": arguments.commit or machine["commit"]})
        if arguments.page == "-":
            print(text, end="")
            return
        page = user_path(arguments.page, "--page")
        write_atomic(page, insert(page.read_text(encoding="utf-8"), machine["device"], text))
        print(f"wrote the section {machine['device']} of {page}")


def read_stages(folder: Path) -> dict[str, Record]:
    """The stages' JSON in a folder.

    Raises:
      UserError: if there is none, or they are of a rehearsal.
    """
    stages = {}
    for stage in _STAGES:
        path = folder / f"{stage}.json"
        if path.exists():
            try:
                stages[stage] = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{path} is empty or damaged; run gpu.py again") from error
    if not stages:
        raise UserError(
            f"{folder} holds none of {', '.join(f'{stage}.json' for stage in _STAGES)}; give the --out of gpu.py"
        )
    if any(record["machine"].get("tiny") for record in stages.values()):
        raise UserError(f"{folder} is from a rehearsal (--tiny), whose figures are not meaningful")
    if not any("device" in record["machine"] for record in stages.values()):
        raise UserError(f"{folder} is from a run that found no device in time; run gpu.py again")
    return stages


def insert(page: str, device: str, text: str) -> str:
    """The page with the section of a device, in the place of an earlier one or after the others.

    Raises:
      UserError: if the page has no place for it.
    """
    if _BEGIN not in page or _END not in page:
        raise UserError(f"the page has no lines {_BEGIN.strip()} and {_END.strip()} for the sections to be between")
    before, rest = page.split(_BEGIN, 1)
    sections, after = rest.split(_END, 1)
    others = [each for each in re.split(r"(?m)^(?=### )", sections) if each.strip()]
    others = [each for each in others if not each.startswith(f"### {device}, ")]
    return before + _BEGIN + "\n" + "".join(f"{each.strip()}\n\n" for each in [*others, text]) + _END + after


def section(stages: Mapping[str, Record], machine: Record) -> str:
    """The Markdown of a run: checks, steps, kernels, options of XLA, distances."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"### {machine['device']}, {machine['date']}",
        "",
        f"`python scripts/benchmarks/gpu.py --seconds={machine['seconds']:g}` at commit "
        f"{machine['commit'] or 'unknown'}; {machine['devices']} × {machine['device']}, {machine['cores']} CPU cores; "
        f"{versions}; driver: {machine['driver'] or 'unknown'}.",
    ]
    parts = {stage: stages[stage]["parts"] if stage in stages else {} for stage in _STAGES}
    lines += _checks(parts["right"])
    lines += _steps(parts["fast"])
    lines += _profile(_result(parts["why"], "profile"))
    lines += _flags(_result(parts["why"], "flags"))
    lines += _evidence(parts["evidence"])
    unfinished = [
        f"{stage}.{name} ({record['status']})"
        for stage, records in parts.items()
        for name, record in records.items()
        if record["status"] not in ("done", "wrong")
    ]
    if unfinished:
        lines += ["", f"Without a result: {', '.join(unfinished)}."]
    return "\n".join(lines) + "\n"


def _result(parts: Record, name: str) -> Record | None:
    return parts.get(name, {}).get("result")


def _checks(parts: Record) -> list[str]:
    done = {name: record for name, record in parts.items() if "summary" in record}
    if not done:
        return []
    wrong = [name for name, record in done.items() if record["status"] == "wrong"]
    verdict = f"{len(done) - len(wrong)} of {len(done)} checks of correctness passed"
    lines = ["", f"{verdict}{f'; **wrong: {chr(44).join(wrong)}**' if wrong else ''}:", ""]
    return [*lines, *(f"- {record['summary']}" for record in done.values())]


def _steps(parts: Record) -> list[str]:
    rows, lines = [], []
    for name, record in parts.items():
        programs = (record.get("result") or {}).get("programs")
        if programs:
            rows += [_step_row(_STEP_TITLES.get(name, name), program, f) for program, f in programs.items()]
        elif "summary" in record:
            lines.append(f"- {record['summary']}")
    if not rows:
        return ["", *lines] if lines else []
    header = ("train step", "program", "ms (lowest to highest)", "images/s", "TFLOP/s", "of the matrix rate")
    return ["", markdown_table((*header, "memory, GB", "compile, s", "time relative to"), rows), "", *lines]


def _step_row(title: str, program: str, figures: Record) -> Sequence[str]:
    ms, share = figures["ms"], figures["share_of_matmul_rate"]
    ratios = [
        f"{name.removeprefix('ratio_to_')} {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
        for name, ratio in figures.items()
        if name.startswith("ratio_to_")
    ]
    warm = figures.get("compile_warm_s")
    return (
        f"{title}, batch {figures['batch']}, {figures['dtype']}",
        program,
        f"{ms['median']:.2f} ({ms['low']:.2f} to {ms['high']:.2f})",
        f"{figures['images_per_s']:,.0f}",
        f"{figures['tflops']:.0f}",
        "–" if share is None else f"{share:.1%}",
        "–" if figures["memory_bytes"] is None else f"{figures['memory_bytes'] / 1e9:.1f}",
        f"{figures['compile_s']:.0f}" + (f", warm {warm:.0f}" if warm else ""),
        "; ".join(ratios) or "–",
    )


def _profile(result: Record | None) -> list[str]:
    if not result:
        return []
    classes = [
        (kind, f"{row['ms']:.2f}", _number(row["predicted_ms"]), _number(row["gb"]), _number(row["gflop"], "{:,.0f}"))
        for kind, row in result["classes"].items()
    ]
    kernels = [
        (
            f"`{row['op']}`",
            row["class"],
            f"{row['share']:.1%}",
            f"{row['ms_per_step']:.3f}",
            f"{row['calls_per_step']:.0f}",
            _number(row["bytes"] and row["bytes"] / 1e6, "{:,.0f}"),
            _number(row["flops"] and row["flops"] / 1e9, "{:,.0f}"),
            _number(row["tb_per_s"]),
            _number(row["tflops"], "{:,.0f}"),
        )
        for row in result["kernels"]
    ]
    gaps = ", ".join(f"{gap['us']:.0f} µs after `{gap['before']}`" for gap in result["gaps"])
    return [
        "",
        f"A CIFAR-10 step takes {result['ms_per_step']:.2f} ms in a profile of {result['steps']} steps, "
        f"{result['predicted_ms_per_step']:.2f} as predicted from bytes and FLOPs at this card's rates; the card is "
        f"busy {result['busy']['busy_share']:.1%} of the time. Kernels from {result['kernels_from']}.",
        "",
        markdown_table(("class", "ms", "predicted ms", "GB", "GFLOP"), classes),
        "",
        markdown_table(("kernel", "class", "share", "ms", "calls", "MB", "GFLOP", "TB/s", "TFLOP/s"), kernels),
        "",
        f"The longest idle gaps: {gaps or 'none'}.",
    ]


def _flags(result: Record | None) -> list[str]:
    if not result:
        return []
    rows = [
        (
            name,
            " ".join(f"`{option}={value}`" for option, value in record["options"].items()),
            f"{record['ratio']['median']:.3f} ({record['ratio']['low']:.3f} to {record['ratio']['high']:.3f})"
            if record["status"] == "measured"
            else record["status"],
        )
        for name, record in result["flags"].items()
    ]
    return ["", markdown_table(("XLA option", "value", "time relative to the step as trained"), rows)]


def _evidence(parts: Record) -> list[str]:
    compared = [record["result"] for record in parts.values() if "comparison" in (record.get("result") or {})]
    if not compared:
        return []
    last = compared[-1]
    nfe = sorted({row["nfe"] for record in last["comparison"].values() for row in record["rows"]})
    rows = []
    for name, record in last["comparison"].items():
        found = {(row["skip_scale"], row["nfe"]): row["frechet_distance"] for row in record["rows"]}
        for skip in sorted({skip for skip, _ in found}):
            label = f"{name}, output rescaled for skip {skip}" if skip else name
            cells = [f"{found[skip, n]:.2f}" if (skip, n) in found else "–" for n in nfe]
            rows.append((label, f"{record['seconds']:.0f}", f"{record['step']:,}", *cells))
    header = ("objective", "seconds of training", "steps", *(f"NFE {n}" for n in nfe))
    ends = f"real images {last['anchors']['floor']:.2f}, noise {last['anchors']['ceiling']:.2f}"
    notes = "".join(f" {note[0].upper()}{note[1:]}." for note in last["notes"])
    about = (
        f"Fréchet distance in the features of a small classifier (not FID) after seconds of training; {ends}.{notes}"
    )
    return ["", markdown_table(header, rows), "", about]


def _number(value: float | None, form: str = "{:.2f}") -> str:
    return "–" if value is None else form.format(value)


if __name__ == "__main__":
    main()
