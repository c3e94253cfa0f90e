"""What a stage asks of a sampler, and what of its own answers it learns: by its kind, for the plan and the memory."""

from __future__ import annotations

from typing import NamedTuple

from posttrain.recipe.blocks import Sampling
from posttrain.recipe.preference import OnlinePreference, PairSampling, Preference, SelfRewarding
from posttrain.recipe.rl import Grpo, RejectionSampling, Rl
from posttrain.recipe.schema import Stage
from posttrain.recipe.scoring import ProcessRewardModel, StepSampling
from posttrain.recipe.supervised import Constitutional, Distill


class Call(NamedTuple):
    """What a sampler is asked at a time."""

    prompts: int
    n: int
    """Completions to each."""
    sampling: Sampling
    times: float = 1
    """How often a stage asks so, at most."""


class Asks(NamedTuple):
    together: int
    """Answers to a prompt that are learned from together; they are drawn in the first of the calls."""
    calls: tuple[Call, ...]
    """The last is that which takes the most memory."""

    @property
    def sampling(self) -> Sampling:
        """How the answers that are learned are drawn."""
        return self.calls[0].sampling

    @property
    def tokens(self) -> float:
        """That are generated, at most."""
        return sum(call.times * call.prompts * call.n * call.sampling.max_new_tokens for call in self.calls)


def asks(stage: Stage, rows: int) -> Asks | None:
    """What the stage asks where its data hold so many prompts; None where it learns what stands in them alone.

    Process rewards are left out: how many steps a solution has, and so is completed from, only shows.
    """
    once = min(rows, stage.steps * stage.batch_size)  # where each prompt that the steps come to is answered before them
    match stage:
        case Distill(mode="sequence"):
            return Asks(1, (Call(once, 1, stage.sampling),))
        case Distill(mode="on_policy"):
            return Asks(1, (Call(stage.batch_size, 1, stage.sampling, stage.steps * stage.student_share),))
        case Constitutional():
            return Asks(1, (Call(once, 1, stage.sampling, 1 + 2 * stage.rounds),))
        case Preference(on_policy=PairSampling() as how):
            return Asks(stage.width, (Call(how.prompts, how.n, how),))
        case ProcessRewardModel(rollouts=StepSampling() as how):
            return Asks(1, (Call(how.prompts, how.solutions, how),))
        case RejectionSampling():
            times = stage.rounds * (2 if stage.hint else 1)
            return Asks(1, (Call(stage.prompts, stage.n, stage.sampling, times),))
        case OnlinePreference():
            return Asks(stage.sides, (Call(stage.batch_size, stage.n, stage.sampling, stage.steps),))
        case SelfRewarding():
            judging, answers = stage.judging, stage.prompts * stage.n
            calls = [Call(stage.prompts, stage.n, stage.sampling), Call(answers, judging.n, judging)]
            if stage.meta_judge:
                calls.append(Call(stage.prompts * judging.n * (judging.n - 1), 1, judging))
            return Asks(2, tuple(call._replace(times=stage.rounds) for call in calls))
        case Rl():
            draws = stage.max_draws if isinstance(stage, Grpo) else 1
            batches = -(-stage.steps // stage.period)
            return Asks(stage.n, (Call(stage.batch_size, stage.n, stage.whole, batches * draws),))
    return None
