"""Row shapes: what the columns of a data set may look like, and how a row of each becomes an Example.

`SHAPES` is the table, most specific first. `detect` picks from the first rows; every row is then converted by
that one shape, so that a stray row is reported instead of being read as something else.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from posttrain.records import Example, Message

Row = Mapping[str, Any]
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "function_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "ipython": "tool",
}  # fmt: skip
"""Role names met in public data, and the one a chat template knows."""

MEDIA = ("images", "image", "videos", "audios")
"""Columns that make a row more than text; to leave them out would train on half a question."""


class Malformed(ValueError):
    """This row cannot be used; the message says why, without the place."""


class BadRow(NamedTuple):
    where: str
    """`file:line`, or `file[index]` where a line means nothing."""
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


class Shape(NamedTuple):
    summary: str
    columns: str
    """The columns it goes by, as shown to the user."""
    fits: Callable[[Row], bool]
    convert: Callable[[Row], dict[str, Any]]
    """Row to the fields of an Example (all but `id`); raises Malformed."""


class Detection(NamedTuple):
    name: str
    reason: str


def detect(rows: Sequence[Any]) -> Detection | None:
    """The shape most of `rows` have (the earlier in the table where two have as many); None if no row has one."""
    objects = [row for row in rows if isinstance(row, Mapping)]
    counts = {name: sum(shape.fits(row) for row in objects) for name, shape in SHAPES.items()}
    name = max(counts, key=lambda n: counts[n])
    if not counts[name]:
        return None
    return Detection(name, f"{SHAPES[name].columns} in {counts[name]} of the first {len(rows)} rows")


def convert(row: Any, shape: str, where: str) -> Example:
    """One row as an Example. Raises Malformed where it does not fit."""
    if not isinstance(row, Mapping):
        raise Malformed(f"a row must be an object, this one is {_kind(row)}")
    if not SHAPES[shape].fits(row):
        raise Malformed(f"not the shape {shape} ({SHAPES[shape].columns}); its columns: {', '.join(map(str, row))}")
    for column in MEDIA:
        if row.get(column):
            raise Malformed(f"it has {column}; only text is supported")
    return Example(id=where, **SHAPES[shape].convert(row))


# Pieces of rows


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "empty"}
    return names.get(type(value), "a number")


def _text(value: Any, what: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise Malformed(f"{what} must be text, it is {_kind(value)}")
    if not empty and not value.strip():
        raise Malformed(f"{what} is empty")
    if "\0" in value:
        raise Malformed(f"{what} holds a NUL character")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Malformed(f"{what} is not valid UTF-8") from None
    return value


def _list(value: Any, what: str) -> list[Any]:
    """A list, or one written as JSON text (as CSV has to)."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _json(value, what)
    if not isinstance(value, list):
        raise Malformed(f"{what} must be a list, it is {_kind(value)}")
    return value


