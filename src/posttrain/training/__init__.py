"""Training: one loop, and a short file for each method."""

from typing import NamedTuple


class Entry(NamedTuple):
    summary: str
    paper: str


METHODS: dict[str, Entry] = {
    "sft": Entry("Supervised fine-tuning on the assistant's tokens", "maximum likelihood"),
    "dpo": Entry("Direct preference optimisation, pairs from a file or on-policy", "Rafailov et al., 2305.18290"),
    "reward_model": Entry("Bradley-Terry reward model on pairs from a file", "Ouyang et al., 2203.02155"),
    "process_reward_model": Entry(
        "Process reward model on solutions whose steps are labelled", "Lightman et al., 2305.20050"
    ),
    "grpo": Entry("Group-relative policy optimisation with a verifier's reward", "Shao et al., 2402.03300"),
}
"""The kinds of stage; what `posttrain methods` lists."""
