"""The tables and texts that a run's folder holds: written whole or not at all, read with what is damaged named."""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from fastproto._check import expect, is_number


def write_log(folder: Path, log: list[dict[str, float]]) -> None:
    """Writes log.csv anew: rows after an interrupted epoch are gone, terms that came later have a column."""
    columns = list(dict.fromkeys(name for row in reversed(log) for name in row))
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    writer.writerows(log)
    write_text(folder / "log.csv", file.getvalue())


def read_log(folder: Path) -> list[dict[str, float]]:
    """The rows of log.csv; NaN where a row has no entry. Raises ValueError where it holds something else."""
    path = folder / "log.csv"
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        try:
            return [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]
        except (ValueError, TypeError, csv.Error) as error:
            raise ValueError(f"run: {path} expected rows of numbers, got {error}") from error


def read_result(folder: Path) -> dict[str, Any]:
    """What result.json holds; nothing while the run has not ended. Raises ValueError where it holds something else."""
    path = folder / "result.json"
    found = read_json(path)
    depths = {"before": 1, "after": 1, "time_s": 1, "best": 2}
    good = isinstance(found, dict) and all(is_table(found.get(name, {}), depth) for name, depth in depths.items())
    expect(good, "run", str(path), "the result of a training", "something else")
    return found


def read_json(path: Path) -> Any:
    """What a file of JSON holds, {} where there is none; a damaged one is a ValueError that names it."""
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"run: {path} expected JSON, got {error}") from error


def is_table(value: Any, depth: int) -> bool:
    """Whether it is a number, or a dict of such tables, one level less deep."""
    if depth == 0:
        return is_number(value)
    return isinstance(value, dict) and all(is_table(entry, depth - 1) for entry in value.values())


def write_text(path: Path, text: str) -> None:
    """Writes a text whole or not at all; what is no UTF-8 in it, as in names of files, as question marks."""
    write_whole(path, lambda file: file.write(text.encode("utf-8", "replace")))


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Has ``write`` write a file that is there whole or not at all, if the machine stops or others write it too."""
    # Processes of several containers or machines may have one number.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except Exception as error:
        temporary.unlink(missing_ok=True)
        # torch.save's writer says in place of a full disk that it is not where it should be.
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    os.replace(temporary, path)
    # The new name lasts once the folder is on the disk too. Some file systems know no such thing.
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
