"""CONTRIBUTING.md: its examples run as they stand, its rooms are those there are, and what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_rooms import ORDER

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("what", ["A loss", "A reward", "An environment"])
def test_an_example_is_whole(what: str) -> None:
    [block] = re.findall(rf"^### {what}, whole\n\n```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    exec(compile(block, "CONTRIBUTING.md", "exec", dont_inherit=True), {})


def test_the_rooms_stand_in_their_order() -> None:
    [listed] = re.findall(r"imports only rooms before it: ((?:`\w+`,?\s?)+)", PAGE)
    assert tuple(re.findall(r"\w+", listed)) == ORDER


def test_the_files_that_it_names_are_there() -> None:
    named = {name for name in re.findall(r"`([\w/]+\.py)`", PAGE) if "NAME" not in name}
    folders = (ROOT, ROOT / "src/posttrain", ROOT / "src/posttrain/recipe")
    assert named
    assert not [name for name in named if not any((folder / name).is_file() for folder in folders)]
