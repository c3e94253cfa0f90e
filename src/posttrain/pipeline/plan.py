"""The dry run: what a recipe would do and about what it would cost, from its data and the model's config alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from posttrain.data.chat import Rendered
from posttrain.data.prepare import Prepared, prompt_key
from posttrain.evals import retention, suites
from posttrain.machine import own_memory
from posttrain.models.cost import forward_flops_per_token, training_flops_per_token
from posttrain.models.policy import Policy, outline
from posttrain.pipeline.calls import asks
from posttrain.pipeline.memory import Terms, Unpredicted, fit, told
from posttrain.pipeline.stages import stage_data
from posttrain.recipe.rl import Grpo, Rl
from posttrain.recipe.schema import Recipe, Stage
from posttrain.recipe.scoring import ScoringStage
from posttrain.recipe.supervised import Distill
from posttrain.training.preference import second_model
from posttrain.training.reward import hold_out

MARKS = ("⟦", "⟧")
"""What stands around trained tokens in the example."""


@dataclass(frozen=True)
class StagePlan:
    id: str
    kind: str
    steps: int
    rows: int
    """Rows that can be used, or prompts."""
    trained_tokens: int
    """Through forward and backward, a prompt counted once for all answers to it."""
    generated_tokens: int
    """At most."""
    flops: float
    tokens_per_forward: int
    """As the recipe says, or lowered to fit `memory_gb`."""
    memory: Terms | str
    """Bytes at the peak by what takes them, or why that is not known."""
    example: str


@dataclass(frozen=True)
class Plan:
    name: str
    model: str
    weights: int
    trainable: int
    stages: tuple[StagePlan, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        lines = [f"{self.name}: {self.model}, {self.weights / 1e6:.1f} M weights, {self.trainable / 1e6:.1f} M trained"]
        for s in self.stages:
            lines += [
                "",
                f"{s.id} ({s.kind}): {s.steps} steps over {s.rows} rows",
                f"  tokens trained {s.trained_tokens:,}, generated at most {s.generated_tokens:,}",
                f"  about {s.flops:.2g} FLOPs, passes of {s.tokens_per_forward:,} tokens",
                f"  peak memory: {_peak(s.memory)}",
                f"  example, trained tokens in {MARKS[0]}{MARKS[1]}:",
                *(f"    {line}" for line in s.example.splitlines()),
            ]
        return "\n".join(
            [
                *lines,
                "",
                "What prompts of one step have in common is computed once too, so a run trains fewer tokens than this.",
            ]
        )


def plan(recipe: Recipe) -> Plan:
    """Resolve model and data, count, estimate. Downloads the model if it is not there; loads no weights.

    Memory is that of the CPU's process; see `pipeline.memory`.

    Raises:
        UserError: whatever a run would refuse before its first step.
    """
    model = recipe.model
    own_memory()
    policy = outline(
        model.source,
        adapter=model.adapter,
        dtype=model.dtype,
        revision=model.revision,
        chat_template=model.chat_template,
    )
    if recipe.evals.retention:
        retention.prompts(recipe.evals.retention)
    held_out = frozenset(prompt_key(e) for suite in recipe.evals.suites for e in suites.items(suite))
    trainable = sum(p.numel() for p in policy.parameters().values())
    stages = [_stage(stage, stage_data(stage, policy, held_out), policy, recipe.seed) for stage in recipe.stages]
    return Plan(recipe.name, model.source, policy.parameters_total, trainable, tuple(stages))


def _stage(stage: Stage, data: Prepared, policy: Policy, seed: int) -> StagePlan:
    config = policy.model.config
    if isinstance(stage, ScoringStage):
        data, _ = hold_out(stage, data)
    rows = [r for part in data.rows for r in part]
    prompt = sum(len(r.prompt_ids) for r in rows) / len(rows)
    answers = sum(len(r.completion_ids) + len(r.rejected_ids) for r in rows) / len(rows)
    trees, branches = stage.steps * stage.batch_size, 2 if rows[0].rejected_ids else 1
    if asked := asks(stage, len(rows)):
        branches = asked.together
        share = stage.student_share if isinstance(stage, Distill) and stage.mode == "on_policy" else 1.0
        answers = share * branches * asked.sampling.max_new_tokens + (1 - share) * answers
    if isinstance(stage, Rl):
        trees //= stage.minibatches
    generated = asked.tokens if asked else 0
    each = prompt + answers  # a prompt and all that hangs on it
    context = prompt + answers / branches
    trained = trees * each
    read = 0.0  # with weights that are not trained then
    if isinstance(stage, Grpo) and stage.prime:  # each batch is learned from once more, and read twice for its rewards
        read = 2 * trained / stage.iterations
        trained += trained / stage.iterations
    targets = branches if isinstance(stage, ScoringStage) else answers
    flops = trained * training_flops_per_token(config, policy.adapter is not None, int(context), targets / each)
    author = config
    if isinstance(stage, Distill):
        teacher = second_model(policy, stage, outline).model.config
        if stage.mode == "sequence":
            author = teacher
        else:
            flops += trained * forward_flops_per_token(teacher, int(context), targets / each)
    flops += read * forward_flops_per_token(config, int(context), targets / each)
    flops += generated * forward_flops_per_token(author, int(context))
    memory: Terms | str
    try:
        stage, memory = fit(stage, data, policy, seed)
    except Unpredicted as error:
        memory = str(error)
    return StagePlan(
        stage.id, stage.kind, stage.steps, len(rows), round(trained), round(generated), flops,
        stage.tokens_per_forward, memory, _shown(rows[0], policy.tokenizer),
    )  # fmt: skip


def _peak(memory: Terms | str) -> str:
    return (
        f"not predicted: {memory}"
        if isinstance(memory, str)
        else f"{sum(memory.values()) / 1e9:.2f} GB: {told(memory)}"
    )


def _shown(row: Rendered, tokenizer: Any) -> str:
    """The row as text, trained tokens marked."""
    text = tokenizer.decode(row.prompt_ids)
    ids, target = row.completion_ids, row.completion_target
    open_ = False
    for i, (token, trained) in enumerate(zip(ids, target, strict=True)):
        if trained != open_:
            text += MARKS[0] if trained else MARKS[1]
            open_ = trained
        text += tokenizer.decode([token])
        if open_ and i == len(ids) - 1:
            text += MARKS[1]
    return text if ids else f"{text}{MARKS[0]}…{MARKS[1]}"
