"""What the checks of `right` share: errors beside their bounds, and the tests' golden values."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The golden files, and what reads them.
TESTS = Path(__file__).resolve().parents[3] / "tests"


def bounded(title: str, errors: Mapping[str, Mapping[str, float]], bounds: Mapping[str, float]) -> dict[str, Any]:
    """A check's result: the largest relative error of each kind, beside its bound."""
    import numpy as np

    # The largest of numbers with a NaN is NaN, which is within no bound.
    largest = {kind: float(np.max([values[kind] for values in errors.values()])) for kind in bounds}
    passed = all(largest[kind] <= bound for kind, bound in bounds.items())
    parts = [f"{kind} {largest[kind]:.1e} (bound {bound:.0e})" for kind, bound in bounds.items()]
    return {"passed": passed, "summary": f"{title}: relative errors {', '.join(parts)}", "errors": errors}


def largest_error(actual: Any, expected: Any) -> float:
    """The largest difference, relative to the largest value."""
    import numpy as np

    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def norm_error(actual: Any, expected: Any) -> float:
    """The norm of the difference, relative to that of `expected`."""
    import numpy as np

    return float(np.linalg.norm(np.ravel(actual - expected)) / np.linalg.norm(np.ravel(expected)))


def flat(tree: Any) -> Any:
    """All arrays of a tree in one."""
    import jax
    import numpy as np

    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def add_tests_to_path() -> None:
    """Makes the modules of tests/ importable."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))


def published_module() -> Any:
    """tests/published.py."""
    add_tests_to_path()
    import published

    return published
