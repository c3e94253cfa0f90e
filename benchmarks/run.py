"""Every comparison one after the other, docs/measured/engine.json and growth.json, the plots, and one table.

    python benchmarks/run.py [--runs 5] [--quick]

Leave the machine alone meanwhile. What fails is named at the end, and the others are measured all the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import plots
from measured import parser, show

HERE = Path(__file__).resolve().parent
SCRIPTS = ("peak", "train", "breakdown", "sampling", "checkpoint", "cluster", "growth")
WITHOUT_RUNS = {"breakdown", "growth"}


def main() -> None:
    options = parser(__doc__, "--runs", "--quick")
    options.add_argument("--llama", action="store_true", help="llama.cpp as well; see sampling.py")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) if args.quick else plots.MEASURED
        engine, growth = folder / "engine.json", folder / "growth.json"
        if not args.quick:
            for file in (engine, growth):  # rows of earlier names must not stay
                file.unlink(missing_ok=True)
        failed = []
        began = time.perf_counter()
        for script in SCRIPTS:
            command = [
                sys.executable,
                str(HERE / f"{script}.py"),
                "--out",
                str(growth if script == "growth" else engine),
            ]
            command += [] if script in WITHOUT_RUNS else ["--runs", str(args.runs)]
            command += ["--quick"] if args.quick else []
            command += ["--llama"] if args.llama and script == "sampling" else []
            print(f"== {script}, after {time.perf_counter() - began:.0f} s", flush=True)
            if subprocess.run(command).returncode:
                failed.append(script)
        rows = json.loads(engine.read_text())
        if growth.exists():
            plots.draw(rows, json.loads(growth.read_text()), folder if args.quick else plots.PLOTS)
        print(f"== what was to be reached, after {time.perf_counter() - began:.0f} s")
        show([row for row in rows if "met" in row])
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; see above")


if __name__ == "__main__":
    main()
