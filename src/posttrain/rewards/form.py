"""Whether an answer is laid out as asked: one part in each tag, in order, and nothing besides."""

from __future__ import annotations

from posttrain.recipe.rewards import FormatReward
from posttrain.records import Example, Score
from posttrain.rewards.protocol import Cases, Rule
from posttrain.rewards.prove import nonsense


def tagged(reward: FormatReward) -> Rule:
    """The format reward of DeepSeek-R1 (2501.12948). Departure: parts must not be empty, and no tag may come twice."""
    tags = reward.tags

    def score(example: Example, text: str) -> Score:
        rest = text.strip()
        for tag in tags:
            opening, closing = f"<{tag}>", f"</{tag}>"
            if text.count(opening) != 1 or text.count(closing) != 1:
                return Score(0.0, "unparsed", None, f"not exactly one {opening} and one {closing}")
            if not rest.startswith(opening):
                return Score(0.0, "unparsed", None, f"{opening} does not stand where it must")
            part, _, rest = rest.removeprefix(opening).partition(closing)
            if not part.strip():
                return Score(0.0, "unparsed", None, f"nothing stands in {opening}")
            if any(mark in part for other in tags for mark in (f"<{other}>", f"</{other}>")):
                return Score(0.0, "unparsed", None, f"a tag stands inside {opening}")
            rest = rest.lstrip()
        if rest:
            return Score(0.0, "unparsed", None, "text behind the last tag")
        return Score(1.0, "correct", part.strip())

    def cases(example: Example) -> Cases:
        parts = [f"<{tag}>some words</{tag}>" for tag in tags]
        good = "\n".join(parts)
        wrong = {
            "an empty part": good.replace("some words", " "),
            "everything twice": good * 2,
            "text before": f"So: {good}",
            "text behind": f"{good} So.",
            "a part left out": "\n".join(parts[:-1]),
            "a tag left open": good.removesuffix(f"</{tags[-1]}>"),
        }
        if len(tags) > 1:
            wrong["the other order"] = "\n".join(reversed(parts))
        return Cases({"the format": good}, nonsense(example) | wrong)

    return Rule(score, cases, where="here", form=True)
