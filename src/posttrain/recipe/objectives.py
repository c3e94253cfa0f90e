"""The losses of a preference stage: what each one compares, which parameters it reads, and their papers' values.

The functions themselves are torch's business and stand in `posttrain.losses`; `training/preference.py` joins the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

Loss = Literal[
    "dpo", "dpo_norm", "hinge", "ipo", "robust", "exo", "nca", "bco", "sppo", "aot", "aot_paired", "apo_zero",
    "apo_down", "discopop", "cpo", "simpo", "alphapo", "orpo", "tpo", "rrhf", "pro", "lipo", "kto",
    "apo_zero_unpaired", "bco_unpaired",
]  # fmt: skip
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
Values = Mapping[str, float | str]


class Objective(NamedTuple):
    summary: str
    paper: str
    of: Literal["pairs", "triples", "lists", "answers"]
    """What it compares: a better and a worse answer to one prompt; these and a third that is learned as it stands; all
    of several, ranked; single ones that bear a label."""
    score: Literal["sum", "mean", "odds", "alpha"]
    """What it makes of an answer's log-probabilities; `odds` and `alpha` (AlphaPO's) are functions of their mean."""
    reference: bool
    """Whether those are taken relative to a reference model's."""
    reads: Values
    """The parameters that it takes, with their defaults."""
    whole_step: bool = False
    """Whether an answer's loss depends on the others of its step: their order (AOT) or their mean (KTO, BCO)."""

    def parameters(self, divergence: str | None) -> Values:
        """What it reads; `alpha` is read where the divergence is that of this name."""
        if "divergence" in self.reads and divergence != "alpha":
            return {name: value for name, value in self.reads.items() if name != "alpha"}
        return self.reads


_SORTED: Values = {"beta": 0.1, "label_smoothing": 0.0, "nll_weight": 0.0}
_PAIR: Values = {"nll_weight": 0.0, "weighting": False}
_SUMS: Values = {**_PAIR, "length_alpha": 1.0}
_RATIOS: Values = {"divergence": "reverse_kl", "alpha": 0.5}

