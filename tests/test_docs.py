"""The documents are true: commands exist and parse, links resolve, examples of additions work.

`scripts/dev/run_docs.py`, which `.ci/run` calls, runs the blocks; here is what takes no training.
"""

import argparse
import html
import itertools
import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote

import pytest
from helpers import load_file, save_run
from markdown_it import MarkdownIt

from s2dm_jax import main
from s2dm_jax.config.defaults import FIELDS
from s2dm_jax.config.io import to_json
from s2dm_jax.devices import distributed
from s2dm_jax.evaluation import evaluate
from s2dm_jax.inference import sample
from s2dm_jax.training import loop
from s2dm_jax.weights import export

ROOT = Path(__file__).resolve().parents[1]
run_docs = load_file(ROOT / "scripts" / "dev" / "run_docs.py")

ADDING = ROOT / "docs" / "adding.md"
LINKED = [*run_docs.PAGES, ROOT / "CHANGELOG.md"]
BLOCKS = [block for page in run_docs.PAGES for block in run_docs.blocks(page)]


def name(path):
    return str(path.relative_to(ROOT))


def inline(page):
    """The inline tokens of a page in order, tables included."""
    tokens = MarkdownIt().enable("table").parse(page.read_text())
    return [child for token in tokens if token.type == "inline" for child in token.children]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_every_block_is_run_or_says_why_not(block):
    if block.kind == "diff":
        assert block.page == ADDING, "only that page's diffs are applied"
    if block.kind == "python":
        compile(block.text, block.place, "exec")
    if block.not_run or block.kind in ("diff", "text", "python"):
        return
    assert block.kind, f"{block.place}: name the block sh, python or text, or say above it why it is not run"
    ci = (ROOT / ".ci" / "run").read_text()
    for words in run_docs.commands(block.text):
        if Path(words[0]).name in ("ruff", "mypy"):
            assert " ".join(words) in ci
        elif not run_docs.done_by_ci(words):
            said = run_docs.arguments(words)
            ours = said[:2] == ["-m", "s2dm_jax.main"] or "".join(said[:1]).startswith("scripts/")
            is_run = ours and words[1:] == said
            assert is_run, f"{block.place}: {' '.join(words)} is not run; say why above the block"


def test_a_block_is_what_its_fence_or_its_lines_say(tmp_path, monkeypatch):
    monkeypatch.setattr(run_docs, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run: needs\na GPU -->\n\n```sh\npython -m x\n```\n\n```python\nx = 1\n```\n\n"
        "<!-- before:\ny = 2\n-->\n```python\ny\n```\n\n    x = √2\n\ntext\n\n"
        "    # what it does\n    python a.py \\\n      --b\n\n"
        "```text\npython a.py\n```\n\n```text\nx = √2\n```\n"
    )
    found = [(block.kind, block.not_run, block.before, block.line) for block in run_docs.blocks(page)]
    assert found == [
        ("sh", "needs\na GPU", "", 5),
        ("python", "", "", 9),
        ("python", "", "y = 2\n", 16),
        ("", "", "", 19),
        ("sh", "", "", 23),
        ("", "", "", 28),
        ("text", "", "", 32),
    ]
    said = run_docs.commands("a b && c 'd e'  # f\n\n# g\nh \\\n  i")
    assert said == [["a", "b"], ["c", "d e"], ["h", "i"]]
    with pytest.raises(run_docs.PageError, match="more than commands"):
        run_docs.commands("python - <<'END'\nEND")


