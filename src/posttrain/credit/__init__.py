"""Credit: from scored rollouts to what is learned from them, one file per algorithm."""

from posttrain.credit.advantages import group_advantages
from posttrain.credit.batch import Counted, Credited, as_row, groups
from posttrain.credit.gae import gae
from posttrain.credit.grpo import grpo
from posttrain.credit.minillm import minillm
from posttrain.credit.pairs import best_and_worst, pairs, rankings
from posttrain.credit.prime import process_returns
from posttrain.credit.reinforce import reinforce, whiten
from posttrain.credit.rloo import leave_one_out, rloo

__all__ = [
    "Counted",
    "Credited",
    "as_row",
    "best_and_worst",
    "gae",
    "group_advantages",
    "groups",
    "grpo",
    "leave_one_out",
    "minillm",
    "pairs",
    "process_returns",
    "rankings",
    "reinforce",
    "rloo",
    "whiten",
]
