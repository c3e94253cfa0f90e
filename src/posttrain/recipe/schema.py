"""What a run is. Every key a recipe may hold, its type, default and meaning; nothing here imports torch.

The descriptions are the documentation: `posttrain explain KEY` prints them and `posttrain schema` turns them
into a JSON Schema for editors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from posttrain.recipe.base import Block, Misfit
from posttrain.recipe.objectives import OBJECTIVES, PARAMETERS, Divergence, Loss
from posttrain.recipe.rewards import STAGE, ModelReward, ProcessReward, Reward, Rewarded

SCHEMA_VERSION = 1

GREEDY_GROUP = "must be above 0: at 0 the completions of a prompt are all the same, and nothing is learned"


class Lora(Block):
    """Low-rank adapter (Hu et al., 2106.09685): W + (alpha / r) B A, only A and B are trained."""

    r: int = Field(16, ge=1, description="Rank of the update.")
    alpha: float = Field(32.0, gt=0, description="The update is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="Which linear layers get an adapter: all but the output head, or a list of names."
    )


class Model(Block):
    source: str = Field(description="A directory, a hub id (owner/name), a .gguf file, or pip:PACKAGE/FILE.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Precision of the weights.")
    adapter: Lora | None = Field(None, description="Train a low-rank adapter; without it every weight is trained.")
    chat_template: str | None = Field(
        None, description="A Jinja file, or `chatml`, in place of the model's own chat template."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where the model computes; auto is cuda where there is one."
    )
    compile: bool = Field(
        False, description="Compile the decoder's layers (torch.compile): seconds at first, less time for each step."
    )


class Source(Block):
    source: str = Field(
        description="A file (.jsonl, .json, .csv, .parquet, .txt, also .gz), hub:OWNER/NAME, or reasoning_gym/TASK."
    )
    weight: float = Field(1.0, gt=0, description="Share of the mixture, relative to the other sources.")
    rows: int | None = Field(None, ge=1, description="Take at most so many rows; a generator needs it.")
    seed: int = Field(0, ge=0, description="Seed of a generator.")
    config: dict[str, Any] = Field(default_factory=dict, description="A generator's own parameters.")
    split: str = Field("train", description="Split of a hub data set.")
    shape: str | None = Field(None, description="Name of the row shape, where detection should not decide.")

    @model_validator(mode="after")
    def _generator_ends(self) -> Source:
        if self.source.startswith("reasoning_gym/") and self.rows is None:
            raise Misfit((("rows",), "missing; a generator never ends, say how many rows to take"))
        return self


class Data(Block):
    sources: tuple[Source, ...] = Field(min_length=1, description="Where rows come from; mixed by weight.")
    system: str | None = Field(None, description="System prompt for conversations that have none.")
    max_length: int = Field(1024, ge=8, description="Longest sequence, prompt and completion together, in tokens.")
    too_long: Literal["error", "drop", "truncate"] = Field(
        "drop", description="What happens to a longer one; truncate cuts the end of the completion, never the prompt."
    )
    max_bad_rows: float = Field(
        0.05, ge=0, le=1, description="Share of rows that may be unreadable before the run stops; each is reported."
    )


class Optim(Block):
    lr: float = Field(2e-4, gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="Decay after warm-up, to zero.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of the steps over which the rate rises from zero.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay (not on norms and biases).")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's moment decay rates.")
    eps: float = Field(1e-8, gt=0, description="AdamW's denominator offset.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Clip the gradient's global 2-norm; null: no clipping.")


class Sampling(Block):
    temperature: float = Field(1.0, ge=0, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Keep the smallest set of tokens with this probability mass.")
    top_k: int = Field(0, ge=0, description="Keep the k likeliest tokens; 0 keeps all.")
    min_p: float = Field(0.0, ge=0, lt=1, description="Keep tokens at least this share as likely as the likeliest.")
    max_new_tokens: int = Field(64, ge=1, description="Longest completion, in tokens.")
    stop: tuple[str, ...] = Field((), description="Strings that end a completion.")
    speculate: int = Field(
        0,
        ge=0,
        description="Tokens that a completion may guess ahead in one step, from what its text said before; the result "
        "is the same. Faster for few completions at a time that repeat their prompt, slower for many; 0: off.",
    )


class StageBase(Block):
    id: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Name of the stage, and of its folder.")
    from_: str | None = Field(
        None, alias="from", description="Id of the stage whose model this one starts from; default: the one before."
    )
    data: Data = Field(description="What the stage learns from.")
    steps: int = Field(ge=1, description="Optimiser steps.")
    batch_size: int = Field(
        8,
        ge=1,
        description="Examples (sft), pieces of text (continued_pretraining), pairs or what else the loss compares "
        "(preference, reward_model), or prompts (grpo) in one step.",
    )
    tokens_per_forward: int = Field(
        1024,
        ge=16,
        description="Token budget of one forward pass; changes memory and speed, never the result "
        "(but for what an adapter's dropout drops).",
    )
    memory_gb: float | None = Field(
        None, gt=0, description="Memory the stage may take, in GB; tokens_per_forward is lowered until it fits."
    )
    activation_checkpointing: bool = Field(
        False, description="Keep no activations inside a layer but compute them again: less memory, a third more time."
    )
    check_first_step: bool = Field(
        True, description="Compare the packed forward and backward pass with the plain one before the first step."
    )
    optim: Optim = Field(default_factory=lambda: Optim(), description="Optimiser and its schedule.")
    checkpoint_every: int = Field(
        10,
        ge=1,
        description="Most steps that a kill may cost; checkpoints begin a quarter sooner, to be on the disk by then.",
    )
    nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="On a NaN or infinite loss or gradient: stop the run, or skip the step and count it."
    )

    @field_validator("optim")
    @classmethod
    def _own_defaults(cls, optim: Optim) -> Optim:
        """A partly written block keeps this kind's defaults, not those of `Optim`."""
        own = cls.model_fields["optim"].get_default(call_default_factory=True)
        return optim.model_copy(update={k: getattr(own, k) for k in own.model_fields_set - optim.model_fields_set})


