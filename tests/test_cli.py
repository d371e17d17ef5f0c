"""The command line, as a user meets it: in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import nearfar as nf


def run(*arguments, code=None, **options):
    """`python -m nearfar ...`, or a script that calls it; warnings are errors there too."""
    start = ["-m", "nearfar"] if code is None else ["-c", code]
    command = [sys.executable, "-W", "error", *start, *map(str, arguments)]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "COLUMNS": "100"}
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=300, **options)


def without(*modules, command):
    """Runs a command where some modules are not installed."""
    return run(
        code=f"import sys; sys.modules.update(dict.fromkeys({modules!r}));"
        f"from nearfar.cli import main; sys.exit(main([{command!r}]))"
    )


@pytest.fixture
def demo_packages():
    for module in ("torch", "sklearn", "matplotlib", "rich"):
        pytest.importorskip(module)


# ---- info ------------------------------------------------------------------------------------------------------------


def test_info_says_what_this_build_is():
    result = run("info")
    assert (result.returncode, result.stderr) == (0, "")
    facts = dict(line.split(None, 1) for line in result.stdout.replace("instruction set", "isa").splitlines())
    build = nf.build_info()
    assert facts["nearfar"] == build["version"]
    assert facts["isa"] == build["isa"]
    assert facts["numpy"][0].isdigit()
    assert set(facts) >= {"vector", "threads", "processors", "CUDA", "torch", "cupy"}


def test_info_needs_numpy_alone():
    result = without("torch", "sklearn", "scipy", "matplotlib", "rich", command="info")
    assert (result.returncode, result.stderr) == (0, "")


# ---- what is asked wrongly, or cannot be done ------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["no-such-command"]])
def test_unknown_command(arguments):
    result = run(*arguments)
    assert result.returncode == 2
    assert "usage: nearfar" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["info", "bench", "evaluate"])
def test_unknown_instruction_set(command, tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.eye(4))
    monkeypatch.setenv("NEARFAR_ISA", "v5")
    result = run(command, *([tmp_path / "x.npy"] if command == "evaluate" else []))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"nearfar {command}: NEARFAR_ISA=v5: expected one of ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["info", "bench", "evaluate"])
def test_help_needs_no_extra(command):
    script = f"from nearfar.cli import main; main([{command!r}, '--help'])"
    result = run(code=f"import sys; sys.modules.update(torch=None, sklearn=None, rich=None); {script}")
    assert result.returncode == 0
    assert f"usage: nearfar {command}" in result.stdout


@pytest.mark.parametrize(
    ("modules", "names"),
    [
        (("torch", "sklearn"), "scikit-learn and torch"),
        (("rich",), "rich"),
        (("torch", "sklearn", "matplotlib"), "scikit-learn, torch and matplotlib"),
    ],
)
def test_missing_extra_is_one_line(modules, names, demo_packages):
    result = without(*modules, command="demo")
    assert result.returncode == 1
    assert result.stderr == f"the demo needs {names}: pip install 'nearfar[demo]'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: expected a positive integer, got 0"),
        (["--threads", "two"], "argument --threads: expected a positive integer"),
        (["--output", "no/such/folder.png"], "argument --output: no folder"),
        (["--output", "picture.doc"], "argument --output: expected a name that ends in .png"),
    ],
)
def test_wrong_options_are_told_before_any_work(arguments, message):
    result = run("demo", *arguments)
    assert result.returncode == 2
    assert message in result.stderr


# ---- evaluate --------------------------------------------------------------------------------------------------------


def saved(folder, **arrays):
    """The arrays in files of their names."""
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return [folder / f"{name}.npy" for name in arrays]


def test_evaluate_is_the_function(tmp_path):
    random = np.random.default_rng(0)
    x = random.standard_normal((90, 5)).astype(np.float32)
    labels, views = np.arange(90) % 3, x + np.float32(0.1)
    files = saved(tmp_path, x=x, labels=labels, views=views)
    results, picture = tmp_path / "report.json", tmp_path / "report.svg"
    options = ["--labels", files[1], "--views", files[2], "--seed", 2, "--json", results, "--plot", picture]
    result = run("evaluate", files[0], *options)
    assert (result.returncode, result.stderr) == (0, "")
    report = nf.evaluate(x, labels, views=views, seed=2)
    assert result.stdout == f"{report}\n"
    assert json.loads(results.read_text()) == report.to_dict()
    assert picture.read_text().startswith("<?xml")


def test_evaluate_needs_numpy_alone(tmp_path):
    (file,) = saved(tmp_path, x=np.eye(4))
    modules = ("torch", "sklearn", "scipy", "matplotlib", "rich")
    script = "from nearfar.cli import main; sys.exit(main(sys.argv[1:]))"
    script = f"import sys; sys.modules.update(dict.fromkeys({modules!r})); {script}"
    result = run("evaluate", file, code=script)
    assert (result.returncode, result.stderr) == (0, "")
    assert "effective rank" in result.stdout
    result = run("evaluate", file, "--plot", tmp_path / "picture.png", code=script)
    assert result.stderr == "the evaluate needs matplotlib: pip install 'nearfar[plot]'\n"
    assert (result.returncode, result.stdout) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-file.npy"], "argument FILE.npy: expected a file of numpy.save, got no-such-file.npy"),
        (["text.npy"], "argument FILE.npy: expected a file of numpy.save"),
        (["archive.npz"], "argument FILE.npy: expected one array, got an archive of several"),
        (["integers.npy"], "nearfar evaluate: embeddings: expected a floating dtype"),
        (
            ["x.npy", "--labels", "x.npy"],
            "nearfar evaluate: labels: expected shape (4,) to match embeddings, got (4, 4)",
        ),
        (["x.npy", "--plot", "picture.doc"], "argument --plot: expected a name that ends in .png"),
        (["x.npy", "--json", "no/such/folder.json"], "argument --json: no folder"),
    ],
)
def test_evaluate_says_what_is_wrong(arguments, message, tmp_path):
    saved(tmp_path, x=np.eye(4), integers=np.eye(4, dtype=int))
    np.savez(tmp_path / "archive.npz", x=np.eye(4))
    (tmp_path / "text.npy").write_text("no array")
    result = run("evaluate", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


# ---- demo ------------------------------------------------------------------------------------------------------------


def numbers(output):
    """The rows of the table: what does not depend on the clock."""
    return [line for line in output.splitlines() if "│" in line]


def test_short_demo_from_end_to_end(tmp_path, demo_packages):
    picture = tmp_path / "picture.png"
    result = run("demo", "--short", "--threads", 1, "--output", picture)
    assert result.returncode == 0, result.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000
    rows = {line.split("│")[1].strip(): line for line in numbers(result.stdout)}
    assert list(rows) == ["raw pixels", "random encoder", "trained encoder"]
    # The optimum of the sphere in 64 dimensions (pixels) and in 128.
    assert all(row.rstrip(" │").endswith(("-3.875", "-3.938")) for row in rows.values())
    assert "dense torch" in result.stdout
    assert "500 x 128 embeddings, 10 classes" in result.stdout
    assert "MI lower bound" in result.stdout

    again = run("demo", "--short", "--threads", 1, "--output", tmp_path / "again.svg")
    assert numbers(again.stdout) == numbers(result.stdout)
    assert (tmp_path / "again.svg").read_text().startswith("<?xml")


def test_output_that_nobody_reads():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "nearfar", "info"]
    process = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (process.returncode, process.stderr) == (141, b"")


def test_interrupt_ends_without_a_traceback(tmp_path, demo_packages):
    command = [sys.executable, "-m", "nearfar", "demo", "--output", str(tmp_path / "picture.png")]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background, and inherited
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    process.stdout.readline()  # the opening: training follows
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.rstrip().endswith("interrupted")
    assert "Traceback" not in errors


def test_interrupt_inside_exec_ends_with_the_same_code(tmp_path):
    (tmp_path / "interrupted.py").write_text(
        "import sys\n"
        "from nearfar import cli\n"
        "cli._HERE['info'].run = staticmethod(lambda args: exec('raise KeyboardInterrupt'))\n"
        "sys.exit(cli.main(['info']))\n"
    )
    command = [sys.executable, "-m", "interrupted"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stderr) == (130, "interrupted\n")
