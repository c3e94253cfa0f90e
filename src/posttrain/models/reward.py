"""A reward model: a language model whose output head is replaced by one number per sequence.

It is what Transformers calls a sequence classifier with one label. The number is read at the last token that is not
padding: the token that ends the answer. A process reward model is the same, read at the last token of each step: a
token sees nothing that comes after it, so the number is that of the sequence which ends there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from posttrain.forest import Forest, Row, hidden_states, pack, split
from posttrain.forest.attention import decoder
from posttrain.forest.logprobs import States
from posttrain.machine import tune
from posttrain.models import place
from posttrain.models.policy import (
    Policy,
    base_model,
    is_reward_model,
    lasting,
    load_adapter,
    read_tokenizer,
    weights_digest,
)
from posttrain.models.quiet import quiet
from posttrain.models.source import resolve
from posttrain.records import UserError


def reward_model(policy: Policy, ends: Collection[int], seed: int) -> Policy:
    """`policy` turned into a reward model: its decoder and adapter taken over, not copied, under a new head.

    Trained are the adapter and the head, or every weight. The head is linear, without bias, its weights drawn as
    Transformers draws them: normal, of the deviation that the model's config names.

    Args:
        policy: not to be used afterwards.
        ends: the tokens that the sequences to be scored end with. Padding must not be one of them, as it is in the
            many models that pad with EOS: Transformers would read the score one token early.

    Raises:
        UserError: Transformers has no sequence classifier of this architecture, or no token is left to pad with.
    """
    pad = fitting(policy, ends)
    adapter = copy.deepcopy(policy.adapter)
    trained = policy.snapshot() if adapter else {}  # unloading drops it
    base: PreTrainedModel = policy.model.unload() if isinstance(policy.model, PeftModel) else policy.model
    policy.tokenizer.pad_token = policy.tokenizer.convert_ids_to_tokens(pad)
    base.config.get_text_config().pad_token_id = pad
    model: PreTrainedModel | PeftModel = _classifier(base, policy.source, seed)
    if adapter is None:
        return Policy(model.requires_grad_(True), policy.tokenizer, policy.source, policy.base_digest, policy.revision)
    adapter.task_type = "SEQ_CLS"  # PEFT then trains and saves the head beside the adapter
    with torch.random.fork_rng(), quiet():
        model = get_peft_model(model, adapter).eval()
    made = Policy(model, policy.tokenizer, policy.source, policy.base_digest, policy.revision)
    with torch.no_grad():
        for name, parameter in made.parameters().items():
            if name in trained:
                parameter.copy_(trained[name])
    return made


def load_reward_model(
    source: str,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    chat_template: str | None = None,
    device: str = "auto",
) -> Policy:
    """A saved reward model: what a `reward_model` or `process_reward_model` stage wrote, or any adapter (PEFT's
    SEQ_CLS) or sequence classifier with one label that Transformers knows. Arguments are those of `policy.load`.

    Raises:
        UserError: the source cannot be had or used, or has no head that scores; the base of an adapter changed.
    """
    tune()
    at, folder = place.device(device), headed(source, revision)
    if (folder / "adapter_config.json").is_file():

        def loaded(base: Path, origin: str) -> PreTrainedModel:
            return base_model(base, origin, dtype).to(at)

        turned = partial(_classifier, source=source, seed=0)  # the saved head takes the place of this one
        return load_adapter(folder, loaded, dtype=dtype, chat_template=chat_template, turned=turned)
    model = base_model(folder, source, dtype, auto=AutoModelForSequenceClassification).to(at).eval()
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear) or score.out_features != 1:
        given = f"{score.out_features} numbers" if isinstance(score, nn.Linear) else "no linear head called score"
        raise UserError(f"{source}: a reward model gives one number for a sequence, and this one has {given}")
    digest = weights_digest(dict(model.named_parameters()))
    tokenizer = read_tokenizer(folder, chat_template)
    return Policy(model.requires_grad_(True), tokenizer, lasting(source), digest, revision)


def headed(source: str, revision: str | None = None) -> Path:
    """The directory of the reward model that `source` names, whose weights are not read yet.

    Raises:
        UserError: there is no such model, or it is one that writes text and has no head that scores.
    """
    folder = resolve(source, revision)
    if not is_reward_model(folder):
        raise UserError(
            f"{source}: is a language model, which has no head that scores; train one with a stage of kind "
            "reward_model or process_reward_model and name its artifact, or ask it as a judge"
        )
    return folder


def fitting(policy: Policy, ends: Collection[int]) -> int:
    """The padding token that a reward model of `policy` would have.

    Raises:
        UserError: there is no such reward model; see `reward_model`.
    """
    _kind(decoder(policy.model).config, policy.source)
    tokenizer, ends = policy.tokenizer, {*ends, *policy.eos_ids}
    own = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id)
    special = sorted(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    pad = next((token for token in (*own, *special) if token is not None and token not in ends), None)
    if pad is None:
        raise UserError(
            f"{policy.source}: a reward model needs a special token to pad with that ends no answer, and this "
            f"tokenizer has none ({', '.join(map(str, tokenizer.all_special_tokens))}); start from another model"
        )
    return int(pad)


def head(model: nn.Module, hidden_RD: Tensor) -> Tensor:
    """[R] float32 (float64 for a float64 model): the rewards read from the hidden states of the last tokens."""
    score: nn.Module = decoder(model).score
    rewards_R = score(hidden_RD).squeeze(-1)
    return rewards_R.to(torch.promote_types(rewards_R.dtype, torch.float32))


def marked(model: nn.Module, forest: Forest, states: States = hidden_states) -> Tensor:
    """[T] float32 (float64 for a float64 model): what the head reads at the forest's target tokens, 0 elsewhere."""
    at_N = forest.target_T.nonzero().squeeze(1)
    read_N = head(model, states(model, forest)[at_N]).to(at_N.device)
    return read_N.new_zeros(len(forest)).index_copy(0, at_N, read_N)