def _json(value: str, what: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{what} is not valid JSON ({error})") from None


def _clean(value: Any, what: str) -> Any:
    """`value` as plain JSON whose every text can be encoded."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise Malformed(f"{what} is not plain JSON ({error})") from None
    return json.loads(_text(text, what))


def _content(value: Any, what: str) -> str:
    """Content as text. OpenAI's list of parts is joined; a part that is not text is refused, not dropped."""
    if not isinstance(value, list):
        return "" if value is None else _text(value, what, empty=True)
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
        if kind != "text":
            raise Malformed(f"{what} has a part of type {kind!r}; only text is supported")
        texts.append(_text(part.get("text", part.get("value")), what, empty=True))
    return "".join(texts)


def _call(value: Any, what: str) -> dict[str, Any]:
    if isinstance(value, str):
        value = _json(value, what)
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Malformed(f"{what} needs a name and arguments")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # the OpenAI wire format; templates want the object
        arguments = _json(arguments, f"{what}'s arguments") if arguments.strip() else {}
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return _clean(call | ({"id": value["id"]} if value.get("id") else {}), what)


def _calls(value: Any, what: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        value = _json(value, what)
    return [_call(call, what) for call in (value if isinstance(value, list) else [value])]


def _message(value: Any, what: str) -> Message:
    if not isinstance(value, Mapping):
        raise Malformed(f"{what} must be an object with role and content, it is {_kind(value)}")
    given = value.get("role", value.get("from"))
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise Malformed(f"{what} has the unknown role {given!r} (known: {', '.join(ROLES)})")
    content = value.get("content", value.get("value"))
    if given == "function_call":
        return {"role": role, "content": "", "tool_calls": _calls(content, what)}
    message: dict[str, Any] = {"role": role, "content": _content(content, f"{what}'s content")}
    if value.get("tool_calls"):
        message["tool_calls"] = _calls(value["tool_calls"], f"{what}'s tool_calls")
    for key in ("reasoning_content", "name", "tool_call_id"):
        if value.get(key):
            message[key] = _text(value[key], f"{what}'s {key}")
    if not message["content"].strip() and "tool_calls" not in message and role != "tool":
        raise Malformed(f"{what} ({role}) has no content")
    return message


def _messages(value: Any, what: str) -> tuple[Message, ...]:
    turns = tuple(_message(turn, f"{what}[{i}]") for i, turn in enumerate(_list(value, what)))
    if not turns:
        raise Malformed(f"{what} is empty")
    return turns


def _side(value: Any, what: str, role: str) -> tuple[Message, ...]:
    """A prompt or an answer: text, one message, or a list of messages."""
    if isinstance(value, Mapping):
        return (_message(value, what),)
    if isinstance(value, list):
        return _messages(value, what)
    return ({"role": role, "content": _text(value, what)},)


def _sides(row: Row) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    return _side(row["chosen"], "chosen", "assistant"), _side(row["rejected"], "rejected", "assistant")


def _tools(row: Row) -> dict[str, Any]:
    tools = row.get("tools")
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return {}
    tools = _clean(_list(tools, "tools"), "tools")
    functions = [tool.get("function", tool) if isinstance(tool, dict) else None for tool in tools]
    if not all(isinstance(f, dict) and isinstance(f.get("name"), str) for f in functions):
        raise Malformed("tools must be a list of objects with a name")
    return {"tools": tuple({"type": "function", "function": f} for f in functions)}


def _system(row: Row) -> tuple[Message, ...]:
    text = row.get("system")
    return ({"role": "system", "content": _text(text, "system")},) if text else ()


def _answered(turns: tuple[Message, ...], what: str) -> tuple[Message, ...]:
    if turns[-1]["role"] != "assistant":
        raise Malformed(f"{what} must end with an assistant turn, it ends with {turns[-1]['role']}")
    return turns


def _split(turns: tuple[Message, ...], what: str) -> dict[str, Any]:
    """A conversation: up to the first assistant turn is the prompt, and every assistant turn is learned."""
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))
    return {"prompt": turns[:first], "completion": _answered(turns, what)[first:]}


