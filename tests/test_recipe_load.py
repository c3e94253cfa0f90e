"""A recipe file either becomes a Recipe or one message that names every problem and its line."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.recipe.blocks import Optim
from posttrain.recipe.load import MAX_BYTES, load, parse, resolved
from posttrain.recipe.preference import Preference
from posttrain.recipe.rl import Grpo
from posttrain.recipe.schema import Gate, Recipe
from posttrain.recipe.supervised import Sft
from posttrain.records import UserError

GOOD = """\
schema: 1
name: demo
model:
  source: pip:pkg/m.gguf
stages:
  - id: warm
    kind: sft
    steps: 4
    data:
      sources:
        - {source: reasoning_gym/chain_sum, rows: 64}
  - id: play
    kind: grpo
    steps: 2
    data: {sources: [{source: prompts.jsonl}]}
evals:
  suites:
    - {id: sums, role: trained, source: {source: reasoning_gym/chain_sum, rows: 9, seed: 7}}
gates:
  - {suite: sums, measure: gain, at_least: 0.3}
"""


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as error:
        parse(text, "r.yaml", overrides)
    return str(error.value).splitlines()


def edited(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def test_good_recipe_has_its_values_and_defaults() -> None:
    recipe = parse(GOOD, "r.yaml")
    assert [(s.id, s.kind, s.steps) for s in recipe.stages] == [("warm", "sft", 4), ("play", "grpo", 2)]
    assert recipe.evals.suites[0].source.seed == 7
    assert recipe.stages[0].optim == Optim()


def test_json_round_trip_is_the_same_recipe() -> None:
    recipe = parse(GOOD, "r.yaml")
    assert parse(json.dumps(recipe.model_dump(mode="json", by_alias=True)), "r.json") == recipe


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "    steps: 4",
            "    steps: 4\n    bach_size: 2",
            "r.yaml:9: stages.0.bach_size: unknown key (did you mean `batch_size`",
        ),
        ("    steps: 4", "    steps: true", "r.yaml:8: stages.0.steps: must be a whole number, at least 1, not true"),
        ("    steps: 4", '    steps: "4"', 'r.yaml:8: stages.0.steps: must be a whole number, at least 1, not "4"'),
        ("    steps: 4", "    steps: 4.5", "r.yaml:8: stages.0.steps: must be a whole number, at least 1, not 4.5"),
        ("    steps: 4", "    steps: 0", "r.yaml:8: stages.0.steps: must be a whole number, at least 1, not 0"),
        ("    steps: 4", "    steps: 4\n    lr: 1", "r.yaml:9: stages.0.lr: unknown key (did you mean `optim.lr`?)"),
        ("kind: grpo", "kind: gpro", "r.yaml:13: stages.1.kind: unknown kind 'gpro' (did you mean `grpo`?)"),
        ("    kind: grpo\n", "", "r.yaml:12: stages.1.kind: missing; it takes `continued_pretraining`, `sft`, "),
        ("    steps: 2\n", "", "r.yaml:12: stages.1.steps: missing; it takes a whole number, at least 1"),
        ("  source: pip:pkg/m.gguf", "  source: no\n  adapter: {r: 8, targets: 1}", "or a list of texts, not 1"),
        ("name: demo", "name: 2", "r.yaml:2: name: must be text, pattern"),
        ("role: trained", "role: train", '`trained` or `neighbour`, not "train" (did you mean `trained`?)'),
        (", rows: 64", "", "r.yaml:11: stages.0.data.sources.0.rows: missing; a generator never ends"),
        ("at_least: 0.3", "at_least: 2, at_most: 1", "r.yaml:20: gates.0.at_least: 2.0 is above at_most"),
        (", at_least: 0.3", "", "r.yaml:20: gates.0: a gate needs at_least or at_most"),
        ("{suite: sums,", "{suite: sum,", "r.yaml:20: gates.0.suite: no suite 'sum' under evals (there are: sums)"),
        ("id: play", "id: warm", "r.yaml:12: stages.1.id: 'warm' is taken"),
        ("id: play", "id: play\n    from: wram", "r.yaml:13: stages.1.from: 'wram' is no earlier stage"),
        ("id: play", "id: play\n    sampling: {temperature: 0}", "r.yaml:13: stages.1.sampling.temperature: must be"),
        ("id: play", "id: play\n    optim: {betas: [0.9]}", "stages.1.optim.betas: must be a list of 2 numbers"),
        ("schema: 1", "schema: 2", "r.yaml:1: schema: recipe format 2 is newer than this posttrain, which reads 1"),
        ("schema: 1", "schema: 0", "r.yaml:1: schema: recipe format 0 cannot be read or migrated"),
        ("schema: 1\n", "", "r.yaml:1: schema: missing"),
    ],
)
def test_one_mistake_is_one_line_that_says_where_and_what(old: str, new: str, expected: str) -> None:
    lines = problems(edited(old, new))
    assert len(lines) == 1
    assert expected in lines[0]


def test_all_problems_are_told_in_the_order_of_the_file() -> None:
    lines = problems(
        GOOD.replace("name: demo", "nmae: demo").replace("steps: 4", "steps: -1").replace("rows: 9", "row: 9")
    )
    assert [line.split(":")[1] for line in lines] == ["1", "2", "8", "18"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "r.yaml:1: the recipe is empty"),
        ("# only a comment\n", "r.yaml:1: the recipe is empty"),
        ("- a\n", 'r.yaml:1: a recipe is a block of keys (`name: ...`), not ["a"]'),
        ("a: 1\n\tb: 2\n", "r.yaml:2: not valid YAML"),
        ("a: [1,\n", "r.yaml:2: not valid YAML"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2: not valid YAML"),
        ("a: 1\nb: {c: 2, c: 3}\n", "r.yaml:2: b.c: given twice, first at r.yaml:2"),
        ("a: 1\nb: \x07\n", "r.yaml:2: character U+0007 cannot stand here"),
        ("a: *nowhere\n", "r.yaml:1: not valid YAML"),
        ("1: a\n", "r.yaml:1: a key must be text: put 1 in quotes"),
        ("? [a]\n: b\n", "r.yaml:1: a key must be text"),
        ("a: !!python/object/apply:os.system [ls]\n", "r.yaml:1: the tag"),
        ("a: !!binary aGk=\n", "r.yaml:1: the tag"),
        ("a: !!int x\n", "r.yaml:1: 'x' cannot be read as int"),
        ("a: 1e999\n", "r.yaml:1: 1e999 is too large"),
        ('a: "\\ud800"\n', "r.yaml:1: "),
        ("<<: 1\n", "r.yaml:1: <<: takes a block"),
        ("a: " + "9" * 5000 + "\n", "r.yaml:1: "),
        ("a: &a [*a]\n", "aliases expanded"),
        ("a: &a {<<: *a}\n", "nested too deeply"),
        ("a: " + "[" * 5000, "r.yaml:1: "),
    ],
)
def test_broken_yaml_is_told_by_line(text: str, expected: str) -> None:
    assert expected in problems(text)[0]


@pytest.mark.parametrize(
    "entry", ["[{0}, {0}, {0}, {0}, {0}, {0}, {0}, {0}]", "{{<<: [{0}, {0}, {0}, {0}, {0}, {0}, {0}]}}"]
)
def test_alias_bomb_is_bounded(entry: str) -> None:
    bomb = "a0: &a0 {}\n" + "".join(f"a{i}: &a{i} {entry.format(f'*a{i - 1}')}\n" for i in range(1, 30))
    assert "aliases expanded" in problems(bomb)[0]


def test_scalars_are_those_of_yaml_1_2() -> None:
    recipe = parse(
        edited("name: demo", "name: no"), "r.yaml", ["stages.warm.optim.lr=2e-4", "stages.warm.data.system=off"]
    )
    assert (recipe.name, recipe.stages[0].optim.lr, recipe.stages[0].data.system) == ("no", 2e-4, "off")
    assert parse(edited("name: demo", "name: 2026-01-01"), "r.yaml").name == "2026-01-01"


def test_anchors_and_merge_keys() -> None:
    text = edited("    steps: 4", "    steps: 4\n    optim: &o {lr: 0.1, warmup: 0.5}")
    text = text.replace("    steps: 2", "    steps: 2\n    optim:\n      <<: *o\n      lr: 0.2")
    recipe = parse(text, "r.yaml")
    assert [(s.optim.lr, s.optim.warmup) for s in recipe.stages] == [(0.1, 0.5), (0.2, 0.5)]
    assert recipe == parse(text, "r.yaml", ["stages.warm.optim.lr=0.1"])
    lines = problems(text.replace("warmup: 0.5", "warmup: 2").replace("lr: 0.2", "lr: -1"))
    assert [line.split(": ")[:2] for line in lines] == [
        ["r.yaml:9", "stages.0.optim.warmup"],
        ["r.yaml:9", "stages.1.optim.warmup"],
        ["r.yaml:18", "stages.1.optim.lr"],
    ]


def test_first_of_several_merged_blocks_wins() -> None:
    text = edited("    steps: 4", "    steps: 4\n    optim: {<<: [{lr: 0.1}, {lr: 0.2, eps: 0.3}]}")
    optim = parse(text, "r.yaml").stages[0].optim
    assert (optim.lr, optim.eps) == (0.1, 0.3)


# --set


def test_set_by_index_and_by_id_agree() -> None:
    by_id = parse(GOOD, "r", ["stages.play.steps=9", "evals.suites.sums.source.rows=3"])
    assert by_id == parse(GOOD, "r", ["stages.1.steps=9", "evals.suites.0.source.rows=3"])
    assert (by_id.stages[1].steps, by_id.evals.suites[0].source.rows) == (9, 3)


def test_set_equals_editing_the_file() -> None:
    assert parse(GOOD, "r", ["stages.warm.steps=7"]) == parse(edited("steps: 4", "steps: 7"), "r")


def test_set_makes_blocks_replaces_them_and_takes_flow_values() -> None:
    recipe = parse(GOOD, "r", ["model.adapter.r=4", "gates=[]", "stages.play.sampling={top_k: 5, stop: ['=', b]}"])
    assert recipe.model.adapter is not None
    assert recipe.model.adapter.r == 4
    assert recipe.gates == ()
    play = recipe.stages[1]
    assert isinstance(play, Grpo)
    assert (play.sampling.top_k, play.sampling.stop) == (5, ("=", "b"))
    assert parse(GOOD, "r", ["model.adapter.r=4", "model.adapter=null"]).model.adapter is None


def test_set_repairs_what_the_file_has_wrong() -> None:
    assert parse(edited("steps: 4", "steps: x"), "r", ["stages.warm.steps=4"]) == parse(GOOD, "r")


def test_an_id_made_of_digits_is_taken_before_the_index() -> None:
    recipe = parse(edited("id: warm", "id: '1'"), "r", ["stages.1.steps=9"])
    assert [s.steps for s in recipe.stages] == [9, 2]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.warm.stpes=2", "stages.0.stpes: unknown key (did you mean `steps`?)"),
        ("stages.warm.steps=-2", "stages.0.steps: must be a whole number, at least 1, not -2"),
        ("stages.warn.steps=2", "stages has no entry 'warn' (did you mean `warm`?); it has: warm, play"),
        ("stages.2.steps=2", "stages has no entry '2'; it has: warm, play"),
        ("name.x=2", 'name is "demo", not a block of keys'),
        ("modle.adapter.r=2", "modle: unknown key (did you mean `model`?)"),
        ("stages.warm.steps", "write KEY=VALUE"),
        ("stages.warm.steps=", "write KEY=VALUE"),
        ("a..b=1", "write KEY=VALUE"),
        ("=1", "write KEY=VALUE"),
        ("seed=[1", "not valid YAML"),
        ("model={source: a, sauce: b}", "model.sauce: unknown key (did you mean `source`?)"),
        ("schema=3", "schema: recipe format 3 is newer"),
    ],
)
def test_error_of_an_override_names_it(override: str, expected: str) -> None:
    lines = problems(GOOD, override)
    assert len(lines) == 1
    assert lines[0].startswith(f"--set {override}: ")
    assert expected in lines[0]


@pytest.mark.parametrize(
    ("reward", "what"),
    [
        ("{kind: process, source: 'stage:steps'}", None),
        ("{kind: model, source: 'stage:steps'}", "'steps' is no earlier stage of kind reward_model (there are: none)"),
        (
            "{kind: process, source: 'stage:warm'}",
            "'warm' is no earlier stage of kind process_reward_model (there are: steps)",
        ),
        ("{kind: judge, source: 'stage:warm'}", "only the rewards model and process take stage:ID"),
        ("{kind: implicit, source: 'stage:warm', reference: r}", "only the rewards model and process take stage:ID"),
        ("{kind: implicit, source: m, reference: 'stage:warm'}", "only the rewards model and process take stage:ID"),
    ],
)
def test_a_reward_takes_its_model_from_a_stage_that_makes_such_a_one(reward: str, what: str | None) -> None:
    scored = "  - {id: steps, kind: process_reward_model, steps: 1, data: {sources: [{source: s.jsonl}]}}\n"
    text = edited("  - id: play\n", f"{scored}  - id: play\n    from: warm\n")
    override = f"stages.play.rewards=[{reward}]"
    if what is None:
        assert parse(text, "r", [override]).stages[2].rewards[0].source == "stage:steps"
        return
    (line,) = problems(text, override)
    key = "reference" if "reference: 'stage" in reward else "source"
    assert f"stages.2.rewards.0.{key}: {what}" in line


@pytest.mark.parametrize("kind", ["kind: distill, teacher", "kind: preference, reference"])
def test_a_teacher_or_reference_is_no_stage_of_the_recipe(kind: str) -> None:
    text = edited("    kind: grpo\n", f"    {kind}: {{source: 'stage:warm'}}\n".replace(", ", "\n    "))
    (line,) = problems(text)
    assert f"{kind.split()[-1]}.source: only the rewards model and process take stage:ID; name a model, or" in line


@given(st.text(max_size=60), st.text(max_size=20))
def test_any_text_is_a_recipe_or_a_user_error(text: str, override: str) -> None:
    for attempt in ((text, ()), (GOOD + text, ()), (GOOD, (override,)), (GOOD, (f"stages.{override}",))):
        with contextlib.suppress(UserError):
            assert isinstance(parse(attempt[0], "r", attempt[1]), Recipe)


# Files


def test_load_reads_a_file_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text(GOOD, encoding=encoding)
        assert load(path, ["seed=3"]) == parse(GOOD, "r", ["seed=3"])


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    cases = {"missing.yaml": None, "latin.yaml": b"a: 1\nb: \xe9\n", "big.yaml": b"#" * (MAX_BYTES + 1)}
    expected = {"missing.yaml": "No such file", "latin.yaml": ":2: not UTF-8", "big.yaml": "larger than"}
    for name, content in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=expected[name]):
            load(tmp_path / name)
    with pytest.raises(UserError, match="cannot read the recipe"):
        load(tmp_path)


def test_resolved_makes_files_absolute_and_leaves_names_alone(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    text = edited("  source: pip:pkg/m.gguf", "  source: local\n  chat_template: t.jinja")
    recipe = parse(text, "r", ["evals.retention={prompts: ../p.txt}", "stages.play.data.sources.0.source=d/a.jsonl"])
    there = resolved(recipe, tmp_path)
    assert there.model.source == str(tmp_path / "local")
    assert there.model.chat_template == str(tmp_path / "t.jinja")
    assert there.stages[1].data.sources[0].source == str(tmp_path / "d" / "a.jsonl")
    assert there.evals.retention is not None
    assert there.evals.retention.prompts == str(tmp_path.parent / "p.txt")
    assert there.stages[0].data == recipe.stages[0].data
    assert there.evals.suites == recipe.evals.suites
    assert resolved(there, Path("/elsewhere")) == there
    for source in ("pip:pkg/m.gguf", "owner/name"):
        same = parse(GOOD, "r", [f"model.source={source}", "evals.retention={}", "model.chat_template=chatml"])
        assert resolved(same, tmp_path).model == same.model
        assert resolved(same, tmp_path).evals == same.evals


# Schema


def test_partly_written_optim_keeps_the_defaults_of_its_kind() -> None:
    assert Grpo.model_fields["optim"].get_default(call_default_factory=True).lr == 5e-5
    recipe = parse(GOOD, "r", ["stages.play.optim.weight_decay=0.1", "stages.warm.optim.weight_decay=0.1"])
    assert recipe.stages[1].optim == Optim(lr=5e-5, schedule="constant", weight_decay=0.1)
    assert recipe.stages[0].optim == Optim(weight_decay=0.1)
    play = recipe.stages[1].model_dump()
    assert Grpo(**{**play, "optim": {"lr": 0.5}}).optim == Optim(lr=0.5, schedule="constant")
    assert Preference.model_fields["optim"].get_default(call_default_factory=True) == Optim(lr=5e-5)
    assert Sft.model_fields["optim"].get_default(call_default_factory=True) == Optim()


def test_gate_of_retention_is_kl_and_only_that() -> None:
    assert Gate(suite="retention", measure="kl", at_most=0.1).at_most == 0.1
    for suite, measure in (("retention", "score"), ("sums", "kl")):
        with pytest.raises(ValueError, match="measure kl"):
            Gate(suite=suite, measure=measure, at_most=0.1)
