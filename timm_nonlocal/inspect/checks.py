"""Conditions on the numbers of every block, such as 'neg_top<=4', for a build that fails where they do not hold."""

import operator
import re
from typing import Any

from ..analysis.spectra import Spectrum
from .report import Result

__all__ = ['OF_STABILITY', 'parse_check', 'run_checks']

OPERATORS = {'<=': operator.le, '>=': operator.ge, '==': operator.eq, '!=': operator.ne, '<': operator.lt,
             '>': operator.gt}
OF_STABILITY = ('kappa', 'constant_gain', 'radius', 'outside')
CHECKABLE = (*(name for name, field in Spectrum.__dataclass_fields__.items() if field.type in (
    int, int | None, float | None)), *OF_STABILITY)


def parse_check(expression: str) -> tuple[str, str, float]:
    """'neg_top<=4' as its parts. Raises ValueError for another form or an unknown name."""
    match = re.fullmatch(r'\s*(\w+)\s*(<=|>=|==|!=|<|>)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*', expression)
    if not match:
        raise ValueError(f"--check {expression!r}: write NAME OPERATOR NUMBER, such as 'neg_top<=4'")
    if match[1] not in CHECKABLE:
        raise ValueError(f'--check {expression!r}: {match[1]} is not one of {", ".join(CHECKABLE)}')
    return match[1], match[2], float(match[3])


def run_checks(expressions: list[str], results: list[Result]) -> list[dict[str, Any]]:
    """Every expression with the blocks of which it does not hold; an undefined number never does."""
    checks = []
    for expression in expressions:
        name, sign, bound = parse_check(expression)
        failures = []
        for result in results:
            for block in (block for stage in result.stages for block in stage.blocks):
                value = (block.stability or {}).get(name) if name in OF_STABILITY else getattr(block, name)
                if value is None or not OPERATORS[sign](value, bound):
                    failures.append({'target': result.input, 'stage': block.stage, 'block': block.index,
                                     'value': value})
        checks.append({'expression': expression, 'ok': not failures, 'failures': failures})
    return checks