def _pair(prompt: tuple[Message, ...], chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> dict[str, Any]:
    """Two continuations; what they share goes to the prompt, back to the assistant turn where they part."""
    chosen, rejected = (*prompt, *_answered(chosen, "chosen")), (*prompt, *_answered(rejected, "rejected"))
    if chosen == rejected:
        raise Malformed("chosen and rejected are the same")
    both = range(min(len(chosen), len(rejected)))
    shared = next((i for i in both if chosen[i] != rejected[i]), len(both))
    while shared and not (all(side[shared:] and side[shared]["role"] == "assistant" for side in (chosen, rejected))):
        shared -= 1
    if shared < len(prompt) or not shared:
        raise Malformed("chosen and rejected must part at an assistant turn that answers the same prompt")
    return {"prompt": chosen[:shared], "completion": chosen[shared:], "rejected": rejected[shared:]}


def _margin(row: Row) -> dict[str, Any]:
    value = row.get("margin")
    if value is None or value == "":
        return {}
    try:
        margin = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        margin = math.nan
    if not math.isfinite(margin):
        raise Malformed(f"margin must be a number, it is {value!r}")
    return {"margin": margin}


def _label(value: Any) -> bool:
    known = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
    key = value.strip().lower() if isinstance(value, str) else value
    if not isinstance(key, bool | int | str) or key not in known:
        raise Malformed(f"label must be true or false, it is {value!r}")
    return known[key]


def _chance(value: Any, what: str) -> float:
    """A label, or the chance that it is true."""
    if isinstance(value, float) and 0 <= value <= 1:
        return value
    try:
        return _label(value)
    except Malformed:
        raise Malformed(f"{what} must be true, false, null or a number from 0 to 1, it is {value!r}") from None


# Shapes


def _columns(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(row.get(name) is not None for name in names)


def _is_text(row: Row, *names: str) -> bool:
    return all(isinstance(row.get(name), str) for name in names)


def _step_labels(row: Row) -> dict[str, Any]:
    steps, labels = _list(row["completions"], "completions"), _list(row["labels"], "labels")
    if not steps or len(steps) != len(labels):
        raise Malformed(f"{len(steps)} completions and {len(labels)} labels; each step needs one label")
    return {
        "prompt": _side(row["prompt"], "prompt", "user"),
        "completion": tuple(
            {"role": "assistant", "content": _text(s, f"completions[{i}]")} for i, s in enumerate(steps)
        ),
        "step_labels": tuple(
            None if label is None else _chance(label, f"labels[{i}]") for i, label in enumerate(labels)
        ),
    }


def _instruction(row: Row) -> tuple[Message, ...]:
    turns = list(_system(row))
    for i, pair in enumerate(_list(row.get("history") or [], "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Malformed(f"history[{i}] must be a list of a question and its answer")
        turns += [
            {"role": role, "content": _text(text, f"history[{i}]")}
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    question, extra = _text(row["instruction"], "instruction"), _text(row.get("input") or "", "input", empty=True)
    return (*turns, {"role": "user", "content": f"{question}\n{extra}" if extra.strip() else question})


def _alpaca(row: Row) -> dict[str, Any]:
    answer: Message = {"role": "assistant", "content": _text(row["output"], "output")}
    return _split((*_instruction(row), answer), "the conversation") | _tools(row)


def _alpaca_pair(row: Row) -> dict[str, Any]:
    return _pair(_instruction(row), *_sides(row)) | _margin(row)


def _self_instruct(row: Row) -> dict[str, Any]:
    instances = _list(row["instances"], "instances")
    if len(instances) != 1 or not isinstance(instances[0], Mapping) or "output" not in instances[0]:
        raise Malformed("instances must hold exactly one object with input and output")
    return _alpaca({"instruction": row["instruction"], **instances[0]})


def _sharegpt(row: Row) -> dict[str, Any]:
    turns = (*_system(row), *_messages(row["conversations"], "conversations"))
    return _split(turns, "conversations") | _tools(row)


def _sharegpt_pair(row: Row) -> dict[str, Any]:
    prompt = (*_system(row), *_messages(row["conversations"], "conversations"))
    return _pair(prompt, *_sides(row)) | _margin(row) | _tools(row)


def _preference(row: Row) -> dict[str, Any]:
    prompt = (*_system(row), *_side(row["prompt"], "prompt", "user"))
    return _pair(prompt, *_sides(row)) | _margin(row) | _tools(row)


def _pair_of_conversations(row: Row) -> dict[str, Any]:
    chosen, rejected = (_messages(row[key], key) for key in ("chosen", "rejected"))
    prompt: tuple[Message, ...] = ()
    if row.get("prompt"):
        prompt = (*_system(row), *_side(row["prompt"], "prompt", "user"))
        n = len(prompt)
        if chosen[:n] == prompt and rejected[:n] == prompt:  # some sets repeat the prompt in both
            chosen, rejected = chosen[n:], rejected[n:]
            if not chosen or not rejected:
                raise Malformed("chosen or rejected holds the prompt and no answer")
    return _pair(prompt, chosen, rejected) | _margin(row) | _tools(row)


_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def _dialogue(text: str, what: str) -> tuple[Message, ...]:
    _, *pieces = _HH_TURN.split(_text(text, what))
    named = list(zip(pieces[::2], pieces[1::2], strict=True))
    turns = [("user" if who == "Human" else "assistant", said.strip()) for who, said in named]
    for i, (role, said) in enumerate(turns):
        if not said:
            raise Malformed(f"turn {i} ({role}) of {what} is empty")
    return tuple({"role": role, "content": said} for role, said in turns)


def _hh(row: Row) -> dict[str, Any]:
    return _pair((), _dialogue(row["chosen"], "chosen"), _dialogue(row["rejected"], "rejected")) | _margin(row)


def _is_hh(row: Row) -> bool:
    starts = ("\n\nHuman:", "Human:")
    return (
        _is_text(row, "chosen", "rejected") and row["chosen"].startswith(starts) and row["rejected"].startswith(starts)
    )


def _unpaired(row: Row) -> dict[str, Any]:
    if row.get("messages") is not None:
        turns = _answered((*_system(row), *_messages(row["messages"], "messages")), "messages")
        sides = {"prompt": turns[:-1], "completion": turns[-1:]}  # the label speaks of the last answer only
    else:
        sides = _prompt_completion(row)
    return sides | {"label": _label(row["label"])} | _tools(row)


def _prompt_completion(row: Row) -> dict[str, Any]:
    prompt = (*_system(row), *_side(row["prompt"], "prompt", "user"))
    completion = _answered(_side(row["completion"], "completion", "assistant"), "completion")
    return {"prompt": prompt, "completion": completion} | _tools(row)


def _conversation(row: Row) -> dict[str, Any]:
    return _split((*_system(row), *_messages(row["messages"], "messages")), "messages") | _tools(row)


def _question_answer(row: Row) -> dict[str, Any]:
    answer = _text(row["answer"], "answer")
    return {
        "prompt": (*_system(row), {"role": "user", "content": _text(row["question"], "question")}),
        "completion": ({"role": "assistant", "content": answer},),
        "answer": answer.rpartition("####")[2].strip(),  # GSM8K writes the result behind ####
    }


def _asking(row: Row) -> tuple[Message, ...]:
    prompt = (*_system(row), *_side(row["prompt"], "prompt", "user"))
    if prompt[-1]["role"] == "assistant":
        raise Malformed("prompt must end with what is to be answered, it ends with an assistant turn")
    return prompt


def _prompt(row: Row) -> dict[str, Any]:
    answer = row.get("answer")
    return {"prompt": _asking(row), "answer": None if answer is None else _text(str(answer), "answer")} | _tools(row)


def _unit_tests(row: Row) -> dict[str, Any]:
    prompt, tests, entry = _text(row["prompt"], "prompt"), _text(row["test"], "test"), row.get("entry_point")
    meta: dict[str, Any] = {"tests": tests}
    solution = _text(row.get("canonical_solution") or "", "canonical_solution", empty=True)
    if entry is not None:  # HumanEval: the prompt is the beginning of the solution
        meta = {"tests": f"{tests}\ncheck({_text(entry, 'entry_point')})", "entry_point": entry, "prefix": prompt}
        solution = solution and prompt + solution
    return {
        "prompt": (*_system(row), {"role": "user", "content": prompt}),
        "completion": ({"role": "assistant", "content": solution},) if solution else (),
        "meta": meta,
    }


def _instructions(row: Row) -> dict[str, Any]:
    names, settings = _list(row["instruction_id_list"], "instruction_id_list"), _list(row["kwargs"], "kwargs")
    if not names or len(names) != len(settings):
        raise Malformed(f"{len(names)} instructions and {len(settings)} kwargs; each instruction needs its own")
    asked = []
    for i, (name, given) in enumerate(zip(names, settings, strict=True)):
        if not isinstance(given, Mapping):
            raise Malformed(f"kwargs[{i}] must be an object, it is {_kind(given)}")
        name = _text(name, f"instruction_id_list[{i}]")
        if name.count(":") == 2:  # with its language before it
            name = name.partition(":")[2]
        asked.append([name, _clean({key: value for key, value in given.items() if value is not None}, f"kwargs[{i}]")])
    return {"prompt": _asking(row), "meta": {"instructions": asked}}


def _plain(row: Row) -> dict[str, Any]:
    return {"text": _text(row["text"], "text")}


def _is_prompt(row: Row) -> bool:
    return row.get("prompt") is not None and not any(name in row for name in ("completion", "completions", "chosen"))


SHAPES: dict[str, Shape] = {
    "unit_tests": Shape(
        "A programming task with its unit tests (HumanEval)", "prompt, test, perhaps entry_point",
        _columns("prompt", "test"), _unit_tests,
    ),
    "instructions": Shape(
        "A prompt with instructions that can be checked (IFEval)", "prompt, instruction_id_list, kwargs",
        _columns("prompt", "instruction_id_list", "kwargs"), _instructions,
    ),
    "step_labels": Shape(
        "A solution in steps, each labelled", "prompt, completions, labels",
        _columns("prompt", "completions", "labels"), _step_labels,
    ),
    "alpaca_preference": Shape(
        "Instruction with a better and a worse answer", "instruction, chosen, rejected",
        _columns("instruction", "chosen", "rejected"), _alpaca_pair,
    ),
    "sharegpt_preference": Shape(
        "Conversation (from/value) with a better and a worse next turn", "conversations, chosen, rejected",
        _columns("conversations", "chosen", "rejected"), _sharegpt_pair,
    ),
    "conversation_preference": Shape(
        "Two conversations, the better and the worse, with or without their prompt", "chosen, rejected (lists)",
        lambda row: isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list),
        _pair_of_conversations,
    ),
    "preference": Shape(
        "Prompt with a better and a worse answer", "prompt, chosen, rejected",
        _columns("prompt", "chosen", "rejected"), _preference,
    ),
    "hh_dialogue": Shape(
        "Two dialogues as text, Human: and Assistant: (HH-RLHF)", "chosen, rejected (dialogues)", _is_hh, _hh,
    ),
    "unpaired": Shape(
        "An answer labelled good or bad", "label with messages or prompt, completion",
        lambda row: _columns("label")(row) and (_columns("messages")(row) or _columns("prompt", "completion")(row)),
        _unpaired,
    ),
    "prompt_completion": Shape(
        "A prompt and its completion, text or messages", "prompt, completion",
        _columns("prompt", "completion"), _prompt_completion,
    ),
    "messages": Shape("Conversation as OpenAI writes it", "messages", _columns("messages"), _conversation),
    "sharegpt": Shape("Conversation with from/value", "conversations", _columns("conversations"), _sharegpt),
    "alpaca": Shape("Instruction, perhaps input, and output", "instruction, output",
                    _columns("instruction", "output"), _alpaca),
    "self_instruct": Shape("Instruction with one worked instance", "instruction, instances",
                           _columns("instruction", "instances"), _self_instruct),
    "question_answer": Shape("Question and answer", "question, answer",
                             _columns("question", "answer"), _question_answer),
    "prompt": Shape(
        "A prompt to be answered, perhaps with its reference answer", "prompt, and no answer to learn",
        _is_prompt, _prompt,
    ),
    "text": Shape("Raw text for continued pre-training", "text", _columns("text"), _plain),
}  # fmt: skip
