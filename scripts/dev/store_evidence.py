"""Puts the tables, figures and numbers that scripts/evidence.py has reported into docs/."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from s2dm_jax.common.cli import Parser, path_argument
from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import write_atomic
from s2dm_jax.common.report import report_user_errors

DOCS = Path(__file__).resolve().parents[2] / "docs"
_DESCRIPTION = """\
Puts the tables of a report into docs/evidence.md, its figures beside it, and the number of each seed into
docs/evidence.json.

The section of a finding is the one that shows its figure, evidence_FINDING.png. Each table of that section is replaced
by the table of the report with the same first heading; all other text of the page stays."""
_EXAMPLE = """\
example:
  python scripts/evidence.py --out=runs/evidence --report
  python scripts/dev/store_evidence.py --out=runs/evidence"""
_DIGITS = 6

# (finding, first heading of the table)
_Table = tuple[str, str]


def tables(text: str, marks_finding: str) -> Iterator[tuple[_Table | None, str]]:
    """The blocks of a Markdown text, which blank lines separate, with the key of those that are tables of a finding.

    Args:
      text: Markdown.
      marks_finding: pattern of what names the finding of a section, as its group 1.
    """
    finding = None
    for block in text.rstrip("\n").split("\n\n"):
        if block.startswith("#"):
            finding = None
        if named := re.search(marks_finding, block):
            finding = named[1]
        is_table = finding is not None and block.startswith("| ")
        yield (finding, block.split("|")[1].strip()) if is_table else None, block


def with_tables(page: str, report: str) -> str:
    """The page with the tables of the report.

    Raises:
      UserError: for a table of the page that the report does not have.
    """
    found = {key: block for key, block in tables(report, r"^## .*\(`(\w+)`\)") if key}
    blocks = []
    for key, block in tables(page, r"\]\(evidence_(\w+)\.png\)"):
        if key and key not in found:
            raise UserError(
                f"the report has no table {key[1]!r} of the finding {key[0]}, which docs/evidence.md shows; make that "
                "finding, or remove the table"
            )
        blocks.append(found[key] if key else block)
    return "\n\n".join(blocks) + "\n"


def numbers_text(report: Mapping[str, Any]) -> str:
    """JSON of {finding: {run: {column: {seed: number}}}}, a line for each run."""
    findings = []
    for name, finding in report["findings"].items():
        arms = [f"  {json.dumps(arm)}: {json.dumps(_rounded(columns))}" for arm, columns in finding["values"].items()]
        findings.append(f" {json.dumps(name)}: {{\n" + ",\n".join(arms) + "\n }")
    return "{\n" + ",\n".join(findings) + "\n}\n"


def _rounded(columns: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {
        column: {seed: round(value, _DIGITS) for seed, value in sorted(by_seed.items())}
        for column, by_seed in columns.items()
    }


def store(out: Path, docs: Path) -> None:
    """Writes evidence.md, evidence.json and the figures of a report to a folder that has evidence.md.

    Raises:
      UserError: where there is no report, or it lacks a table of the page.
    """
    try:
        report = (out / "report.md").read_text(encoding="utf-8")
        content = json.loads((out / "report.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"--out={out} has no report ({error}); run scripts/evidence.py --report first") from error
    page = docs / "evidence.md"
    write_atomic(page, with_tables(page.read_text(encoding="utf-8"), report))
    write_atomic(docs / "evidence.json", numbers_text(content))
    figures = sorted((out / "figures").glob("*.png"))
    for figure in figures:
        shutil.copyfile(figure, docs / f"evidence_{figure.name}")
    print(f"{page}, evidence.json and {len(figures)} figures: {content['made']} of {content['pieces']} runs")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = Parser(_DESCRIPTION, _EXAMPLE)
    parser.add_argument("--out", default="runs/evidence", type=path_argument("--out"), help="folder (%(default)s)")
    with report_user_errors():
        store(Path(parser.parse_args(argv).out), DOCS)


if __name__ == "__main__":
    main()
