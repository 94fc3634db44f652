"""The notebooks of colab/: stored as their source says and with outputs, and each runs from top to bottom."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "colab").glob("*.py"))


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def setup_of(name):
    """The code of a notebook's first cell that is code."""
    return next(source for kind, source in cells(jupytext.read(ROOT / "colab" / f"{name}.py")) if kind == "code")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the repository as far as a notebook sees it; what they train stays out of runs/."""
    path = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "scripts"):
        shutil.copytree(ROOT / name, path / name)
    (path / "colab").mkdir()
    return path


@pytest.fixture
def run(checkout, monkeypatch):
    """Function that runs a notebook as it is committed and gives what expressions are worth at its end."""
    # They train: without conftest's quick compilation that takes little more than half the CPU time.
    monkeypatch.delenv("XLA_FLAGS")

    def values_of(name, expressions):
        notebook = nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4)
        notebook.cells.append(nbformat.v4.new_code_cell(f"print(json.dumps([{expressions}]))"))
        where = {"metadata": {"path": str(checkout / "colab")}}
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
        return json.loads(notebook.cells[-1].outputs[0].text)

    return values_of


def test_each_notebook_is_made_from_its_text():
    assert NAMES == ["compare_objectives", "fast_sampling", "quickstart"]
    for name in NAMES:
        committed = nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4)
        nbformat.validate(committed)
        text = jupytext.read(ROOT / "colab" / f"{name}.py")
        assert cells(committed) == cells(text), "run python scripts/dev/store_notebooks.py"
    assert len({setup_of(name) for name in NAMES}) == 1, "the notebooks share their first cell"


def output_errors(notebook, size):
    """What is wrong with the stored outputs of a notebook of `size` bytes."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    # A figure is stored where it is shown.
    shown = [cell for cell in code if "plt.show()" in cell.source]
    figures = [[output for output in cell.outputs if "image/png" in output.get("data", {})] for cell in shown]
    streams = "".join(output.text for output in outputs if output.output_type == "stream")
    wrong = {
        "too large": size >= 400_000,
        "not executed from top to bottom": [cell.execution_count for cell in code] != list(range(1, len(code) + 1)),
        "no figure": not figures or not all(figures),
        "an error": any(output.output_type == "error" for output in outputs) or "Traceback" in streams,
        "a path of the machine": str(Path.home()) in streams or str(ROOT) in streams or "/tmp/" in streams,
        "a carriage return": "\r" in streams,
    }
    return [name for name, found in wrong.items() if found]


def test_each_notebook_is_stored_executed():
    for name in NAMES:
        path = ROOT / "colab" / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        assert output_errors(notebook, path.stat().st_size) == [], name
        assert notebook.cells[0].source.startswith("[![Open In Colab]")
    assert output_errors(notebook, 400_000) == ["too large"]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    assert output_errors(notebook, 0) == ["not executed from top to bottom", "no figure"]


def test_the_first_cell_needs_one_line():
    lines = setup_of(NAMES[0]).split("\n")
    assert [i for i, line in enumerate(lines) if '""' in line] == [2]
    assert "edit this one line" in lines[1]
    assert lines[2].startswith("REPOSITORY")


@pytest.mark.slow
def test_quickstart(run):
    shapes, distance = run("quickstart", "[images.shape, strips.shape, rows.shape], distance")
    assert shapes == [[60, 8, 8, 1], [4, 10, 8, 8, 1], [4, 11, 8, 8, 1]]
    # Of noise 361, of real digits 3.
    assert distance["unipc, truncated_logsnr"] < 30


@pytest.mark.slow
def test_compare_objectives(run):
    rows, measured, theory = run("compare_objectives", "results, smaller.tolist(), expected[times].tolist()")
    distance = {name: of_run[1]["frechet_distance"] for name, of_run in rows.items()}
    assert max(distance["ddpm, rescaled"], distance["s2"]) < distance["ddpm"] < distance["sa"] < 60
    # From timestep 401 on as in theory; at timestep 1 the output is a fifth smaller.
    assert measured[8:] == pytest.approx(theory[8:], abs=0.02)
    assert measured[0] < 0.9


@pytest.mark.slow
def test_fast_sampling(run):
    curves, shape = run("fast_sampling", "curves, reloaded.shape")
    assert set(curves) == {"ddim", "dpmpp_2m", "unipc", "analytic"}
    assert all(distance < 30 for name in ("dpmpp_2m", "unipc") for _, distance in curves[name])
    # With noise in every step five of them are too few.
    assert curves["analytic"][0][1] > 30
    assert shape == [16, 8, 8, 1]


@pytest.fixture
def colab(tmp_path):
    """Function of a repository's address that runs the first cell as in Colab, with a pip that only prints."""
    (tmp_path / "modules" / "google").mkdir(parents=True)
    for module in ("google/__init__.py", "google/colab.py"):
        (tmp_path / "modules" / module).touch()
    (tmp_path / "modules" / "pip.py").write_text("import sys\nprint('pip', *sys.argv[1:], flush=True)\n")
    (tmp_path / "content").mkdir()

    def start(repository):
        code = setup_of(NAMES[0]).replace('REPOSITORY = ""', f"REPOSITORY = {str(repository)!r}")
        code = f"import google.colab\n{code}\nprint('in', os.getcwd(), 'runs', RUNS)"
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path / "content",
            env={**os.environ, "PYTHONPATH": str(tmp_path / "modules")},
            capture_output=True,
            text=True,
        )

    return start


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not here")
def test_setup_in_colab_clones_and_installs(colab, tmp_path):
    assert "REPOSITORY is empty" in colab("").stderr
    upstream = tmp_path / "upstream"
    shutil.copytree(ROOT / "configs", upstream / "configs")
    for command in ("init --quiet", "add .", "-c user.name=a -c user.email=a@b commit --quiet -m all"):
        subprocess.run(["git", *command.split()], cwd=upstream, check=True)
    expected = f"pip install --quiet ./s2dm_jax[plot]\nin {tmp_path}/content/s2dm_jax runs runs/notebooks/quick\n"
    assert colab(upstream).stdout == expected
    # After a restart of the session the clone is there.
    shutil.rmtree(upstream)
    assert colab(upstream).stdout == expected
