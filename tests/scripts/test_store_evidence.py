"""The page of the evidence: its tables are those of the numbers by seed beside it, and a report replaces them alone."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from findings import numbers, pieces, table
from helpers import load_file

from s2dm_jax.common.errors import UserError

ROOT = Path(__file__).parents[2]
store_evidence = load_file(ROOT / "scripts" / "dev" / "store_evidence.py")

PAGE = """\
# Evidence

| claim | here |
| ----- | ---- |
| skip  | 1    |

### L_skip

![the figure](evidence_skip.png)

| difference | 5     |
| ---------- | ----- |
| a less b   | +0.10 |

What it says.

## Not tested

| run | 5    |
| --- | ---- |
| own | 1.00 |
"""
REPORT = """\
# Evidence, digits

## Training with L_skip (`skip`)

![the figure](figures/skip.png)

| run | 5    |
| --- | ---- |
| a   | 9.00 |

Differences seed by seed, mean ± standard error:

| difference | 5            |
| ---------- | ------------ |
| a less b   | +0.20 ± 0.05 |
"""


def folder_of_a_report(tmp_path):
    out, docs = tmp_path / "out", tmp_path / "docs"
    (out / "figures").mkdir(parents=True)
    docs.mkdir()
    (docs / "evidence.md").write_text(PAGE)
    (out / "report.md").write_text(REPORT)
    values = {"a|gap": {"5": {"1": 9.1234567, "0": 9.0}}, "b": {"5": {"0": 8.0}}}
    content = {"findings": {"skip": {"values": values}, "bits": {"values": {}}}, "made": 3, "pieces": 4}
    (out / "report.json").write_text(json.dumps(content))
    (out / "figures" / "skip.png").write_bytes(b"figure")
    return out, docs


def test_a_report_replaces_the_tables_of_its_findings_and_no_other_text(tmp_path):
    out, docs = folder_of_a_report(tmp_path)
    store_evidence.store(out, docs)
    old = "| difference | 5     |\n| ---------- | ----- |\n| a less b   | +0.10 |"
    new = "| difference | 5            |\n| ---------- | ------------ |\n| a less b   | +0.20 ± 0.05 |"
    assert (docs / "evidence.md").read_text() == PAGE.replace(old, new)
    assert (docs / "evidence_skip.png").read_bytes() == b"figure"
    text = (docs / "evidence.json").read_text()
    assert json.loads(text) == {
        "skip": {"a|gap": {"5": {"0": 9.0, "1": 9.123457}}, "b": {"5": {"0": 8.0}}},
        "bits": {},
    }
    # A line for each run, so that a change of one shows as that.
    assert len([line for line in text.splitlines() if '"5"' in line]) == 2


def test_a_table_that_the_report_lacks_and_a_missing_report_are_named(tmp_path):
    out, docs = folder_of_a_report(tmp_path)
    (docs / "evidence.md").write_text(PAGE.replace("| difference |", "| ratio      |"))
    with pytest.raises(UserError, match="no table 'ratio' of the finding skip"):
        store_evidence.store(out, docs)
    assert not (docs / "evidence.json").exists()
    with pytest.raises(UserError, match="has no report"):
        store_evidence.store(tmp_path, docs)


# What a cell of each table averages over the seeds.
COMBINED = {"run": lambda a, _: a, "difference": lambda a, b: a - b, "ratio": lambda a, b: b / a}


def cells_of(block):
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
    for label, *cells in rows:
        for column, cell in zip(header[1:], cells, strict=True):
            yield label, column, cell


def test_every_table_of_the_page_follows_from_its_numbers_by_seed():
    stored = json.loads((ROOT / "docs" / "evidence.json").read_text())
    page = (ROOT / "docs" / "evidence.md").read_text()
    seen = set()
    for key, block in store_evidence.tables(page, r"\]\(evidence_(\w+)\.png\)"):
        if not key or key[1] not in COMBINED:
            continue
        name, kind = key
        finding, values = table.FINDINGS[name], stored[name]
        if kind == "run":
            rows = {numbers.label_of(arm): (arm, arm) for arm in pieces.arms_of(finding)}
        elif kind == "difference":
            rows = {f"{numbers.label_of(a)} less {numbers.label_of(b)}": (a, b) for a, b in finding.pairs}
        else:
            rows = {f"{pieces.split_arm(b)[0]} / {pieces.split_arm(a)[0]}": (a, b) for a, b in finding.pairs}
        for label, column, cell in cells_of(block):
            a, b = rows[label]
            first, second = values.get(a, {}).get(column, {}), values.get(b, {}).get(column, {})
            found = [COMBINED[kind](first[seed], second[seed]) for seed in first if seed in second]
            if cell == "–":
                assert not found, (name, label, column)
                continue
            mean, _, error = cell.partition(" ± ")
            # Half a unit of the last digit, and what the stored digits leave open of it.
            tolerance = 0.51 * 10 ** -len(re.sub(r".*\.", "", mean))
            assert float(mean) == pytest.approx(np.mean(found), abs=tolerance), (name, label, column)
            if len(found) > 1:
                expected = np.std(found, ddof=1) / math.sqrt(len(found))
                assert float(error) == pytest.approx(expected, abs=tolerance), (name, label, column)
            else:
                assert error == ""
        seen.add(name)
    assert seen == set(table.FINDINGS)