@pytest.fixture
def checked(monkeypatch, tmp_path, command_line):
    """Function of a command's words that checks them as the command itself does, and starts no work.

    What a page has trained is there for its next commands, as far as checks look at it.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.syspath_prepend(ROOT / "scripts" / "benchmarks")
    for folder in ("configs", "scripts", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for module, work in ((sample, "sample"), (export, "export"), (evaluate, "evaluate_run")):
        monkeypatch.setattr(module, work, lambda config, workdir, out: None)
    for module, function in (
        (main, "prepare_dataset"),
        (main, "check_preparable"),
        (main, "check_wandb"),
        (distributed, "initialize_distributed"),
    ):
        monkeypatch.setattr(module, function, lambda *_: None)

    def leave(config, workdir):
        (Path(workdir) / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)
        (Path(workdir) / "config.json").write_text(to_json(config))

    monkeypatch.setattr(loop, "train", leave)

    class Parsed(Exception):
        pass

    parse_args = argparse.ArgumentParser.parse_args

    def parse_only(*arguments):
        parse_args(*arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)

    def check(words):
        said = run_docs.arguments(words)
        if said[:2] == ["-m", "s2dm_jax.main"]:
            flags = dict(word.lstrip("-").partition("=")[::2] for word in said[2:])
            given = [flags.get("config.variance_head.base_workdir")] + ([] if "config" in flags else [flags["workdir"]])
            for workdir in filter(None, given):
                if not Path(workdir).exists():
                    leave(runpy.run_path("configs/digits.py")["get_config"](), workdir)
            command_line(*said[2:])
        elif said[:2] == ["-m", "pytest"]:
            paths = [Path(word) for word in said[2:] if "/" in word]
            assert all(path.is_file() for path in paths)
        elif said[:2] == ["-m", "pip"]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(re.findall(r"\.\[(\w+)\]", " ".join(said))) <= extras.keys()
        elif said and said[0].startswith("scripts/"):
            monkeypatch.setattr(sys, "argv", said)
            with pytest.raises(Parsed):
                runpy.run_path(str(ROOT / said[0]), run_name="__main__")

    return check


@pytest.mark.parametrize("page", [page for page in run_docs.PAGES if page != ADDING], ids=name)
def test_every_command_parses(page, checked):
    """Also of blocks that are not run, and in running text; those of docs/adding.md need its diffs."""
    texts = [block.text for block in run_docs.blocks(page) if block.kind == "sh"]
    spans = [token.content for token in inline(page) if token.type == "code_inline"]
    for text in [*texts, *(span for span in spans if re.match(r"\S*python3? \S+", span))]:
        for words in run_docs.commands(text):
            try:
                checked(words)
            except SystemExit as error:
                pytest.fail(f"{name(page)}: {' '.join(words)}: {error}")


@pytest.mark.parametrize("page", run_docs.PAGES, ids=name)
def test_every_field_and_file_named_exists(page):
    text = page.read_text()
    fields = set(re.findall(r"\bconfig\.([a-z]+\.[a-zA-Z]\w*)\b(?!\()", text))
    added = set(re.findall(r"^\+ +\"([a-z]+\.\w+)\": Field", text, re.M)) if page == ADDING else set()
    groups = {field.split(".")[0] for field in FIELDS}
    assert {field for field in fields if field.split(".")[0] in groups} <= FIELDS.keys() | added
    files = set(re.findall(r"(?<![\w/.])(?:s2dm_jax|scripts|tests|configs|docs|colab)/[\w/]+\.\w+", text))
    made = set(re.findall(r"^\+\+\+ (\S+)", text, re.M))
    assert [file for file in sorted(files - made) if not (ROOT / file).is_file()] == []


def test_the_table_of_s_t_is_what_its_script_prints(capsys):
    page = ROOT / "docs" / "objectives.md"
    script = next(block for block in run_docs.blocks(page) if "skip_scale(" in block.text)
    exec(script.text, {})
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 6
    for row in rows:
        assert f"| {' | '.join(row.split())} |" in page.read_text()


def anchors(page):
    """The names that GitHub gives to a page's headings."""
    found, tokens = [], MarkdownIt().parse(page.read_text())
    for opening, title in itertools.pairwise(tokens):
        if opening.type == "heading_open":
            said = "".join(child.content for child in title.children)
            anchor = re.sub(r"[^\w\- ]", "", said.lower()).replace(" ", "-")
            found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return found


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_every_link_inside_the_repo_resolves(page):
    tokens = inline(page)
    links = [token.attrGet("href") or token.attrGet("src") for token in tokens if token.attrs]
    links += [html.unescape(link) for link in re.findall(r"(?:href|src)=\"(.*?)\"", page.read_text())]
    dead = []
    for link in links:
        path, _, anchor = unquote(link).partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        there = target.exists() and target.is_relative_to(ROOT)
        if not there or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_every_row_of_a_table_is_in_one(page):
    texts = [token.content for token in inline(page) if token.type == "text"]
    assert [text for text in texts if text.startswith("|")] == []


