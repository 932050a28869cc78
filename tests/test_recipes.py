"""Every shipped recipe decodes, and the model families have exactly the published number of parameters."""

from __future__ import annotations

import subprocess
import sys

import pytest

from osler.config import RECIPES, available_recipes, decode, encode, load_recipe
from osler.model.config import ModelConfig
from osler.show import decode_recipe, derived, list_recipes, show_recipe
from osler.yaml12 import load_yaml

PARAMETERS = {
    "pure-tiny": 85_327_872,
    "pure-small": 178_716_672,
    "pure-medium": 373_555_200,
    "pure-medium-large": 401_227_776,
    "pure-large": 763_232_256,
    "synth-tiny": 49_255_296,
    "synth-small": 162_220_800,
    "synth-medium": 406_635_520,
    "synth-baguette": 308_494_848,
    "superbpe-270m": 273_284_480,
    "factorized-177m": 177_230_720,
    "osler-400m": 405_651_456,
}
RECIPE_NAMES = sorted(available_recipes())


def model_of(name: str) -> ModelConfig:
    return decode(ModelConfig, load_recipe(name)["model"])


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_parameters_of_the_model_families(name, parameters):
    assert model_of(name).num_parameters == parameters


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_parameters_counted_from_the_built_model(name, parameters):
    import torch

    from osler.model.transformer import Transformer

    config = model_of(name)
    with torch.device("meta"):  # shapes without memory
        model = Transformer(config)
    padding_rows = config.padded_vocab_size - config.vocab_size
    width = config.hidden_size if config.embed_rank is None else config.embed_rank
    padding = padding_rows * (width + (0 if config.tie_embeddings else config.hidden_size))
    assert sum(parameter.numel() for parameter in model.parameters()) - padding == parameters


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_recipe_has_one_line_and_decodes(name):
    assert available_recipes()[name], f"{name} needs a description"
    assert "\n" not in available_recipes()[name]
    recipe = load_recipe(name)
    resolved = decode_recipe(recipe, source=name)
    assert decode(type(resolved), encode(resolved)) == resolved
    assert set(recipe) <= set(encode(resolved))


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_recipe_shows_what_it_resolves_to(name):
    text = show_recipe(name)
    resolved = decode_recipe(load_recipe(name))
    assert load_yaml(text, name) == encode(resolved)
    assert all(f"# {label}: {value:,}" in text for label, value in derived(resolved).items())


def test_overrides_change_what_is_shown():
    assert "# parameters: 463,601,664" in show_recipe("osler-400m", ["model.num_layers=24"])


def test_no_number_follows_from_a_model_that_is_replaced():
    shown = show_recipe("text-10min", ["init_from=runs/other"])
    assert "# optimizer steps" in shown and "# parameters" not in shown and "FLOPs" not in shown


def test_list_names_every_recipe_with_its_parameters():
    lines = list_recipes().splitlines()
    assert [line.split()[0] for line in lines] == RECIPE_NAMES
    assert all(any(name in line and f"{count:,}" in line for line in lines) for name, count in PARAMETERS.items())


def test_recipes_folder_holds_only_yaml():
    strange = [path for path in RECIPES.rglob("*") if path.is_file() and path.suffix != ".yaml"]
    assert not strange


def test_a_training_recipe_is_told_from_a_reinforcement_recipe(tmp_path):
    (tmp_path / "train.yaml").write_text("kind: pretrain\nbase: pure-tiny\nseq_len: 256\ntotal_tokens: 1_000_000\n")
    (tmp_path / "grpo.yaml").write_text("kind: grpo\ninit_from: runs/a\nalgorithm: {samples_per_prompt: 16}\n")
    train = decode_recipe(load_recipe(tmp_path / "train.yaml"))
    grpo = decode_recipe(load_recipe(tmp_path / "grpo.yaml"))
    assert (type(train).__name__, derived(train)["optimizer steps"]) == ("TrainConfig", 123)
    assert (type(grpo).__name__, derived(grpo)["completions per step"]) == ("GrpoConfig", 128)


def test_recipes_are_read_without_torch():
    code = (
        "import sys; from osler.show import list_recipes, show_recipe; list_recipes(); show_recipe('osler-400m');"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
