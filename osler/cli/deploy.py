"""``osler deploy``: writes a recipe as manifests for other machines, and applies, watches and stops them. Torch-free."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from osler.cli.show import decode_recipe
from osler.config.recipe import load_recipe
from osler.config.schema import decode
from osler.deploy.config import DeployConfig
from osler.deploy.targets import TARGETS, call
from osler.deploy.workload import workload_of
from osler.runtime.errors import UserError
from osler.runtime.files import write_atomic

logger = logging.getLogger(__name__)

DONE = {
    "apply": "{name} is applied. `osler deploy status`, `logs` and `stop` with the same recipe and options look after it.",
    "stop": "{name} is stopped. Its run folder stays, and `osler deploy apply` goes on with it.",
}


def run(
    verb: str,
    target: str,
    recipe: str | None,
    overrides: Sequence[str],
    out: str | None = None,
    follow: bool = False,
    **settings: Any,
) -> int | str:
    """Render, apply, watch or stop a recipe on other machines: the command ``deploy``.

    Raises UserError for a recipe that could not run there, before any machine costs money.
    """
    if recipe is None:
        raise UserError("which recipe? `osler recipes` lists them; a YAML file of your own will do as well.")
    if (out is not None and verb != "render") or (follow and verb != "logs"):
        raise UserError(
            f"`osler deploy {verb}` has no {'--follow, which is of logs' if follow else '--out, which is of render'}."
        )
    given = load_recipe(recipe, overrides)
    config = decode_recipe(given, source=recipe)
    source = Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe
    workload = workload_of(given, config, source, decode(DeployConfig, settings, source="the command line"))
    if verb != "render":
        call(target, verb, workload, follow=follow)
        if verb in DONE:
            logger.info(DONE[verb].format(name=workload.name))
        return 0
    text = TARGETS[target].render(workload)
    if out is None:
        return text.removesuffix("\n")
    write_atomic(Path(out), text)
    return 0