def folders_of_tree(text):
    """The sub-packages in a page's tree: the `name/` lines of a text block that starts with `s2dm_jax/`."""
    blocks = re.findall(r"^```text\n(.*?)^```", text, re.M | re.DOTALL)
    tree = next((block for block in blocks if block.startswith("s2dm_jax/")), "")
    inside = itertools.takewhile(lambda line: line.startswith((" ", "│", "├", "└")), tree.splitlines()[1:])
    return [found[1] for line in inside if (found := re.match(r"[│├└─ ]+(\w+)/(?:\s|$)", line))]


def test_the_architectures_tree_names_each_sub_package_once():
    text = (ROOT / "docs" / "architecture.md").read_text()
    packages = [path.parent.name for path in (ROOT / "s2dm_jax").glob("*/__init__.py")]
    assert sorted(folders_of_tree(text)) == sorted(packages)


def test_every_module_that_the_architecture_names_exists():
    text = (ROOT / "docs" / "architecture.md").read_text()
    # A placeholder is written in capitals: `samplers/NAME.py`.
    named = set(re.findall(r"(?<![\w/*>])[a-z_\d/]+\.py\b", text))
    folders = ("s2dm_jax", "configs", "scripts", "tests")
    files = [str(path) for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert named
    assert [name for name in sorted(named) if not any(file.endswith(f"/{name}") for file in files)] == []


def test_each_addition_changes_fewer_lines_than_the_page_promises():
    sections = re.split(r"^## ", ADDING.read_text(), flags=re.M)[1:]
    changed = {}
    for section in sections:
        lines = "".join(re.findall(r"^```diff\n(.*?)^```", section, re.M | re.DOTALL)).splitlines()
        changed[section.split("\n")[0]] = sum(bool(re.match(r"[+-](?!\+\+ )", line)) for line in lines)
    assert list(changed) == ["A sampler", "A loss term", "A metric", "A dataset", "A network"]
    assert all(0 < count < (40 if name == "A network" else 20) for name, count in changed.items()), changed


def test_a_diff_that_does_not_fit_is_refused(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\ny = 2\ny = 2\n")
    run_docs.apply_diff(tmp_path, "+++ a.py\n@@\n-x = 1\n+x = 3\n y = 2\n+++ b.py\n@@\n+z = 4\n")
    assert (tmp_path / "a.py").read_text() == "x = 3\ny = 2\ny = 2\n"
    assert (tmp_path / "b.py").read_text() == "z = 4\n"
    for line, times in (("y = 2", 2), ("x = 1", 0)):
        with pytest.raises(run_docs.PageError, match=f"a.py has the old lines of the diff {times} times"):
            run_docs.apply_diff(tmp_path, f"+++ a.py\n@@\n {line}\n+w = 5\n")


@pytest.fixture(scope="module")
def added(tmp_path_factory):
    """A clone with the additions of docs/adding.md, after the commands of that page."""
    folder = tmp_path_factory.mktemp("docs") / "clone"
    run_docs.make_clone(folder, [ADDING])
    run_docs.make_images(folder)
    (folder / "runs").mkdir()
    digits = runpy.run_path(str(ROOT / "configs" / "digits.py"))["get_config"]()
    save_run(folder / "runs" / "digits", digits, seed=0, ema_factor=1)
    run_docs.run_page(ADDING, folder)
    return folder


PROOF = """
import io
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from PIL import Image
from s2dm_jax.data import cache, tfds_builder
from s2dm_jax.diffusion import objectives
from s2dm_jax.config.validate import check_config
from s2dm_jax.config import default_config
from s2dm_jax.data.datasets import load_dataset
from s2dm_jax.workdir.load import read_config
from s2dm_jax.samplers.specs import get_sampler
from s2dm_jax.diffusion.schedule import linear_schedule

schedule = linear_schedule()
ab = schedule.alpha_bar
rng = np.random.default_rng(0)

# A network that sees no noise: each prediction is x divided by the signal.
x_T, noise = rng.standard_normal((2, 3, 4, 4, 1)).astype(np.float32)
renoise, timesteps = get_sampler("renoise"), np.array([100, 300])
x_0 = renoise(lambda x, t: 0 * x, x_T, schedule, timesteps, noise_fn=lambda step: noise)
expected = x_T / np.sqrt(ab[300]) + np.sqrt(1 / ab[100] - 1) * noise
np.testing.assert_allclose(x_0, expected, rtol=1e-4)

# The term is the sum over pixels of |noise − ε|, and the loss has it with its weight.
t = np.array([0, 100, 300, 999])
noise = rng.standard_normal((4, 1, 8, 8, 1)).astype(np.float32)
sample = objectives.NoiseSample(t, noise, None)
objective = objectives.paper(l1=0.1)
x0 = np.zeros((4, 8, 8, 1), np.float32)
total, terms = objectives.loss(lambda x, t: 0 * x, schedule, objective, x0, sample)
np.testing.assert_allclose(terms["l1"], np.abs(noise).sum((1, 2, 3, 4)), rtol=1e-4)
np.testing.assert_allclose(total, terms["simple"] + 0.1 * terms["l1"], rtol=1e-4)
assert objective.formula == "L_simple + 0.1·L_1"

data = load_dataset(read_config("runs/my_images"))
assert data.train.shape == (36, 32, 32, 3) and data.held_out.shape == (4, 32, 32, 3)

# What the builder would give; that it does so for CIFAR-10 is held by tests/data/test_tfds_builder.py.
class Builder:
    version = "1.0.0"
    info = SimpleNamespace(
        splits={name: SimpleNamespace(num_examples=2) for name in ("train", "test")},
        features={"image": None, "label": SimpleNamespace(names=["zero", "one"])},
    )

png = io.BytesIO()
Image.new("RGB", (32, 32), (1, 2, 3)).save(png, "PNG")
tfds_builder.build = lambda name, folder: Builder
tfds_builder.encoded_examples = lambda builder, split: [{"image": png.getvalue(), "label": i} for i in (1, 0)]
config = default_config()
config.data.name = "svhn"
check_config(config)
folder = Path("svhn")
folder.mkdir()
provenance = tfds_builder.run("svhn", cache.transform_of(config), folder, folder)
assert provenance["source"] == "SVHN of tensorflow-datasets" and provenance["classes"] == ["zero", "one"]
assert (np.load(folder / "train.npy") == np.full((2, 32, 32, 3), [1, 2, 3])).all()
assert np.load(folder / "held_out_labels.npy").tolist() == [1, 0]
"""


def test_what_was_added_works(added):
    assert list((added / "runs" / "digits" / "samples").glob("renoise_nfe*.png"))
    for run in ("l1", "my_images", "pixelwise"):
        last = (added / "runs" / run / "metrics.jsonl").read_text().splitlines()[-1]
        assert json.loads(last)["step"] == 4
    environment = {**os.environ, "PYTHONPATH": str(added)}
    done = subprocess.run([sys.executable, "-c", PROOF], cwd=added, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
