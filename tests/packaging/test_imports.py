"""Who may import whom, read from the syntax trees: no module is run.

The rule: kernels and clients import nothing of ours, server imports kernels, draftmodels imports the parts
of server that run models. Modules form no cycle. What schedules and verifies knows no HTTP, and the scheduler
and the block manager know no tensors either, however far away the import is.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOPS = ("server", "kernels", "draftmodels", "clients")

#: Beside the part itself.
ALLOWED: dict[str, tuple[str, ...]] = {
    "kernels": (),
    "clients": (),
    "server": ("paceline.kernels",),
    "draftmodels": (
        "paceline.kernels",
        "paceline.server.config",
        "paceline.server.models",
        "paceline.server.decoding",
        "paceline.server.engine",
        "paceline.server.errors",
        "paceline.server.log",
    ),
}

HTTP = {"fastapi", "starlette", "uvicorn", "httpx", "openai", "aiohttp", "requests"}
TENSORS = {"torch", "numpy", "transformers", "safetensors"}

#: Module -> what neither it nor anything of ours that it imports may import.
INNOCENT: dict[str, set[str]] = {
    "paceline.server.errors": HTTP | TENSORS,
    "paceline.server.engine.interface": HTTP | TENSORS,
    "paceline.server.engine.request": HTTP | TENSORS,
    "paceline.server.engine.scheduler": HTTP | TENSORS,
    "paceline.server.engine.kv_blocks": HTTP | TENSORS,
    "paceline.server.decoding.verify": HTTP,
    "paceline.server.decoding.sampler": HTTP,
}


@cache
def modules() -> dict[str, Path]:
    """Every module of ours by its full name."""
    return {name_of(path): path for top in TOPS for path in sorted((ROOT / top).rglob("*.py"))}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("paceline", *(parts[:-1] if parts[-1] == "__init__" else parts)))


@cache
def imports(module: str) -> tuple[tuple[int, str], ...]:
    """(line, absolute name) of every import statement, wherever in the module it stands."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    return tuple(found for node in ast.walk(tree) for found in imported_names(node))


def imported_names(node: ast.AST) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.Import):
        yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level:
        yield node.lineno, "." * node.level + (node.module or "")
    elif isinstance(node, ast.ImportFrom) and node.module:
        # `from package import module` depends on that module, `from module import name` on the first.
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            yield node.lineno, full if full in modules() else node.module


def own_imports(module: str) -> set[str]:
    return {name for _, name in imports(module) if name.split(".")[0] == "paceline"}


def reach(module: str) -> set[str]:
    """The module and everything of ours that it imports, directly or not."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo += own_imports(current) & modules().keys()
    return seen


def cycles() -> list[list[str]]:
    """Each import cycle once, starting from its first module in the alphabet."""
    found = []

    def walk(path: list[str]) -> None:
        for target in own_imports(path[-1]) & modules().keys():
            if target == path[0]:
                found.append(path)
            elif target > path[0] and target not in path and path[0] in reach(target):
                walk([*path, target])

    for module in modules():
        walk([module])
    return found


def test_there_are_modules_to_check() -> None:
    assert len(modules()) > 10
    assert any(own_imports(module) for module in modules())


def test_each_part_imports_only_what_it_may() -> None:
    wrong = []
    for module in modules():
        top = module.split(".")[1]
        allowed = (f"paceline.{top}", *ALLOWED[top])
        for name in own_imports(module):
            if not any(name == root or name.startswith(root + ".") for root in allowed):
                wrong.append(f"{module} imports {name}")
    assert not wrong


def test_imports_are_absolute_and_go_through_the_umbrella_package() -> None:
    wrong = []
    for module in modules():
        for line, name in imports(module):
            if name.startswith(".") or name.split(".")[0] in TOPS:
                wrong.append(f"{module}:{line} imports {name}")
    assert not wrong


def test_every_import_of_ours_names_a_module_that_exists() -> None:
    missing = {(module, name) for module in modules() for name in own_imports(module) - modules().keys()}
    assert not missing


def test_no_import_cycles() -> None:
    assert cycles() == []


@pytest.mark.parametrize("module", INNOCENT)
def test_inner_modules_stay_free_of_http_and_tensors(module: str) -> None:
    reached = {(owner, name.split(".")[0]) for owner in reach(module) for _, name in imports(owner)}
    assert {(owner, name) for owner, name in reached if name in INNOCENT[module]} == set()


def test_clients_need_only_the_base_dependencies() -> None:
    """The base install is the SDK: any other would break it where no extra is installed."""
    base = {"httpx", "openai", "rich", "typer", "typing_extensions", "paceline"} | sys.stdlib_module_names
    wrong = {
        (module, name)
        for module in modules()
        if module.startswith("paceline.clients.")
        for name in imported_at_once(module)
        if name.split(".")[0] not in base
    }
    assert not wrong


def imported_at_once(module: str) -> Iterator[str]:
    """What importing the module imports: not what its functions import when they are called."""
    todo: list[ast.AST] = [ast.parse(modules()[module].read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        yield from (name for _, name in imported_names(node))
        todo += [
            child
            for child in ast.iter_child_nodes(node)
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        ]


def test_two_modules_import_vllm_and_only_their_package_reaches_them() -> None:
    users = [module for module in modules() if any(n.split(".")[0] == "vllm" for _, n in imports(module))]
    own = "paceline.server.backends.vllm"
    assert users == [f"{own}.connect", f"{own}.plugin"]  # the other one is loaded by vLLM itself
    eager = [
        f"{module}:{node.lineno}"
        for module, path in modules().items()
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        for _, name in imported_names(node)
        if name.startswith(own) and (not module.startswith(own) or name == users[0])
    ]
    assert not eager, "imported at the top of a module, so without engine.kind being vllm"
