"""Public text uses the field's terms: documents, notebooks, strings and docstrings of the package and the scripts."""

import ast
import re

import pytest
from helpers import ROOT

# A regular expression without regard to case, in which a space also stands for a line break: what to write instead.
BANNED = {
    r"\btold\b": "reported, printed; or name what it is (provenance, summary)",
    r"\b(goes|going|go|went) on\b": "resumes, continues",
    r"\bcannot be had\b": "is unavailable",
    r"\b(of|none of|than) ours\b": "of s2dm_jax, our own",
    r"\bmoving averages?\b": "EMA",
    r"\bnoise levels?\b|\blevels? of noise\b": "timestep",
    r"\b(what|all that) (it|they|these|the numbers) depends? on\b": "provenance",
    r"\b(is|are|was|were) held to\b": "is checked against",
    r"\bwhoever\b": "if you; anyone who",
    r"\bset aside\b": "quarantined, moved",
    r"\b(images?|pictures|samples) at a time\b": "batch size",
    r"\bat hand\b": "available",
    r"\bto the bit\b": "bit for bit, bit-identical",
    r"\bfor nothing\b": "for free",
    r"\basked for\b": "requested",
    r"\bdata sets?\b": "dataset",
    r"\banew\b": "again",
    r"\bmend(s|ed)?\b": "fix",
    r"\bmistakes?\b": "error",
    r"\bis owed\b|\bare owed\b": "has not been run yet",
    r"\bdo(es)? not go with\b|\bgo together\b": "cannot be combined with, must be given together",
    r"\bwithout a word\b|\bin silence\b": "silently",
}

PATTERNS = {re.compile(pattern.replace(" ", r"\s+(?:# )?"), re.IGNORECASE): hint for pattern, hint in BANNED.items()}


def public_files():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("colab/*.py")]
    return pages + [path for folder in ("s2dm_jax", "scripts") for path in (ROOT / folder).rglob("*.py")]


def passages(name, text):
    """The line and text of what readers see: of a module its docstrings and other strings with several words."""
    if not name.endswith(".py") or name.startswith("colab/"):
        return [(1, text)]
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    return [(node.lineno, node.value) for node in nodes if isinstance(node.value, str) and " " in node.value.strip()]


def old_words(name, text):
    """A line for each banned word, with what to write instead."""
    return [
        f"{name}:{line + passage[: match.start()].count(chr(10))}: {match[0]!r}; better: {hint}"
        for line, passage in passages(name, text)
        for pattern, hint in PATTERNS.items()
        for match in pattern.finditer(passage)
    ]


def test_public_text_has_no_old_words():
    names = {str(path.relative_to(ROOT)): path for path in public_files()}
    found = [line for name, path in names.items() for line in old_words(name, path.read_text())]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("docs/a.md", "A run\nGoes\non.", "docs/a.md:2: 'Goes\\non'; better: resumes"),
        ("colab/a.py", "# the moving\n# average", "colab/a.py:1: 'moving\\n# average'; better: EMA"),
        (
            "s2dm_jax/a.py",
            'told = 1\n\nprint(f"{told} is told: "\n      "no")',
            "s2dm_jax/a.py:3: 'told'; better: report",
        ),
        (
            "scripts/a.py",
            'def f():\n    """Loss.\n\n    A data set.\n    """',
            "scripts/a.py:4: 'data set'; better: dataset",
        ),
    ],
)
def test_old_words_are_found_in_text_and_strings_alone(name, text, place):
    (found,) = old_words(name, text)
    assert found.startswith(place)
