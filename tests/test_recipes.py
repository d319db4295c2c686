"""Recipes from JSON: one clear line for each thing that can be wrong with the fields."""

from typing import Any

import pytest

from timm_nonlocal.recipes import NEWER, PAPER, Recipe

OLD = {name: value for name, value in PAPER.to_dict().items() if name not in NEWER}


@pytest.mark.parametrize(('fields', 'message'), [
    ({**OLD, 'dropout': 0.1}, "a recipe has no 'dropout'"),
    ({'epochs': 3, 'milestones': []}, 'the recipe lacks batch_size, lr, gamma, momentum, weight_decay'),
    ({**OLD, 'epochs': '164'}, "the recipe's epochs is '164', not a whole number"),
    ({**OLD, 'epochs': True}, "the recipe's epochs is True, not a whole number"),
    ({**OLD, 'lr': None}, "the recipe's lr is None, not a number"),
    ({**OLD, 'nesterov': 1}, "the recipe's nesterov is 1, not true or false"),
    ({**OLD, 'mean': 3}, "the recipe's mean is 3, not text"),
    ({**OLD, 'milestones': 81}, "the recipe's milestones is 81, not a list of whole numbers"),
    ({**OLD, 'milestones': [81, 122.5]}, "the recipe's milestones is [81, 122.5], not a list of whole numbers"),
    ('paper', "a recipe has fields, it is not 'paper'"),
])
def test_fields_that_make_no_recipe(fields: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Recipe.from_dict(fields)
    assert str(caught.value) == message


def test_a_whole_number_is_a_number() -> None:
    assert Recipe.from_dict({**OLD, 'lr': 1, 'warmup': 0}) == Recipe(lr=1)
