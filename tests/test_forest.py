"""The Forest's one promise: values and gradients equal those of one sequence at a time."""

from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import ARCHS, tiny_model

from posttrain.forest import Row, grow, pack, share, split, token_logprobs, unrolled_logprobs
from posttrain.forest.logprobs import check_head
from posttrain.forest.tree import MIN_SHARED

VOCAB = 97


def random_forest(rng: random.Random, depth: int = 4):
    """Segments of random length, parents drawn among earlier segments of less than `depth`; some targets anywhere."""
    nodes, depths = [], []
    for i in range(rng.randint(1, 9)):
        candidates = [j for j in range(i) if depths[j] < depth]
        parent = rng.choice(candidates) if candidates and rng.random() < 0.75 else -1
        depths.append(1 + (depths[parent] if parent >= 0 else 0))
        ids = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 7))]
        marks = [rng.random() < 0.6 for _ in ids]
        if parent < 0:
            marks[0] = False
        nodes.append((ids, marks, parent))
    parents = {p for _, _, p in nodes}
    return grow(nodes, [i for i in range(len(nodes)) if i not in parents])


def sharpen(model: torch.nn.Module) -> torch.nn.Module:
    """Scale the queries up, so that a missing soft-cap, window or mask shows in the numbers: without the cap the
    log-probabilities of the Gemma 2 below are off by more than 1."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(k in name for k in ("q_proj", "qkv_proj", "query_key_value", "c_attn")) and p.ndim == 2:
                p.mul_(20)
    return model


@contextmanager
def double_throughout():
    """Transformers casts norms and attention to float32 even in a float64 model; here they stay float64, so that
    the comparison is of the mathematics and not of rounding."""
    to, single, softmax = torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax
    torch.Tensor.float = lambda x: x if x.dtype == torch.float64 else single(x)
    torch.Tensor.to = lambda x, *a, **k: (
        x if x.dtype == torch.float64 and torch.float32 in (*a, k.get("dtype")) else to(x, *a, **k)
    )
    torch.nn.functional.softmax = lambda x, dim, dtype=None: softmax(x, dim)
    try:
        yield
    finally:
        torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax = to, single, softmax


@pytest.fixture(scope="module", params=ARCHS)
def model(request):
    # Gemma 2's own cap of 50 would not bind on scores of this size.
    cap = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 1.0} if request.param == "gemma2" else {}
    return sharpen(tiny_model(request.param, vocab=VOCAB, dtype=torch.float64, **cap))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6))
def test_values_and_gradients_equal_one_by_one(model, seed):
    rng = random.Random(seed)
    forest = random_forest(rng)
    if not forest.target_T.any():
        return
    weight_T = torch.tensor([rng.uniform(-1, 1) for _ in range(len(forest))], dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    results = []
    for way in (token_logprobs, unrolled_logprobs):
        with double_throughout():
            logps_T = way(model, forest)
        grads = torch.autograd.grad((logps_T * weight_T).sum(), parameters, allow_unused=True)
        results.append((logps_T.detach(), grads))
    (ours, grads), (oracle, oracle_grads) = results
    torch.testing.assert_close(ours, oracle, atol=1e-6, rtol=0)
    assert (ours[~forest.target_T] == 0).all()
    for g, o in zip(grads, oracle_grads, strict=True):
        assert (g is None) == (o is None)
        if g is not None:
            torch.testing.assert_close(g, o, atol=1e-6, rtol=0)


@pytest.mark.parametrize("arch", ARCHS)
def test_float32_agrees_to_1e_4(arch):
    model = tiny_model(arch, vocab=VOCAB)
    for seed in range(5):
        forest = random_forest(random.Random(seed))
        torch.testing.assert_close(
            token_logprobs(model, forest), unrolled_logprobs(model, forest), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("arch", ARCHS)
def test_log_probabilities_are_those_of_the_models_own_forward(arch):
    """Independent of both paths above: the log-softmax of `model(ids).logits`, temperature included."""
    model = tiny_model(arch, vocab=VOCAB)
    check_head(model)
    ids = [random.Random(3).randrange(VOCAB) for _ in range(12)]
    forest = pack([Row(tuple(ids[:5]), tuple(ids[5:]), (True,) * 7)])
    logits_TV = model(torch.tensor([ids])).logits[0].float() / 0.7
    want = torch.log_softmax(logits_TV, -1)[torch.arange(4, 11), torch.tensor(ids[5:])]
    torch.testing.assert_close(token_logprobs(model, forest, 0.7)[5:], want, rtol=1e-4, atol=1e-5)


def rows_of(rng: random.Random, n: int) -> list[Row]:
    """Rows whose contexts share a system prompt, then a question, as data does; some contexts extend others."""
    system = [rng.randrange(VOCAB) for _ in range(rng.randint(0, 12))]
    questions = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 14))] for _ in range(3)]
    rows = []
    for _ in range(n):
        context = system + [t for q in rng.sample(questions, rng.randint(1, 3)) for t in q]
        completion = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))]
        rows.append(Row(tuple(context), tuple(completion), tuple(rng.random() < 0.8 for _ in completion)))
    return rows


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 12))
def test_packing_loses_and_mixes_nothing(seed, n):
    rows = rows_of(random.Random(seed), n)
    forest = pack(rows)
    starts = {s.start: i for i, s in enumerate(forest.segments)}
    for i, (row, (start, stop)) in enumerate(zip(rows, forest.spans, strict=True)):
        path = forest.path(starts[start])
        tokens = [t for p in path for t in forest.ids_T[forest.segments[p].start : forest.segments[p].stop].tolist()]
        assert tokens == [*row.context, *row.completion]
        assert tuple(forest.target_T[start:stop].tolist()) == row.target
        assert (forest.sequence_T[start:stop] == i).all()
        assert forest.position_T[stop - 1] == len(row) - 1
    assert forest.target_T.sum() == sum(sum(row.target) for row in rows)
    assert len(forest) <= sum(map(len, rows))


def test_shared_context_stands_once():
    system, a, b = tuple(range(20)), (30, 31, 32), (40, 41)
    rows = [
        Row(system + a, (50,), (True,)),
        Row(system + a, (51, 52), (True, True)),
        Row(system + b, (53,), (True,)),
    ]
    assert len(pack(rows)) == 20 + 3 + 2 + 1 + 2 + 1


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.integers(1, 200))
def test_split_covers_every_unit_once(seed, budget):
    rows = rows_of(random.Random(seed), 11)
    rows[1] = replace(rows[1], context=rows[0].context)
    units = [(0, 1), *((i,) for i in range(2, 11))]
    packs = split(rows, units, budget)
    assert sorted(u for p in packs for u in p) == list(range(len(units)))
    for p in packs:
        packed = pack([rows[i] for u in p for i in units[u]])
        assert len(packed) <= budget + MIN_SHARED * len(p) or len(p) == 1


def test_micro_batches_give_the_gradient_of_the_whole():
    model = tiny_model("llama", vocab=VOCAB, dtype=torch.float64)
    rows = rows_of(random.Random(0), 10)
    parameters = list(model.parameters())

    def gradient(budget):
        total = None
        for p in split(rows, [(i,) for i in range(10)], budget):
            with double_throughout():
                loss = token_logprobs(model, pack([rows[i] for i in p])).sum()
                g = torch.autograd.grad(loss, parameters)
            total = g if total is None else [a + b for a, b in zip(total, g, strict=True)]
        return total

    for a, b in zip(gradient(10**6), gradient(1), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-9)


def test_recurrent_models_fall_back_and_say_so():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()
    forest = pack([Row((1, 2, 3), (4, 5), (True, True))])
    with pytest.warns(UserWarning, match="one sequence at a time"):
        logps_T = token_logprobs(model, forest)
    want = torch.log_softmax(model(torch.tensor([[1, 2, 3, 4, 5]])).logits[0].float(), -1)
    torch.testing.assert_close(logps_T[3:], torch.stack([want[2, 4], want[3, 5]]), rtol=1e-4, atol=1e-5)


def test_attention_sinks_take_their_share():
    """gpt-oss: a learned logit a head in the softmax, on layers with and without a window."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        max_position_embeddings=4096,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = sharpen(GptOssForCausalLM(config).float().eval())
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.sinks.normal_(std=2)
    forests = [random_forest(random.Random(seed)) for seed in range(4)]
    before = [token_logprobs(model, forest).detach() for forest in forests]
    for forest, logps_T in zip(forests, before, strict=True):
        torch.testing.assert_close(logps_T, unrolled_logprobs(model, forest).detach(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(-1e4)
    without = [token_logprobs(model, forest).detach() for forest in forests]
    assert max((a - b).abs().max() for a, b in zip(before, without, strict=True)) > 1e-2


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2", "gpt2"])
def test_a_frozen_head_and_a_trained_one_give_the_same(monkeypatch, arch, temperature):
    """Their backward passes differ: one keeps derivatives, the other computes logits again. Three chunks each."""
    monkeypatch.setattr("posttrain.forest.logprobs.CHUNK", 5)
    found = []
    for frozen in (True, False):
        model = tiny_model(arch, dtype=torch.float64)
        head = model.get_output_embeddings()
        model.requires_grad_(True)
        if model.config.tie_word_embeddings:
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
        head.requires_grad_(not frozen)
        forest = pack(
            [Row((1, 2, 3, 4), (5, 6, 7, 8, 9, 3, 2), (True,) * 7), Row((9, 3), (4, 4, 4, 4, 5), (True,) * 5)]
        )
        logps_T = token_logprobs(model, forest, temperature)
        (logps_T * torch.arange(len(forest))).sum().backward()
        found.append((logps_T.detach(), {n: p.grad for n, p in model.named_parameters() if p is not head.weight}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=1e-12)
    for name, gradient in found[1][1].items():
        if gradient is not None:
            torch.testing.assert_close(found[0][1][name], gradient, rtol=1e-9, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), workers=st.integers(1, 5))
def test_shares_hold_every_unit_once_and_contexts_whole(seed, workers):
    rng = random.Random(seed)
    contexts = [tuple(rng.choices(range(9), k=rng.randint(1, 30))) for _ in range(rng.randint(1, 6))]
    rows = [
        Row(rng.choice(contexts), (1,) * (n := rng.randint(1, 20)), (True,) * n) for _ in range(2 * rng.randint(1, 10))
    ]
    units = [(i,) for i in range(len(rows))]
    shares = share(rows, units, workers)
    assert len(shares) == workers
    assert sorted(u for part in shares for u in part) == list(range(len(units)))
    places = {}
    for worker, part in enumerate(shares):
        for u in part:
            places.setdefault(rows[u].context, set()).add(worker)
    if len(places) >= workers:
        assert all(len(where) == 1 for where in places.values())
        assert all(shares)


def test_shares_are_even():
    """Sixteen rows of 10 to 160 tokens: the two halves differ by less than the shortest row."""
    rows = [Row((i,) * 5 * i, (1,) * 5 * i, (True,) * 5 * i) for i in range(1, 17)]
    loads = [sum(len(rows[u]) for u in part) for part in share(rows, [(i,) for i in range(16)], 2)]
    assert abs(loads[0] - loads[1]) <= 10
