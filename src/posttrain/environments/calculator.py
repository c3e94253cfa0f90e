"""A calculator: arithmetic read as a syntax tree, never run as code."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

from posttrain.environments.tools import Tool

LONGEST = 200
"""Characters of an expression."""
BITS = 1024
"""Of an integer, those on the way to a result too."""

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculate(expression: str) -> str:
    """The value of numbers with + - * / // % ** and parentheses, by Python's rules: 7 / 2 is 3.5.

    What cannot be computed, or not in bounds, gives a line that begins with `error:`.
    """
    if len(expression) > LONGEST:
        return f"error: more than {LONGEST} characters"
    try:
        return str(_value(ast.parse(expression.strip(), mode="eval").body))
    except (ArithmeticError, ValueError) as error:
        return f"error: {error}"
    except (SyntaxError, RecursionError, MemoryError):  # what Python's parser raises, the last two on deep nesting
        return "error: not an arithmetic expression"


def _value(node: ast.expr) -> Any:
    """An int or a float."""
    found: Any
    match node:
        case ast.Constant(value=value) if type(value) in (int, float):
            found = value
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            found = _UNARY[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            a, b = _value(left), _value(right)
            if isinstance(op, ast.Pow) and isinstance(a, int) and isinstance(b, int) and a.bit_length() * b > 2 * BITS:
                raise ValueError("the number is too large")  # before it is computed
            found = _BINARY[type(op)](a, b)
        case _:
            raise ValueError("only numbers, + - * / // % ** and parentheses are known")
    if isinstance(found, complex):
        raise ValueError("the result is not a real number")
    if found.bit_length() > BITS if isinstance(found, int) else not math.isfinite(found):
        raise ValueError("the number is too large")
    return found


CALCULATOR = Tool(
    "calculator",
    "Computes an arithmetic expression with + - * / // % ** and parentheses.",
    {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    calculate,
)
