"""The tables that are made of a GPU's figures."""

import copy
import json

import pytest
from gpu_table import insert, main, read_stages, section

from s2dm_jax.common.errors import UserError

MACHINE = {
    "device": "NVIDIA H100 80GB HBM3",
    "devices": 1,
    "cores": 16,
    "driver": "580.1",
    "versions": {"python": "3.12", "jax": "0.11.2"},
    "date": "2026-12-01",
    "commit": "abc",
    "seconds": 480.0,
    "tiny": False,
}
FIGURES = {
    "ms": {"median": 14.236, "low": 14.1, "high": 14.4},
    "images_per_s": 8991.4,
    "tflops": 335.6,
    "share_of_matmul_rate": 0.4251,
    "memory_bytes": 6.14e9,
    "compile_s": 41.2,
    "compile_warm_s": 5.4,
    "batch": 128,
    "dtype": "bfloat16",
}
TORCH = {
    **FIGURES,
    "ratio_to_s2dm_jax": {"median": 1.312, "low": 1.30, "high": 1.33},
    "share_of_matmul_rate": None,
    "memory_bytes": None,
    "compile_warm_s": None,
}
EVIDENCE = {
    "comparison": {
        "ddpm": {
            "seconds": 30.4,
            "step": 5100,
            "rows": [
                {"skip_scale": 0, "nfe": 10, "frechet_distance": 20.5},
                {"skip_scale": 0, "nfe": 20, "frechet_distance": 18.25},
                {"skip_scale": 10, "nfe": 10, "frechet_distance": 19.0},
            ],
        }
    },
    "anchors": {"floor": 0.58, "ceiling": 94.86},
    "notes": ["not trained for equal times"],
}


def record(result, status="done"):
    return {"status": status, "seconds": 1.0, "summary": result.get("summary", "a line"), "result": result}


STAGES = {
    "right": {
        "network": record({"summary": "relative error 1e-6", "passed": True}),
        "resume": record({"summary": "297 of 298 arrays equal", "passed": False}, "wrong"),
    },
    "fast": {
        "cifar10": record({"programs": {"s2dm_jax": FIGURES, "torch.compile": TORCH}}),
        "sampling": record({"summary": "1,234 images/s"}),
        "celeba64": {"status": "timed out", "seconds": 90.0, "log": ["…"]},
    },
    "evidence": {"ddpm": record({"comparison": {}}), "distances": record(EVIDENCE)},
}


def write(folder, **machine):
    for stage, parts in STAGES.items():
        content = {"stage": stage, "machine": {**MACHINE, **machine}, "parts": parts}
        (folder / f"{stage}.json").write_text(json.dumps(content))


def cells(text, first):
    """The cells of the table's row that begins with a cell."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {first}"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_figures_are_those_of_the_run(tmp_path):
    write(tmp_path)
    text = section(read_stages(tmp_path), MACHINE)
    assert text.startswith("### NVIDIA H100 80GB HBM3, 2026-12-01\n")
    assert "1 of 2 checks of correctness passed; **wrong: resume**:" in text
    step = "CIFAR-10, batch 128, bfloat16"
    ours = [step, "s2dm_jax", "14.24 (14.10 to 14.40)", "8,991", "336", "42.5%", "6.1", "41, warm 5", "–"]
    assert cells(text, f"{step} | s2dm_jax") == ours
    assert cells(text, f"{step} | torch.compile")[5:] == ["–", "–", "41", "s2dm_jax 1.312 (1.300 to 1.330)"]
    assert "- 1,234 images/s" in text
    assert cells(text, "ddpm  ") == ["ddpm", "30", "5,100", "20.50", "18.25"]
    assert cells(text, "ddpm, output rescaled for skip 10") == [
        "ddpm, output rescaled for skip 10",
        "30",
        "5,100",
        "19.00",
        "–",
    ]
    assert "real images 0.58, noise 94.86. Not trained for equal times." in text
    assert "Without a result: fast.celeba64 (timed out)." in text


def test_a_card_has_one_section(tmp_path, monkeypatch):
    write(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- gpu tables -->\n<!-- end of gpu tables -->\n\nafter\n")
    for date, device in (("2026-12-01", "H100"), ("2026-12-02", "H200"), ("2026-12-03", "H100")):
        write(tmp_path, date=date, device=device)
        monkeypatch.setattr("sys.argv", ["gpu_table.py", str(tmp_path), f"--page={page}", "--commit=1a2b"])
        main()
    text = page.read_text()
    assert [line for line in text.splitlines() if line.startswith("###")] == [
        "### H200, 2026-12-02",
        "### H100, 2026-12-03",
    ]
    assert text.startswith("before\n\n<!-- gpu tables -->\n\n### H200")
    assert text.endswith("\n\n<!-- end of gpu tables -->\n\nafter\n")
    assert "at commit 1a2b;" in text


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds none of right.json, fast.json"):
        read_stages(tmp_path)
    write(tmp_path, tiny=True)
    with pytest.raises(UserError, match="is from a rehearsal"):
        read_stages(tmp_path)
    for stage in STAGES:
        (tmp_path / f"{stage}.json").write_text('{"machine": {"commit": null}, "parts": {}}')
    with pytest.raises(UserError, match="found no device in time"):
        read_stages(tmp_path)
    (tmp_path / "fast.json").write_text("")
    with pytest.raises(UserError, match=r"fast.json is empty or damaged"):
        read_stages(tmp_path)
    with pytest.raises(UserError, match="has no lines"):
        insert("a page", "H100", "text")


def test_a_run_of_which_nothing_ended_well_has_a_section():
    stages = {"fast": {"machine": MACHINE, "parts": {"rates": {"status": "failed", "seconds": 1.0, "log": []}}}}
    text = section(copy.deepcopy(stages), MACHINE)
    assert "Without a result: fast.rates (failed)." in text
