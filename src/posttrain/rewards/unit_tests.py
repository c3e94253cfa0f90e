"""Whether the Python in an answer passes the unit tests of its example."""

from __future__ import annotations

import hashlib
import json
import re
import secrets

from posttrain.recipe.rewards import PythonReward
from posttrain.records import Example, Score
from posttrain.rewards import sandbox
from posttrain.rewards.protocol import Cases, Rule
from posttrain.rewards.prove import nonsense
from posttrain.rewards.text import extract

_BLOCK = re.compile(r"^```(?:python|py)?[ \t]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def python(reward: PythonReward) -> Rule:
    """1 where all tests pass, else 0, as HumanEval counts it (Chen et al., 2107.03374, pass@1).

    The code is that of the answer's fenced blocks, or all of it. An example's tests stand in its meta: `tests`, a
    program that raises where one fails; `entry_point`, the function under test, where there is one; `prefix`, code that
    the answer may leave out. What the function returns must be of Python's own plain types, for an object may claim to
    equal anything.
    """
    limits = sandbox.Limits(seconds=reward.timeout_s, memory_mb=reward.memory_mb)

    def score(example: Example, text: str) -> Score:
        answer = extract(text)
        code = "\n".join(_BLOCK.findall(answer)) or answer
        if not code.strip():
            return Score(0.0, "unparsed", None, "empty")
        entry = example.meta.get("entry_point")
        if entry and not defines(code, entry):
            code = example.meta.get("prefix", "") + code
        # The program has to answer a question that is not asked before its tests are over: an exit from their midst
        # has passed nothing, whatever it printed.
        question = secrets.token_bytes(16)
        program = _PROGRAM.format(given=json.dumps([code, example.meta["tests"], entry]))
        ran = sandbox.run(program, question, limits)
        if ran.stdout.endswith(hashlib.sha256(question + b"passed").hexdigest().encode()):
            return Score(1.0, "correct", code)
        why = {"timeout": f"took longer than {limits.seconds:g} s", "signal": f"ended by signal {ran.code}"}
        last = ran.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        return Score(0.0, "wrong", code, why.get(ran.ended) or last[:200] or "ended before its tests")

    def cases(example: Example) -> Cases:
        entry = example.meta.get("entry_point")
        right = {"the reference solution": str(example.completion[0]["content"])} if example.completion else {}
        wrong = {
            "code that does nothing": "pass",
            "an exit": "raise SystemExit(0)",
            "an exit without cleaning up": "import os\nos._exit(0)",
        }
        if entry:
            define = f"def {entry}(*args, **kwargs):\n    "
            equal = "class Any:\n    __eq__ = lambda self, other: True\n    __ne__ = lambda self, other: False\n"
            wrong |= {
                "a function that returns nothing": f"{define}return None",
                "a function that exits": f"{define}raise SystemExit(0)",
                "an object that equals everything": f"{equal}{define}return Any()",
            }
        return Cases(right, nonsense(example) | wrong)

    def lacks(example: Example) -> str:
        return "" if example.meta.get("tests") else "it has no unit tests"

    return Rule(score, cases, lacks=lacks, where="threads")


def defines(code: str, name: str) -> bool:
    return re.search(rf"^(?:async\s+)?def\s+{re.escape(name)}\b|^{re.escape(name)}\s*=", code, re.MULTILINE) is not None


# What it needs afterwards it takes hold of before the code under test can put something in its place, and puts Python's
# own functions back before the tests use them.
_PROGRAM = """
import builtins, hashlib, json, os, sys

def passes(code, tests, entry, run=exec, parse=compile, read=os.read, write=os.write, leave=os._exit,
           sha256=hashlib.sha256, kind=type, put_back=vars(builtins).update, own=dict(vars(builtins)),
           several=(list, tuple, set, frozenset, dict), plain=(int, float, complex, bool, str, bytes, type(None))):

    def checked(value):
        if kind(value) in several:
            for part in value:
                checked(part)
                if kind(value) is several[-1]:
                    checked(value[part])
        elif kind(value) not in plain:
            raise TypeError("%s returned an object of type %s" % (entry, kind(value).__name__))
        return value

    def called(*args, **kwargs):
        value = function(*args, **kwargs)
        put_back(own)
        return checked(value)

    sys.stdout = open(os.devnull, "w")
    space = {{"__name__": "answer"}}
    run(parse(code, "answer.py", "exec"), space)
    put_back(own)
    if entry:
        function = space[entry]
        space[entry] = called
    run(parse(tests, "tests.py", "exec"), space)
    write(1, sha256(read(0, 16) + b"passed").hexdigest().encode())
    leave(0)

passes(*json.loads({given!r}))
"""
