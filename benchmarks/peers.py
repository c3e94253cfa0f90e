"""The environment of the libraries we are compared with, apart from ours: `.venv-peers`, made on first use.

python benchmarks/peers.py
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-peers"
REQUIREMENTS = ("torch==2.13.0", "trl==1.16.0", "transformers==5.23.0", "peft==0.21.2")
"""Torch, Transformers and PEFT are those of constraints.txt: what differs is what is measured."""


def python() -> Path:
    """The interpreter of that environment. The stamp comes last: an installation that was cut short starts over."""
    stamp = ENVIRONMENT / "requirements.txt"
    wanted = "\n".join(REQUIREMENTS) + "\n"
    interpreter = ENVIRONMENT / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {', '.join(REQUIREMENTS)} into {ENVIRONMENT}, once", file=sys.stderr)
        venv.create(ENVIRONMENT, clear=True, with_pip=True)
        pip = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *REQUIREMENTS], check=True)
        stamp.write_text(wanted)
    return interpreter


if __name__ == "__main__":
    print(python())
