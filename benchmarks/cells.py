"""What benchmarks of one process a cell share: their options, which cells are missing, who runs them."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rulers
import tables


def parser(description: str | None, rows: Path) -> argparse.ArgumentParser:
    """A parser with the options that all have; ``rows`` is the file that their tables are made of."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", type=Path, default=rows, help="file of rows (default: %(default)s)")
    made.add_argument("--merge", nargs="*", type=Path, help="run nothing; take these files' rows into --json")
    made.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to calibrate")
    made.add_argument("--cell", help=argparse.SUPPRESS)
    return made


def run_missing(
    cells: Sequence[Any],
    file: Path,
    tell: Callable[[tables.Row], str],
    *,
    again: bool = False,
    options: Sequence[str] = (),
) -> str | None:
    """Runs each cell that has no row in ``file`` by this very script, in a process of its own.

    Args:
        cells: dataclasses of plain values.
        file: of rows, written after each cell.
        tell: what to print of a row beside its cell.
        again: whether cells that have a row are run as well.
        options: more words of the command.

    Returns:
        How many failed, in words; None if none did.
    """
    if not rulers.ASSETS.is_dir():
        raise SystemExit(f"no assets at {rulers.ASSETS}: set ADADFQ_ASSETS to their folder")
    failed = 0
    for cell in cells:
        key = tables.key(asdict(cell))
        if key in tables.read(file) and not again:
            continue
        command = [sys.executable, sys.argv[0], *options, "--cell", key]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:  # its traceback has been seen
            failed += 1
            print(key, "FAILED", flush=True)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        print(key, tell(row), flush=True)
        tables.save({**tables.read(file), key: row}, file)
    return f"{failed} of {len(cells)} cells failed" if failed else None
