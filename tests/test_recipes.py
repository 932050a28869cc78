"""Every shipped recipe decodes, and the model families have exactly the published number of parameters."""

import re

import pytest

from osler.cli.show import decode_recipe, list_recipes, show_recipe
from osler.config.recipe import as_comments, available_recipes, load_recipe, load_yaml
from osler.config.schema import decode, encode
from osler.data.config import sources_of
from osler.model.config import ModelConfig
from osler.runtime.errors import UserError

RECIPE_NAMES = sorted(available_recipes())
FAMILIES = {
    # parameters; layers, hidden, intermediate, heads, kv heads, head_dim, vocabulary, tied, rank, norm weights, max_seq_len
    "pure-tiny": (85_327_872, 12, 512, 1408, 8, 2, 64, 50_304, False, None, False, 2048),
    "pure-small": (178_716_672, 16, 768, 2112, 12, 3, 64, 50_304, False, None, False, 2048),
    "pure-medium": (373_555_200, 24, 1024, 2816, 16, 4, 64, 50_304, False, None, False, 2048),
    "pure-medium-large": (401_227_776, 20, 1152, 3168, 16, 4, 72, 50_304, False, None, False, 2048),
    "pure-large": (763_232_256, 24, 1536, 4224, 16, 4, 96, 50_304, False, None, False, 2048),
    "synth-tiny": (49_255_296, 6, 384, 1024, 6, 6, 64, 50_304, False, None, True, 2048),
    "synth-small": (162_220_800, 12, 768, 2048, 12, 12, 64, 50_304, False, None, True, 2048),
    "synth-medium": (406_635_520, 24, 1024, 2752, 16, 16, 64, 50_304, False, None, True, 2048),
    "synth-baguette": (308_494_848, 80, 512, 1408, 8, 8, 64, 50_304, False, None, True, 2048),
    "superbpe-270m": (273_284_480, 28, 640, 1712, 10, 2, 64, 200_005, False, 128, True, 4096),
    "factorized-177m": (177_230_720, 28, 768, 2048, 12, 2, 64, 50_257, True, 128, True, 4096),
    "osler-400m": (405_651_456, 20, 1152, 3168, 18, 6, 64, 50_304, False, None, False, 2048),
}
STAGES = {  # tokens in a row, rows of a step, and the step at which they begin; None: not published
    "superbpe-curriculum": [
        (128, 256, 0), (256, 128, 3_000), (512, 64, 6_000), (768, 64, 10_000), (1024, 32, 15_000), (2048, 32, 25_000)
    ],
    "ultra-curriculum": [
        (8, 8192, 0), (16, 4096, None), (32, 2048, None), (64, 1024, None), (128, 512, None), (256, 256, None),
        (512, 128, None), (768, 256, None), (1536, 128, None), (2048, 64, None),
    ],
    "four-stage/1-wikipedia-24gb": [(512, 8 * 8, 0), (1024, 6 * 8, 5_000), (1536, 4 * 8, 10_000), (2048, 4 * 8, 15_000)],
}  # fmt: skip

FOUR_STAGES = ["four-stage/1-wikipedia", "four-stage/2-reasoning", "four-stage/3-math", "four-stage/4-code"]


def model_of(name: str) -> ModelConfig:
    return decode(ModelConfig, load_recipe(name)["model"])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_family_has_the_published_shape_and_parameters(name):
    import torch

    from osler.model.transformer import Transformer

    model = model_of(name)
    sizes = (model.num_layers, model.hidden_size, model.intermediate_size, model.num_heads, model.num_kv_heads, model.head_dim)
    rest = (model.vocab_size, model.tie_embeddings, model.embed_rank, model.norm_weight, model.max_seq_len)
    assert (model.num_parameters, *sizes, *rest) == FAMILIES[name]
    assert model.rope_theta == 10_000.0 and not model.qk_norm_weight
    assert model.head_init == ("normal" if model.tie_embeddings else "zero"), "the first loss is ln(vocab_size)"
    with torch.device("meta"):  # shapes without memory
        built = Transformer(model)
    width = (model.embed_rank or model.hidden_size) + (0 if model.tie_embeddings else model.hidden_size)
    padding = (model.padded_vocab_size - model.vocab_size) * width
    assert sum(parameter.numel() for parameter in built.parameters()) - padding == model.num_parameters


@pytest.mark.parametrize(("name", "stages"), STAGES.items())
def test_published_stages(name, stages):
    spans = decode_recipe(load_recipe(name)).timeline.spans
    assert [(span.seq_len, span.rows_per_batch) for span in spans] == [stage[:2] for stage in stages]
    begins = [(span.first_step, step) for span, (_, _, step) in zip(spans, stages, strict=True)]
    assert all(published in (None, step) for step, published in begins)


