"""The configuration: what is laid over what, what is refused and how, and that files say it all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastproto.train import config as settings
from fastproto.train import recipes
from fastproto.train.config import Config, LossConfig, OptimizerConfig, PrototypeConfig, ViewConfig


def resolved(arguments: list[str], defaults: Path | None = None) -> Config:
    parser = settings.config_parser()
    return settings.resolve(parser, settings.parse(parser, arguments, defaults))


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_arguments_lie_over_the_recipe_and_the_recipe_over_the_defaults(tmp_path: Path) -> None:
    path = recipe(tmp_path, "epochs: 7\noptimizer: {lr: 0.5, warmup: 2}\nprototypes:\n  num: [8, 16]\n")
    config = resolved(["--optimizer.lr", "3", "--views.scale", "[0.1, 0.9]", "--limit", "300"], path)
    expected = Config(
        epochs=7,
        limit=300,
        optimizer=OptimizerConfig(lr=3.0, warmup=2.0),
        prototypes=PrototypeConfig(num=(8, 16)),
        views=ViewConfig(scale=(0.1, 0.9)),
    )
    assert config == expected


def test_without_anything_it_is_the_defaults() -> None:
    assert resolved([]) == Config()


def test_a_file_is_read_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pattern, and no home: its neighbour is another's."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a[1]*?.yaml", "a1b.yaml", "~", "~root")):
        Path(name).write_text(f"epochs: {number + 3}\n")
        assert settings.read_config(Path(name)).epochs == number + 3


def test_a_file_says_all_of_a_configuration(tmp_path: Path) -> None:
    config = Config(
        method="spcl",
        limit=None,
        loss=LossConfig(temperature=0.3),
        views=ViewConfig(size=24, jitter=(0.8, 0.7, 0.6, 0.2)),
    )
    assert settings.read_config(recipe(tmp_path, settings.to_yaml(config))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bogus: 1", r"recipe.yaml: .*'bogus'"),
        ("optimizer: {bogus: 1}", r"recipe.yaml: .*'optimizer'.*'bogus'"),
        ("method: dino", r'recipe.yaml: "method": Expected one of .*pauc.*simclr.* Got value: dino'),
        ("epochs: many", r'recipe.yaml: "epochs": Expected int\. Got value: many'),
        ("views: {scale: [0.1]}", r'recipe.yaml: "views.scale": Expected a tuple with 2 elements'),
        ("- 1", r"recipe.yaml: "),
        ("a: [", r"recipe.yaml: "),
        ("optimizer: 3", "config: optimizer expected settings by name, got int 3"),
        ("epochs: 0", "config: epochs expected a number >= 1, got int 0"),
        ("batch_size: 1", "config: batch_size expected a number >= 2, got int 1"),
        ("devices: 3", "config: batch_size expected a multiple of devices x accumulate = 3, got int 256"),
        ("{devices: 2, accumulate: 5}", "batch_size expected a multiple of devices x accumulate = 10, got int 256"),
        ("{accumulate: 200}", "config: batch_size expected a number >= 400, got int 256"),
        ("limit: 255", "config: limit expected a number >= 256, got int 255"),
        ("encoder: {width: 7}", "encoder: width expected a number >= 8, got int 7"),
        ("head: {dim: 0}", "head: dim expected a number >= 1, got int 0"),
        ("views: {box_interval: 0}", "views: box_interval expected a number >= 1"),
        ("prototypes: {num: []}", r"prototypes: num expected one or more numbers >= 1, got tuple \(\)"),
        ("prototypes: {num: [4, 0]}", "prototypes: num expected one or more numbers >= 1"),
        ("prototypes: {warmup: -1}", "prototypes: warmup expected a number >= 0, got int -1"),
        ("target: {momentum: 1.5}", "target: momentum expected a number from 0 to 1, got float 1.5"),
        ("target: {queue: 0}", "target: queue expected a number >= 1"),
        ("seed: -1", "config: seed expected 0 to 9223372036854775807, got int -1"),
        ("seed: 99999999999999999999", "config: seed expected 0 to 9223372036854775807, got int 99999999999999999999"),
        ("views: {size: 0}", "views: size expected a number >= 1, got int 0"),
        ("prototypes: {temperature: -1}", "prototypes: temperature expected a finite number above 0, got float -1.0"),
        ("prototypes: {temperature: .inf}", "prototypes: temperature expected a finite number above 0, got float inf"),
        ("loss: {temperature: 0}", "loss: temperature expected a finite number above 0, or null, got float 0.0"),
        ("loss: {temperature: .inf}", "loss: temperature expected a finite number above 0, or null, got float inf"),
        ("loss: {align_weight: .nan}", "loss: align_weight expected a finite number >= 0, got float nan"),
        ("optimizer: {lr: -1}", "optimizer: lr expected a finite number >= 0, got float -1.0"),
        ("optimizer: {lr: .nan}", "optimizer: lr expected a finite number >= 0, got float nan"),
        ("optimizer: {lr: .inf}", "optimizer: lr expected a finite number >= 0, got float inf"),
        ("strict: maybe", "config: strict expected true or false, got 'maybe'"),
        ("strict: 'false'", "config: strict expected true or false, got 'false'"),
        ("optimizer: {momentum: 7}", "optimizer: momentum expected a number from 0 to below 1, got float 7.0"),
    ],
)
def test_what_is_refused_is_named_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        settings.read_config(recipe(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "dino"], '^"method": Expected one of '),
        (["--bogus", "3"], "^unrecognized arguments: --bogus"),
        (["--meth", "simclr"], "^unrecognized arguments: --meth"),
        (["--optimizer.lr", "fast"], '^"optimizer.lr": Expected float. Got value: fast'),
    ],
)
def test_bad_arguments_are_named_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        resolved(arguments)
    assert "\n" not in str(caught.value)


def test_difference_names_the_first_setting_that_differs() -> None:
    config = Config()
    assert settings.difference(config, config) == ""
    assert settings.difference(config, replace(config, epochs=3)) == "epochs 200, now 3"
    changed = replace(config, prototypes=PrototypeConfig(num=(3, 4)))
    assert settings.difference(config, changed) == "prototypes.num [512], now [3, 4]"


def test_a_run_may_go_on_elsewhere() -> None:
    assert settings.difference(Config(), Config(device="cpu", data_root="/elsewhere")) == ""
    here, there = Config(data="imagefolder:here"), Config(data="imagefolder:there")
    assert settings.difference(here, there) == ""
    moved = (Config(data=f"shards:{place}/x.tar", test_shards=f"{place}/y.tar") for place in ("here", "there"))
    assert settings.difference(*moved) == ""
    tests = Config(data="shards:x.tar", test_shards="y.tar"), Config(data="shards:x.tar", test_shards="z.tar")
    assert settings.difference(*tests) == "test_shards 'y.tar', now 'z.tar'"
    assert settings.difference(here, Config(data="shards:here")) == "data 'imagefolder:here', now 'shards:here'"


def test_recipes_are_found_by_path_and_by_name(tmp_path: Path) -> None:
    path = recipe(tmp_path, "epochs: 3")
    assert recipes.find_recipe(str(path)) == path
    assert recipes.find_recipe("digits") == recipes.RECIPES / "digits.yaml"
    with pytest.raises(ValueError, match=r"recipe: expected a YAML file or one of .*digits.*, got 'nothing'"):
        recipes.find_recipe("nothing")


def test_the_default_recipe_is_the_methods_or_else_the_datas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recipes.default_recipe("byol", "digits") == recipes.RECIPES / "digits.yaml"
    monkeypatch.setattr(recipes, "RECIPES", tmp_path)
    (tmp_path / "digits.yaml").write_text("data: digits")
    (tmp_path / "byol_digits.yaml").write_text("data: digits")
    assert recipes.default_recipe("byol", "digits") == tmp_path / "byol_digits.yaml"
    assert recipes.default_recipe("pauc", "digits") == tmp_path / "digits.yaml"


@pytest.mark.parametrize("path", sorted(recipes.RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_packaged_recipes_are_for_what_their_names_say(path: Path) -> None:
    config = settings.read_config(path)
    assert path.stem in (config.data, f"{config.method}_{config.data}")


def test_other_data_has_no_recipe_of_its_own() -> None:
    assert recipes.default_recipe("pauc", "imagefolder:somewhere") is None