class ContinuedPretraining(StageBase):
    """Continued pre-training (Gururangan et al., 2004.10964): negative log-likelihood of raw text, each document for
    itself and without a chat template. A document longer than `data.max_length` or the model's context is cut into
    pieces, and nothing of it is left out."""

    kind: Literal["continued_pretraining"] = Field(description="The method.")

    @model_validator(mode="after")
    def _documents(self) -> ContinuedPretraining:
        problems: list[tuple[tuple[str | int, ...], str]] = []
        if self.data.system is not None:
            problems.append((("data", "system"), "raw text has no system prompt; leave it out"))
        if self.data.too_long != "drop":
            what = "a long document is cut into pieces, so none is too long; leave it out"
            problems.append((("data", "too_long"), what))
        if problems:
            raise Misfit(*problems)
        return self


class Sft(StageBase):
    """Supervised fine-tuning: the likelihood of the assistant's tokens, per target token of the step."""

    kind: Literal["sft"] = Field(description="The method.")
    loss: Literal["nll", "dft"] = Field(
        "nll",
        description="Negative log-likelihood, or that weighted by each token's own probability (dynamic fine-tuning, "
        "2508.05629), which learns less from what the model finds unlikely.",
    )


class PairSampling(Rewarded, Sampling):
    n: int = Field(8, ge=2, description="Completions per prompt, ranked by the verifier.")
    prompts: int = Field(ge=1, description="How many prompts to sample for before training.")

    @model_validator(mode="after")
    def _completions_differ(self) -> PairSampling:
        if self.temperature == 0:
            raise Misfit((("temperature",), GREEDY_GROUP))
        return self


