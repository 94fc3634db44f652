"""Several runs side by side: seeds, tables, plots, and the self-contained page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers import load_file
from matplotlib.container import ErrorbarContainer
from PIL import Image

from s2dm_jax.common.errors import UserError
from s2dm_jax.config.defaults import default_config
from s2dm_jax.config.io import to_json
from s2dm_jax.evaluation.comparison import comparison_cells, plot_distances, read_evaluated, series_of
from s2dm_jax.evaluation.html_report import plot_losses, report_page

SCRIPT = Path(__file__).parents[2] / "scripts" / "report.py"
report = load_file(SCRIPT)


# A term that no file of the package names, one group of timesteps, and metrics that are no loss.
METRICS_AT = {
    1: {"loss": 3.0, "loss_simple": 2.0, "loss_simple_by_t/000-099": 1.0, "grad_norm": 5.0},
    2: {"loss": 1.5, "loss_simple": 1.0, "loss_own": 0.5, "images_per_second": 9.0},
    7: {"loss": 0.5, "loss_simple": 0.25, "loss_own": 0.125},
}


def make_run(folder, seed, distances, skip=0, **provenance):
    """A folder with the results of a run: a list of (sampler, NFE, distance)."""
    config = default_config()
    config.model.attn_resolutions = ()
    config.loss.skip, config.train.seed = skip, seed
    (folder / "checkpoints" / "7").mkdir(parents=True)
    (folder / "config.json").write_text(to_json(config))
    rows = [("real (floor)", None, 1.0), *distances, ("noise (ceiling)", None, 100.0)]
    results = {
        "step": 7,
        "eval": {},
        "rows": [
            {"name": name, "nfe": nfe, "frechet_distance": d, "normalized": (d - 1) / 99} for name, nfe, d in rows
        ],
        "provenance": {"metric": "distance <of> tests", "num_images": 50, "notes": [], **provenance},
    }
    (folder / "results.json").write_text(json.dumps(results))
    lines = [{"step": step, **METRICS_AT[step]} for step in METRICS_AT]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


@pytest.fixture
def workdirs(tmp_path):
    return [
        make_run(tmp_path / "a", 0, [("ddim", 10, 4.0), ("ddim", 20, 2.0)]),
        make_run(tmp_path / "b", 1, [("ddim", 10, 6.0), ("ddim", 20, 2.5), ("unipc", 10, 3.0)]),
        make_run(tmp_path / "c", 0, [("ddim", 10, 3.0)], skip=10),
    ]


def test_runs_that_differ_in_their_seed_become_one_line(workdirs):
    plain, unipc, skip = series_of(read_evaluated(workdirs))
    assert plain.name == "loss.skip=0, ddim"
    assert plain.workdirs == workdirs[:2]
    assert plain.points == [(10, 5.0, pytest.approx(2**0.5)), (20, 2.25, pytest.approx(0.125**0.5))]
    assert (unipc.name, unipc.points) == ("loss.skip=0, unipc", [(10, 3.0, None)])
    assert (skip.name, skip.points) == ("loss.skip=10, ddim", [(10, 3.0, None)])


def test_table_and_plot_hold_the_same_numbers(workdirs):
    runs = read_evaluated(workdirs)
    header, rows, caption = comparison_cells(runs)
    assert header == ["run, sampler", "seeds", "10", "20"]
    assert rows == [
        ["loss.skip=0, ddim", "2", "5.00 ± 1.41", "2.25 ± 0.35"],
        ["loss.skip=0, unipc", "1", "3.00", "–"],
        ["loss.skip=10, ddim", "1", "3.00", "–"],
    ]
    assert caption == "distance <of> tests, by NFE; real images (floor) 1.00, noise (ceiling) 100.00."
    axes = plot_distances(runs).axes[0]
    bars = [each for each in axes.containers if isinstance(each, ErrorbarContainer)]
    assert [each.lines[0].get_ydata().tolist() for each in bars] == [[5.0, 2.25], [3.0], [3.0]]
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_every_loss_that_was_logged_is_drawn_and_no_group_of_timesteps():
    axes = plot_losses([{"step": step, **metrics} for step, metrics in METRICS_AT.items()]).axes[0]
    curves = {curve.get_label(): curve.get_xydata().tolist() for curve in axes.lines}
    assert curves == {
        "loss": [[1, 3.0], [2, 1.5], [7, 0.5]],
        "loss_simple": [[1, 2.0], [2, 1.0], [7, 0.25]],
        "loss_own": [[2, 0.5], [7, 0.125]],
    }
    assert axes.get_yscale() == "log"


class Tables(HTMLParser):
    """The cells of every table row of a page."""

    def __init__(self, page):
        super().__init__()
        self.rows, self._in_cell = [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        self._in_cell = tag in ("td", "th")

    def handle_endtag(self, tag):
        self._in_cell = False

    def handle_data(self, data):
        if self._in_cell:
            self.rows[-1].append(data)


def test_the_page_has_the_tables_of_runs_and_provenance(workdirs):
    rows = Tables(report_page(workdirs[:2])).rows
    assert ["run, sampler", "seeds", "10", "20"] in rows
    assert ["ddim", "2", "5.00 ± 1.41", "2.25 ± 0.35"] in rows
    assert ["sampler", "NFE", "Fréchet distance", "above the floor, noise = 100"] in rows
    assert ["unipc", "10", "3.00", "2.0"] in rows
    assert ["real (floor)", "–", "1.00", "0.0"] in rows
    assert rows.count(["num_images", "50"]) == 2
    assert rows.count(["metric", "distance <of> tests"]) == 2


def test_the_page_is_self_contained(workdirs):
    samples = Path(workdirs[0], "samples")
    samples.mkdir()
    (samples / "step_0000007.png").write_bytes(b"\x89PNG a picture")
    page = report_page(workdirs[:2])
    assert page.count("<svg") == 3
    assert "distance &lt;of&gt; tests" in page
    assert "distance <of> tests" not in page
    assert "Samples at step 7" in page
    # What a browser would fetch: nothing but what stands in the page.
    links = re.findall(r"(?:src|href)=[\"']?([^\"' >]+)", page)
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not re.search(r"@import|url\((?!#)|<script|<link", page)


def test_command_writes_page_and_plot_and_replaces_nothing_else(workdirs, tmp_path, capsys):
    out, plot = tmp_path / "page.html", tmp_path / "plot.png"
    report.main([workdirs[0], f"--out={out}", f"--plot={plot}"])
    assert out.read_text().startswith("<!DOCTYPE html>")
    plot_distances(read_evaluated(workdirs[:1])).savefig(tmp_path / "expected.png", dpi=150)
    np.testing.assert_array_equal(Image.open(plot), Image.open(tmp_path / "expected.png"))
    (tmp_path / "expected.png").unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c", "page.html", "plot.png"]


def test_what_cannot_be_compared_is_refused(workdirs, tmp_path, capsys):
    def refuses(sentence, *names):
        with pytest.raises(UserError, match=sentence):
            series_of(read_evaluated(names))

    other = make_run(tmp_path / "d", 3, [("ddim", 10, 4.0)], num_images=60)
    refuses("evaluated with different num_images: 50 and 60", workdirs[0], other)
    # Of the features what differs; the metric's sentence says no more, and earlier versions named no pipeline in it.
    tf1, pytorch_fid = ({"weights_sha256": "67", "resize": resize} for resize in ("as TensorFlow 1", "as pytorch-fid"))
    runs = [
        make_run(tmp_path / f"f{i}", i, [("ddim", 10, 4.0)], features=features, metric=f"FID {i}")
        for i, features in enumerate((tf1, tf1, pytorch_fid))
    ]
    assert len(series_of(read_evaluated(runs[:2]))) == 1
    refuses("different features: {'resize': 'as TensorFlow 1'} and {'resize': 'as pytorch-fid'}; eval", *runs)
    twin = make_run(tmp_path / "e", 0, [("ddim", 10, 4.0)])
    refuses("have the same train.seed and config; give only one", workdirs[0], twin)
    refuses("appears twice", workdirs[0], f"{workdirs[0]}/../a")
    Path(twin, "results.json").write_text("{}")
    refuses("is not readable as results", twin)
    Path(twin, "results.json").unlink()
    refuses(r"has no results\.json; run --mode=evaluate", twin)
    with pytest.raises(SystemExit):
        report.main([workdirs[0], "--out=page.txt"])
    assert capsys.readouterr().err == "error: --out=page.txt must end in .html\n"