@torch.no_grad()
def read(compute: Callable[[Forest], Tensor], rows: Sequence[Row], budget: int) -> list[list[float]]:
    """For each row the values that `compute` ([T]) has at its target tokens, in passes of about `budget` tokens.

    Rows of one context meet in one pass wherever they fit, and the context is computed once.
    """
    found: list[list[float]] = [[] for _ in rows]
    for members in split(rows, [(i,) for i in range(len(rows))], budget):
        forest = pack([rows[i] for i in members])
        values_T = compute(forest)
        for i, (start, stop) in zip(members, forest.spans, strict=True):
            found[i] = values_T[start:stop][forest.target_T[start:stop]].tolist()
    return found


def _kind(config: PreTrainedConfig, source: str) -> type[PreTrainedModel]:
    """The class that a reward model of such a model has in Transformers."""
    kind = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    with torch.device("meta"):
        if kind is None or not isinstance(getattr(kind(copy.deepcopy(config)), "score", None), nn.Linear):
            raise UserError(
                f"{source}: Transformers has no sequence classifier with a linear head for {config.model_type} "
                "models, so nothing could load the reward model; start from another model"
            )
    return kind


def _classifier(base: PreTrainedModel, source: str, seed: int) -> PreTrainedModel:
    """The decoder of `base`, not copied, under a head drawn from `seed`."""
    config = base.config  # the decoder's own: forest attention is switched on in it
    kind = _kind(config, source)
    config.num_labels = 1
    with torch.device("meta"):
        model = kind(config)
    setattr(model, model.base_model_prefix, base.base_model)
    head = nn.Linear(model.score.in_features, 1, bias=False, dtype=base.dtype)
    rng = torch.Generator().manual_seed(seed)
    nn.init.normal_(head.weight, std=config.get_text_config().initializer_range, generator=rng)
    model.score = head.to(base.device)
    return model.eval()