class Reference(Block):
    """Another model that the policy is compared with; its tokenizer has the policy's vocabulary."""

    source: str = Field(description="A directory, a hub id (owner/name), a .gguf file, or pip:PACKAGE/FILE.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")


class Preference(StageBase):
    """Learn from answers that were judged beforehand: pairs of a better and a worse one (DPO, Rafailov et al.,
    2305.18290, and what came after it), ranked lists, or single ones labelled good or bad. docs/preference.md has the
    losses and what each one reads; a parameter that is left out has the value of the loss's paper."""

    kind: Literal["preference"] = Field(description="The method.")
    optim: Optim = Field(default_factory=lambda: Optim(lr=5e-5), description="Optimiser and its schedule.")
    loss: Loss = Field("dpo", description="What is minimised; one value for each pair, list or answer.")
    reference: Reference | None = Field(None, description="The reference, in place of the stage's starting model.")
    beta: float | None = Field(
        None, gt=0, description="What scores are multiplied by: the strength of the pull towards the reference."
    )
    label_smoothing: float | None = Field(
        None, ge=0, lt=0.5, description="Share of labels taken to be flipped (cDPO, Mitchell 2023)."
    )
    gamma: float | None = Field(None, ge=0, description="Margin by which the chosen answer must win, after beta.")
    tau: float | None = Field(None, gt=0, le=1, description="How wide the mixture of discopop's two losses is.")
    divergence: Divergence | None = Field(
        None, description="f-divergence from the reference that scores come from (f-DPO, 2309.16240)."
    )
    alpha: float | None = Field(None, description="Of `divergence: alpha`, or of alphapo's reward.")
    length_alpha: float | None = Field(
        None, ge=0, le=1, description="Weight of tokens beyond the shorter answer's length (LD-DPO, 2409.06411)."
    )
    weighting: bool | None = Field(
        None, description="Weigh a pair by how likely the policy is to write it itself (WPO, 2406.11827)."
    )
    nll_weight: float | None = Field(
        None, ge=0, description="Weight of the best answer's per-token NLL (RPO, 2404.19733); guards its probability."
    )
    desirable_weight: float | None = Field(None, ge=0, description="Weight of answers that are labelled good.")
    undesirable_weight: float | None = Field(None, ge=0, description="Weight of answers that are labelled bad.")
    on_policy: PairSampling | None = Field(
        None,
        description="Sample pairs or lists from the stage's starting model and rank them with the task's verifier; "
        "without it the data must hold pairs, or labelled answers.",
    )

    @model_validator(mode="after")
    def _fits_its_loss(self) -> Preference:
        objective = OBJECTIVES[self.loss]
        reads = objective.parameters(self.divergence)
        problems: list[tuple[tuple[str | int, ...], str]] = [
            ((name,), f"loss {self.loss} does not read it; it reads {', '.join(reads)}")
            for name in PARAMETERS
            if name not in reads and getattr(self, name) is not None
        ]
        if self.loss == "exo" and self.label_smoothing == 0:
            problems.append((("label_smoothing",), "must be above 0: loss exo takes its logarithm"))
        if self.reference is not None and not objective.reference:
            problems.append((("reference",), f"loss {self.loss} has no reference"))
        if self.on_policy is not None and objective.of == "answers":
            problems.append((("on_policy",), f"loss {self.loss} learns from labelled answers, not from ranked ones"))
        if self.on_policy is None and objective.of in ("lists", "triples"):
            what = f"missing; loss {self.loss} learns from {objective.of}, which are sampled"
            problems.append((("on_policy",), what))
        if self.batch_size < 2 and objective.whole_step:
            problems.append((("batch_size",), f"must be at least 2: loss {self.loss} compares the answers of a step"))
        if problems:
            raise Misfit(*problems)
        for name, value in reads.items():
            if getattr(self, name) is None:  # so that a record of the run says what was used
                object.__setattr__(self, name, value)
        return self

    @property
    def width(self) -> int:
        """Answers that one value of the loss is about."""
        sampled = self.on_policy.n if self.on_policy else 0
        return {"answers": 1, "pairs": 2, "triples": 3, "lists": sampled}[OBJECTIVES[self.loss].of]

    @property
    def parameters(self) -> dict[str, Any]:
        """What its loss reads."""
        return {name: getattr(self, name) for name in OBJECTIVES[self.loss].parameters(self.divergence)}


