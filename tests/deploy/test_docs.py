"""docs/deployment.md: its commands are run, as far as a machine without Docker can, and its arithmetic is that of the recipes."""

import json
import re
import shlex
import subprocess
from base64 import b64encode
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from osler.cli.commands import COMMANDS
from osler.cli.main import main
from osler.cli.show import decode_recipe
from osler.config.recipe import available_recipes, load_recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "deployment.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines()]
A100_FLOPS, DAY_SECONDS, PUBLISHED_TOKENS_PER_SECOND = 312e12, 86_400, 19_057

(PLAN,) = [line for line in LINES if line.startswith("osler plan ")]


def deployments(*verbs: str) -> list[list[str]]:
    commands = [shlex.split(line)[1:] for line in LINES if line.startswith("osler deploy ")]
    return [words for words in commands if words[1] in verbs]


def test_no_command_of_the_page_is_left_out():
    programs = {" ".join(shlex.split(line)[:2]) for line in LINES}
    assert programs == {"docker build", "docker compose", "osler deploy", "osler plan", "kubectl create"}


@pytest.mark.parametrize("words", [*deployments("render"), shlex.split(PLAN)[1:]], ids=" ".join)
def test_what_the_page_prints(words, capsys):
    assert main(words) == 0, capsys.readouterr().err


def test_what_the_page_calls(cluster, recorded, capfd, monkeypatch):
    """In its order: kubectl talks to the server of the tests, other programs note what they are called with."""
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    for words in deployments("apply", "status", "logs", "stop"):
        assert main(words) == 0, capfd.readouterr().err
    assert list(cluster.objects) == [("persistentvolumeclaims", "osler")]
    assert [words[0] for words in recorded()] == ["sbatch", "squeue", "tail", "scancel"]
    (secret,) = [line for line in LINES if line.startswith("kubectl")]
    # Printed and not sent: kubectl creates what it knows in a binary form, which the server of the tests does not read.
    made = subprocess.run(["bash", "-c", f"{secret} --dry-run=client --output json"], check=True, capture_output=True).stdout
    assert json.loads(made)["data"] == {"HF_TOKEN": b64encode(b"hf_of_a_test").decode()}


def test_the_page_builds_what_the_dockerfile_and_compose_files_have():
    docker = [shlex.split(line) for line in LINES if line.startswith("docker")]
    arguments = [word.partition("=") for words in docker for before, word in pairwise(words) if before == "--build-arg"]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert all(f"ARG {name}=" in dockerfile and f'"${name}" = {value}' in dockerfile for name, _, value in arguments)
    files = {word for words in docker for before, word in pairwise(words) if before == "--file"}
    assert files == {"compose.yaml", "compose.cuda.yaml"} and all((ROOT / file).exists() for file in files)
    for line in (line for line in LINES if line.startswith("docker build")):
        assert line in dockerfile, "the Dockerfile says how it is built, in the same words"


def test_commands_and_recipes_of_the_tables_are_there():
    cells = [cell for line in PAGE.splitlines() if line.startswith("|") for cell in line.split("|")[2:]]
    words = [word for cell in cells for word in re.findall(r"`([^`]+)`", cell)]
    known = {command.name.split()[0] for command in COMMANDS}
    assert {word.split()[1] for word in words if word.startswith("osler ")} - {"--help"} <= known
    named = {word for word in words if re.fullmatch(r"[a-z0-9][a-z0-9-]*(/[a-z0-9-]+)?", word) and word not in ("apply", "stop")}
    assert named <= {*available_recipes(), *("superbpe-270m",)}, named - {*available_recipes()}


def test_the_arithmetic_of_what_cannot_be_is_that_of_the_recipes():
    for recipe, tokens, days, cost, share, fits in (
        ("a100-1day", 15e9, 1, "2.626 GFLOP = 3.94e19", "146 %", "5.1B tokens a day"),
        ("a100-3day", 50e9, 3, "2.536 GFLOP = 1.27e20", "157 %", "15.9B tokens in three days"),
    ):
        config = decode_recipe(load_recipe(recipe))
        flops = config.model.flops_per_token(config.seq_len)
        at_peak = A100_FLOPS * DAY_SECONDS * days
        assert config.total_tokens == tokens
        assert cost == f"{flops / 1e9:.3f} GFLOP = {tokens * flops:.2e}".replace("e+", "e")
        assert share == f"{tokens * flops / at_peak:.0%}".replace("%", " %")
        assert fits.split()[0] == f"{at_peak / 2 / flops / 1e9:.1f}B"
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{recipe}`: "))
        assert cost in row and share in row and fits in row and f"{at_peak:.2e}".replace("e+", "e") in row
    assert f"{15e9 / PUBLISHED_TOKENS_PER_SECOND / DAY_SECONDS:.1f} days; 50e9: " in PAGE
    assert f"50e9: {50e9 / PUBLISHED_TOKENS_PER_SECOND / DAY_SECONDS:.1f} days" in PAGE
    assert f"are {PUBLISHED_TOKENS_PER_SECOND * DAY_SECONDS / 1e9:.2f}B a day" in PAGE
    assert f"take {2e9 / PUBLISHED_TOKENS_PER_SECOND / 3600:.0f} hours of its two days" in PAGE
    model = decode_recipe(load_recipe("superbpe-270m")).model
    width, heads, kv_heads, size = model.hidden_size, model.num_heads, model.num_kv_heads, model.head_dim
    layer = width * size * (2 * heads + 2 * kv_heads) + 3 * width * model.intermediate_size
    share = 6 * model.num_layers * layer / model.flops_per_token(2048)
    assert f"its projections are {share:.0%} of {model.flops_per_token(2048) / 1e9:.3f} GFLOP".replace("%", " %") in PAGE
    assert f"| {1 / (1 - share / 2):.2f} times at most" in PAGE


def test_the_page_tells_the_exit_codes_that_the_manifests_act_on(capsys):
    assert main(["deploy", "render", "debug", "parallel.type=ddp", "--target", "jobset", "--machines", "2"]) == 0
    (job,) = list(yaml.safe_load_all(capsys.readouterr().out))[-1]["spec"]["replicatedJobs"]
    rules = job["template"]["spec"]["podFailurePolicy"]["rules"]
    codes = {code for rule in rules for code in rule.get("onExitCodes", {}).get("values", ())}
    assert codes == {2, 75, 130} and all(re.search(rf"^\|.*\| {code}[ :,|]", PAGE, re.MULTILINE) for code in codes), json.dumps(
        list(codes)
    )
