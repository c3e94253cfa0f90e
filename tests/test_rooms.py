"""The rooms import only what stands before them, and the light ones stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ORDER = (
    "recipe",
    "machine",
    "losses",
    "forest",
    "credit",
    "data",
    "models",
    "sampling",
    "rewards",
    "environments",
    "training",
    "door",
    "evals",
    "monitors",
    "report",
    "pipeline",
    "cluster",
    "cli",
)
RECORDS = "records"
"""Importable by all; imports none."""
ONLY_RECORDS = ("recipe", "losses", "report")
"""Rooms that stand alone: configuration, arithmetic, and the report, which renders what it reads."""
DOOR = "__init__"
"""`posttrain/__init__.py`, the Python door: it may name every room, and no room may import from it."""
HEAVY = ("torch", "transformers", "numpy", "ray")


def room_of(file: Path, package: Path) -> str:
    return file.relative_to(package).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and room of each import from the package, those inside functions too."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "posttrain" else [module]
        for name in names:
            first, _, rest = name.partition(".")
            if first == "posttrain":
                yield node.lineno, rest.partition(".")[0] or DOOR


def allowed(room: str) -> set[str]:
    if room == RECORDS:
        return set()
    if room == DOOR:
        return {*ORDER, RECORDS}
    before = () if room in ONLY_RECORDS else ORDER[: ORDER.index(room)]
    return {*before, room, RECORDS}


def test_a_room_imports_only_rooms_before_it(repo_root: Path) -> None:
    package = repo_root / "src" / "posttrain"
    wrong = []
    for file in sorted(package.rglob("*.py")):
        room = room_of(file, package)
        assert room in {*ORDER, RECORDS, DOOR}, f"{file}: give the room {room!r} its place in ORDER"
        for line, other in imports(ast.parse(file.read_text(encoding="utf-8"))):
            if other not in allowed(room):
                wrong.append(f"{file.relative_to(package)}:{line}: {room} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_the_walk_sees_every_form_of_import() -> None:
    code = "import posttrain\nimport posttrain.data.chat as c\nfrom posttrain import rewards\n"
    code += "def f():\n from posttrain.cli import x\n"
    assert sorted(imports(ast.parse(code))) == [(1, DOOR), (2, "data"), (3, "rewards"), (5, "cli")]


@pytest.mark.parametrize(
    "code",
    [
        "import posttrain.recipe, posttrain.recipe.schema, posttrain.recipe.load, posttrain.recipe.explain",
        "import posttrain.records",
        "import posttrain.cli",
        "from posttrain.cli import main; assert main(['--help']) == 0; assert main(['run', '--help']) == 0",
    ],
)
def test_light_imports_stay_light(code: str) -> None:
    check = f"{code}\nimport sys; print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


def test_the_command_line_starts_without_the_schema() -> None:
    check = "import posttrain.cli, sys; print([m for m in ('pydantic', 'yaml', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
