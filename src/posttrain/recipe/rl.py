"""Stages that learn from their own samples and what rewards say of them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain.recipe.base import Block, Misfit
from posttrain.recipe.blocks import GREEDY_GROUP, Sampling
from posttrain.recipe.rewards import Rewarded
from posttrain.recipe.stage import Rounds, SamplingStage


class Endpoint(Block):
    """An inference server that completions are drawn from. Its API key, if it asks for one, comes from the environment
    variable POSTTRAIN_ENDPOINT_KEY."""

    url: str = Field(pattern=r"^https?://", description="Where it answers, without /v1: http://gpu7:8000.")
    engine: Literal["vllm", "sglang"] = Field(description="What it runs; vllm only where an adapter is trained.")
    timeout_s: float = Field(600.0, gt=0, description="Seconds to wait for one answer.")
    retries: int = Field(5, ge=0, description="Further attempts where it is busy, restarting or cut off.")


class ToolsEnvironment(Block):
    """Tools that the model may call before it answers: an episode goes on until a turn without a call, the answer."""

    tools: tuple[Literal["calculator", "python"], ...] = Field(min_length=1, description="What it may call.")
    plain: bool = Field(
        False,
        description="Describe the tools in the system message, and tell their results as the user: for a chat template "
        "that shows no tools.",
    )
    tokens: int = Field(
        512,
        ge=1,
        description="Longest episode behind its prompt, in tokens, with what tools say; max_new_tokens is of one turn.",
    )
    timeout_s: float = Field(5.0, gt=0, description="Seconds after which a program given to python is ended.")

    @model_validator(mode="after")
    def _tools_differ(self) -> ToolsEnvironment:
        if len(set(self.tools)) < len(self.tools):
            raise Misfit((("tools",), "names one tool twice"))
        return self


class Rl(Rewarded, SamplingStage):
    """What every stage has that follows the gradient of its rewards."""

    n: int = Field(1, ge=1, description="Completions per prompt.")
    iterations: int = Field(1, ge=1, description="How often each batch of rollouts is gone through.")
    minibatches: int = Field(
        1, ge=1, description="Optimiser steps in which it is gone through each time, each on a part of its completions."
    )
    staleness: int = Field(
        0,
        ge=0,
        description="Batches by which the sampler may be behind the weights, so that it works while they are trained; "
        "0 is on-policy. Nothing is ahead of a checkpoint.",
    )
    clip_low: float = Field(0.2, ge=0, lt=1, description="Ratio is clipped below at 1 - clip_low.")
    clip_high: float = Field(0.2, ge=0, description="... and above at 1 + clip_high (clip-higher: 0.28).")
    ratio_cap: float | None = Field(
        None, gt=1, description="Cap on the ratio where the advantage is negative (dual clip)."
    )
    entropy_weight: float = Field(
        0.0, ge=0, description="Weight of the next token's entropy, which is added to what is maximised."
    )
    mask_truncated: bool = Field(
        False, description="A completion that was cut off is compared with, and not learned from (DAPO)."
    )
    curriculum: int = Field(
        1,
        ge=1,
        description="How many times batch_size prompts each batch is chosen from: those nearest to being answered "
        "correctly half of the time so far, new ones first; 1 takes all in turn.",
    )
    reference_reset: int = Field(
        0, ge=0, description="Steps after which the reference of the KL penalty becomes the model of now; 0: never."
    )
    importance: Literal["truncate", "mask", "none"] = Field(
        "truncate",
        description="Correction for sampler and trainer disagreeing: weight exp(trainer - sampler) "
        "cut at importance_cap, or dropped above it.",
    )
    importance_cap: float = Field(2.0, gt=1, description="Largest such weight.")
    endpoint: Endpoint | None = Field(
        None, description="A server that draws the completions in place of the local engine."
    )
    environment: ToolsEnvironment | None = Field(
        None, description="What the model acts in before it answers; default: nothing. `rewards` score the answer."
    )

    @property
    def whole(self) -> Sampling:
        """`sampling`, as long as all that may follow a prompt."""
        if self.environment is None:
            return self.sampling
        return self.sampling.model_copy(update={"max_new_tokens": self.environment.tokens})

    @property
    def period(self) -> int:
        """Optimiser steps on one batch of rollouts."""
        return self.iterations * self.minibatches

    @model_validator(mode="after")
    def _rollouts_fit(self) -> Rl:
        problems: list[tuple[tuple[str | int, ...], str]] = []
        if self.sampling.temperature == 0:
            problems.append((("sampling", "temperature"), GREEDY_GROUP))
        if self.reference_reset % self.period:
            what = f"a batch of rollouts serves {self.period} steps (iterations x minibatches); take a multiple of that"
            problems.append((("reference_reset",), what))
        if problems:
            raise Misfit(*problems)
        return self


HINT = "{answer}"


class RejectionSampling(Rewarded, Rounds):
    """Sample, keep what is right, learn it as if it stood in the data: RFT (Yuan et al., 2308.01825) in one round,
    expert iteration (ReST, 2308.08998; ReST-EM, 2312.06585) in several, STaR (2203.14465) with a hint."""

    kind: Literal["rejection_sampling"] = Field(description="The method.")
    n: int = Field(8, ge=1, description="Completions per prompt.")
    at_least: float = Field(1.0, description="A completion is kept that earns this or more, and that came to its end.")
    most: int | None = Field(
        None, ge=1, description="Most completions kept of one prompt in a round, different ones (ReST-EM: 10)."
    )
    hint: str | None = Field(
        None,
        description="Where none is kept, the prompt is asked again with this below it, {answer} being the reference "
        "answer; what is kept then is learned without it (STaR's rationalisation).",
    )

    @model_validator(mode="after")
    def _answers_fit(self) -> RejectionSampling:
        problems: list[tuple[tuple[str | int, ...], str]] = []
        if self.sampling.temperature == 0 and self.n > 1:
            problems.append((("n",), "must be 1 at temperature 0, where the completions of a prompt are all the same"))
        if self.hint is not None and HINT not in self.hint:
            problems.append((("hint",), f"does not say where the answer stands: write {HINT} there"))
        if problems:
            raise Misfit(*problems)
        return self


READ: dict[str, dict[str, tuple[str, ...]]] = {
    "objective": {
        "clip": ("ratio", "clip_low", "clip_high", "ratio_cap"),
        "cispo": ("ratio", "cispo_cap"),
        "sapo": ("ratio", "sapo_tau"),
        "gmpo": ("gmpo_clip",),
        "vespo": ("vespo_positive", "vespo_negative"),
    },
    "advantage": {"group": ("baseline_std", "std_eps"), "leave_one_out": (), "whitened": ()},
    "kl_in": {"loss": ("kl_corrected",), "reward": ()},
}
"""Which keys of a grpo stage each value of another one reads; those that its value does not read must not be set."""


class Prime(Block):
    """Process rewards from a model that learns, while the policy is trained, which answers are right (PRIME, Cui et
    al., 2502.01456): a second set of the weights that the policy trains, with moments of its own."""

    beta: float = Field(
        0.05, gt=0, description="A token earns this times its log-ratio of that model to the stage's starting model."
    )
    gamma: float = Field(1.0, gt=0, le=1, description="Discount of a process reward for each token before it.")
    lr: float = Field(1e-4, gt=0, description="Learning rate of that model, constant; twice the policy's in the paper.")


class Grpo(Rl):
    """Policy gradient on groups of completions (Shao et al., 2402.03300) in its many forms, no critic."""

    kind: Literal["grpo"] = Field(description="The method.")
    n: int = Field(8, ge=1, description="Completions per prompt (the group).")
    max_draws: int = Field(
        1,
        ge=1,
        description="How often at most batch_size prompts are drawn until there are batch_size groups whose answers "
        "differ in reward (dynamic sampling, DAPO, 2503.14476); 1 takes the groups as they come.",
    )
    advantage: Literal["group", "leave_one_out", "whitened"] = Field(
        "group",
        description="What a completion is worth: its reward above the group's mean, above the mean of the others "
        "(RLOO, 2402.14740), or against all of the step (REINFORCE++, 2501.03262).",
    )
    prime: Prime | None = Field(
        None,
        description="Add to what a token is worth by the outcome what process rewards say of it, of a model that is "
        "learned on the way (PRIME); advantage must be leave_one_out.",
    )
    baseline_std: Literal["group", "batch", "none"] = Field(
        "group", description="What the reward above the group's mean is divided by; none is Dr. GRPO (2503.20783)."
    )
    std_eps: float = Field(1e-4, gt=0, description="Added to that deviation (which is the unbiased, n - 1, one).")
    objective: Literal["clip", "cispo", "sapo", "gmpo", "vespo"] = Field(
        "clip",
        description="What is minimised: PPO's clipped surrogate (1707.06347), or that of CISPO (2506.13585), SAPO "
        "(2511.20347), GMPO (2507.20673) or VESPO (2602.10693).",
    )
    ratio: Literal["token", "sequence", "sequence_token", "product"] = Field(
        "token",
        description="Importance ratio per token, or one per sequence: its tokens' geometric mean (GSPO, 2507.18071), "
        "the same with each token's own gradient (GSPO-token), or their product (RLOO).",
    )
    cispo_cap: float = Field(5.0, gt=0, description="Largest weight of a token; the paper's 1 + epsilon_high.")
    sapo_tau: tuple[float, float] = Field(
        (1.0, 1.05), description="How fast the gate closes where the advantage is positive, and where it is not."
    )
    gmpo_clip: float = Field(0.4, gt=0, description="Each token's log-ratio is held within this of 0.")
    vespo_positive: tuple[float, float] = Field((2.0, 3.0), description="Shape (k, b) of the weight, advantage >= 0.")
    vespo_negative: tuple[float, float] = Field((3.0, 2.0), description="... and where the advantage is negative.")
    aggregate: Literal["token", "sequence", "constant", "sum"] = Field(
        "token",
        description="Mean over the step's tokens (DAPO), mean over sequences of their means (GRPO), "
        "of their sums divided by max_new_tokens (Dr. GRPO), or of their sums (RLOO, LUSPO).",
    )
    kl_weight: float = Field(0.0, ge=0, description="Weight of the KL penalty towards the stage's starting model.")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k3", description="Schulman's estimators of that KL.")
    kl_in: Literal["loss", "reward"] = Field(
        "loss",
        description="loss: a term for each token. reward: taken off a completion's reward, summed over its tokens, "
        "before rewards are compared.",
    )
    kl_corrected: bool = Field(
        False,
        description="Multiply the term by the token's importance ratio and let the gradient through it: with k1 or k3 "
        "it is then the KL's own (DeepSeek-V3.2, 2512.02556).",
    )

    @model_validator(mode="after")
    def _read(self) -> Grpo:
        problems: list[tuple[tuple[str | int, ...], str]] = []
        for key, table in READ.items():
            mine = table[getattr(self, key)]
            for other in dict.fromkeys(name for names in table.values() for name in names if name not in mine):
                if other in self.model_fields_set and getattr(self, other) != type(self).model_fields[other].default:
                    what = f"{key}: {getattr(self, key)} does not read it"
                    problems.append(((other,), what + (f"; it reads {', '.join(mine)}" if mine else "")))
        if min(self.sapo_tau) <= 0:
            problems.append((("sapo_tau",), f"each must be above 0, not {list(self.sapo_tau)}"))
        if self.n == 1 and (self.advantage != "whitened" or self.max_draws > 1):
            problems.append((("n",), "one completion has nothing to be compared with; take 2 or more"))
        if self.prime is not None and self.advantage != "leave_one_out":
            problems.append((("advantage",), "must be leave_one_out, to which prime adds its process rewards"))
        if self.max_draws > 1 and self.staleness:
            problems.append((("max_draws",), "a sampler that is asked ahead cannot know what more will be needed"))
        if self.kl_weight and self.kl_in == "loss":
            if self.kl_estimator == "k1" and not self.kl_corrected:
                what = "k1 in the loss pulls nowhere on average; take kl_in: reward, kl_corrected: true, k2 or k3"
                problems.append((("kl_estimator",), what))
            if self.kl_estimator == "k2" and self.kl_corrected:
                what = "k2's gradient is the KL's own as it stands; leave kl_corrected out"
                problems.append((("kl_corrected",), what))
        if problems:
            raise Misfit(*problems)
        return self


class Ppo(Rl):
    """Proximal policy optimisation (Schulman et al., 1707.06347; Ouyang et al., 2203.02155) with a critic: a linear
    head on the policy's own hidden states."""

    kind: Literal["ppo"] = Field(description="The method.")
    iterations: int = Field(4, ge=1, description="How often each batch of rollouts is gone through.")
    gamma: float = Field(1.0, gt=0, le=1, description="Discount of a token's reward for each token before it.")
    gae_lambda: float = Field(
        0.95, ge=0, le=1, description="Generalised advantage estimation (1506.02438): 0 trusts the critic, 1 rewards."
    )
    critic: str | None = Field(
        None,
        pattern=r"^stage:",
        description="stage:ID, an earlier ppo stage whose critic this one goes on with; null: it begins at 0.",
    )
    value_weight: float = Field(0.1, gt=0, description="Weight of the critic's loss.")
    value_clip: float | None = Field(
        0.2, gt=0, description="A value is held within this of what it was when the batch was scored; null: it is not."
    )
    missing_eos_penalty: float = Field(0.0, ge=0, description="Taken off the score of a completion that did not end.")
    kl_weight: float = Field(0.05, ge=0, description="Weight of the KL penalty in the reward of each token.")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k1", description="Schulman's estimators of that KL.")
    kl_target: float | None = Field(
        None,
        gt=0,
        description="KL of a whole completion, nats, that kl_weight is steered to after each batch (Ziegler et al., "
        "1909.08593); null: it stays.",
    )

    @model_validator(mode="after")
    def _steerable(self) -> Ppo:
        if self.kl_target is not None and not self.kl_weight:
            raise Misfit((("kl_weight",), "must be above 0 where kl_target steers it: it is where that starts"))
        return self
