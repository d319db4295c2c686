"""How the commands take their options: numbers have bounds, tags say something, and what is off is one line."""

import argparse
import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, NoReturn

from timm.models import split_model_name_tag

from timm_nonlocal.models.pretrained import TAGS, Tag
from timm_nonlocal.recipes import RECIPES, Recipe

__all__ = ['Parser', 'number', 'recipe_of', 'take_tag', 'whole']


class Parser(argparse.ArgumentParser):
    """A parser that ends with exit code 2 and one line, without the usage, where an option is off.

    Args:
        doc: of the module: the first paragraph is what --help begins with, and from 'Exit codes' on how it ends.
    """

    def __init__(self, doc: str, prog: str | None = None):
        super().__init__(prog=prog, description=doc.split('\n\n')[0], epilog=doc[doc.index('Exit codes'):],
                         formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'error: {message}\n')


def whole(least: int = 0) -> Callable[[str], int]:
    """A type of argparse: a whole number of at least `least`."""
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f'{text} is not a whole number of at least {least}')
        return value
    return read


def number(least: float = 0.0, most: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """A type of argparse: a finite number from `least` to `most`.

    Args:
        above: `least` itself is too little.
    """
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not least <= value <= most or (above and value == least):
            bounds = f'{"above" if above else "of at least"} {least:g}' + f' and at most {most:g}' * math.isfinite(most)
            raise argparse.ArgumentTypeError(f'{text} is not a finite number {bounds}')
        return value
    return read


def take_tag(args: argparse.Namespace) -> None:
    """Sets the data set and the recipe's name where they are not given: by the tag of --model, else to the defaults.

    Raises:
        ValueError: the tag is unknown, or an option says otherwise.
    """
    architecture, tag = split_model_name_tag(args.model)
    if tag and tag not in TAGS:
        raise ValueError(f'--model {args.model}: the tag {tag} says no data set; use {", ".join(TAGS)}, or '
                         f'{architecture} with --dataset')
    means = TAGS[tag] if tag else Tag('cifar10', 'paper')
    if tag and args.dataset not in (None, means.dataset):
        raise ValueError(f'--model {args.model} --dataset {args.dataset}: the tag says {means.dataset}; leave out one')
    if tag and means.recipe != 'paper' and args.recipe not in (None, means.recipe):
        raise ValueError(f'--model {args.model} --recipe {args.recipe}: the tag says {means.recipe}; leave out one')
    args.dataset, args.recipe = args.dataset or means.dataset, args.recipe or means.recipe


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe that is named, with the options that differ from it."""
    given: dict[str, Any] = {field.name: tuple(value) if isinstance(value, list) else value
                             for field in fields(Recipe) if (value := getattr(args, field.name)) is not None}
    return replace(RECIPES[args.recipe], **given)
