"""What every block of a recipe is made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Misfit(ValueError):
    """Keys that are right by themselves and wrong together: (path below this block, what) for each problem."""

    def __init__(self, *problems: tuple[tuple[str | int, ...], str]) -> None:
        super().__init__("; ".join(what for _, what in problems))
        self.problems = problems


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)