DISTILLS: dict[str, tuple[str, ...]] = {
    "sequence": ("sampling",),
    "off_policy": ("beta", "temperature"),
    "on_policy": ("beta", "temperature", "student_share", "sampling"),
}
"""Which keys of a distill stage each of its modes reads; those that it does not read must not be set."""


class Distill(StageBase):
    """Distillation (Hinton et al., 1503.02531): learn what a teacher would say next, from its own answers
    (sequence-level, Kim and Rush, 1606.07947) or from its distributions (GKD, Agarwal et al., 2306.13649)."""

    kind: Literal["distill"] = Field(description="The method.")
    teacher: Reference = Field(description="The model that is learned from.")
    mode: Literal["sequence", "off_policy", "on_policy"] = Field(
        "off_policy",
        description="sequence: fine-tune on answers that the teacher writes before training. off_policy: come near the "
        "teacher's next-token distributions along the data's answers. on_policy: along the student's own, too (GKD).",
    )
    beta: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Of the generalised Jensen-Shannon divergence: 0 is KL(teacher, student), which covers all that "
        "the teacher says, and 1 is KL(student, teacher), which keeps to what the teacher says (MiniLLM, 2306.08543).",
    )
    temperature: float = Field(1.0, gt=0, description="Both models' logits are divided by it in the divergence.")
    student_share: float = Field(
        0.5, gt=0, le=1, description="Share of the answers that the student writes itself; the others are the data's."
    )
    sampling: Sampling = Field(
        default_factory=lambda: Sampling(), description="How the teacher, or on-policy the student, writes answers."
    )

    @model_validator(mode="after")
    def _read(self) -> Distill:
        mine = DISTILLS[self.mode]
        problems: list[tuple[tuple[str | int, ...], str]] = [
            ((name,), f"mode: {self.mode} does not read it; it reads {', '.join(mine)}")
            for name in DISTILLS["on_policy"]
            if name not in mine
            and getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True)
        ]
        if problems:
            raise Misfit(*problems)
        return self


class StepSampling(Rewarded, Sampling):
    """Labels of steps from what becomes of them (Math-Shepherd, Wang et al., 2312.08935): the stage's starting model
    writes solutions, and completes each of them from the end of each step; `rewards` say which come right."""

    prompts: int = Field(ge=1, description="How many prompts to write solutions to before training.")
    solutions: int = Field(4, ge=1, description="Solutions to each prompt.")
    n: int = Field(8, ge=1, description="Completions from the end of each step.")
    labels: Literal["soft", "hard"] = Field(
        "soft", description="A step's label: the share of its completions that come right, or whether any does."
    )

    @model_validator(mode="after")
    def _completions_differ(self) -> StepSampling:
        if self.temperature == 0:
            raise Misfit((("temperature",), GREEDY_GROUP))
        return self


class ScoringStage(StageBase):
    """What every stage has whose model scores answers and writes none."""

    optim: Optim = Field(default_factory=lambda: Optim(lr=1e-4), description="Optimiser and its schedule.")
    holdout: float = Field(
        0.1, ge=0, lt=1, description="Share of the rows kept out of training; accuracy is measured on them."
    )


