import dataclasses

import pytest
import yaml

from fusekern import recipes
from fusekern.config import Recipe
from fusekern.errors import FusekernError

EXPECTED = {
    "ade20k/mobilenetv2-convformer",
    "ade20k/mobilenetv2-fpn",
    "camvid/mobilenetv2-convformer",
    "camvid/mobilenetv2-fpn",
    "demo",
}


def leaves(value, prefix=""):
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if dataclasses.is_dataclass(item):
            yield from leaves(item, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, item


def test_shipped_recipes_are_found_and_load():
    assert set(recipes.names()) == EXPECTED
    for name in recipes.names():
        assert isinstance(recipes.load(name), Recipe)


def test_the_file_is_read_and_an_option_overrides_it():
    plain = recipes.load("demo")
    assert plain.model.guidance.channels == 128
    changed = dict(leaves(recipes.load("demo", "--train.steps", "7", "--data.crop=[64, 96]", "--train.ema", "0.9")))
    assert changed.pop("train.steps") == 7
    assert changed.pop("data.crop") == (64, 96)
    assert changed.pop("train.ema") == 0.9
    expected = {key: value for key, value in leaves(plain) if key in changed}
    assert changed == expected


def test_options_may_stand_before_the_recipe():
    parser = recipes.recipe_parser(prog="x")
    options, recipe = recipes.parse(parser, ["--train.steps", "7", "demo"])
    assert (options.recipe, recipe.train.steps) == ("demo", 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dmo"], "did you mean demo?"),
        (["demo", "--train.btch", "3"], "unknown option --train.btch; did you mean --train.batch?"),
        (["demo", "--train.btch=3"], "unknown option --train.btch; did you mean --train.batch?"),
        (["demo", "--train.batch", "many"], "train.batch"),
        (["demo", "--model.guidance.kind", "clip"], "model.guidance.kind"),
    ],
)
def test_a_misspelt_name_key_or_value_is_named(arguments, message):
    with pytest.raises(FusekernError) as error:
        recipes.load(*arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {bakbone: {name: x}}", "unknown key model.bakbone; did you mean model.backbone?"),
        ("trian: {steps: 3}", "unknown key trian; did you mean train?"),
        ("train: {steps: soon}", "train.steps"),
        ("train: [", "cannot be read as YAML"),
        ("just words", "a recipe is a mapping"),
    ],
)
def test_a_bad_file_is_named_with_the_key(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(FusekernError) as error:
        recipes.load(str(path))
    assert message in str(error.value)
    assert "mine.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "need"),
    [
        ("optim.clip", "-1", "above 0"),
        ("train.ema", "1.5", "above 0 and below 1"),
        ("text.width", "0", "1 or more"),
        ("model.guidance.blocks", "-1", "0 or more"),
        ("model.head.dropout", "2", "from 0 to below 1"),
        ("data.crop", "[0, 64]", "1 or more"),
        ("data.ratio", "[2.0, 0.5]", "the first must not be above the second"),
        ("data.std", "[0.2, 0.0, 0.2]", "above 0"),
        ("data.flip", "7", "from 0 to 1"),
        ("data.workers", "-1", "0 or more"),
        ("train.keep", "0", "1 or more"),
        ("eval.ratios", "[0.0]", "above 0"),
    ],
)
def test_a_value_out_of_range_is_named_with_the_need(key, value, need):
    with pytest.raises(FusekernError) as error:
        recipes.load("demo", f"--{key}={value}")
    assert str(error.value).startswith(f"{key} is ") and need in str(error.value)


def test_a_path_with_glob_characters_is_the_file_of_that_name(tmp_path):
    path = tmp_path / "mine[1].yaml"
    path.write_text("train: {steps: 3}")
    assert recipes.load(str(path)).train.steps == 3


def test_dump_and_from_dict_are_inverse():
    recipe = recipes.load("demo", "--eval.ratios", "[0.5, 1.0]", "--optim.clip", "null")
    assert recipes.from_dict(yaml.safe_load(recipes.dump(recipe))) == recipe


def test_from_dict_refuses_an_unknown_key():
    values = recipes.to_dict(Recipe())
    values["train"]["epochs"] = 3
    with pytest.raises(FusekernError, match="epochs"):
        recipes.from_dict(values)


def test_the_eval_keys_of_a_recipe_are_overridden_and_no_others():
    recipe = recipes.load("demo", "--eval.flip", "true")
    options, config = recipes.parse_eval(recipes.eval_parser(prog="x"), ["run", "--eval.mode", "slide"], recipe)
    assert options.checkpoint == "run"
    assert config == dataclasses.replace(recipe.eval, mode="slide")
    with pytest.raises(FusekernError, match="--train.steps"):
        recipes.parse_eval(recipes.eval_parser(prog="x"), ["run", "--train.steps", "3"], recipe)
