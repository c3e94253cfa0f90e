"""What stages are made of: a model, data, an optimiser, a way to sample."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from posttrain.recipe.base import Block, Misfit

GREEDY_GROUP = "must be above 0: at 0 the completions of a prompt are all the same, and nothing is learned"


class Lora(Block):
    """Low-rank adapter (Hu et al., 2106.09685): W + (alpha / r) B A, only A and B are trained."""

    r: int = Field(16, ge=1, description="Rank of the update.")
    alpha: float = Field(32.0, gt=0, description="The update is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="Which linear layers get an adapter: all but the output head, or a list of names."
    )

    @model_validator(mode="after")
    def _some_layer(self) -> Lora:
        if not self.targets:
            raise Misfit((("targets",), "names no layer, so nothing would be trained; leave it out for all of them"))
        return self


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

    @model_validator(mode="after")
    def _moments_decay(self) -> Optim:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise Misfit((("betas",), f"each must be at least 0 and below 1, not {list(self.betas)}"))
        return self


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

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Sampling:
        if "" in self.stop:
            raise Misfit((("stop",), "holds an empty text, at which every completion would end before it begins"))
        if 0 < self.temperature < 1e-4:
            raise Misfit((("temperature",), "is so near 0 that logits divided by it overflow; take 0, which is greedy"))
        return self


class Reference(Block):
    """Another model that the policy is compared with; its tokenizer has the policy's vocabulary."""

    source: str = Field(description="A directory, a hub id (owner/name), a .gguf file, or pip:PACKAGE/FILE.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
