"""What a stage takes of memory, and the pass that fits what there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import tiny_model, tiny_policy, tiny_tokenizer
from tiny_runs import SEED, answered, asked, labelled, paired, prepared, stage_of

from posttrain.data.prepare import Prepared
from posttrain.pipeline.memory import Terms, fit, stage_memory, told
from posttrain.pipeline.plan import plan
from posttrain.recipe.blocks import Lora
from posttrain.recipe.schema import Recipe
from posttrain.records import UserError

DATA = {"sft": answered, "dpo": paired, "dpo on-policy": asked, "bco_unpaired": labelled}
DATA |= {"online_preference": asked, "rejection_sampling": asked, "self_rewarding": asked, "grpo": asked, "ppo": asked}


def data_of(name: str) -> Prepared:
    return prepared(DATA[name]())


def terms_of(name: str, adapter: Lora | None = None, **settings: Any) -> Terms:
    return stage_memory(stage_of(name, **settings), data_of(name), tiny_policy(adapter=adapter), SEED)


@pytest.mark.parametrize("adapter", [None, Lora(r=4)])
@pytest.mark.parametrize("name", DATA)
def test_every_kind_of_stage_is_counted(name: str, adapter: Lora | None) -> None:
    policy = tiny_policy(adapter=adapter)
    terms = stage_memory(stage_of(name), data_of(name), policy, SEED)
    trained = sum(p.nbytes for p in policy.parameters().values())
    assert terms["weights"] == sum(p.nbytes for p in policy.model.parameters())
    assert terms["optimiser"] == 2 * trained
    assert ("reference" in terms) == (name in ("online_preference", "grpo", "ppo"))  # the last two by their KL weight
    assert all(size >= 0 for size in terms.values())


def test_a_checkpoint_counts_where_one_falls_due() -> None:
    without, due = (terms_of("sft", checkpoint_every=every) for every in (100, 2))
    assert "checkpoint" not in without
    assert due["checkpoint"] == due["base"] + due["optimiser"]


def test_a_smaller_pass_and_recomputation_take_less() -> None:
    def passing(terms: Terms) -> int:
        return terms["activations"] + terms["work"]

    large, small = (terms_of("sft", batch_size=8, tokens_per_forward=tokens) for tokens in (512, 64))
    recomputed = terms_of("sft", batch_size=8, tokens_per_forward=512, activation_checkpointing=True)
    assert passing(small) < passing(large)
    assert passing(recomputed) < passing(large)


def test_fit_lowers_the_pass_until_it_fits_and_then_recomputes() -> None:
    policy, data = tiny_policy(intermediate_size=4096), prepared(answered()[:4])
    stage = stage_of("sft", batch_size=4, steps=1, tokens_per_forward=256)

    def peak(tokens: int, recompute: bool = False) -> int:
        update = {"tokens_per_forward": tokens, "activation_checkpointing": recompute}
        return sum(stage_memory(stage.model_copy(update=update), data, policy, SEED).values())

    def fitted(limit: float) -> tuple[int, bool]:
        allowed = (limit + 0.5) / 1e9  # half a byte, for what dividing rounds away
        found, terms = fit(stage.model_copy(update={"memory_gb": allowed}), data, policy, SEED)
        assert sum(terms.values()) <= limit
        return found.tokens_per_forward, found.activation_checkpointing

    assert fit(stage, data, policy, SEED)[0] == stage
    assert fitted(peak(256)) == (256, False)
    tight = (peak(128) + peak(64)) / 2
    tokens, recompute = fitted(tight)
    assert peak(tokens, recompute) <= tight
    assert not recompute
    least = peak(64, recompute=True)
    assert least < peak(64)
    assert fitted((least + peak(64)) / 2)[1]
    with pytest.raises(UserError, match="memory_gb is"):
        fitted(least - 1)


def test_terms_are_told_largest_first() -> None:
    assert told({"small": 1, "weights": 2_000_000_000, "process": 500_000_000}) == "weights 2.00, process 0.50"


def recipe_of(folder: Path, model: str, **settings: Any) -> Recipe:
    tiny_model(model, num_hidden_layers=3).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"What is {i}?", "completion": "A number."} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"sources": [{"source": str(folder / "rows.jsonl")}]}
    stage = {"id": "a", "kind": "sft", "data": data, "steps": 2, "batch_size": 4, **settings}
    made = {"schema": 1, "name": "r", "model": {"source": str(folder / "model")}, "stages": [stage]}
    return Recipe.model_validate_json(json.dumps(made))


def test_a_dry_run_tells_the_peak_and_the_pass(tmp_path: Path) -> None:
    planned = plan(recipe_of(tmp_path, "llama", memory_gb=100.0))
    terms = planned.stages[0].memory
    assert isinstance(terms, dict)
    assert f"peak memory: {sum(terms.values()) / 1e9:.2f} GB: process" in planned.text()


def test_a_mixture_whose_routing_needs_values_is_planned_without_its_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = {"num_key_value_heads": 2, "num_local_experts": 4}
    monkeypatch.setitem(tiny.ARCHS, "mixtral", experts)
    planned = plan(recipe_of(tmp_path, "mixtral"))
    assert planned.stages[0].steps == 2
    assert "peak memory: not predicted: MixtralForCausalLM does not run without values" in planned.text()
    with pytest.raises(UserError, match=r"'a': memory_gb: no pass can be picked.*set tokens_per_forward"):
        plan(recipe_of(tmp_path, "mixtral", memory_gb=1.0))


def test_a_second_model_counts_where_it_is_larger_than_a_step(tmp_path: Path) -> None:
    """Its log-probabilities are taken before training, so that one of the two is the peak."""
    other = tiny_policy(intermediate_size=8192)
    other.save(tmp_path / "other")
    plain = terms_of("dpo")
    terms = terms_of("dpo", reference={"source": str(tmp_path / "other")})
    size = sum(p.nbytes for p in other.model.parameters())
    assert terms["reference"] == size > sum(plain[name] for name in ("gradients", "activations", "work"))
    assert "activations" not in terms
