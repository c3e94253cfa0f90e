"""Single questions to a model, without a recipe: `posttrain sample` and `posttrain eval`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.data.chat import Renderer
from posttrain.evals import suites
from posttrain.models.policy import load
from posttrain.recipe.blocks import Sampling, Source
from posttrain.recipe.schema import Evals, Suite
from posttrain.records import Example
from posttrain.rewards.verifier import verify
from posttrain.sampling.local import LocalSampler


def sample(
    model: str, prompts: Sequence[str], n: int, temperature: float, max_new_tokens: int, seed: int, system: str | None
) -> list[dict[str, Any]]:
    """`n` answers to each prompt, with how each ended and its log-probability in nats."""
    policy = load(model)
    asked = [Example(f"prompt {i + 1}", ({"role": "user", "content": text},)) for i, text in enumerate(prompts)]
    how = Sampling(temperature=temperature, max_new_tokens=max_new_tokens)
    rollouts, _ = LocalSampler(policy, Renderer(policy.tokenizer, system=system))(asked, n, how, seed)
    return [
        {
            "prompt": prompts[r.group],
            "text": r.text,
            "finish": r.finish,
            "tokens": len(r.ids),
            "logp": sum(r.logps),
            "weights": r.weights,
        }
        for r in rollouts
    ]


def evaluate(model: str, task: str, rows: int, seed: int, against: str | None) -> dict[str, Any]:
    """Accuracy on `rows` items of a task with its interval, and the paired difference from `against`."""
    suite = Suite(id="task", role="trained", source=Source(source=task, rows=rows, seed=seed))
    evals = Evals(suites=(suite,))
    items = {"task": suites.items(suite)}
    answers, found = {}, {}
    for name in filter(None, (against, model)):
        policy = load(name)
        sampler = LocalSampler(policy, Renderer(policy.tokenizer))
        answers[name], _ = suites.answer(items, evals, sampler, verify, seed)
        found = suites.summarise(answers[name], evals, name, policy.digest())[0]
    result: dict[str, Any] = {"task": task, "model": model}
    result |= {key: found[key] for key in ("n", "score", "interval", "unparsed", "lenient", "errors")}
    if against is not None and against != model:
        compared = suites.compare(answers, evals, model, [against])
        result["comparison"] = (
            {k: v for k, v in compared[0].items() if k not in ("suite", "stage")} if compared else None
        )
    return result
