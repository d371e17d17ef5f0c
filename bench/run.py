"""The full table: every operation and size, written to `bench/results` as text, JSON and a picture.

    python bench/run.py [options of `python -m nearfar bench`]

Files are named after the date, the processor and, where not all are measured, the operations; a run says in its first
lines what machine it is of. Options that are given win: ``--plot docs/bench.png`` renews the picture of the README.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import re
import sys
from pathlib import Path

from nearfar import bench
from nearfar.bench import machine

RESULTS = Path(__file__).parent / "results"


def _operations(options: list[str]) -> str:
    parser = argparse.ArgumentParser(add_help=False)
    bench.add_arguments(parser)
    return parser.parse_known_args(options)[0].ops or ""


def main() -> int:
    """Run, print the table and keep it."""
    day = datetime.datetime.now(datetime.timezone.utc).date()
    processor = re.sub(r"[^a-z0-9]+", "-", machine.cpu_model().lower()).strip("-")
    stem = RESULTS / "-".join([str(day), processor, *re.findall(r"[a-z0-9_]+", _operations(sys.argv[1:]))])
    text = io.StringIO()
    RESULTS.mkdir(exist_ok=True)
    try:
        with contextlib.redirect_stdout(text):
            status = bench.main(["--json", f"{stem}.json", "--plot", f"{stem}.png", *sys.argv[1:]])
    finally:
        print(text.getvalue(), end="")  # also of --help, which leaves by an exception
    if status == 0:
        Path(f"{stem}.txt").write_text(text.getvalue(), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
