"""The training recipes: the paper's, the same at a tenth of its length, and fine-tuning from a trained backbone."""

from dataclasses import asdict, dataclass
from typing import Any

ANNEALS = 'steps', 'linear'
MEANS = 'image', 'colour'


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
        """The recipe that `to_dict` wrote; fields that it lacks are the paper's. Raises TypeError for unknown ones."""
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
