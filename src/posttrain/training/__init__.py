"""Training: one loop, and a short file for each method."""

from posttrain.records import Entry

METHODS: dict[str, Entry] = {
    "continued_pretraining": Entry("Likelihood of raw text", "Gururangan et al., 2004.10964"),
    "sft": Entry("Supervised fine-tuning on the assistant's tokens: likelihood, or DFT", "Wu et al., 2508.05629 (dft)"),
    "distill": Entry(
        "A teacher's distributions or answers: sequence-level, off-policy, on-policy (GKD)",
        "Agarwal et al., 2306.13649",
    ),
    "constitutional": Entry(
        "Answers that the model criticised and revised by written principles (Constitutional AI)",
        "Bai et al., 2212.08073",
    ),
    "preference": Entry(
        "DPO and the losses after it: pairs, lists or labelled answers, from a file or on-policy",
        "Rafailov et al., 2305.18290",
    ),
    "reward_model": Entry("Bradley-Terry reward model on pairs from a file", "Ouyang et al., 2203.02155"),
    "process_reward_model": Entry(
        "Process reward model on solutions whose steps are labelled", "Lightman et al., 2305.20050"
    ),
    "rejection_sampling": Entry(
        "Learn the right ones of its own answers: RFT, STaR with rationalisation, ReST and expert iteration",
        "Yuan et al., 2308.01825; Zelikman et al., 2203.14465; Gulcehre et al., 2308.08998",
    ),
    "online_preference": Entry(
        "Preferences between answers sampled while training: online DPO, Nash-MD, XPO",
        "Guo et al., 2402.04792; Munos et al., 2312.00886; Xie et al., 2405.21046",
    ),
    "self_rewarding": Entry(
        "Rounds of DPO on answers that the model graded itself, and on its judgements (meta-judge)",
        "Yuan et al., 2401.10020; Wu et al., 2407.19594",
    ),
    "grpo": Entry(
        "Policy gradient on groups: GRPO, Dr. GRPO, DAPO, GSPO, CISPO, SAPO, GMPO, VESPO, RLOO, REINFORCE++, PRIME",
        "Shao et al., 2402.03300",
    ),
    "ppo": Entry("Proximal policy optimisation with a critic", "Schulman et al., 1707.06347"),
}
"""The kinds of stage; what `posttrain methods` lists."""
