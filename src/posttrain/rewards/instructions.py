"""Instructions on the form of an answer that a program can check: those of IFEval (Zhou et al., 2311.07911).

`CHECKS` is the table, by the names of IFEval's data, whose settings the functions take. Departures: words and sentences
are found without NLTK; what is searched for is taken literally, not as a pattern; the two checks of a case do not ask
which language it is in, and `language:response_language`, which would need a model, is not here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from posttrain.recipe.rewards import InstructionsReward
from posttrain.records import Example, Score, UserError
from posttrain.rewards.protocol import Cases, Rule
from posttrain.rewards.text import MAX_ANSWER, unfenced

Settings = Mapping[str, Any]


class Check(NamedTuple):
    """An instruction as a predicate, with an example on either side by which it is proven."""

    holds: Callable[..., bool]
    """The answer, then the settings by name."""
    good: Callable[..., str]
    """An answer that keeps to it, from the settings."""
    bad: Callable[..., str]
    """One that does not."""


def instructions(reward: InstructionsReward) -> Rule:
    """1 for a non-empty answer that keeps to all of them (IFEval's strict prompt-level score), else 0.

    An example's own stand in its meta under `instructions`, as pairs of a name and settings.

    Raises:
        UserError: a check of the recipe does not exist or does not take its settings.
    """
    common = list(reward.checks.items())
    for name, settings in common:
        if problem := unproven(name, settings):
            raise UserError(f"reward {reward.name!r}: {problem}")

    def of(example: Example) -> list[tuple[str, Settings]]:
        return common + [(name, settings) for name, settings in example.meta.get("instructions", ())]

    def lacks(example: Example) -> str:
        if not (asked := of(example)):
            return "it has no instructions to check, and the recipe names none"
        return next(filter(None, (unproven(name, settings) for name, settings in asked)), "")

    def score(example: Example, text: str) -> Score:
        if not text.strip():
            return Score(0.0, "unparsed", None, "empty")
        broken = [name for name, settings in of(example) if not CHECKS[name].holds(text, **settings)]
        return Score(0.0, "wrong", None, f"not kept: {', '.join(broken)}") if broken else Score(1.0, "correct")

    def cases(example: Example) -> Cases:
        asked = of(example)
        good = {f"its own example of {name}": CHECKS[name].good(**settings) for name, settings in asked}
        bad = {f"a breach of {name}": CHECKS[name].bad(**settings) for name, settings in asked}
        return Cases(good if len(asked) == 1 else {}, {"nothing": "", **bad})

    return Rule(score, cases, lacks=lacks, where="here", form=True)


def unproven(name: str, settings: Settings) -> str:
    """Why a check cannot be relied on: it is not known, does not take its settings, or is wrong on its own examples."""
    if name not in CHECKS:
        return f"no check {name!r} (known: {', '.join(CHECKS)})"
    for key, value in settings.items():
        if key in LISTS and not isinstance(value, list | tuple):  # text would be taken for its letters
            return f"check {name}: {key} must be a list, not {value!r}"
        if isinstance(value, int | float) and value > MAX_ANSWER:
            return f"check {name}: no answer has {key} {value:g}; {MAX_ANSWER} is the most"
    check = CHECKS[name]
    try:
        good, bad = check.good(**settings), check.bad(**settings)
        kept, broken = check.holds(good, **settings), not check.holds(bad, **settings)
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        return f"check {name} does not take the settings {dict(settings)}: {error}"
    if kept and broken:
        return ""
    return f"check {name} with {dict(settings)} is wrong on its own example: {good if not kept else bad!r}"


# What is counted


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text)


def sentences(text: str) -> list[str]:
    """Split behind . ! ? where white space or the end follows, and behind their wide forms. Each holds a word."""
    return [part for part in re.split(r"(?<=[.!?])[\"'”’)\]]*(?:\s+|$)|(?<=[。！？])", text) if words(part)]


def parts(text: str, mark: str) -> list[str]:
    """What stands between lines of `mark`; nothing before the first one or behind the last one is no part."""
    found = [part.strip() for part in text.split(mark)]
    return found[not found[0] : len(found) - (len(found) > 1 and not found[-1])]


def paragraphs(text: str) -> list[str]:
    return [part for part in re.split(r"\n\s*\n", text) if part.strip()]


def bullets(text: str) -> list[str]:
    return re.findall(r"^[ \t]*(?:\*(?!\*)|-).*$", text, re.MULTILINE)


def highlights(text: str) -> list[str]:
    return [mark for mark in re.findall(r"\*\*[^\n*]+\*\*|\*[^\n*]+\*", text) if mark.strip("* ")]


def is_json(text: str) -> bool:
    try:
        json.loads(unfenced(text))
    except (ValueError, RecursionError):
        return False
    return True


def relation_holds(count: int, relation: str, limit: int) -> bool:
    if relation not in ("at least", "less than"):
        raise ValueError(f"relation {relation!r}; it is `at least` or `less than`")
    return count >= limit if relation == "at least" else count < limit


def occurrences(text: str, phrase: str) -> int:
    return text.lower().count(phrase.lower())


def whole_words(text: str, phrases: Iterable[str]) -> bool:
    return any(re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) for phrase in phrases)


def postscript(text: str, postscript_marker: str) -> bool:
    letters = (re.escape(letter) for letter in postscript_marker.replace(" ", "").split(".") if letter)
    marker = r"(?<!\w)" + r"\.?\s?".join(letters) + r"\b.*\w"
    return re.search(marker, text, re.IGNORECASE | re.DOTALL) is not None


def sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections


def nth_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    found = paragraphs(text)
    if len(found) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    start = words(found[nth_paragraph - 1])[:1]
    return [word.lower() for word in start] == [first_word.lower()]


def two_responses(text: str) -> bool:
    found = parts(text, "******")
    return len(found) == 2 and all(found) and found[0] != found[1]


def quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 2 and text[0] == text[-1] == '"'


LISTS = ("keywords", "forbidden_words")
CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _count(relation: str, limit: int, one: str, between: str = " ") -> str:
    """`one` as often as the relation asks."""
    return between.join([one] * (limit if relation == "at least" else limit - 1))


def _miscount(relation: str, limit: int, one: str, between: str = " ") -> str:
    return between.join([one] * (limit - 1 if relation == "at least" else limit))


CHECKS: dict[str, Check] = {
    "keywords:existence": Check(
        lambda text, keywords: all(occurrences(text, word) for word in keywords),
        lambda keywords: " ".join(keywords),
        lambda keywords: "?",
    ),
    "keywords:frequency": Check(
        lambda text, keyword, frequency, relation: relation_holds(occurrences(text, keyword), relation, frequency),
        lambda keyword, frequency, relation: _count(relation, frequency, keyword) or "?",
        lambda keyword, frequency, relation: _miscount(relation, frequency, keyword),
    ),
    "keywords:forbidden_words": Check(
        lambda text, forbidden_words: not whole_words(text, forbidden_words),
        lambda forbidden_words: "?",
        lambda forbidden_words: f"So {forbidden_words[0]}.",
    ),
    "keywords:letter_frequency": Check(
        lambda text, letter, let_frequency, let_relation: relation_holds(
            occurrences(text, letter), let_relation, let_frequency
        ),
        lambda letter, let_frequency, let_relation: _count(let_relation, let_frequency, letter) or "?",
        lambda letter, let_frequency, let_relation: _miscount(let_relation, let_frequency, letter),
    ),
    "length_constraints:number_words": Check(
        lambda text, num_words, relation: relation_holds(len(words(text)), relation, num_words),
        lambda num_words, relation: _count(relation, num_words, "word"),
        lambda num_words, relation: _miscount(relation, num_words, "word"),
    ),
    "length_constraints:number_sentences": Check(
        lambda text, num_sentences, relation: relation_holds(len(sentences(text)), relation, num_sentences),
        lambda num_sentences, relation: _count(relation, num_sentences, "It is so."),
        lambda num_sentences, relation: _miscount(relation, num_sentences, "It is so."),
    ),
    "length_constraints:number_paragraphs": Check(
        lambda text, num_paragraphs: len(found := parts(text, "***")) == num_paragraphs and all(found),
        lambda num_paragraphs: "\n***\n".join(["It is so."] * num_paragraphs),
        lambda num_paragraphs: "\n***\n".join(["It is so."] * (num_paragraphs + 1)),
    ),
    "length_constraints:nth_paragraph_first_word": Check(
        nth_first_word,
        lambda num_paragraphs, nth_paragraph, first_word: "\n\n".join([f"{first_word} is so."] * num_paragraphs),
        lambda num_paragraphs, nth_paragraph, first_word: "\n\n".join([f"No {first_word}."] * num_paragraphs),
    ),
    "detectable_content:number_placeholders": Check(
        lambda text, num_placeholders: len(re.findall(r"\[[^\[\]]+\]", text)) >= num_placeholders,
        lambda num_placeholders: "[name] " * num_placeholders,
        lambda num_placeholders: "[name] " * (num_placeholders - 1),
    ),
    "detectable_content:postscript": Check(
        postscript,
        lambda postscript_marker: f"So.\n\n{postscript_marker} One more word.",
        lambda postscript_marker: "So.",
    ),
    "detectable_format:number_bullet_lists": Check(
        lambda text, num_bullets: len(bullets(text)) == num_bullets,
        lambda num_bullets: "\n".join(["* So."] * num_bullets),
        lambda num_bullets: "\n".join(["* So."] * (num_bullets + 1)),
    ),
    "detectable_format:constrained_response": Check(
        lambda text: any(option in text for option in CONSTRAINED), lambda: CONSTRAINED[0], lambda: "Yes."
    ),
    "detectable_format:number_highlighted_sections": Check(
        lambda text, num_highlights: len(highlights(text)) >= num_highlights,
        lambda num_highlights: "*part* " * num_highlights,
        lambda num_highlights: "*part* " * (num_highlights - 1) + "**",
    ),
    "detectable_format:multiple_sections": Check(
        sections,
        lambda section_spliter, num_sections: "\n".join(f"{section_spliter} {i + 1}\nSo." for i in range(num_sections)),
        lambda section_spliter, num_sections: f"{section_spliter}\nSo.\n" * num_sections,
    ),
    "detectable_format:json_format": Check(is_json, lambda: '{"a": 1}', lambda: '{"a": 1'),
    "detectable_format:title": Check(
        lambda text: any(title.strip("<> ") for title in re.findall(r"<<[^\n]+>>", text)),
        lambda: "<<A title>>\nSo.",
        lambda: "<< >>\nSo.",
    ),
    "combination:two_responses": Check(two_responses, lambda: "One.\n******\nTwo.", lambda: "One.\n******\nOne."),
    "combination:repeat_prompt": Check(
        lambda text, prompt_to_repeat: text.strip().lower().startswith(prompt_to_repeat.strip().lower()),
        lambda prompt_to_repeat: f"{prompt_to_repeat}\nSo.",
        lambda prompt_to_repeat: f"So. {prompt_to_repeat}",
    ),
    "startend:end_checker": Check(
        lambda text, end_phrase: text.strip().strip('"').lower().endswith(end_phrase.strip().strip('"').lower()),
        lambda end_phrase: f"So. {end_phrase}",
        lambda end_phrase: f"{end_phrase} So.",
    ),
    "startend:quotation": Check(quoted, lambda: '"So."', lambda: '"So.'),
    "change_case:capital_word_frequency": Check(
        lambda text, capital_frequency, capital_relation: relation_holds(
            sum(word.isupper() for word in words(text)), capital_relation, capital_frequency
        ),
        lambda capital_frequency, capital_relation: _count(capital_relation, capital_frequency, "WORD") or "?",
        lambda capital_frequency, capital_relation: _miscount(capital_relation, capital_frequency, "WORD"),
    ),
    "change_case:english_capital": Check(str.isupper, lambda: "IT IS SO.", lambda: "It IS SO."),
    "change_case:english_lowercase": Check(str.islower, lambda: "it is so.", lambda: "It is so."),
    "punctuation:no_comma": Check(lambda text: "," not in text, lambda: "It is so.", lambda: "So, it is."),
}
