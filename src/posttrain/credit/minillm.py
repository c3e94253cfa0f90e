"""On-policy distillation as reinforcement: a token is worth what the teacher thinks of it, and of what follows it."""

from __future__ import annotations

from collections.abc import Sequence


def minillm(
    student_logps: Sequence[float], teacher_logps: Sequence[float], *, gamma: float = 1.0, mean: bool = True
) -> list[float]:
    """Advantages of one completion's tokens, nats (MiniLLM, Gu et al., 2306.08543), to be used in a policy gradient.

    r_t = log teacher - log student of the token that the student sampled, whose mean is -KL(student, teacher);
    A_t = sum_i>=t gamma^(i - t) r_i, and with `mean`, the paper's length normalisation, that over the sum of
    gamma^(i - t). gamma = 0 looks at the token alone, as in TRL's default. The paper takes the mean from t + 1 on and
    the token's own part as an exact KL (`losses.jsd` with beta 1).
    """
    advantages, total, weight = [0.0] * len(student_logps), 0.0, 0.0
    rewards = [teacher - student for student, teacher in zip(student_logps, teacher_logps, strict=True)]
    for t in reversed(range(len(rewards))):
        total, weight = rewards[t] + gamma * total, 1 + gamma * weight
        advantages[t] = total / weight if mean else total
    return advantages
