"""Markdown tables."""

import pytest

from s2dm_jax.common.markdown import markdown_table


def test_markdown_table():
    table = markdown_table(["sampler", "NFE"], [["ddim", 10], ["a|b\nc", 1.25]])
    assert table == ("| sampler | NFE  |\n| ------- | ---- |\n| ddim    | 10   |\n| a\\|b c  | 1.25 |")


def test_markdown_table_without_rows():
    assert markdown_table(["a"], []) == "| a   |\n| --- |"


def test_bad_markdown_table():
    with pytest.raises(ValueError, match="row 1 must have 2 cells like the header, got 1"):
        markdown_table(["a", "b"], [[1, 2], [3]])
    with pytest.raises(ValueError, match="header must name at least one column"):
        markdown_table([], [])
