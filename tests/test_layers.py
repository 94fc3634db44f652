"""The direction of imports: each sub-package imports only those below it, and checks import no jax."""

import ast
import functools
import subprocess
import sys

import pytest
from helpers import ROOT

PACKAGE = ROOT / "s2dm_jax"
LAYERS = [
    {"common"},
    {"diffusion", "devices"},
    {"models", "samplers"},
    {"config"},
    {"data", "workdir"},
    {"inference"},
    {"weights"},
    {"evaluation"},
    {"training"},
    {"__init__"},
    {"main"},
    {"__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(PACKAGE.rglob("*.py"))
# What is checked before seconds of imports, and what those checks need.
NO_JAX = [
    "common.errors",
    "common.files",
    "common.progress",
    "common.signals",
    "config",
    "config.build",
    "config.fields",
    "config.evaluation_plan",
    "config.metrics",
    "config.io",
    "config.validate",
    "diffusion.betas",
    "data.cache",
    "data.import_images",
    "data.sources",
    "samplers.specs",
    "samplers.timesteps",
    "weights.formats",
    "workdir.exported",
    "workdir.folder",
    "workdir.load",
    "workdir.results",
    "main",
]
MAX_LINES = 350
LONGEST_CHAIN = 11


def imported(path, *, only_at_start=False):
    """Dotted names below `s2dm_jax.` that a file imports: modules, or what it takes from them."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree)
    if only_at_start:
        skipped = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.If) for n in ast.walk(f)}
        nodes = (node for node in nodes if id(node) not in skipped)
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "s2dm_jax":
            package = node.module.split(".")[1:]
            yield from (".".join([*package, alias.name]) for alias in node.names)


def module_of(name):
    """The file that a dotted name belongs to."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        base = PACKAGE.joinpath(*parts[:length])
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
    return PACKAGE / "__init__.py"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    packages = {name.split(".")[0] for name in imported(path)} & RANK.keys()
    assert [other for other in packages if other != own and RANK[other] >= RANK[own]] == []


def test_no_chain_of_imports_is_circular_or_long():
    uses = {path: {module_of(name) for name in imported(path)} - {path} for path in FILES}

    @functools.cache
    def length(path):
        return 1 + max((length(other) for other in uses[path]), default=0)

    # A circle would end in a RecursionError. `__main__` is `main` under another name.
    assert max(length(path) for path in FILES if path.stem != "__main__") <= LONGEST_CHAIN, sorted(FILES, key=length)[
        -3:
    ]


def test_files_are_short():
    long = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: lines for name, lines in long.items() if lines > MAX_LINES} == {}


def test_what_is_checked_first_imports_no_jax():
    code = "import sys\n" + "".join(f"import s2dm_jax.{name}\n" for name in NO_JAX)
    code += "print([name for name in ('jax', 'orbax', 'flax') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "[]\n", done.stderr
