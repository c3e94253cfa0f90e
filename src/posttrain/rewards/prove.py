"""A rule proves itself before a run may use it: what is right earns 1, and what only looks like it does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from posttrain.records import Example, Score, UserError
from posttrain.rewards.protocol import Cases, Rule
from posttrain.rewards.text import same

PROOF = 16
"""Examples on which a rule must prove itself."""
FEW = 4
BY_CHANCE = 0.2


def prove(rule: Rule, examples: Sequence[Example], score: Callable[[Example, str], Score]) -> list[str]:
    """Why `rule` must not be trained on; empty if it holds on `examples`.

    Each case that is right must earn 1, each that is wrong less, and a score it must be. Unless the rule looks at form
    alone, there must be one that is right, which must not be right for most others. `score` is the rule's own, or that
    of a worker which it runs in.
    """
    if not examples:
        raise UserError("a rule cannot be proven on no example")
    failures = []
    golds: list[tuple[Example, str]] = []
    for example in examples:
        cases = rule.cases(example)
        golds += [(example, text) for text in list(cases.right.values())[:1]]
        if not cases.right and not rule.form:
            failures.append(f"{example.id}: there is no answer known to be right")
        for what, text in cases.right.items():
            if (got := score(example, text)).value != 1.0:
                failures.append(f"{example.id}: {what} earned {_told(got)}: {text[:80]!r}")
        for what, text in cases.wrong.items():
            if (got := score(example, text)).value is None or got.value >= 1.0:
                failures.append(f"{example.id}: {what} earned {_told(got)}: {text[:80]!r}")
    return failures if rule.form else failures + _constants(golds, score)


def reference_cases(example: Example) -> Cases:
    """The cases of a rule that compares an answer with the example's reference answer."""
    gold = example.answer
    if gold is None:
        return Cases()
    return Cases(
        {"the reference answer": gold},
        {what: text for what, text in wrong(example, gold).items() if not same(text, gold)},
    )


def wrong(example: Example, gold: str) -> dict[str, str]:
    """What is near the answer `gold`, or holds it, and is not it; and what is nothing at all."""
    return nonsense(example) | {
        "the answer's beginning": gold[:3],
        "half of the answer": gold[: len(gold) // 2],
        "the answer in prose": f"I believe that the answer is {gold}.",
        "a list with the answer first": f"{gold} or qwxz",
        "a list with the answer last": f"5 or {gold}",
        "the answer twice": f"{gold}, {gold}",
    }


def nonsense(example: Example) -> dict[str, str]:
    """What answers nothing, and costs a model nothing to say."""
    return {
        "nothing": "",
        "garbage": "qwxz vlk",
        "punctuation": "?!",
        "the question": "\n".join(str(m["content"]) for m in example.prompt),
    }


def _constants(golds: Sequence[tuple[Example, str]], score: Callable[[Example, str], Score]) -> list[str]:
    """Answers of one example that are right for too many others. Some tasks have several right answers each, so
    one hit by chance is no failure; with few distinct answers a constant says nothing of the rule."""
    counts = Counter(gold for _, gold in golds)
    if len(counts) <= FEW:
        return []
    failures = []
    for constant, _ in counts.most_common(3):
        others = [example for example, gold in golds if not same(constant, gold)]
        earned = sum(score(example, constant).value == 1.0 for example in others) / max(1, len(others))
        if earned > BY_CHANCE:
            failures.append(
                f"one constant is right for {earned:.0%} of the items it is no answer to: {constant[:80]!r}"
            )
    return failures


def _told(score: Score) -> str:
    return f"{score.value} ({score.why or score.outcome})"
