"""The training recipes: the paper's, the same at a tenth of its length, and fine-tuning from a trained backbone."""

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ['ANNEALS', 'FINE_TUNING', 'MEANS', 'PAPER', 'RECIPES', 'SHORT', 'Recipe', 'nearest', 'recipe_id']

ANNEALS = 'steps', 'linear'
MEANS = 'image', 'colour'
NEWER = 'nesterov', 'warmup', 'anneal', 'mean'  # fields that older lines of results lack
KINDS = {int: 'a whole number', float: 'a number', bool: 'true or false', str: 'text', tuple: 'a list of whole numbers'}


@dataclass(frozen=True)
class Recipe:
    """Everything about the training that a network's architecture and seed do not say. The defaults are the paper's.

    Attributes:
        epochs: how often the training images are seen.
        batch_size: images a step. Not stated in the paper, but it follows from its "32k and 48k iterations".
        lr: the highest learning rate.
        milestones: epochs after which the learning rate is multiplied by gamma; of `anneal='steps'`.
        gamma: see milestones.
        momentum: of SGD.
        weight_decay: on every parameter.
        nesterov: Nesterov's momentum in place of the heavy ball.
        warmup: the fraction of all steps in which the learning rate grows linearly to lr.
        anneal: after the warm-up 'steps' (see milestones) or 'linear' to zero.
        mean: what is subtracted from the images, the training images' 'image' (per pixel) or 'colour' (per channel,
            as timm's transforms do).

    Example:
        >>> recipe = Recipe(epochs=4, milestones=(2, 3))
        >>> [round(recipe.lr_at(step, steps_per_epoch=1), 4) for step in range(4)]
        [0.1, 0.1, 0.01, 0.001]
        >>> recipe_id(recipe)
        'paper epochs=4 milestones=[2, 3]'
        >>> Recipe.from_dict(recipe.to_dict()) == recipe
        True
    """

    epochs: int = 164
    batch_size: int = 128
    lr: float = 0.1
    milestones: tuple[int, ...] = (81, 122)
    gamma: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False
    warmup: float = 0.0
    anneal: str = 'steps'
    mean: str = 'image'

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, counted from 0 over the whole run."""
        steps = self.epochs * steps_per_epoch
        rise = self.warmup * steps
        if step < rise:
            return self.lr * (step + 1) / (rise + 1)
        if self.anneal == 'linear':
            return self.lr * (steps - step) / (steps - rise)
        return self.lr * self.gamma ** sum(step >= milestone * steps_per_epoch for milestone in self.milestones)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return {**asdict(self), 'milestones': list(self.milestones)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> 'Recipe':
        """The recipe that `to_dict` wrote; of `NEWER` fields that it lacks the paper's.

        Raises:
            ValueError: a field is unknown, missing or of another type.
        """
        known = cls.__dataclass_fields__
        if not isinstance(fields, dict):
            raise ValueError(f'a recipe has fields, it is not {fields!r:.80}')
        if unknown := [name for name in fields if name not in known]:
            raise ValueError(f'a recipe has no {", ".join(map(repr, unknown))}')
        if missing := [name for name in known if name not in fields and name not in NEWER]:
            raise ValueError(f'the recipe lacks {", ".join(missing)}')
        for name, value in fields.items():
            kind = type(known[name].default)
            if kind is tuple:
                fits = isinstance(value, (list, tuple)) and all(type(epoch) is int for epoch in value)
            else:
                fits = type(value) is kind or (kind is float and type(value) is int)
            if not fits:
                raise ValueError(f"the recipe's {name} is {value!r:.80}, not {KINDS[kind]}")
        return cls(**{**fields, 'milestones': tuple(fields['milestones'])})

    def changes(self, base: 'Recipe') -> dict[str, Any]:
        """The fields that differ from another recipe's."""
        other = base.to_dict()
        return {key: value for key, value in self.to_dict().items() if value != other[key]}


PAPER = Recipe()  # section 3.1
SHORT = Recipe(epochs=16, milestones=(8, 12))  # the paper's at a tenth of its length
FINE_TUNING = Recipe(epochs=10, lr=0.05, milestones=(), weight_decay=5e-4, nesterov=True, warmup=0.05,
                     anneal='linear', mean='colour')  # starts from a trained backbone
RECIPES = {'paper': PAPER, 'short': SHORT, 'ft': FINE_TUNING}


def nearest(recipe: Recipe) -> str:
    """The name of the recipe in `RECIPES` that it differs least from; the first of equals."""
    return min(RECIPES, key=lambda name: len(recipe.changes(RECIPES[name])))


def recipe_id(recipe: Recipe) -> str:
    """The nearest recipe's name, with what differs from it: 'paper', 'paper lr=0.01', 'ft epochs=20'."""
    name = nearest(recipe)
    return ' '.join([name, *(f'{key}={value}' for key, value in recipe.changes(RECIPES[name]).items())])
