"""Executes the notebooks of colab/ and stores them with their outputs, small enough to read on a phone."""

import base64
import io
from pathlib import Path

import jupytext
import nbformat
from jupytext.combine import combine_inputs_with_outputs
from nbclient import NotebookClient
from PIL import Image

from s2dm_jax.common.cli import Parser
from s2dm_jax.common.errors import UserError
from s2dm_jax.common.report import report_user_errors

COLAB = Path(__file__).resolve().parents[2] / "colab"
_DESCRIPTION = """\
Executes the notebooks of colab/ from their sources (the .py files beside them) and stores them with outputs.

A complete run in runs/notebooks is not trained again. Remove that folder first: the stored output then shows the
training."""
_EXAMPLE = """\
examples (all notebooks, and one of them):
  python scripts/dev/store_notebooks.py
  python scripts/dev/store_notebooks.py quickstart"""
# Figures of digits and a few lines look the same with this palette, at under half the size.
_COLOURS = 128


def smaller_png(png: bytes) -> bytes:
    """The same picture with a palette."""
    buffer = io.BytesIO()
    picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(_COLOURS, Image.Quantize.MAXCOVERAGE)
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def shown_text(text: str) -> str:
    """What a terminal shows in the end: of a progress bar only its last state."""
    lines = (line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in text.split("\n"))
    return "\n".join(lines)


def compact(outputs: list) -> list:
    """A cell's outputs with its text joined, and smaller figures."""
    others, texts = [], []
    for output in outputs:
        if output.output_type == "stream":
            texts.append(output.text)
            continue
        if png := output.get("data", {}).get("image/png"):
            output.data["image/png"] = base64.b64encode(smaller_png(base64.b64decode(png))).decode()
        others.append(output)
    text = shown_text("".join(texts))
    return [nbformat.v4.new_output("stream", name="stdout", text=text), *others] if text else others


def store(name: str) -> None:
    """Executes colab/NAME.py and writes colab/NAME.ipynb."""
    path = COLAB / f"{name}.ipynb"
    stored = nbformat.read(path, as_version=4)
    # Cells that did not change keep their ids.
    notebook = combine_inputs_with_outputs(jupytext.read(COLAB / f"{name}.py"), stored)
    where = {"metadata": {"path": str(COLAB)}}
    NotebookClient(notebook, timeout=1200, kernel_name="python3", record_timing=False, resources=where).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = compact(cell.outputs)
    nbformat.write(notebook, path)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} KB")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    # The other notebooks use the run of the quickstart.
    names = sorted((path.stem for path in COLAB.glob("*.py")), key=lambda name: (name != "quickstart", name))
    parser = Parser(_DESCRIPTION, _EXAMPLE)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"notebooks (default: {', '.join(names)})")
    with report_user_errors():
        chosen = parser.parse_args(argv).names or names
        if unknown := sorted(set(chosen) - set(names)):
            raise UserError(f"NAME={unknown[0]} is not a notebook of colab/: choose from {', '.join(names)}")
    for name in chosen:
        store(name)


if __name__ == "__main__":
    main()
