"""How results are written: JSON files, aligned text tables, units."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SCHEMA = 1  # of every result file; a reader refuses another


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": SCHEMA, **content}, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """ValueError for what is no JSON object, or one of another schema."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path}: schema {schema!r}, expected {SCHEMA}")
    return content


def read_result(path: Path, *kinds: str) -> dict[str, Any]:
    """A result of one of these kinds, for a command. SystemExit where there is none."""
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    kind = content.get("kind")
    if kind not in kinds:
        raise SystemExit(f"{path}: a result of kind {kind!r}, expected {' or '.join(kinds)}")
    return content


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns aligned with spaces, the first to the left, the others to the right."""
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        clean = [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
        return "| " + " | ".join(clean) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *[line(row) for row in rows]])


def clip(text: str, limit: int = 6000) -> str:
    """The first sixth and the last five sixths of a long text: errors stand at the end."""
    if len(text) <= limit:
        return text
    head = limit // 6
    cut = len(text) - limit
    return f"{text[:head]}\n... {cut} characters left out ...\n{text[-(limit - head) :]}"


def rate(value: float | None, unit: str) -> str:
    """ "4.31 TB/s": the value scaled to the prefix it reads best with; "-" for None."""
    if value is None:
        return "-"
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
