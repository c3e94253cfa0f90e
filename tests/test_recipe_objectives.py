"""A preference stage takes what its loss reads and nothing else, and says what it took."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from posttrain.recipe.load import parse
from posttrain.recipe.objectives import OBJECTIVES, PARAMETERS, Divergence, Loss
from posttrain.recipe.preference import Preference
from posttrain.records import UserError

LISTED = {"on_policy": {"prompts": 4}}
PROBE = {"weighting": True, "divergence": "js"}
"""A value that no loss refuses for itself, where that is not 0.1."""


def stage(loss: str, **settings: Any) -> Preference:
    if OBJECTIVES[loss].of in ("lists", "triples"):
        settings = LISTED | settings
    data = {"sources": [{"source": "x.jsonl"}]}
    return Preference.model_validate(
        {"id": "a", "kind": "preference", "steps": 1, "data": data, "loss": loss, **settings}
    )


def refused(loss: str, **settings: Any) -> str:
    """The one line that a recipe with such a stage gets."""
    block = {"id": "a", "kind": "preference", "steps": 1, "data": {"sources": [{"source": "x.jsonl"}]}, "loss": loss}
    recipe = {"schema": 1, "name": "n", "model": {"source": "m"}, "stages": [block | settings]}
    with pytest.raises(UserError) as caught:
        parse(json.dumps(recipe), "r.json")
    (line,) = str(caught.value).splitlines()
    return line.removeprefix("r.json:1: stages.0.")


def test_the_table_holds_every_loss_and_names_keys_that_there_are() -> None:
    assert list(OBJECTIVES) == list(get_args(Loss))
    assert set(PARAMETERS) <= Preference.model_fields.keys()


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_what_a_loss_reads_is_taken_and_filled_in_and_the_rest_is_refused(loss: str) -> None:
    """`alpha` is read with the divergence of that name."""
    reads = OBJECTIVES[loss].parameters(None)
    plain = stage(loss)
    assert plain.parameters == dict(reads)
    for name in PARAMETERS:
        if name in reads:
            value = PROBE.get(name, 0.1)
            assert getattr(plain, name) == reads[name]
            assert stage(loss, **{name: value}).parameters == {**reads, name: value}
        else:
            assert getattr(plain, name) is None
            given = LISTED if OBJECTIVES[loss].of in ("lists", "triples") else {}
            message = refused(loss, **given, **{name: PROBE.get(name, 0.1)})
            assert message == f"{name}: loss {loss} does not read it; it reads {', '.join(reads)}"


def test_a_record_of_the_stage_makes_the_same_stage_again() -> None:
    for loss in OBJECTIVES:
        first = stage(loss)
        assert Preference.model_validate(first.model_dump(mode="json", by_alias=True)) == first


@pytest.mark.parametrize("divergence", get_args(Divergence))
def test_alpha_belongs_to_one_divergence(divergence: str) -> None:
    if divergence == "alpha":
        assert stage("dpo", divergence=divergence).parameters["alpha"] == 0.5
        assert stage("dpo", divergence=divergence, alpha=0.2).parameters["alpha"] == 0.2
    else:
        assert "alpha" not in stage("dpo", divergence=divergence).parameters
        assert refused("dpo", divergence=divergence, alpha=0.2).startswith("alpha: loss dpo does not read it")


@pytest.mark.parametrize(
    ("loss", "settings", "message"),
    [
        ("exo", {"label_smoothing": 0}, "label_smoothing: must be above 0: loss exo takes its logarithm"),
        ("simpo", {"reference": {"source": "m"}}, "reference: loss simpo has no reference"),
        ("rrhf", {}, "on_policy: missing; loss rrhf learns from lists, which are sampled"),
        ("tpo", {}, "on_policy: missing; loss tpo learns from triples, which are sampled"),
        ("kto", LISTED, "on_policy: loss kto learns from labelled answers, not from ranked ones"),
        ("kto", {"batch_size": 1}, "batch_size: must be at least 2: loss kto compares the answers of a step"),
        ("kto", {"desirable_weight": 0, "undesirable_weight": 0}, "desirable_weight: is 0, and so is undesirable"),
        ("aot", {"batch_size": 1}, "batch_size: must be at least 2: loss aot compares the answers of a step"),
        ("dop", {}, "loss: must be `dpo` or "),
    ],
)
def test_what_does_not_go_together_is_told(loss: str, settings: dict[str, Any], message: str) -> None:
    assert refused(loss, **settings).startswith(message)


def test_a_list_is_as_wide_as_it_is_sampled() -> None:
    widths = {loss: stage(loss).width for loss in ("dpo", "tpo", "kto", "rrhf")}
    assert widths == {"dpo": 2, "tpo": 3, "kto": 1, "rrhf": 8}
    assert stage("dpo", on_policy={"prompts": 4, "n": 6}).width == 2
