"""Recipes: the four that have names, those made from them, and what is refused."""

import dataclasses
import json

import pytest

from fewbits import FewbitsError
from fewbits.train.recipe import RECIPES, LossScaling, Recipe


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("fp32", ("fp32", "fp32", "fp32", "fp32")),
        ("fp16", ("fp16", "fp16", "fp16", "fp16")),
        ("bf16", ("bf16", "bf16", "bf16", "bf16")),
        ("fp8", ("e4m3fn", "e4m3fn", "e5m2", "bf16")),
    ],
)
def test_formats_of_the_named_recipes(name: str, formats: tuple[str, ...]) -> None:
    recipe = Recipe.named(name)
    assert (recipe.weights.name, recipe.activations.name, recipe.gradients.name, recipe.results.name) == formats
    assert recipe.master == recipe.state == "fp32"
    assert (recipe.loss_scaling is not None) == (name == "fp16")


def test_a_recipe_is_frozen_comparable_and_made_by_replace() -> None:
    recipe = Recipe.named("bf16")
    split = dataclasses.replace(recipe, name="mine", master="split", state="bf16", keep=["*.lm_head"])
    assert (split.master, split.keep) == ("split", ("*.lm_head",))
    assert dataclasses.replace(recipe) == recipe
    assert hash(dataclasses.replace(recipe)) == hash(recipe)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.master = "split"  # type: ignore[misc]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_recipe_is_plain_data(recipe: Recipe) -> None:
    fields = json.loads(json.dumps(recipe.to_json()))
    scaling = fields.pop("loss_scaling")
    again = Recipe(**fields, loss_scaling=scaling and LossScaling(**scaling))
    assert again == recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"results": "int8"}, "recipe bf16: results=int8; one of fp32, bf16, fp16 is needed"),
        ({"kept": "e4m3fn"}, "recipe bf16: kept=e4m3fn; one of fp32, bf16, fp16 is needed"),
        ({"accumulation": "fp16"}, "recipe bf16: accumulation=fp16; matmuls add up in fp32 only"),
        ({"weights": "fp16"}, "recipe bf16: weights=fp16 with results=bf16; operands are in the format of the results"),
        ({"weights": "e4m3fn"}, "recipe bf16: scaling=None; 8-bit operands need one of tensor, delayed, row, block"),
        ({"scaling": "row"}, "recipe bf16: scaling='row' is for 8-bit operands; this recipe has none, take None"),
        ({"master": "none"}, "recipe bf16: master='none'; one of fp32, split, kahan, stochastic is needed"),
        ({"state": "fp16"}, "recipe bf16: state='fp16'; one of fp32, bf16, 8bit is needed"),
        ({"history": 0}, "recipe bf16: history=0; at least 1 step is needed"),
        ({"seed": -1}, r"recipe bf16: seed=-1 is out of range: take 0 to 2\^32 - 1"),
        ({"weights": "fp17"}, "fp17"),
    ],
)
def test_nonsense_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        dataclasses.replace(Recipe.named("bf16"), **changes)


def test_masters_without_fp32_need_bf16() -> None:
    with pytest.raises(FewbitsError, match="recipe fp16: master='split' keeps weights in bf16, but results=fp16"):
        dataclasses.replace(Recipe.named("fp16"), master="split")


def test_eight_bit_operands_do_not_fit_fp16_results() -> None:
    with pytest.raises(FewbitsError, match="scales beyond the range of results=fp16"):
        dataclasses.replace(Recipe.named("fp16"), weights="e4m3fn", scaling="tensor")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initial": 3.0}, r"initial=3.0; a power of two from 2\^-100 to 2\^100 is needed"),
        ({"floor": 0.0}, "floor=0.0; a power of two"),
        ({"cap": float("inf")}, "cap=inf; a power of two"),
        ({"initial": 2.0**30}, "initial=1.07374e.09 is outside floor=1 … cap=1.67772e.07"),
        ({"patience": 0}, "patience=0; a whole number from 1 is needed"),
    ],
)
def test_loss_scaling_out_of_range_is_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        LossScaling(**changes)  # type: ignore[arg-type]


def test_an_unknown_recipe_is_named_with_the_nearest() -> None:
    with pytest.raises(FewbitsError, match="recipe 'bf61' is unknown; did you mean bf16"):
        Recipe.named("bf61")