def test_published_numbers_of_single_recipes():
    usmle = decode_recipe(load_recipe("usmle-2day/pretrain"))
    assert (usmle.batch_tokens, usmle.micro_batch_tokens, usmle.seq_len) == (16 * 2048 * 16, 16 * 2048, 2048)
    assert usmle.total_steps == 3_815
    assert (usmle.optim.type, usmle.optim.lr, usmle.clip_norm, usmle.precision) == ("adamw", 3e-4, 1.0, "bf16")
    schedule = usmle.schedule
    assert (schedule.type, schedule.warmup_tokens, schedule.final_fraction) == ("cosine", 100_000_000, 0.1)
    assert (usmle.checkpoint.every_tokens, usmle.eval_every_tokens) == (500 * 524_288, 250 * 524_288)
    assert decode_recipe(load_recipe("debug")).batch_tokens == 32_768
    grpo = decode_recipe(load_recipe("usmle-2day/grpo"))
    assert (grpo.schedule.warmup_tokens, grpo.budget_tokens) == (50_000_000, pytest.approx(0.6e9, rel=1e-3))
    synth = decode_recipe(load_recipe("synth-8xh100"))
    assert (synth.batch_tokens, synth.compile, synth.total_steps) == (8 * 64 * 2048, "always", 40_000)
    small = decode_recipe(load_recipe("four-stage/1-wikipedia-24gb"))
    assert (small.micro_batch_tokens, small.batch_tokens, small.precision) == (4 * 2048, 4 * 8 * 2048, "auto")
    for name in ("superbpe-curriculum", "ultra-curriculum", "text-10min"):
        sources = sources_of(decode_recipe(load_recipe(name)).data).values()
        assert {source.holdout_fraction for source in sources} == {0.05}
    for name in ("superbpe-curriculum", "ultra-curriculum"):
        recipe = decode_recipe(load_recipe(name))
        assert (recipe.precision, recipe.tokenizer.type, recipe.tokenizer.bpe_size) == ("fp8", "superbpe", 80_000)


def test_four_stages_in_one_run_are_the_four_recipes_one_after_another():
    whole, end = decode_recipe(load_recipe("four-stage/all")), 0
    assert [span.seq_len for span in whole.timeline.spans] == [2048] * 4
    for name, stage in zip(FOUR_STAGES, whole.curriculum, strict=True):
        recipe = decode_recipe(load_recipe(name))
        end += recipe.total_tokens
        assert (stage.until_tokens or whole.total_tokens) == end
        weights = {title: source.weight for title, source in sources_of(recipe.data).items()}
        assert {title: weight for title, weight in stage.weights.items() if weight} == weights
        assert stage.weights.keys() == sources_of(whole.data).keys()


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_a_recipe_has_one_line_and_shows_what_it_decodes_to(name):
    assert available_recipes()[name] and "\n" not in available_recipes()[name], f"{name} needs a description of one line"
    recipe = load_recipe(name)
    resolved = decode_recipe(recipe, source=name)
    assert decode(type(resolved), encode(resolved)) == resolved and set(recipe) <= set(encode(resolved))
    text = show_recipe(name)
    assert load_yaml(text, name) == encode(resolved)
    shown = re.sub(r"\n# {19}", " ", text)  # lines in one, which are wrapped
    assert all(line in shown for line in as_comments(getattr(resolved, "numbers", dict)()))


def test_overrides_change_what_is_shown():
    assert "# parameters        463,601,664" in show_recipe("osler-400m", ["model.num_layers=24"])


@pytest.mark.parametrize(("recipe", "change", "words"), [
    ("text-10min", "model={value_embeddings: none, copy_head_dim: null, attention: {window: null}}", "Qwen3"),
    ("text-10min", "model={value_embeddings: none, copy_head_dim: null}", "Qwen3 with a sliding window, and without it in rows "
     "of at most 128 tokens"),
    ("text-10min", "model.copy_head_dim=null", "safetensors alone, because of its value embeddings"),
    ("text-10min", "seq_len=512", "safetensors alone, because of its value embeddings and its copy head"),
    ("osler-400m", "model.attention.type=sparse", "Qwen3, in rows of at most 256 tokens"),
])  # fmt: skip
def test_it_is_shown_what_a_model_can_be_exported_as(recipe, change, words):
    assert re.search(f"# exports as +{re.escape(words)}$", show_recipe(recipe, [change]), re.M)


def test_no_number_follows_from_a_model_that_is_replaced():
    shown = show_recipe("text-10min", ["init_from=runs/other"])
    assert "# steps" in shown and "# parameters" not in shown and "FLOPs" not in shown


def test_a_stage_has_the_numbers_of_the_model_that_an_earlier_one_makes():
    numbers = decode_recipe(load_recipe("sparse-long")).numbers()
    assert "parameters 85,327,872; exports as Qwen3" in numbers["dense"] and "sparse attention" not in numbers["dense"]
    for stage in ("warmup", "sparse"):
        assert "parameters 87,318,528; sparse attention fewer FLOPs" in numbers[stage], stage


def test_a_run_is_no_recipe_but_has_one(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match=r"is a run, not a recipe; its recipe is .*config\.yaml"):
        show_recipe(str(tmp_path))


def test_list_names_every_recipe_with_its_parameters():
    lines = list_recipes().splitlines()
    assert [line.split()[0] for line in lines] == RECIPE_NAMES
    assert all(any(name in line and f"{count:,}" in line for line in lines) for name, (count, *_) in FAMILIES.items())
