"""Write the tables of README.md and docs/*.md from where their content is the truth.

`<!-- measured:NAME -->` begins the table of docs/measured/NAME.json, `<!-- required:NAME -->` that of its rows with a
requirement; `<!-- reference:keys -->` the table of the recipe's keys, `<!-- reference:objectives -->` that of the
preference losses and `<!-- reference:shapes -->` that of the row shapes, all from the code. With --check nothing is
written, and the exit code is 1 where a page is out of date.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.recipe.explain import Key

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- (measured|required|reference):(\w+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def rendered(text: str) -> str:
    """`text` with every block filled anew."""

    def fill(match: re.Match[str]) -> str:
        kind, name = match[2], match[3]
        return f"{match[1]}{CONTENT[kind](name)}{match[4]}"

    return BLOCK.sub(fill, text)


def measured_table(rows: Sequence[dict[str, Any]], by: str | None = None) -> str:
    """A line for each row, and once for all rows of a machine how they came about: `by`, or by their commands."""
    kinds = {"interval": "95 % interval", "spread": "lowest to highest"}
    interval = ", or ".join(name for key, name in kinds.items() if any(key in row for row in rows)) or "95 % interval"
    lines = _table(
        ("what", "measured", interval, "required", "met"),
        (
            (
                row["what"],
                _value(row["value"], row["unit"]),
                _interval(row),
                _required(row),
                {True: "yes", False: "**no**", None: ""}[row.get("met")],
            )
            for row in rows
        ),
    )
    for machine in dict.fromkeys(row["machine"] for row in rows):
        commands = dict.fromkeys(f"`{row['command']}`" for row in rows if row["machine"] == machine)
        lines += f"\nMeasured by {by or _listed(list(commands))} on {machine}.\n"
    return lines


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def keys_table() -> str:
    """Every key once: those of a stage's rewards, which stand in several places, as `rewards.KIND.KEY`."""
    from posttrain.recipe.explain import keys

    first = "stages.grpo.rewards."
    own = [key for key in keys() if not re.match(r"stages\.\w+\.(?:\w+\.)?rewards\.", key.path)]
    rewards = [
        replace(key, path="rewards." + key.path.removeprefix(first)) for key in keys() if key.path.startswith(first)
    ]
    return _table(("key", "takes", "default", "meaning"), [*_alike(own, "stages"), *_alike(rewards, "rewards")])


def _alike(keys: Sequence[Key], of: str) -> list[tuple[str, ...]]:
    """A line for each key; what all kinds of stage, or of reward, have alike stands once, under `*`."""
    kinds = {key.path.split(".")[1] for key in keys if key.path.startswith(f"{of}.")}
    alike: dict[tuple[str, str, str], list[Key]] = {}
    for key in keys:
        path = re.sub(rf"^{of}\.\w+\.", f"{of}.*.", key.path)
        alike.setdefault((path, key.takes, key.description), []).append(key)
    rows = []
    for (path, takes, description), same in alike.items():
        for group in [same] if len(same) == len(kinds) else [[key] for key in same]:
            name = path if len(group) > 1 else group[0].path
            default = " or ".join(dict.fromkeys(_default(key) for key in group))
            rows.append((f"`{name}`", takes, default, description.replace("\n", " ").replace("|", r"\|")))
    return rows


def _default(key: Any) -> str:
    return "" if not key.takes else "required" if key.default.startswith("none;") else f"`{key.default}`"


def shapes_table() -> str:
    from posttrain.data.shapes import SHAPES

    return _table(("shape", "columns", "what it is"), ((f"`{n}`", s.columns, s.summary) for n, s in SHAPES.items()))


def objectives_table() -> str:
    from posttrain.recipe.objectives import OBJECTIVES

    def values(o: Any) -> str:
        return ", ".join(
            f"`{name}` {str(value).lower() if isinstance(value, bool) else value}" for name, value in o.reads.items()
        )

    return _table(
        ("`loss`", "of", "score", "what it is", "reads", "paper"),
        (
            (f"`{name}`", o.of, f"{o.score}, ratio" if o.reference else o.score, o.summary, values(o), o.paper)
            for name, o in OBJECTIVES.items()
        ),
    )


def rewards_table() -> str:
    from posttrain.rewards import TABLE

    return _table(("reward", "what it says", "source"), ((f"`{n}`", e.summary, e.paper) for n, e in TABLE.items()))


def checks_table() -> str:
    from posttrain.rewards.instructions import CHECKS

    rows = ((f"`{name}`", ", ".join(signature(check.good).parameters)) for name, check in CHECKS.items())
    return _table(("check of `instructions`", "settings"), rows)


def tasks_table() -> str:
    rows = json.loads((ROOT / "docs" / "measured" / "tasks.json").read_text(encoding="utf-8"))["rows"]
    good = ", ".join(f"`{row['task']}`" for row in rows if row["holds"])
    bad = [(f"`{row['task']}`", row["why"].replace("|", r"\|")) for row in rows if not row["holds"]]
    lines = f"{len(rows) - len(bad)} of {len(rows)} hold on {rows[0]['items']} items: {good}.\n\n"
    return lines + _table(("task that does not", "why"), bad)


REFERENCE = {
    "keys": keys_table,
    "objectives": objectives_table,
    "shapes": shapes_table,
    "rewards": rewards_table,
    "checks": checks_table,
    "tasks": tasks_table,
}
WHOLE = {"engine": "the scripts of `make bench`"}
"""What a table of requirements names in place of many commands; the full table has them."""
CONTENT = {
    "measured": lambda name: measured_table(_measured(name)),
    "required": lambda name: measured_table([row for row in _measured(name) if "met" in row], WHOLE.get(name)),
    "reference": lambda name: REFERENCE[name](),
}


def _measured(name: str) -> list[dict[str, Any]]:
    return json.loads((ROOT / "docs" / "measured" / f"{name}.json").read_text(encoding="utf-8"))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def _value(value: float, unit: str) -> str:
    match unit:
        case "share":
            return f"{value:.1%}".replace("%", " %")
        case "difference":
            return f"{100 * value:+.1f} points"
        case "nats/token":
            return f"{value:.3f} nats/token"
        case "times":
            return f"{value:.2f} times"
        case "GB":
            return f"{value:.1f} GB"
    return f"{value:,.0f} {unit}" if value >= 10 else f"{value:.2f} {unit}"


def _interval(row: dict[str, Any]) -> str:
    ends = row.get("interval") or row.get("spread")
    if not ends:
        return ""
    low, high = (_value(end, row["unit"]) for end in ends)
    return f"{low.split()[0]} to {high}"


def _required(row: dict[str, Any]) -> str:
    for key in ("at_least", "at_most"):
        if key in row:
            return f"{key.replace('_', ' ')} {_value(row[key], row['unit']).lstrip('+')}"
    return ""


def main(check: bool) -> int:
    stale = []
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = rendered(before)
        if after != before:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(after, encoding="utf-8")
    if stale:
        print(f"{'out of date' if check else 'written'}: {', '.join(stale)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
