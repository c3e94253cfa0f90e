"""Credit: from scored rollouts to what is learned from them, one file per algorithm."""

from posttrain.credit.advantages import group_advantages
from posttrain.credit.batch import Counted, Credited, as_row, groups
from posttrain.credit.grpo import advantages, grpo
from posttrain.credit.pairs import best_and_worst, pairs

__all__ = [
    "Counted",
    "Credited",
    "advantages",
    "as_row",
    "best_and_worst",
    "group_advantages",
    "groups",
    "grpo",
    "pairs",
]
