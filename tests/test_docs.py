"""The pages of docs/: their code runs, their names exist, and every example is in the gallery."""

import re
from pathlib import Path

import numpy as np
import pytest

import nearfar as nf

ROOT = Path(__file__).parent.parent
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
NEEDS = {"judging": ("matplotlib", "sklearn"), "kernels": ("scipy",)}


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def names():
    """What a reader has at hand: rows of tensors, points as arrays, a small network."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    q, k, z1, z2 = torch.randn(4, 32, 128, generator=torch.Generator().manual_seed(0))
    x, y = rng.standard_normal((2, 300, 8)).astype(np.float32)
    encoder = torch.nn.Linear(128, 16)
    return {
        "nf": nf,
        "np": np,
        "q": q,
        "k": k,
        "z": z1.clone(),
        "z1": z1.requires_grad_(),
        "z2": z2.requires_grad_(),
        "item_id": torch.arange(32) // 2,
        "labels": np.arange(32) % 4,
        "encoder": encoder,
        "augment": lambda images: images + 0.1,
        "loader": [q],
        "optimizer": torch.optim.SGD(encoder.parameters(), 0.1),
        "query": x,
        "key": y,
        "x": x,
        "y": y,
        "v": y[:, :2],
        "reference": y,
        "centroids": y[:10],
    }


# Code that needs several processes is tested in test_distributed.py: here it has to be Python.
@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if blocks(text)])
def test_code(page, tmp_path, monkeypatch):
    """The blocks of a page, one after the other."""
    monkeypatch.chdir(tmp_path)
    for module in NEEDS.get(page, ()):
        pytest.importorskip(module)
    known = names()
    for k, block in enumerate(blocks(PAGES[page])):
        code = compile(block, f"docs/{page}.md, block {k}", "exec")
        if page != "distributed":
            exec(code, known)


@pytest.mark.parametrize("page", PAGES)
def test_names(page):
    """`nf.something` is something."""
    for name in set(re.findall(r"\bnf((?:\.\w+)+)", PAGES[page])):
        thing = nf
        for part in name[1:].split("."):
            thing = getattr(thing, part)


def test_links():
    """To pages and pictures of docs/."""
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([\w./-]+)\)", text):
            assert (ROOT / "docs" / target).exists(), f"docs/{page}.md: {target}"


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "csrc/README.md"])
def test_files(document):
    """A file that a document names, by its path or the end of it, is there."""
    folders = ("csrc", "python", "tests", "bench", "docs")
    files = [*ROOT.glob("*.*"), *(file for folder in folders for file in (ROOT / folder).rglob("*.*"))]
    paths = ["/" + str(file.relative_to(ROOT)) for file in files]
    named = set(re.findall(r"`([\w./-]+\.(?:py|hpp|cpp|cu|sh|md))`", (ROOT / document).read_text(encoding="utf-8")))
    assert named
    for name in named:
        assert any(path.endswith("/" + name) for path in paths), f"{document}: {name}"


def test_every_example_is_in_the_gallery():
    listed = re.findall(r"^\| `(\w+\.py)` \|", PAGES["gallery"], re.MULTILINE)
    assert listed == sorted(path.name for path in (ROOT / "examples").glob("[0-9]*.py"))