# Where the less usual ones are from: hinge, RSO (gamma); dpo_norm, the command that trained Tulu 3 (open-instruct,
# docs/tulu3.md); sppo, 1 / eta with eta = 1000, as in the authors' scripts/pipeline.sh; simpo, what the authors' README
# begins with (gamma / beta = 0.5) and took for Llama 3; alphapo, Table 3 (Mistral); lipo, section 5.
OBJECTIVES: dict[Loss, Objective] = {
    "dpo": Objective(
        "Direct preference optimisation; cDPO with label_smoothing", "Rafailov et al., 2305.18290", "pairs", "sum",
        True, {"beta": 0.1, "label_smoothing": 0.0, **_RATIOS, **_SUMS},
    ),
    "dpo_norm": Objective(
        "DPO on means over tokens, not sums", "Lambert et al., 2411.15124", "pairs", "mean", True,
        {"beta": 5.0, "label_smoothing": 0.0, **_RATIOS, **_PAIR},
    ),
    "hinge": Objective(
        "A margin to reach; SLiC's loss on RSO's scores", "Zhao et al., 2305.10425; Liu et al., 2309.06657", "pairs",
        "sum", True, {"beta": 0.05, **_RATIOS, **_SUMS},
    ),
    "ipo": Objective(
        "A margin of means to reach, not to exceed", "Azar et al., 2310.12036", "pairs", "mean", True,
        {"beta": 0.1, **_RATIOS, **_PAIR},
    ),
    "robust": Objective(
        "DPO, unbiased where a share of the labels is flipped", "Chowdhury et al., 2403.00409", "pairs", "sum", True,
        {"beta": 0.01, "label_smoothing": 0.1, **_RATIOS, **_SUMS},
    ),
    "exo": Objective(
        "The reverse of DPO's KL", "Ji et al., 2402.00856", "pairs", "sum", True,
        {"beta": 0.1, "label_smoothing": 1e-3, **_RATIOS, **_SUMS},
    ),
    "nca": Objective(
        "Each side against the reference", "Chen et al., 2402.05369", "pairs", "sum", True, {"beta": 0.01, **_SUMS}
    ),
    "bco": Objective(
        "Each side classified on its own", "Jung et al., 2404.04656", "pairs", "sum", True, {"beta": 0.01, **_SUMS}
    ),
    "sppo": Objective(
        "Self-play with hard labels: a value for each side", "Wu et al., 2405.00675", "pairs", "sum", True,
        {"beta": 1e-3, **_SUMS},
    ),
    "aot": Objective(
        "Chosen answers dominate rejected ones as distributions", "Melnyk et al., 2406.05882", "pairs", "sum", True,
        _SORTED, True,
    ),
    "aot_paired": Objective(
        "The policy's margins dominate the reference's", "Melnyk et al., 2406.05882", "pairs", "sum", True, _SORTED,
        True,
    ),
    "apo_zero": Objective(
        "Chosen up, rejected down: for data better than the model", "D'Oosterlinck et al., 2408.06266", "pairs", "sum",
        True, {"beta": 0.1, **_SUMS},
    ),
    "apo_down": Objective(
        "Both down, rejected more: for a model better than the data", "D'Oosterlinck et al., 2408.06266", "pairs",
        "sum", True, {"beta": 0.1, **_SUMS},
    ),
    "discopop": Objective(
        "Logistic and exponential, mixed by the margin", "Lu et al., 2406.08414", "pairs", "sum", True,
        {"beta": 0.05, "tau": 0.05, **_RATIOS, **_SUMS},
    ),
    "cpo": Objective(
        "DPO without a reference, with an NLL term", "Xu et al., 2401.08417", "pairs", "sum", False,
        {"beta": 0.1, "label_smoothing": 0.0, **_SUMS, "nll_weight": 1.0},
    ),
    "simpo": Objective(
        "Means over tokens, no reference, a target margin", "Meng et al., 2405.14734", "pairs", "mean", False,
        {"beta": 2.0, "gamma": 1.0, **_PAIR},
    ),
    "alphapo": Objective(
        "SimPO with another shape of the reward", "Gupta et al., 2501.03884", "pairs", "alpha", False,
        {"beta": 2.5, "gamma": 0.1, "alpha": 0.25, **_PAIR},
    ),
    "orpo": Objective(
        "NLL of the chosen answer, and beta times the log of the odds ratio", "Hong et al., 2403.07691", "pairs",
        "odds", False, {"beta": 0.1, **_PAIR, "nll_weight": 1.0},
    ),
    "tpo": Objective(
        "CPO whose NLL is that of a third answer, the data's own", "Saeidi et al., 2405.16681", "triples", "sum", False,
        {"beta": 0.01, "label_smoothing": 0.0, "nll_weight": 1.0},
    ),
    "rrhf": Objective(
        "Every better answer above every worse one", "Yuan et al., 2304.05302", "lists", "mean", False,
        {"nll_weight": 1.0},
    ),
    "pro": Objective(
        "Each answer against all worse ones (Plackett-Luce)", "Song et al., 2306.17492", "lists", "mean", False,
        {"nll_weight": 0.05},
    ),
    "lipo": Objective(
        "Pairs of a list, weighed by what their exchange would cost", "Liu et al., 2402.01878", "lists", "sum", True,
        {"beta": 0.05, "nll_weight": 0.0},
    ),
    "kto": Objective(
        "Kahneman-Tversky: gains and losses against a reference point", "Ethayarajh et al., 2402.01306", "answers",
        "sum", True, {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}, True,
    ),
    "apo_zero_unpaired": Objective(
        "Good answers up, bad ones down", "D'Oosterlinck et al., 2408.06266", "answers", "sum", True, {"beta": 0.1}
    ),
    "bco_unpaired": Objective(
        "Good and bad answers classified about their mean", "Jung et al., 2404.04656", "answers", "sum", True,
        {"beta": 0.01}, True,
    ),
}  # fmt: skip
PARAMETERS = tuple(dict.fromkeys(name for objective in OBJECTIVES.values() for name in objective.reads))
"""All that some loss reads."""
