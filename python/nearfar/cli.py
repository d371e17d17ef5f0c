"""The command line: `python -m nearfar demo | bench | evaluate | info`.

A command is a module with `add_arguments(parser)` and `run(args) -> int`. Modules are imported when their command is
asked for, so that `info` answers on a machine that has NumPy alone.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .evaluation import evaluate
from .runtime import build_info

_COMMANDS = {
    "demo": "pre-train on handwritten digits with the fused loss, test on held-out ones, save a picture",
    "bench": "time the operations against torch and the other libraries that are installed",
    "evaluate": "judge embeddings in a .npy file: a table of what is usually asked of them, and a picture",
    "info": "version, instruction set, threads, CUDA",
}
# What a command may miss: module, the name pip knows it by.
_PIP_NAMES = {"sklearn": "scikit-learn", "torch": "torch", "matplotlib": "matplotlib", "rich": "rich"}
_NEEDS = {"demo": tuple(_PIP_NAMES)}
_EXTRA = {"demo": "demo", "bench": "bench", "evaluate": "plot"}


class _Info:
    """The command `info`."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """None."""

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Print one fact a line."""
        for name, value in describe().items():
            print(f"{name:<16} {value}")
        return 0


class _Evaluate:
    """The command `evaluate`."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Files in, files out."""
        parser.add_argument("embeddings", type=_array_file, metavar="FILE.npy", help="(N, D) floating-point numbers")
        parser.add_argument("--labels", type=_array_file, metavar="L.npy", help="(N,) integers, booleans or strings")
        parser.add_argument(
            "--views", type=_array_file, metavar="V.npy", help="(N, D) or (N, V, D): see nearfar.evaluate"
        )
        parser.add_argument("--seed", type=int, default=0, help="of splits and samples (default 0)")
        parser.add_argument("--json", type=_new_file, metavar="F", help="write the numbers there")
        parser.add_argument("--plot", type=picture_file, metavar="F", help="save the picture there: .png, .svg or .pdf")

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Print the table, write what was asked for."""
        missing = _missing(("matplotlib",)) if args.plot else []
        if missing:
            return _complain("evaluate", missing)
        try:
            report = evaluate(args.embeddings, args.labels, views=args.views, seed=args.seed)
        except (TypeError, ValueError) as error:
            print(f"nearfar evaluate: {error}", file=sys.stderr)
            return 2
        print(report)
        if args.json:
            args.json.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
        if args.plot:
            report.plot(args.plot)
        return 0


def _array_file(text: str) -> Any:
    try:
        array = np.load(text, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise argparse.ArgumentTypeError(f"expected a file of numpy.save, got {text}: {error}") from error
    if not isinstance(array, np.ndarray):
        raise argparse.ArgumentTypeError(f"expected one array, got an archive of several: {text}")
    return array


def _new_file(text: str) -> Path:
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"no folder {Path(text).parent}")
    return Path(text)


def picture_file(text: str) -> Path:
    """An argument that names a picture: its ending says the format."""
    if Path(text).suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .png, .svg or .pdf, got {text}")
    return _new_file(text)


class _CommandParser(argparse.ArgumentParser):
    """A parser whose arguments come from the command's module when the command is parsed."""

    command: str | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Ask the module for its arguments, then parse."""
        if self.command is not None:
            module = _module(self.command)
            module.add_arguments(self)
            self.set_defaults(run=module.run)
            self.command = None
        return super().parse_known_args(args, namespace)


_HERE = {"evaluate": _Evaluate, "info": _Info}


class _MissingError(Exception):
    """A command whose packages are not installed: (command, modules)."""


def _module(command: str) -> Any:
    missing = _missing(_NEEDS.get(command, ()))
    if missing:
        raise _MissingError(command, missing)
    return _HERE[command] if command in _HERE else importlib.import_module(f".{command}", __package__)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nearfar", description="Reductions over all pairs of two point sets, fused.")
    commands = parser.add_subparsers(
        dest="command", metavar="command", required=True, parser_class=_CommandParser, title="commands"
    )
    for name, line in _COMMANDS.items():
        commands.add_parser(name, help=line, description=line[0].upper() + line[1:] + ".").command = name
    return parser


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, str]:
    """What `python -m nearfar info` prints, without importing torch or CuPy.

    Returns
    -------
    dict of str to str
        Version, instruction set, vector width, threads, processors, compiler, CUDA, and the array libraries installed.

    Examples
    --------
    >>> from nearfar.cli import describe
    >>> list(describe())[:3]
    ['nearfar', 'instruction set', 'vector width']
    """
    build = build_info()
    cuda = "not compiled in"
    if build["cuda"] is not None:
        cuda = f"compiled with {build['cuda']}, {build['cuda_devices']} device(s)"
    facts = {
        "nearfar": str(build["version"]),
        "instruction set": str(build["isa"]),
        "vector width": f"{8 * build['vector_bytes']} bits",
        "threads": str(build["threads"]),
        "processors": f"{build['available_cpus']} available to this process",
        "compiler": str(build["compiler"]) + (" (debug build)" if build["debug"] else ""),
        "CUDA": cuda,
        "Python": sys.version.split()[0],
        "numpy": _installed("numpy") or "not installed",
        "torch": _installed("torch") or "not installed",
    }
    # A CuPy wheel is named after its CUDA version.
    found = [name for name in ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x") if _installed(name)]
    facts["cupy"] = f"{_installed(found[0])} ({found[0]})" if found else "not installed"
    return facts


def _missing(modules: Sequence[str]) -> list[str]:
    """Those of the modules that are not installed; an installed one that fails to import raises its own error."""
    missing = []
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            missing.append(module)
    return missing


def _complain(command: str, modules: Sequence[str]) -> int:
    names = [_PIP_NAMES[module] for module in modules]
    listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    print(f"the {command} needs {listed}: pip install 'nearfar[{_EXTRA[command]}]'", file=sys.stderr)
    return 1


def _refused() -> RuntimeError | None:
    """Why there is no instruction set to compute with, as the variable NEARFAR_ISA would have it."""
    try:
        build_info()
    except RuntimeError as error:
        return error
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments after the program's name; default those of the process.

    Returns
    -------
    int
        The exit code: 0; 1 where a package is missing; 130 after Ctrl-C; 141 where nobody reads what is printed. A
        wrong command line, or a wrong NEARFAR_ISA, exits with 2.

    Examples
    --------
    >>> from nearfar.cli import main
    >>> main(["info"])  # doctest: +ELLIPSIS
    nearfar ...
    0
    """
    command = ""
    try:
        args = _parser().parse_args(argv)
        command = args.command
        if refused := _refused():
            print(f"nearfar {command}: {refused}", file=sys.stderr)
            return 2
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except _MissingError as error:
        return _complain(*error.args)
    except ModuleNotFoundError as error:
        if error.name not in _PIP_NAMES or command not in _EXTRA:
            raise
        return _complain(command, [error.name])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        # CPython remembers an interrupt that left the text of an `exec`, as one may while dataclasses are imported,
        # and `python -m` then ends by the signal whatever its exit code is; to run a text again makes it forget.
        exec("")
        return 130
    except BrokenPipeError:  # who reads has enough; what is left in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
