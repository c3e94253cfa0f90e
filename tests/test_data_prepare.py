"""Preparing: what is kept, what is counted, and how sources are mixed."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_chat import CHATML, make_tokenizer

from posttrain.data import tasks
from posttrain.data.chat import Renderer
from posttrain.data.prepare import Need, Prepared, prepare, prompt_key, prompted, schedule
from posttrain.data.shapes import Malformed
from posttrain.models.template import CHATML as BUILT_IN
from posttrain.recipe.blocks import Data
from posttrain.records import Example, UserError

TOKENIZER = make_tokenizer(CHATML)


def run(tmp_path: Path, rows: list[Any], need: Need = "completion", context: int | None = None,
        held_out: frozenset[str] = frozenset(), **data: Any) -> Prepared:  # fmt: skip
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Data(sources=({"source": str(path)},), **data)  # type: ignore[arg-type]
    return prepare(recipe, Renderer(TOKENIZER), need=need, held_out=held_out, context=context)


def row(i: int, answer: str = "a") -> dict[str, str]:
    return {"prompt": f"question {i}", "completion": answer}


def test_report_counts_what_happened(tmp_path: Path) -> None:
    key = prompt_key(Example(id="", prompt=({"role": "user", "content": "QUESTION  1 "},)))
    rows = [row(0), row(0), row(1), row(2, "x" * 500), row(3), {"prompt": "", "completion": "a"}]
    done = run(tmp_path, rows, held_out=frozenset({key}), max_length=100, max_bad_rows=0.5)
    (report,) = done.report["sources"]
    assert [r.example.prompt[0]["content"] for r in done.rows[0]] == ["question 0", "question 3"]
    assert {k: report[k] for k in ("read", "used", "bad", "too_long", "truncated", "held_out", "duplicates")} == {
        "read": 6, "used": 2, "bad": 1, "too_long": 1, "truncated": 0, "held_out": 1, "duplicates": 1,
    }  # fmt: skip
    assert report["bad_rows"] == ["d.jsonl:6: prompt is empty"]
    lengths = [len(r.prompt_ids) + len(r.completion_ids) for r in done.rows[0]]
    assert report["length"] == {"p50": min(lengths), "p95": max(lengths), "max": max(lengths)}
    assert report["target_tokens"] == 4  # "a" and the end of the turn, twice
    assert json.loads(json.dumps(done.report)) == done.report


def test_truncation_cuts_answers_and_never_prompts(tmp_path: Path) -> None:
    rows = [row(0, "x y " * 200), {"prompt": "long " * 200, "completion": "a"}, row(1)]
    done = run(tmp_path, rows, max_length=64, too_long="truncate")
    cut, whole = done.rows[0]
    full, _ = run(tmp_path, [rows[0], row(1)], max_length=5000).rows[0]
    assert len(cut.prompt_ids) + len(cut.completion_ids) == 64
    assert cut.completion_ids == full.completion_ids[: len(cut.completion_ids)]
    assert all(len(r.completion_ids) == len(r.completion_target) for r in (cut, whole))
    (report,) = done.report["sources"]
    assert (report["truncated"], report["too_long"]) == (1, 1)


def test_a_pair_that_truncation_makes_equal_is_dropped(tmp_path: Path) -> None:
    same = "word " * 100
    pair = {"prompt": "q", "chosen": same + "yes", "rejected": same + "no"}
    short = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    done = run(tmp_path, [pair, short], "pair", max_length=50, too_long="truncate")
    assert len(done.rows[0]) == 1
    assert done.report["sources"][0]["too_long"] == 1


def test_error_policy_and_the_models_context(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)1 rows are longer than 100 tokens.*d\.jsonl:2 \(\d+ tokens\)"):
        run(tmp_path, [row(0), row(1, "x" * 500)], max_length=100, too_long="error")
    assert run(tmp_path, [row(0), row(1, "x" * 500)], max_length=5000, context=100).report["limit"] == 100


def test_too_many_bad_rows_stop_with_their_places(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)2 of 4 rows are bad.*max_bad_rows \(5%\).*d\.jsonl:2: .*d\.jsonl:4: "):
        run(tmp_path, [row(0), 3, row(1), {"prompt": "q"}])


def test_nothing_left_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"empty data set, none of its 1 rows is left: 1 too long"):
        run(tmp_path, [row(0, "x" * 500)], max_length=100)


@pytest.mark.parametrize(
    ("need", "why"), [("pair", "no pair"), ("label", "no label")]
)  # fmt: skip
def test_a_need_that_rows_do_not_meet(tmp_path: Path, need: Need, why: str) -> None:
    with pytest.raises(UserError, match=why):
        run(tmp_path, [row(0)], need)


def test_bad_answers_are_not_imitated_and_pairs_give_their_better_half(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="labelled bad"):
        run(tmp_path, [{**row(0), "label": False}])
    done = run(tmp_path, [{"prompt": "q", "chosen": "good", "rejected": "bad"}])
    assert done.rows[0][0].rejected_ids == ()


def test_prompts_that_can_be_scored() -> None:
    need = partial(prompted, lacks=lambda example: "" if example.task else "it has no task")
    source = {"source": "reasoning_gym/chain_sum", "rows": 6, "seed": 3}
    renderer, turn = Renderer(TOKENIZER), {"role": "user", "content": "q"}
    done = prepare(Data(sources=(source,)), renderer, need=need, held_out=frozenset())  # type: ignore[arg-type]
    examples = tasks.load("chain_sum", 6, 3, {})
    assert [r.prompt_ids for r in done.rows[0]] == [renderer.prompt_ids(e) for e in examples]
    held = frozenset(map(prompt_key, examples[:2]))
    left = prepare(Data(sources=(source,)), renderer, need=need, held_out=held)  # type: ignore[arg-type]
    assert [r.example for r in left.rows[0]] == examples[2:]
    for example, why in ((Example("x", (turn,)), "no task"), (Example("x", task="t"), "no prompt")):
        with pytest.raises(Malformed, match=why):
            need(example, renderer)


def test_digest_names_the_tokens_and_their_order(tmp_path: Path) -> None:
    rows = [row(0), row(1)]
    digest = run(tmp_path, rows).report["digest"]
    assert digest == run(tmp_path, rows).report["digest"]
    others = [rows[::-1], rows[:1], [row(0), row(1, "b")]]
    assert len({digest, *(run(tmp_path, other).report["digest"] for other in others)}) == 4


def test_prompt_key_ignores_spacing_case_and_system() -> None:
    def key(*turns: tuple[str, str]) -> str:
        return prompt_key(Example(id="", prompt=tuple({"role": r, "content": c} for r, c in turns)))

    assert key(("user", "What is  1+1?\n")) == key(("system", "Be brief"), ("user", "what is 1+1?"))
    assert key(("user", "a"), ("assistant", "b")) != key(("user", "a b"))


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(1, 7), st.floats(0.1, 5)), min_size=1, max_size=4),
    slots=st.integers(0, 60), more=st.integers(0, 40), seed=st.integers(0, 9),
)  # fmt: skip
def test_schedule(parts: list[tuple[int, float]], slots: int, more: int, seed: int) -> None:
    sizes, weights = [s for s, _ in parts], [w for _, w in parts]
    plan = schedule(sizes, weights, slots, seed)
    assert plan == schedule(sizes, weights, slots + more, seed)[:slots]
    given_rows: dict[int, list[int]] = {i: [r for s, r in plan if s == i] for i in range(len(sizes))}
    for i, rows in given_rows.items():
        assert abs(len(rows) - slots * weights[i] / sum(weights)) < len(sizes)
        for start in range(0, len(rows), sizes[i]):
            epoch = Counter(rows[start : start + sizes[i]])
            assert max(epoch.values()) == 1
            assert set(epoch) <= set(range(sizes[i]))


def test_schedule_has_a_fresh_order_for_each_epoch_source_and_seed() -> None:
    plan = [r for _, r in schedule([50], [1.0], 100, 0)]
    two = schedule([50, 50], [1.0, 1.0], 100, 0)
    orders = [plan[:50], plan[50:], [r for s, r in two if s == 1], [r for _, r in schedule([50], [1.0], 50, 1)]]
    assert len(set(map(tuple, orders))) == 4


@pytest.mark.parametrize(
    ("file", "need"),
    [
        ("llamafactory_demo/alpaca_en_demo.json.gz", "completion"),
        ("llamafactory_demo/dpo_en_demo.json.gz", "pair"),
        ("hh_rlhf_harmless_test/test.jsonl.gz", "pair"),
        ("llamafactory_demo/wiki_demo.txt.gz", "text"),
    ],
)
def test_real_sets_are_prepared(shared_data: Path, file: str, need: Need) -> None:
    source = {"source": str(shared_data / file), "rows": 100}
    done = prepare(Data(sources=(source,), max_length=100_000), Renderer(TOKENIZER), need=need, held_out=frozenset())  # type: ignore[arg-type]
    (report,) = done.report["sources"]
    assert report["used"] + report["bad"] + report["duplicates"] == report["read"]
    for r in done.rows[0]:
        assert any(r.completion_target)
        assert (need == "pair") == bool(r.rejected_ids)
        if r.example.text is None:
            assert TOKENIZER.decode(r.completion_ids[-1:]) == "<|im_end|>"


def test_tool_calls_of_a_real_set_are_learned(shared_data: Path) -> None:
    source = {"source": str(shared_data / "llamafactory_demo/glaive_toolcall_en_demo.json.gz"), "rows": 60}
    data = Data(sources=(source,), max_length=100_000)  # type: ignore[arg-type]
    done = prepare(data, Renderer(make_tokenizer(BUILT_IN)), need="completion", held_out=frozenset())
    calls = [sum("tool_calls" in m for m in r.example.completion) for r in done.rows[0]]
    learned = [
        TOKENIZER.decode([t for t, on in zip(r.completion_ids, r.completion_target, strict=True) if on])
        for r in done.rows[0]
    ]
    assert sum(calls) > 10
    assert [text.count("<tool_call>") for text in learned] == calls
    with pytest.raises(UserError, match="leaves tool calls out"):
        prepare(data, Renderer(TOKENIZER), need="completion", held_out=frozenset())
