"""Policy: digests, swapping, adapters, saving and merging, on tiny models; saved models load without our code."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import ARCHS, tiny_model, tiny_policy, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.forest import Row, pack, token_logprobs
from posttrain.models.policy import attach, load, merge, weights_digest
from posttrain.recipe.blocks import Lora
from posttrain.records import UserError

LORA = Lora(r=4, alpha=8.0)
IDS_1T = torch.arange(3, 23)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS_1T).logits


def train(policy, steps=2, lr=0.05):
    """A few real steps, so that B is no longer zero."""
    optimiser = torch.optim.SGD(policy.parameters().values(), lr=lr)
    for _ in range(steps):
        optimiser.zero_grad()
        policy.model(IDS_1T, labels=IDS_1T).loss.backward()
        optimiser.step()
    return policy


@pytest.fixture
def base(tmp_path):
    """A tied model on disk with its tokenizer."""
    folder = tmp_path / "base"
    tiny_model("llama", seed=3).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# Adapters


@pytest.mark.parametrize("arch", ARCHS)
def test_fresh_adapter_changes_nothing_and_leaves_the_head_alone(arch):
    model = tiny_model(arch)
    before = logits(model)
    policy = attach(model, tiny_tokenizer(), source=arch, adapter=LORA)
    assert torch.equal(logits(policy.model), before)
    head = {name for name, m in policy.model.named_modules() if m is policy.model.get_output_embeddings()}
    assert not any(name.startswith(f"{h}.") for h in head for name in policy.parameters())
    assert all(".lora_" in name for name in policy.parameters())


def test_adapter_depends_on_its_seed_only():
    torch.manual_seed(1)
    one = tiny_policy(adapter=LORA)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    two = tiny_policy(adapter=LORA)
    other = attach(tiny_model(), tiny_tokenizer(), source="x", adapter=LORA, seed=5)
    assert one.digest() == two.digest()
    assert not torch.equal(*(next(iter(p.parameters().values())) for p in (one, other)))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_unknown_target_names_what_there_is():
    with pytest.raises(UserError, match=r"'q_pro'.*down_proj, gate_proj.*q_proj"):
        tiny_policy(adapter=Lora(targets=("q_pro",)))
    with pytest.raises(UserError, match="'lm_head'"):
        tiny_policy(adapter=Lora(targets=("lm_head",)))


def test_named_targets_only():
    names = tiny_policy(adapter=Lora(targets=("q_proj", "v_proj"))).parameters()
    assert len(names) == 2 * 2 * 2
    assert all("q_proj" in name or "v_proj" in name for name in names)


def test_adapter_dropout_fires_only_where_it_is_asked_for():
    policy = train(tiny_policy(adapter=Lora(r=4, dropout=0.5)))
    still = logits(policy.model)
    assert torch.equal(logits(policy.model), still)
    with policy.adapter_dropout():
        assert not torch.equal(logits(policy.model), still)
        assert not policy.model.training
    assert torch.equal(logits(policy.model), still)


# Digest


@pytest.mark.parametrize("adapter", [None, LORA])
def test_digest_changes_if_and_only_if_a_weight_does(adapter):
    policy = tiny_policy(adapter=adapter)
    first = policy.digest()
    assert policy.digest() == first
    assert tiny_policy(adapter=adapter).digest() == first
    for parameter in policy.parameters().values():
        bit = parameter.data.view(torch.int32).reshape(-1)[-1:]
        bit ^= 1  # the last bit of one number
        assert policy.digest() != first
        bit ^= 1
    assert policy.digest() == first


def test_digest_tells_names_shapes_types_and_scale_apart():
    zeros = torch.zeros(2, 3)
    variants = [{"a": zeros}, {"b": zeros}, {"a": zeros.T}, {"a": zeros.bfloat16()}, {"a": torch.zeros(3)}]
    assert len({weights_digest(v) for v in variants}) == len(variants)
    assert weights_digest({"a": torch.arange(6.0).view(2, 3).T}) != weights_digest({"a": torch.arange(6.0).view(3, 2)})
    assert tiny_policy(adapter=Lora(r=4, alpha=8)).digest() != tiny_policy(adapter=Lora(r=4, alpha=16)).digest()


def test_every_weight_trained_starts_at_the_base_digest_and_an_adapter_does_not():
    model = tiny_model()
    policy = attach(model, tiny_tokenizer(), source="x")
    assert policy.digest() == policy.base_digest
    adapted = attach(tiny_model(), tiny_tokenizer(), source="x", adapter=LORA)
    assert adapted.base_digest == policy.base_digest != adapted.digest()


def test_tied_weights_count_once():
    tied, loose = tiny_policy("llama"), tiny_policy("llama", tie_word_embeddings=False)
    assert loose.parameters_total - tied.parameters_total == 320 * 32
    assert "lm_head.weight" not in tied.parameters()
    assert sum(p.numel() for p in tied.parameters().values()) == tied.parameters_total


# Swapping


@pytest.mark.parametrize("adapter", [None, LORA])
def test_swapped_computes_as_the_snapshot_and_restores(adapter):
    policy = tiny_policy(adapter=adapter)
    start, snapshot = logits(policy.model), policy.snapshot()
    train(policy)
    now, digest, storage = logits(policy.model), policy.digest(), [p.data_ptr() for p in policy.parameters().values()]
    assert not torch.equal(now, start)
    with policy.swapped(snapshot):
        assert torch.equal(policy.model(IDS_1T).logits, start)
        assert not torch.is_grad_enabled()
    with pytest.raises(KeyboardInterrupt), policy.swapped(snapshot):
        raise KeyboardInterrupt
    assert torch.equal(logits(policy.model), now)
    assert policy.digest() == digest
    assert [p.data_ptr() for p in policy.parameters().values()] == storage


def test_backward_after_a_swap_has_the_same_gradient():
    policy = train(tiny_policy(adapter=LORA))
    snapshot = {name: torch.randn_like(p) for name, p in policy.parameters().items()}

    def gradient(swap):
        policy.model.zero_grad()
        loss = policy.model(IDS_1T, labels=IDS_1T).loss
        if swap:
            with policy.swapped(snapshot):
                policy.model(IDS_1T)
        loss.backward()
        return [p.grad.clone() for p in policy.parameters().values()]

    assert all(torch.equal(a, b) for a, b in zip(gradient(False), gradient(True), strict=True))


def test_snapshot_is_a_copy_and_of_this_model():
    policy = tiny_policy(adapter=LORA)
    snapshot = policy.snapshot()
    train(policy)
    assert weights_digest(snapshot) != weights_digest(policy.parameters())
    with pytest.raises(ValueError, match="another model"), tiny_policy().swapped(snapshot):
        pass


# Saving


@pytest.mark.parametrize("arch", ARCHS)
def test_full_model_loads_in_plain_transformers(arch, tmp_path):
    policy = train(tiny_policy(arch))
    artifact = policy.save(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(plain), logits(policy.model))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == policy.tokenizer.chat_template
    assert (artifact.kind, artifact.digest) == ("model", policy.digest())
    again = load(str(tmp_path / "out"))
    assert again.digest() == policy.digest()
    assert weights_digest(again.parameters()) == weights_digest(policy.parameters())


@pytest.mark.parametrize("arch", ARCHS)
def test_adapter_loads_in_plain_peft(arch, tmp_path):
    tiny_model(arch).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    policy = train(load(str(tmp_path / "base"), adapter=LORA))
    artifact = policy.save(tmp_path / "out")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out").eval()
    assert torch.equal(logits(plain), logits(policy.model))
    assert artifact.kind == "adapter"
    # Transformers finds the base by itself from adapter_config.json.
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), logits(policy.model))


def test_saved_adapter_is_loaded_trainable_and_goes_on(base, tmp_path):
    policy = train(load(str(base), adapter=LORA))
    policy.save(tmp_path / "one")
    again = load(str(tmp_path / "one"), adapter=LORA)
    assert again.digest() == policy.digest()
    assert again.parameters().keys() == policy.parameters().keys()
    assert again.source == str(base)
    train(again).save(tmp_path / "two")
    assert load(str(tmp_path / "two")).digest() == again.digest() != policy.digest()
    with pytest.raises(UserError, match=r"r=4, alpha=8.*merge it first"):
        load(str(tmp_path / "one"), adapter=Lora(r=8))


def test_adapter_written_by_peft_alone_finds_its_base(base, tmp_path):
    policy = train(load(str(base), adapter=LORA))
    policy.model.save_pretrained(tmp_path / "peft")
    again = load(str(tmp_path / "peft"))
    assert torch.equal(logits(again.model), logits(policy.model))


def test_adapter_on_a_changed_base_is_refused(base, tmp_path):
    train(load(str(base), adapter=LORA)).save(tmp_path / "out")
    tiny_model("llama", seed=4).save_pretrained(base)
    with pytest.raises(UserError, match="other weights"):
        load(str(tmp_path / "out"))


def test_saving_twice_is_quiet_and_saving_over_something_else_is_refused(tmp_path):
    policy = tiny_policy(adapter=LORA)
    artifact = policy.save(tmp_path / "out")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert policy.save(tmp_path / "out") == artifact
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before
    with pytest.raises(UserError, match="something else"):
        train(policy).save(tmp_path / "out")


def test_two_saves_of_one_adapter_are_equal_files(tmp_path):
    policy = train(tiny_policy(adapter=LORA))
    policy.save(tmp_path / "a")
    policy.save(tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])


def test_failed_save_leaves_nothing(tmp_path, monkeypatch):
    policy = tiny_policy()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(policy.tokenizer), "save_pretrained", full)
    with pytest.raises(UserError, match="No space left"):
        policy.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        policy.save(tmp_path / "file" / "out")


def test_generation_config_that_transformers_would_not_save_is_mended(base, tmp_path):
    path = base / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.6, "do_sample": False}))
    load(str(base)).save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_is_kept_through_save_and_load(base, tmp_path, dtype):
    policy = load(str(base), dtype=dtype, adapter=LORA)
    assert {p.dtype for p in policy.parameters().values()} == {torch.float32}
    assert policy.model.get_input_embeddings().weight.dtype == getattr(torch, dtype)
    train(policy).save(tmp_path / "out")
    assert load(str(tmp_path / "out"), dtype=dtype).digest() == policy.digest()


# Merging


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_merged_is_the_same_function_under_another_digest(arch, tmp_path):
    policy = train(tiny_policy(arch, adapter=LORA))
    before = policy.digest()
    merged = merge(policy)
    assert torch.allclose(logits(merged.model), logits(policy.model), atol=1e-4)
    assert merged.adapter is None
    assert merged.digest() != before == policy.digest()
    merged.save(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), logits(merged.model))


def test_merge_that_rounds_the_update_away_is_refused():
    policy = train(tiny_policy(adapter=LORA, dtype=torch.bfloat16))
    with pytest.raises(UserError, match=r"nats \(allowed: 0.001\).*float32"):
        merge(policy)
    with pytest.raises(UserError, match="no adapter"):
        merge(tiny_policy())


# Tokens


def test_eos_ids_gather_every_end(base):
    assert tiny_policy().eos_ids == {2}
    policy = tiny_policy()
    policy.model.generation_config.eos_token_id = [0, 7]
    assert policy.eos_ids == {0, 2, 7}
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    assert attach(tiny_model(), tokenizer, source="x").eos_ids == {0, 2}


def test_context_is_the_model_s():
    assert {arch: tiny_policy(arch).context for arch in ARCHS} == dict.fromkeys(ARCHS, 256)


def test_broken_weights_are_a_user_error(base):
    (base / "model.safetensors").write_bytes(b"\x80\x04 no safetensors")
    with pytest.raises(UserError, match="cannot be loaded"):
        load(str(base))


def test_missing_weights_are_refused_not_drawn_at_random(base, tmp_path):
    train(load(str(base), adapter=LORA)).save(tmp_path / "out")
    for file, name in (
        (base / "model.safetensors", "model.norm.weight"),
        (tmp_path / "out/adapter_model.safetensors", None),
    ):
        weights = load_file(file)
        del weights[name or next(iter(weights))]
        save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors \(model\.norm\.weight\)"):
        load(str(base))
    tiny_model("llama", seed=3).save_pretrained(base)
    with pytest.raises(UserError, match="does not fit"):
        load(str(tmp_path / "out"))


def test_tokenizer_larger_than_the_model_is_refused(base):
    with pytest.raises(UserError, match="300 tokens, its model 200"):
        attach(tiny_model(vocab=200), tiny_tokenizer(), source="x")


def test_the_token_that_others_pad_with_learns_like_any_other():
    """Where it is the end of a turn too, as in the default model, its embedding must be trained."""
    policy = tiny_policy("qwen2")
    assert policy.model.config.pad_token_id == 2
    embedding = policy.model.get_input_embeddings().weight
    forest = pack([Row((1, 2, 5), (6, 7), (True, True))])
    (gradient,) = torch.autograd.grad(token_logprobs(policy.model, forest).sum(), [embedding])
    assert gradient[2].abs().max() > 0
    assert gradient[9].abs().max() == 0
