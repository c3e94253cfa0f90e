"""Rewards: what an answer is worth. `TABLE` is all there are, with where each comes from."""

from __future__ import annotations

from posttrain.records import Entry
from posttrain.rewards.sources import build

__all__ = ["TABLE", "build"]

TABLE: dict[str, Entry] = {
    "verifier": Entry("A generated task's own check, exact or nothing", "Stojanovski et al., 2505.24760"),
    "math": Entry("Equal to the reference answer as mathematics", "Kydlicek et al., Math-Verify"),
    "exact": Entry("Equal to the reference answer in its words", "Rajpurkar et al., 1606.05250"),
    "regex": Entry("Matches a pattern as a whole", "Python's re"),
    "json_schema": Entry("JSON that a schema allows", "JSON Schema, draft 2020-12"),
    "format": Entry("Laid out in tags, such as think and answer", "DeepSeek-AI, 2501.12948"),
    "length": Entry("Soft punishment of overlong answers", "Yu et al., 2503.14476"),
    "instructions": Entry("Keeps to instructions on its form", "Zhou et al., 2311.07911"),
    "python": Entry("Its code passes unit tests, in a sandbox", "Chen et al., 2107.03374"),
    "model": Entry("The number of a Bradley-Terry reward model", "Ouyang et al., 2203.02155"),
    "process": Entry("The chances that its steps are good, by a process reward model", "Lightman et al., 2305.20050"),
    "judge": Entry("The grade of a language model, or its share of wins", "Zheng et al., 2306.05685"),
    "implicit": Entry("The log-ratio of a model and its reference", "Rafailov et al., 2305.18290"),
    "majority": Entry("The answer that most of its group give, without labels", "Zuo et al., 2504.16084"),
    "ensemble": Entry("Several taken for one: mean, worst, or penalised by their spread", "Coste et al., 2310.02743"),
}
"""The kinds of reward a recipe may name; what `posttrain rewards` lists."""
