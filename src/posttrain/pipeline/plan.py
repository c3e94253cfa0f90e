"""The dry run: what a recipe would do and about what it would cost, from its data and the model's config alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from posttrain.data.chat import Rendered, Renderer
from posttrain.data.prepare import Prepared, prepare, prompt_key
from posttrain.evals import suites
from posttrain.forest.logprobs import CHUNK
from posttrain.models.cost import Size, forward_flops_per_token, parameters, training_flops_per_token
from posttrain.models.source import resolve
from posttrain.models.template import with_template
from posttrain.pipeline.stages import need
from posttrain.recipe.schema import Dpo, Grpo, Model, Recipe, Sft

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
    memory_bytes: int
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
                f"  about {s.flops:.2g} FLOPs, {s.memory_bytes / 2**30:.1f} GiB at peak",
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

    Memory is an estimate to within a factor of about 1.5: weights, gradients, AdamW's two moments, and the
    activations and logits of one forward pass of `tokens_per_forward` tokens.

    Raises:
        UserError: whatever a run would refuse before its first step.
    """
    folder = resolve(recipe.model.source, recipe.model.revision)
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if recipe.model.chat_template is not None:
        with_template(tokenizer, recipe.model.chat_template)
    held_out = frozenset(prompt_key(e) for suite in recipe.evals.suites for e in suites.items(suite))
    size = parameters(config)
    trainable = _trainable(recipe.model, config, size)
    stages = []
    for stage in recipe.stages:
        renderer = Renderer(tokenizer, system=stage.data.system)
        context = config.get_text_config().max_position_embeddings
        data = prepare(stage.data, renderer, need=need(stage), held_out=held_out, context=context)
        stages.append(_stage(stage, data, config, size, trainable, recipe.model, tokenizer))
    return Plan(recipe.name, recipe.model.source, size.total, trainable, tuple(stages))


def _stage(
    stage: Sft | Dpo | Grpo, data: Prepared, config: Any, size: Size, trainable: int, model: Model, tokenizer: Any
) -> StagePlan:
    rows = [r for part in data.rows for r in part]
    prompt = sum(len(r.prompt_ids) for r in rows) / len(rows)
    answers = sum(len(r.completion_ids) + len(r.rejected_ids) for r in rows) / len(rows)
    generated, trees, branches = 0, stage.steps * stage.batch_size, 1
    if isinstance(stage, Dpo):
        branches = 2
    if isinstance(stage, Dpo) and stage.on_policy:
        answers = 2 * stage.on_policy.max_new_tokens
        generated = stage.on_policy.prompts * stage.on_policy.n * stage.on_policy.max_new_tokens
    elif isinstance(stage, Grpo):
        branches = stage.n
        answers = stage.n * stage.sampling.max_new_tokens
        generated = -(-stage.steps // stage.iterations) * stage.batch_size * answers
    each = prompt + answers  # a prompt and all that hangs on it
    context = prompt + answers / branches
    trained = trees * each
    flops = trained * training_flops_per_token(config, model.adapter is not None, int(context), answers / each)
    flops += generated * forward_flops_per_token(config, int(context))
    width = 4 if model.dtype == "float32" else 2
    at_once = min(stage.tokens_per_forward, int(trained / stage.steps))
    c = config.get_text_config()
    inner = getattr(c, "intermediate_size", 4 * c.hidden_size)
    activations = at_once * c.num_hidden_layers * (12 * c.hidden_size + 5 * inner) * width
    memory = size.total * width + trainable * 4 * 3 + activations + 3 * CHUNK * c.vocab_size * 4
    return StagePlan(
        stage.id, stage.kind, stage.steps, len(rows), round(trained), round(generated), flops, memory,
        _shown(rows[0], tokenizer),
    )  # fmt: skip


def _trainable(model: Model, config: Any, size: Size) -> int:
    """Weights that get a gradient. An adapter's are counted as r for each row and column of the linear layers."""
    if model.adapter is None:
        return size.total
    c = config.get_text_config()
    hidden, inner = c.hidden_size, getattr(c, "intermediate_size", 4 * c.hidden_size)
    heads = c.num_attention_heads
    head_dim = getattr(c, "head_dim", None) or hidden // heads
    queries, keys = heads * head_dim, (getattr(c, "num_key_value_heads", None) or heads) * head_dim
    shapes = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)] + 3 * [(hidden, inner)]
    return c.num_hidden_layers * sum(model.adapter.r * (a + b) for a, b in shapes)


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
