"""A reward model: a language model whose output head is replaced by one number per sequence.

It is what Transformers calls a sequence classifier with one label. The number is read at the last token that is not
padding: the token that ends the answer.
"""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PreTrainedModel

from posttrain.forest.attention import decoder
from posttrain.models.policy import Policy
from posttrain.models.quiet import quiet
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
    kind, pad = fitting(policy, ends)
    adapter = copy.deepcopy(policy.adapter)
    trained = policy.snapshot() if adapter else {}  # unloading drops it
    base: PreTrainedModel = policy.model.unload() if isinstance(policy.model, PeftModel) else policy.model
    config = base.config  # the decoder's own: forest attention is switched on in it
    config.num_labels = 1
    config.get_text_config().pad_token_id = pad
    policy.tokenizer.pad_token = policy.tokenizer.convert_ids_to_tokens(pad)
    with torch.device("meta"):
        model = kind(config)
    setattr(model, model.base_model_prefix, base.base_model)
    head = nn.Linear(model.score.in_features, 1, bias=False, dtype=base.dtype)
    rng = torch.Generator().manual_seed(seed)
    nn.init.normal_(head.weight, std=config.get_text_config().initializer_range, generator=rng)
    model.score = head
    model = model.eval()
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


def fitting(policy: Policy, ends: Collection[int]) -> tuple[type[PreTrainedModel], int]:
    """The class that a reward model of `policy` would have, and its padding token.

    Raises:
        UserError: there is none; see `reward_model`.
    """
    config = copy.deepcopy(decoder(policy.model).config)
    kind = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    with torch.device("meta"):
        if kind is None or not isinstance(getattr(kind(config), "score", None), nn.Linear):
            raise UserError(
                f"{policy.source}: Transformers has no sequence classifier with a linear head for {config.model_type} "
                "models, so nothing could load the reward model; start from another model"
            )
    tokenizer, ends = policy.tokenizer, {*ends, *policy.eos_ids}
    own = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id)
    special = sorted(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    pad = next((token for token in (*own, *special) if token is not None and token not in ends), None)
    if pad is None:
        raise UserError(
            f"{policy.source}: a reward model needs a special token to pad with that ends no answer, and this "
            f"tokenizer has none ({', '.join(map(str, tokenizer.all_special_tokens))}); start from another model"
        )
    return kind, int(pad)


def head(model: nn.Module, hidden_RD: Tensor) -> Tensor:
    """[R] float32 (float64 for a float64 model): the rewards read from the hidden states of the last tokens."""
    score: nn.Module = decoder(model).score
    rewards_R = score(hidden_RD).squeeze(-1)
    return rewards_R.to(torch.promote_types(rewards_R.dtype, torch.float32))
