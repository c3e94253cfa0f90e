"""From what a recipe calls a model to a directory that Transformers loads."""

from __future__ import annotations

from pathlib import Path


def resolve(source: str, revision: str | None = None) -> Path:
    """A directory with config.json, safetensors and a tokenizer."""
    return Path(source).resolve()
