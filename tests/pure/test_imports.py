"""Imports go one way, `__all__` is what is exported, and importing the package costs nothing."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import qspec_llm
from qspec_llm.errors import QSpecError

ROOT = Path(qspec_llm.__file__).parent
LEVELS = (
    {"errors", "version"},
    {"weights"},
    {"kernels"},
    {"model"},
    {"kv"},
    {"engine"},
    {"config", "hub", "llm", "tokenizer"},
    {"server"},
    {"bench", "cli", "eval", "quantize"},
)
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
MODULES = sorted(
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if path.name != "__main__.py"
)

COMPILED = {  # extension modules, by their stubs
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in ROOT.rglob("*.pyi")
}


def tree_of(module: str) -> ast.Module:
    path = ROOT.parent.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def load(module: str) -> ModuleType:
    """A module; one of the GPU's or of an extra is skipped where its packages are missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in ("triton", "lm_eval"):
            raise
        pytest.skip(f"{module} needs {error.name}")
    except QSpecError as error:
        if module != "qspec_llm.kernels.cuda.backend":
            raise
        pytest.skip(str(error))


def imports_of(module: str) -> Iterator[tuple[str, str | None]]:
    """(module, name or None) of every import from this package, wherever it stands in the file."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                is_module = f"{node.module}.{alias.name}" in {*MODULES, *COMPILED}
                yield (f"{node.module}.{alias.name}", None) if is_module else (
                    str(node.module), alias.name
                )  # fmt: skip


@pytest.mark.parametrize("module", [m for m in MODULES if m != "qspec_llm"])
def test_imports_go_down(module: str) -> None:
    part = module.split(".")[1]
    for imported, _ in imports_of(module):
        package, _, rest = imported.partition(".")
        if package == "qspec_llm":
            below = rest.split(".")[0]
            assert below, f"{module} imports from the package itself, which is above everything"
            assert below == part or LEVEL[below] <= LEVEL[part], f"{module} imports {imported}"


def test_parts_import_no_cycle_within_a_level() -> None:
    edges = {
        (module.split(".")[1], imported.split(".")[1])
        for module in MODULES
        if module != "qspec_llm"
        for imported, _ in imports_of(module)
        if imported.startswith("qspec_llm.")
    }
    assert not {(a, b) for a, b in edges if a != b and (b, a) in edges}


def test_every_module_is_found() -> None:
    found = {m.name for m in pkgutil.walk_packages([str(ROOT)], "qspec_llm.")} | {"qspec_llm"}
    found -= COMPILED
    assert {name for name in found if not name.endswith("__main__")} == set(MODULES)


@pytest.mark.parametrize(
    "module",
    MODULES,
)
def test_all_lists_what_the_module_defines(module: str) -> None:
    public = {
        node.name
        for node in tree_of(module).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    loaded = load(module)
    exported = getattr(loaded, "__all__", None)
    if exported is None:
        assert not public, f"{module} defines {sorted(public)} and has no __all__"
        return
    assert len(set(exported)) == len(exported)
    assert public <= set(exported), f"{module} does not list {sorted(public - set(exported))}"
    for name in exported:
        home = getattr(getattr(loaded, name), "__module__", None)
        is_package = hasattr(loaded, "__path__")
        if isinstance(home, str) and home.startswith("qspec_llm") and home != module:
            assert is_package, f"{module} exports {name}, which {home} defines"
            assert home.startswith(module), f"{module} exports {name} of {home}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_what_is_exported(module: str) -> None:
    for imported, name in imports_of(module):
        if imported in COMPILED:
            continue
        if imported.startswith("qspec_llm") and name not in (None, "__version__"):
            exported = getattr(load(imported), "__all__", ())
            assert name in exported, f"{module} imports {name}, which {imported} does not export"


def test_importing_the_package_is_cheap() -> None:
    program = (
        "import time; t = time.perf_counter(); import qspec_llm; t = time.perf_counter() - t\n"
        "import sys; heavy = {'torch', 'transformers', 'numpy', 'gguf'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "assert t < 0.5, t\n"
        "assert qspec_llm.__version__\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_names_of_the_package_load_on_first_use() -> None:
    for name in qspec_llm.__all__:
        assert getattr(qspec_llm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = qspec_llm.nonsense
