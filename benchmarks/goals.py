"""What was to be reached, and what was measured for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ['Goal', 'goals_table', 'provenance']


@dataclass(frozen=True)
class Goal:
    """What is measured, its bound in words, the figure (None while it is missing) and where it was measured."""

    what: str
    bound: str
    measured: str | None = None
    device: str = ''


def goals_table(goals: Sequence[Goal]) -> list[str]:
    """Lines of Markdown: a table of what was measured, and in one line what was not."""
    lines = ['| what | goal | measured | on |', '| --- ' * 4 + '|']
    lines += [f'| {goal.what} | {goal.bound} | {goal.measured} | {goal.device} |' for goal in goals if goal.measured]
    missing = [f'{goal.what} ({goal.bound})' for goal in goals if not goal.measured]
    return [*lines, *(['', f'Not measured yet: {"; ".join(missing)}.'] if missing else [])]


def provenance(record: dict[str, Any]) -> str:
    """The versions and the commit that figures were measured with, in words."""
    versions = [f'{name} {version}' for name, version in record['versions'].items() if version]
    return ', '.join([*versions, f'commit {record["commit"]}'])
