"""Markdown tables."""

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, without a last newline, with its columns aligned, so that it also reads well in a terminal.

    Raises:
      ValueError: for an empty header, or a row of another length.
    """
    if not header:
        raise ValueError("header must name at least one column, got none")
    for index, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"row {index} must have {len(header)} cells like the header, got {len(row)}")
    # A bare | or a line break would end the cell.
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(cell) for cell in column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    )
