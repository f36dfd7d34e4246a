"""A study that sets one field of `augment` keeps the recipe's own default of the others."""

import pytest

from harness.study.protocols import FineTune, Video
from harness.study.recipes import MaeRecipe, WspRecipe

DURATION = {"duration": {"steps": 1}}


@pytest.mark.parametrize("recipe", [MaeRecipe, WspRecipe, FineTune, Video])
def test_fields_that_are_left_out_are_the_recipes_own(
    recipe: type[MaeRecipe | WspRecipe | FineTune | Video],
) -> None:
    own = recipe.model_validate(DURATION).augment
    turned = recipe.model_validate({**DURATION, "augment": {"flip": not own.flip}})
    assert turned.augment == own.model_copy(update={"flip": not own.flip})
    cropped = recipe.model_validate({**DURATION, "augment": {"crop_scale": (0.1, 0.9)}})
    assert cropped.augment == own.model_copy(update={"crop_scale": (0.1, 0.9)})
    same = recipe.model_validate({**DURATION, "augment": {"flip": own.flip}})
    assert same == recipe.model_validate(DURATION)  # so the identity too
    for made in (turned, cropped):
        assert recipe.model_validate(made.model_dump(mode="json")) == made