class RewardModel(ScoringStage):
    """Bradley-Terry reward model (Ouyang et al., 2203.02155): one number for an answer, read at its last token."""

    kind: Literal["reward_model"] = Field(description="The method.")
    centring: float = Field(
        0.0, ge=0, description="Weight of (chosen + rejected reward)^2; keeps rewards around 0 (2312.09244: 0.01)."
    )

    @model_validator(mode="after")
    def _answers_end(self) -> RewardModel:
        if self.data.too_long == "truncate":
            raise Misfit(
                (("data", "too_long"), "a reward is read where an answer ends: none may be cut; take drop or error")
            )
        return self


class ProcessRewardModel(ScoringStage):
    """Process reward model (Lightman et al., 2305.20050): the chance that a solution is right so far, read at the last
    token of each step."""

    kind: Literal["process_reward_model"] = Field(description="The method.")
    separator: str = Field("\n", min_length=1, description="What stands between two steps of an answer.")
    rollouts: StepSampling | None = Field(
        None, description="Sample solutions and label their steps; without it the data must hold labelled steps."
    )


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


class Rl(Rewarded, StageBase):
    """What every stage has that learns from its own samples."""

    optim: Optim = Field(
        default_factory=lambda: Optim(lr=5e-5, schedule="constant"), description="Optimiser and its schedule."
    )
    sampling: Sampling = Field(default_factory=lambda: Sampling(), description="How completions are drawn.")
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


class RejectionSampling(Rewarded, StageBase):
    """Sample, keep what is right, learn it as if it stood in the data: RFT (Yuan et al., 2308.01825) in one round,
    expert iteration (ReST, 2308.08998; ReST-EM, 2312.06585) in several, STaR (2203.14465) with a hint."""

    kind: Literal["rejection_sampling"] = Field(description="The method.")
    optim: Optim = Field(
        default_factory=lambda: Optim(lr=5e-5, schedule="constant"), description="Optimiser and its schedule."
    )
    sampling: Sampling = Field(default_factory=lambda: Sampling(), description="How completions are drawn.")
    prompts: int = Field(ge=1, description="How many prompts to sample for in each round.")
    n: int = Field(8, ge=1, description="Completions per prompt.")
    rounds: int = Field(
        1, ge=1, description="How often it is sampled, with the weights of then; rounds have equal shares of steps."
    )
    at_least: float = Field(1.0, description="A completion is kept that earns this or more, and that came to its end.")
    most: int | None = Field(
        None, ge=1, description="Most completions kept of one prompt in a round, different ones (ReST-EM: 10)."
    )
    hint: str | None = Field(
        None,
        description="Where none is kept, the prompt is asked again with this below it, {answer} being the reference "
        "answer; what is kept then is learned without it (STaR's rationalisation).",
    )

    @property
    def round_steps(self) -> int:
        """Optimiser steps of a round."""
        return self.steps // self.rounds

    @model_validator(mode="after")
    def _rounds_fit(self) -> RejectionSampling:
        problems: list[tuple[tuple[str | int, ...], str]] = []
        if self.sampling.temperature == 0 and self.n > 1:
            problems.append((("n",), "must be 1 at temperature 0, where the completions of a prompt are all the same"))
        if self.steps % self.rounds:
            problems.append((("rounds",), f"{self.steps} steps cannot be shared out evenly among {self.rounds} rounds"))
        if self.hint is not None and HINT not in self.hint:
            problems.append((("hint",), f"does not say where the answer stands: write {HINT} there"))
        if problems:
            raise Misfit(*problems)
        return self


