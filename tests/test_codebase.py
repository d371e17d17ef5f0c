"""The repository keeps its own rules: stubs, symbols, imports, versions, documentation, size of files."""

import ast
import functools
import importlib.metadata
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nearfar as nf
from nearfar import _core

ROOT = Path(__file__).parent.parent
PACKAGE = Path(nf.__file__).parent


# ---- the stub of the compiled module ---------------------------------------------------------------------------------

PYBIND_TYPES = {
    "typing.SupportsInt | typing.SupportsIndex": "int",
    "typing.SupportsFloat | typing.SupportsIndex": "float",
    "typing.": "",
    "collections.abc.": "",
}


def parts(function):
    """Arguments as (name, type, default) and the return type of a parsed `def`."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    defaults = [None] * (len(arguments) - len(function.args.defaults)) + function.args.defaults
    text = [
        (a.arg, ast.unparse(a.annotation), None if default is None else ast.unparse(default))
        for a, default in zip(arguments, defaults, strict=True)
    ]
    return text, ast.unparse(function.returns)


def built_functions():
    """What pybind11 says of each function in the first line of its docstring, in the words of a stub."""
    found = {}
    for name, value in vars(_core).items():
        if name.startswith("_") or not callable(value):
            continue
        signature, _, text = value.__doc__.partition("\n")
        for long, short in PYBIND_TYPES.items():
            signature = signature.replace(long, short)
        found[name] = (*parts(ast.parse(f"def {signature}: ...").body[0]), text.strip())
    return found


def stub_functions():
    tree = ast.parse((PACKAGE / "_core.pyi").read_text())
    return {f.name: (*parts(f), ast.get_docstring(f)) for f in tree.body if isinstance(f, ast.FunctionDef)}


def test_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_stub_names_what_is_built():
    assert sorted(stub_functions()) == sorted(built_functions())


@pytest.mark.parametrize("name", built_functions())
def test_stub_is_fresh(name):
    arguments, returns, text = stub_functions()[name]
    built_arguments, built_returns, built_text = built_functions()[name]
    assert arguments == built_arguments
    assert returns.partition("[")[0] == built_returns  # the stub says what is in a tuple, list or dict
    assert text == built_text


# ---- symbols of the kernels ------------------------------------------------------------------------------------------
# A weak symbol (an inline function or a template of the standard library) that an object for AVX-512 emits may be the
# one that the linker keeps for every CPU. So kernels live in unnamed namespaces, use raw pointers, and export their
# level's functions only.

HARMLESS = "DW.ref.__gxx_personality_v0"  # a pointer, not code


def symbols(path):
    """(kind, name) of everything that an object file defines for others."""
    text = subprocess.run(["nm", "-C", "-g", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    return [line.split(None, 2)[1:] for line in text.splitlines() if line.split(None, 2)[2] != HARMLESS]


def check_symbols(path, level):
    for kind, name in symbols(path):
        assert kind not in "WVu", f"{path}: weak symbol {name}"
        assert name.startswith(f"nearfar::{level}::"), f"{path}: {name} is not of level {level}"


needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or not hasattr(os, "uname") or os.uname().machine != "x86_64",
    reason="needs g++ on x86-64",
)


@needs_nm
@needs_compiler
@pytest.mark.parametrize("operation", ["alignment", "select"])
def test_kernels_emit_no_weak_symbols(operation, tmp_path):
    """Two operations compiled here, quickly; all of them, as they were built, in the test below."""
    target = tmp_path / f"{operation}.o"
    flags = ["-std=c++17", "-O1", "-march=x86-64-v3", "-Wno-psabi", "-DNEARFAR_ISA=v3", "-Icsrc"]
    subprocess.run(["g++", *flags, "-c", f"csrc/cpu/ops/{operation}.cpp", "-o", target], cwd=ROOT, check=True)
    check_symbols(target, "v3")


@needs_nm
def test_built_objects_emit_no_weak_symbols():
    newest_source = max(path.stat().st_mtime for path in (ROOT / "csrc").glob("**/*.?pp"))
    objects = [
        path
        for path in ROOT.glob("build/*/CMakeFiles/nearfar_*.dir/csrc/cpu/ops/*.o")
        if path.stat().st_mtime >= newest_source
    ]
    if not objects:
        pytest.skip("no build tree as new as the sources")
    for path in objects:
        check_symbols(path, re.search(r"nearfar_(\w+)\.dir", str(path))[1])


# ---- the package -----------------------------------------------------------------------------------------------------


def test_versions_agree():
    try:
        installed = importlib.metadata.version("nearfar")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed")
    assert installed == nf.__version__ == nf.build_info()["version"]


def test_changelog_names_the_version():
    assert f"## [{nf.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_import_is_light():
    """NumPy is the only requirement, and a import costs no one a second of torch."""
    heavy = ("torch", "cupy", "scipy", "sklearn", "matplotlib", "rich")
    script = f"import sys, nearfar; print(sorted(set({heavy}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_names_without_torch():
    """What needs it is not listed, so that help() and a star import work; asking for it says so."""
    script = """if True:
        import sys
        sys.modules["torch"] = None
        import nearfar, pydoc
        from nearfar import *
        assert "InfoNCELoss" not in pydoc.render_doc(nearfar) and "distributed" not in dir(nearfar)
        for name in ("InfoNCELoss", "distributed"):
            try:
                getattr(nearfar, name)
            except ImportError as error:
                print(error)
    """
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [
        f"nearfar.{name} needs torch: pip install 'nearfar[torch]'" for name in ("InfoNCELoss", "distributed")
    ]


@pytest.mark.parametrize("name", nf.__all__)
def test_public_names_have_an_example(name):
    if name in nf.losses.MODULES:
        pytest.importorskip("torch")
    value = getattr(nf, name)
    assert value.__doc__, f"{name} has no docstring"
    assert ">>>" in value.__doc__ or inspect.ismodule(value), f"{name} has no example"


def test_documentation_lists_every_public_name():
    listed = set(re.findall(r"^\.\. auto\w+:: nearfar\.([\w.]+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE))
    modules = {name for name in nf.__all__ if inspect.ismodule(getattr(nf, name))}
    assert set(nf.__all__) - modules <= listed


def test_public_names_are_unique_and_exist():
    assert len(set(nf.__all__)) == len(nf.__all__)
    for module in (nf, nf.losses, nf.kernels):
        assert set(module.__all__) <= set(dir(module))
        assert all(hasattr(module, name) for name in module.__all__)


# ---- the files -------------------------------------------------------------------------------------------------------


@functools.cache
def tracked_files():
    """Text files under version control."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.split("\0") if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()]


def test_files_stay_small():
    """A file is a concept; one that outgrows this is two."""
    for path in tracked_files():
        if path.relative_to(ROOT).parts[0] in ("csrc", "python"):
            lines = len(path.read_text().splitlines())
            assert lines <= 520, f"{path.relative_to(ROOT)}: {lines} lines"


def test_no_paths_of_one_machine():
    pattern = re.compile(r"(?<![\w.])/(home|root|work|Users|mnt|tmp)/\w")
    for path in tracked_files():
        found = pattern.search(path.read_text())
        assert found is None, f"{path.relative_to(ROOT)}: {found[0]}"


def test_hooks_and_constraints_pin_the_same_tools():
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for hook, tool in {"ruff-pre-commit": "ruff", "mirrors-clang-format": "clang-format"}.items():
        assert re.search(rf"{hook}\n\s+rev: v{re.escape(pins[tool])}\n", hooks), f"{tool}: not {pins[tool]}"
