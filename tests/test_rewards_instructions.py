"""Instructions that a program can check: each check on its own examples, by hand, and on IFEval's rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rewarded import failures, outcome, question

from posttrain.data.shapes import convert
from posttrain.recipe.rewards import InstructionsReward
from posttrain.records import UserError
from posttrain.rewards.instructions import CHECKS, instructions, paragraphs, sentences, unproven, words

PLAIN = instructions(InstructionsReward(kind="instructions"))


def asking(*asked: tuple[str, dict[str, Any]]) -> Any:
    return question(meta={"instructions": [list(each) for each in asked]})


@pytest.mark.parametrize(
    ("name", "settings", "good", "bad"),
    [
        ("keywords:existence", {"keywords": ["sea", "Salt"]}, "Salt of the SEA", "the sea"),
        ("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": "at least"}, "sea, Sea", "sea"),
        ("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": "less than"}, "sea", "sea, seas"),
        ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", "A Cat!"),
        ("keywords:letter_frequency", {"letter": "q", "let_frequency": 2, "let_relation": "at least"}, "Qq", "q"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "it's well-known, so", "so so"),
        ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "Pi is 3.14.", "A. B."),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb\n***", "a\n\nb"),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "sea"},
            'a\n\n"Sea" b',
            "sea\n\nb",
        ),
        ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] to [b c]", "[a] []"),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\np.s. more", "PS5 is out"),
        ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP.P.S: more", "P.S. more"),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b\n**c**", "* a\n* b\n* c"),
        ("detectable_format:constrained_response", {}, "Well. My answer is maybe.", "My answer is perhaps."),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", "*a* and * *"),
        (
            "detectable_format:multiple_sections",
            {"section_spliter": "Part", "num_sections": 2},
            "Part 1\na\nPart 2\nb",
            "Part one\nPart two",
        ),
        ("detectable_format:json_format", {}, "```json\n[1]\n```", "[1"),
        ("detectable_format:title", {}, "<<Sea>>\nx", "<Sea>\nx"),
        ("combination:two_responses", {}, "a\n******\nb", "a\n***\nb"),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "say it. It.", "It. Say it."),
        ("startend:end_checker", {"end_phrase": "The end."}, "So. the end.", "The end. So."),
        ("startend:quotation", {}, '"a"', "'a'"),
        (
            "change_case:capital_word_frequency",
            {"capital_frequency": 2, "capital_relation": "at least"},
            "A BC",
            "Abc D",
        ),
        ("change_case:english_capital", {}, "A 1 B!", "A b"),
        ("change_case:english_lowercase", {}, "a 1 b!", "a B"),
        ("punctuation:no_comma", {}, "a; b", "a, b"),
    ],
)
def test_a_check(name: str, settings: dict[str, Any], good: str, bad: str) -> None:
    assert CHECKS[name].holds(good, **settings)
    assert not CHECKS[name].holds(bad, **settings)
    assert unproven(name, settings) == ""
    rule, example = PLAIN, asking((name, settings))
    assert outcome(rule, good, example) == (1.0, "correct")
    assert outcome(rule, bad, example) == (0.0, "wrong")
    assert outcome(rule, "  ", example) == (0.0, "unparsed")
    assert failures(rule, example) == []


def test_what_is_counted() -> None:
    assert words("It's 3.5 o'clock - naïve, well-known") == ["It's", "3", "5", "o'clock", "naïve", "well-known"]
    assert len(sentences('He said "Go." Then 3.14 e.g. this? Yes!')) == 4
    assert len(sentences("未来は今日。明日も。")) == 2
    assert paragraphs("a\nb\n\n \nc\n") == ["a\nb", "c\n"]


def test_all_of_them_must_be_kept() -> None:
    both = asking(("punctuation:no_comma", {}), ("change_case:english_lowercase", {}))
    assert [outcome(PLAIN, text, both)[0] for text in ("a b", "a, b", "A b")] == [1.0, 0.0, 0.0]
    assert failures(PLAIN, both) == []
    recipe = instructions(InstructionsReward(kind="instructions", checks={"startend:quotation": {}}))
    assert [outcome(recipe, text, both)[0] for text in ('"a b"', "a b")] == [1.0, 0.0]
    assert recipe.lacks(question()) == ""


def test_what_cannot_be_checked_is_told() -> None:
    assert PLAIN.lacks(question()) == "it has no instructions to check, and the recipe names none"
    assert "no check 'language:response_language'" in PLAIN.lacks(asking(("language:response_language", {})))
    short = asking(("keywords:frequency", {"keyword": "sea", "frequency": 2}))
    assert "does not take the settings" in PLAIN.lacks(short)
    around = asking(("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": "around"}))
    assert "`at least` or `less than`" in PLAIN.lacks(around)
    nothing = asking(("length_constraints:number_words", {"num_words": 0, "relation": "at least"}))
    assert "is wrong on its own example" in PLAIN.lacks(nothing)
    letters = asking(("keywords:existence", {"keywords": "sea"}))
    assert "keywords must be a list, not 'sea'" in PLAIN.lacks(letters)
    assert "does not take the settings" in PLAIN.lacks(asking(("keywords:forbidden_words", {"forbidden_words": []})))
    endless = asking(("length_constraints:number_words", {"num_words": 10**10, "relation": "at least"}))
    assert "no answer has num_words 1e+10; 10000 is the most" in PLAIN.lacks(endless)
    with pytest.raises(UserError, match="reward 'instructions': no check 'words'"):
        instructions(InstructionsReward(kind="instructions", checks={"words": {}}))


def test_the_rows_of_ifeval(shared_data: Path) -> None:
    """Every row but those that ask for a language can be checked, and every check of theirs proves itself."""
    text = (shared_data / "ifeval/en_input_data.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    examples = [convert(row, "instructions", f"row {i}") for i, row in enumerate(rows)]
    lacking = [why for example in examples if (why := PLAIN.lacks(example))]
    assert len(lacking) == sum("language:response_language" in str(row["instruction_id_list"]) for row in rows) == 31
    assert all("response_language" in why for why in lacking)
    assert failures(PLAIN, *(example for example in examples if not PLAIN.lacks(example))) == []