class OnlinePreference(Rewarded, StageBase):
    """Learn preferences between answers that are sampled while training goes on and compared by `rewards`: online DPO
    (Guo et al., 2402.04792), Nash-MD (Munos et al., 2312.00886), XPO (Xie et al., 2405.21046)."""

    kind: Literal["online_preference"] = Field(description="The method.")
    optim: Optim = Field(
        default_factory=lambda: Optim(lr=5e-5, schedule="constant"), description="Optimiser and its schedule."
    )
    sampling: Sampling = Field(default_factory=lambda: Sampling(), description="How completions are drawn.")
    loss: Literal["dpo", "ipo", "nash_md", "xpo"] = Field("dpo", description="What is minimised.")
    n: int = Field(2, ge=2, description="Completions per prompt, a best and a worst of which are a pair (dpo, ipo).")
    beta: float = Field(0.1, gt=0, description="Strength of the pull towards the reference.")
    mixture: float = Field(
        0.5, ge=0, le=1, description="nash_md: share of the reference in what the policy's answer is compared with."
    )
    alpha: float = Field(1e-5, ge=0, description="xpo: weight of exploration, away from the reference's own answers.")

    @property
    def sides(self) -> int:
        """Answers to a prompt that are learned from."""
        return 1 if self.loss == "nash_md" else 2

    @model_validator(mode="after")
    def _fits_its_loss(self) -> OnlinePreference:
        readers = {"n": ("dpo", "ipo"), "mixture": ("nash_md",), "alpha": ("xpo",)}
        problems: list[tuple[tuple[str | int, ...], str]] = [
            ((name,), f"loss {self.loss} does not read it; {' and '.join(losses)} alone do")
            for name, losses in readers.items()
            if self.loss not in losses and getattr(self, name) != type(self).model_fields[name].default
        ]
        if self.sampling.temperature == 0:
            problems.append((("sampling", "temperature"), GREEDY_GROUP))
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
        if self.n == 1 and (self.advantage != "whitened" or self.max_draws > 1):
            problems.append((("n",), "one completion has nothing to be compared with; take 2 or more"))
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
    n: int = Field(1, ge=1, description="Completions per prompt.")
    iterations: int = Field(4, ge=1, description="How often each batch of rollouts is gone through.")
    gamma: float = Field(1.0, gt=0, le=1, description="Discount of a token's reward for each token before it.")
    gae_lambda: float = Field(
        0.95, ge=0, le=1, description="Generalised advantage estimation (1506.02438): 0 trusts the critic, 1 rewards."
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


Stage = Annotated[
    ContinuedPretraining
    | Sft
    | Distill
    | Preference
    | RewardModel
    | ProcessRewardModel
    | RejectionSampling
    | OnlinePreference
    | Grpo
    | Ppo,
    Field(discriminator="kind"),
]


def _rewards(stage: StageBase) -> Iterator[tuple[tuple[str | int, ...], Reward]]:
    """Every reward that the stage names, and where."""
    for path in ((), ("on_policy",), ("rollouts",)):
        block = getattr(stage, path[0], None) if path else stage
        if isinstance(block, Rewarded):
            yield from (((*path, "rewards", i), reward) for i, reward in enumerate(block.rewards))


class Suite(Block):
    id: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Name of the suite in tables and gates.")
    role: Literal["trained", "neighbour"] = Field(
        description="trained: what the stages teach, on held-out items; neighbour: near it, to see what moved along."
    )
    source: Source = Field(description="Verifiable tasks; training drops every prompt that stands in here.")
    version: int = Field(1, ge=1, description="Raise it when the items or the scoring change.")


class Retention(Block):
    """How far the model moved from the base where it was not asked to: KL and drift on general prompts."""

    prompts: str = Field("builtin", description="`builtin`, or a text file with one prompt a line.")
    rows: int = Field(48, ge=2, description="How many prompts.")
    max_new_tokens: int = Field(32, ge=1, description="Length of the base's continuation that is compared.")


class Evals(Block):
    suites: tuple[Suite, ...] = Field((), description="Scored before the first and after every stage, greedily.")
    retention: Retention | None = Field(None, description="Measure drift from the base.")
    max_new_tokens: int = Field(64, ge=1, description="Longest answer in a suite, in tokens.")
    system: str | None = Field(None, description="System prompt of the suites' conversations.")


class Gate(Block):
    """A condition on the last stage's model. A gate that is not met makes the run exit 1, after its report."""

    suite: str = Field(description="Id of a suite, or `retention`.")
    measure: Literal["score", "gain", "unparsed", "kl"] = Field(
        description="score: accuracy; gain: accuracy above the base's; unparsed: share; kl: nats per token (retention)."
    )
    at_least: float | None = Field(None, description="Lowest value that passes.")
    at_most: float | None = Field(None, description="Highest value that passes.")
    sure: bool = Field(False, description="Compare the worse end of the 95 % interval in place of the estimate itself.")

    @model_validator(mode="after")
    def _bounded(self) -> Gate:
        if self.at_least is None and self.at_most is None:
            raise Misfit(((), "a gate needs at_least or at_most"))
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise Misfit((("at_least",), f"{self.at_least} is above at_most, {self.at_most}: nothing passes"))
        if (self.suite == "retention") != (self.measure == "kl"):
            raise Misfit((("measure",), "measure kl goes with suite retention, and only with it"))
        return self


class Recipe(Block):
    schema_: Literal[1] = Field(alias="schema", description="Version of the recipe format.")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run.")
    seed: int = Field(0, ge=0, description="Every random choice of the run derives from it.")
    model: Model = Field(description="The model to start from.")
    stages: tuple[Stage, ...] = Field(min_length=1, description="What is done to it, in order.")
    evals: Evals = Field(default_factory=lambda: Evals(), description="What is measured before and after each stage.")
    gates: tuple[Gate, ...] = Field((), description="What must hold at the end.")

    @model_validator(mode="after")
    def _names_resolve(self) -> Recipe:
        problems: list[tuple[tuple[str | int, ...], str]] = []
        stages: list[str] = []
        writers = ["base"]  # what a stage can start from, an evaluation ask, a gate speak of
        for i, stage in enumerate(self.stages):
            if stage.id in ("base", *stages):
                problems.append((("stages", i, "id"), f"{stage.id!r} is taken; give each stage its own (not 'base')"))
            if stage.from_ is not None and stage.from_ not in ("base", *stages):
                earlier = ", ".join(("base", *stages))
                problems.append((("stages", i, "from"), f"{stage.from_!r} is no earlier stage (these are: {earlier})"))
            start = stage.from_ or (stages[-1] if stages else "base")
            if start in stages and start not in writers:
                there = ", ".join(writers)
                what = f"{start!r} is a reward model, which writes no text; start from another one (there are: {there})"
                problems.append((("stages", i, "from"), what))
            for path, reward in _rewards(stage):
                if isinstance(reward, ModelReward | ProcessReward) and reward.source.startswith(STAGE):
                    scorers = [name for name in stages if name not in writers]
                    if (name := reward.source.removeprefix(STAGE)) not in scorers:
                        there = ", ".join(scorers) or "none"
                        what = f"{name!r} is no earlier stage that makes a reward model (there are: {there})"
                        problems.append((("stages", i, *path, "source"), what))
            stages.append(stage.id)
            if not isinstance(stage, ScoringStage):
                writers.append(stage.id)
        suites: list[str] = []
        for i, suite in enumerate(self.evals.suites):
            if suite.id in ("retention", *suites):
                where = ("evals", "suites", i, "id")
                problems.append((where, f"{suite.id!r} is taken; give each suite its own (not 'retention')"))
            suites.append(suite.id)
        known = [*suites, *(["retention"] if self.evals.retention else [])]
        if self.gates and isinstance(self.stages[-1], ScoringStage):
            what = "gates speak of the last stage's model, and a reward model answers no suite; put that stage earlier"
            problems.append((("gates",), what))
        for i, gate in enumerate(self.gates):
            if gate.suite not in known:
                there = ", ".join(known) or "none"
                problems.append((("gates", i, "suite"), f"no suite {gate.suite!r} under evals (there are: {there})"))
        if problems:
            raise Misfit(*problems)
        return self
