"""The rewards of a recipe that are models, by their blocks."""

from __future__ import annotations

from pathlib import Path

from posttrain.data.chat import Renderer
from posttrain.models.policy import Policy, load, outline
from posttrain.models.reward import headed, load_reward_model
from posttrain.models.source import resolve
from posttrain.recipe.blocks import Sampling
from posttrain.recipe.rewards import STAGE, ImplicitReward, JudgeReward, ModelReward, ProcessReward, Reward
from posttrain.rewards.implicit import check_tokens, implicit_scorer
from posttrain.rewards.judge import RUBRIC, Judge, PairJudge, tournament
from posttrain.rewards.model import model_scorer
from posttrain.rewards.process import process_scorer
from posttrain.rewards.protocol import Scorer
from posttrain.sampling.local import LocalSampler

Learned = ModelReward | ProcessReward | JudgeReward | ImplicitReward


def learned(reward: Learned, renderer: Renderer, device: str = "auto") -> Scorer:
    """The scorer that `reward` asks for, its models loaded, of answers by the model whose renderer is given.

    Raises:
        UserError: a model cannot be had, has no head that scores, or cannot read these answers.
    """

    def model(source: str, revision: str | None = None) -> Policy:
        return load(source, revision=revision, device=device)

    if isinstance(reward, ModelReward | ProcessReward):
        scoring = load_reward_model(reward.source, revision=reward.revision, device=device)
        if isinstance(reward, ModelReward):
            return model_scorer(scoring, renderer)
        return process_scorer(scoring, renderer, aggregate=reward.aggregate, separator=reward.separator)
    if isinstance(reward, ImplicitReward):
        return implicit_scorer(model(reward.source), model(reward.reference), renderer, beta=reward.beta)
    judge = model(reward.source, reward.revision)
    sampler = LocalSampler(judge, Renderer(judge.tokenizer))
    rubric, sampling = reward.rubric or RUBRIC, Sampling(temperature=0.0, max_new_tokens=reward.max_new_tokens)
    if reward.compare:
        return tournament(PairJudge(sampler, rubric, sampling=sampling))
    return Judge(sampler, rubric, low=reward.low, high=reward.high, sampling=sampling)


def located(reward: Reward, stages: Path) -> Reward:
    """`reward` with the model of `stage:ID`, if it names one, as that stage left it in the folder `stages`."""
    if not isinstance(reward, ModelReward | ProcessReward) or not reward.source.startswith(STAGE):
        return reward
    return reward.model_copy(update={"source": str(stages / reward.source.removeprefix(STAGE) / "artifact")})


def check(reward: Learned) -> None:
    """Refuse what can be told before any weights are read.

    Raises:
        UserError: a model is not there, has no head that scores, or has other tokens than its reference.
    """
    if isinstance(reward, ModelReward | ProcessReward):
        if not reward.source.startswith(STAGE):  # else it is not trained yet
            headed(reward.source, reward.revision)
    elif isinstance(reward, JudgeReward):
        resolve(reward.source, reward.revision)
    else:
        check_tokens(outline(reward.source), outline(reward.reference))
