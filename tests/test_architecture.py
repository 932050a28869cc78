"""The plan of the house, enforced: imports point downward, configs stay light, files and functions stay small."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "osler"

LAYERS = [  # each may import those above it
    ["runtime"],
    ["config"],
    ["ops", "files", "clinic", "tokenizer"],
    ["model", "optim", "tasks", "checkpoint", "records"],
    ["data", "parallel", "inference", "monitor"],
    ["eval"],
    ["export", "runs"],
    ["train", "rl"],
    ["plan"],
    ["report"],
    ["pipeline", "doctor", "selftest", "bench", "watch", "serve", "api", "deploy"],
    ["cli"],
]
FLOORS = {name: floor for floor, names in enumerate(LAYERS) for name in names}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_PARAMETERS = 8
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "shared", "base", "core"}

# Libraries beside torch and numpy: the only files that may import them, so that each can be replaced in one place.
DOORS: dict[str, set[str]] = {
    "annotated_types": {"config/schema.py"},
    "typing_extensions": {"config/schema.py", "files/hub.py"},
    "pydantic": {"config/schema.py"},
    "yaml": {"config/recipe.py"},
    "tokenizers": {"tokenizer/bpe.py", "tokenizer/superbpe.py"},
    "py3langid": {"data/languages.py"},
    "rensa": {"data/duplicates.py"},
    "safetensors": {"checkpoint/store.py"},
    "pyarrow": {"rl/verl.py", "files/rows.py"},
    "huggingface_hub": {"files/hub.py"},
    "jinja2": {"report/page.py"},
    "markupsafe": {"report/page.py"},
    "lm_eval": {"eval/harness.py"},
    "deepspeed": {"parallel/deepspeed.py"},
    "fastapi": {"serve/app.py"},
    "uvicorn": {"serve/process.py"},
    "gguf": {"export/gguf.py"},
    "onnxruntime": {"export/onnx.py"},
    "onnxscript": {"export/onnx.py"},
    "torchao": {"parallel/fp8.py"},
    "wandb": {"monitor/sinks.py"},
    "clearml": {"monitor/sinks.py"},
}
EVERYWHERE = {"torch", "numpy"}
# What pyproject.toml asks for: the library that is imported, where its name differs; None: a library we import needs it.
IMPORTED_AS: dict[str, str | None] = {"PyYAML": "yaml", "tensorboard": None}

FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = [path for path in FILES if path.name != "__init__.py"]
NAMES = [path.relative_to(PACKAGE).as_posix() for path in MODULES]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every imported name with its line, lazy and ``TYPE_CHECKING`` imports and ``import_module("...")`` included."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide the floor; write osler.package.module"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"  # a module of a package, or a name in a module
                is_module = (ROOT / inside.replace(".", "/")).with_suffix(".py").is_file()
                yield node.lineno, inside if is_module else node.module or ""
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            yield from ((node.lineno, arg.value) for arg in node.args if isinstance(arg, ast.Constant))
        elif isinstance(node, ast.Constant) and re.fullmatch(r"osler[.\w]+:\w+", str(node.value)):  # what a command calls
            yield node.lineno, str(node.value).partition(":")[0]


def part(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_imports_point_downward(path):
    own = part(path)
    assert own in FLOORS, f"{own} has no floor; give it one in FLOORS"
    for line, name in imports(path):
        if name == "osler" or not name.startswith("osler."):
            continue
        other = name.split(".")[1]
        if other == own:
            continue
        assert other in FLOORS, f"{path}:{line}: {name} has no floor"
        assert FLOORS[other] < FLOORS[own], (
            f"{path}:{line}: {own} (floor {FLOORS[own]}) imports {other} (floor {FLOORS[other]})"
        )


def test_no_circle():
    """Lazy imports count too: modules in a circle can only be understood, moved and tested together."""
    names = {path: "osler." + path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for path in MODULES}
    modules = set(names.values())
    edges = {names[path]: {name for _, name in imports(path)} & modules for path in MODULES}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " → ".join([*above[above.index(module) :], module])
        if module not in done:
            for other in edges[module]:
                visit(other, (*above, module))
            done.add(module)

    for module in edges:
        visit(module, ())


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_module_is_documented_small_and_well_named(path):
    parsed = tree(path)
    assert ast.get_docstring(parsed), f"{path} opens without a docstring"
    assert path.stem not in VAGUE_NAMES, f"{path}: a name that says what is inside"
    length = path.read_text(encoding="utf-8").count("\n")
    assert length <= MAX_FILE_LINES, f"{path} has {length} lines, more than {MAX_FILE_LINES}"
    for node in ast.walk(parsed):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{path}:{node.lineno}: {node.name} has {lines} lines"
            given = [arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg) and arg.arg not in ("self", "cls")]
            assert len(given) <= MAX_PARAMETERS, f"{path}:{node.lineno}: {node.name} has {len(given)} parameters"


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_errors_are_caught_by_name(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else {"bare"}
            reraises = any(isinstance(inner, ast.Raise) and inner.exc is None for inner in ast.walk(node))
            broad = caught & {"bare", "Exception", "BaseException"}
            assert not broad or reraises, f"{path}:{node.lineno}: catches {broad} and does not raise it again"


def test_packages_have_empty_init_files():
    folders = {path.parent for path in MODULES}
    for folder in folders:
        init = folder / "__init__.py"
        assert init.is_file() and init.stat().st_size == 0, f"{init} should exist and be empty"


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_libraries_have_one_door(path):
    name = path.relative_to(PACKAGE).as_posix()
    for line, module in imports(path):
        library = module.split(".")[0]
        if library in sys.stdlib_module_names or library in {"osler", *EVERYWHERE}:
            continue
        doors = DOORS.get(library, set())
        assert name in doors, f"{path}:{line}: {library} may be imported in {sorted(doors) or 'no file yet'} only"


def test_every_door_is_used_and_every_requirement_is_imported():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")
    imported = {path.relative_to(PACKAGE).as_posix(): {name.split(".")[0] for _, name in imports(path)} for path in MODULES}
    for library, doors in DOORS.items():
        assert all(library in imported.get(door, ()) for door in doors), f"{library} is not imported in each of {sorted(doors)}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [requirements for extra, requirements in project["optional-dependencies"].items() if extra != "test"]
    for requirement in [*project["dependencies"], *(requirement for extra in extras for requirement in extra)]:
        name = re.split("[<>=]", requirement)[0]
        library = IMPORTED_AS.get(name, name.replace("-", "_"))
        assert library in {None, *DOORS, *EVERYWHERE}, f"{requirement} is required and imported nowhere"


def test_tests_import_only_what_their_extra_installs():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [re.split("[<>=]", one)[0] for one in [*project["dependencies"], *project["optional-dependencies"]["test"]]]
    installed = {IMPORTED_AS.get(name) or name.replace("-", "_") for name in required} | sys.stdlib_module_names
    beside = {path.stem for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")} | {"osler", "tests"}
    for path in (ROOT / "tests").rglob("*.py"):
        for line, name in imports(path):
            assert name.split(".")[0] in installed | beside, f"{path}:{line}: the extra test does not install {name}"


def test_supported_versions_of_transformers_are_those_that_the_readme_names():
    (low, high) = re.findall(r'"transformers>=([\d.]+),<(\d+)"', (ROOT / "pyproject.toml").read_text())[0]
    assert f"`transformers` {low} and {int(high) - 1})" in (ROOT / "README.md").read_text()


def test_configs_and_cli_do_not_load_torch():
    light = [
        "osler.config.schema",
        "osler.config.recipe",
        "osler.cli.show",
        "osler.cli.deploy",
        "osler.cli.main",
        "osler.cli.commands",
        "osler.cli.options",
        "osler.cli.plan",
        "osler.config.devices",
        "osler.doctor",
        "osler.optim.schedule",
        "osler.monitor.metrics",
        "osler.monitor.tracker",
        "osler.monitor.sinks",
    ]
    light += [f"osler.{path.parent.name}.config" for path in PACKAGE.glob("*/config.py")]
    light += [f"osler.clinic.{path.stem}" for path in (PACKAGE / "clinic").glob("*.py") if path.stem != "__init__"]
    code = (
        "import importlib, sys\n"
        f"for name in {light!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'pydantic', 'yaml', 'tokenizers', 'pyarrow', 'numpy', 'transformers'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} loads {heavy}'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_tests_mirror_the_package():
    beside = {"numerics", "e2e", "distributed", "faults", "gpu"}
    for path in (ROOT / "tests").rglob("*.py"):
        folder = path.relative_to(ROOT / "tests").parts[0]
        assert path.name != "__init__.py", f"{path}: tests are no package"
        assert path.parent == ROOT / "tests" or folder in FLOORS or folder in beside, f"{path} mirrors no package"


def test_what_benchmarks_and_scripts_import_is_there():
    """No other test and no type checker reads them."""
    for path in [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("osler."):
                place = ROOT / node.module.replace(".", "/")
                there = {found.stem for found in place.glob("*.py")}
                for made in ast.walk(tree(place.with_suffix(".py"))) if not there else ():
                    there.add(getattr(made, "name", None) or getattr(made, "id", None))
                missing = {alias.name for alias in node.names} - there
                assert not missing, f"{path}: {node.module} has no {missing}"
