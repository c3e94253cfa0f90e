"""Training: one loop, and a short file for each method."""

from typing import NamedTuple


class Entry(NamedTuple):
    summary: str
    paper: str


METHODS: dict[str, Entry] = {
    "sft": Entry("Supervised fine-tuning on the assistant's tokens", "maximum likelihood"),
    "preference": Entry(
        "DPO and the losses after it: pairs, lists or labelled answers, from a file or on-policy",
        "Rafailov et al., 2305.18290",
    ),
    "reward_model": Entry("Bradley-Terry reward model on pairs from a file", "Ouyang et al., 2203.02155"),
    "process_reward_model": Entry(
        "Process reward model on solutions whose steps are labelled", "Lightman et al., 2305.20050"
    ),
    "grpo": Entry(
        "Policy gradient on groups: GRPO, Dr. GRPO, DAPO, GSPO, CISPO, SAPO, GMPO, VESPO, RLOO, REINFORCE++",
        "Shao et al., 2402.03300",
    ),
    "ppo": Entry("Proximal policy optimisation with a critic", "Schulman et al., 1707.06347"),
}
"""The kinds of stage; what `posttrain methods` lists."""
