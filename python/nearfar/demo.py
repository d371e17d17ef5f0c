"""The main job: pre-train an encoder of handwritten digits with the fused loss, adapt it, test it.

Pre-training is SimCLR: two random views of an image are each other's positive (`nearfar.nt_xent_loss`). Adaptation is a
linear probe on frozen features. Compared on a held-out split: raw pixels, the random encoder, the trained one. Epochs
and the strength of the views were chosen with the held-out accuracy in sight; pre-training sees neither held-out digits
nor labels.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import nearfar as nf

from .cli import picture_file

HELD_OUT = 500
FEATURES, PROJECTION, WIDTH = 128, 64, 32
BATCH, TEMPERATURE = 512, 0.5
FEW = 5  # labels a class in the second probe


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m nearfar demo`."""
    parser.add_argument("--epochs", type=_positive, default=250, help="passes over the training images (default 250)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, views and batches (default 0)")
    parser.add_argument(
        "--output", type=picture_file, default="nearfar-demo.png", help="the picture (default nearfar-demo.png)"
    )
    parser.add_argument("--threads", type=_positive, default=None, help="of torch and nearfar (default: torch's)")
    parser.add_argument("--short", action="store_true", help="a few seconds: enough to see that it runs")


@dataclass
class Digits:
    """scikit-learn's 1797 images of 8 x 8 pixels, split by class."""

    train: Tensor
    test: Tensor
    train_labels: NDArray[np.int64]
    test_labels: NDArray[np.int64]

    @classmethod
    def load(cls) -> Digits:
        """Pixels in [0, 1]; always the same split."""
        pixels, labels = load_digits(return_X_y=True)
        parts = train_test_split(pixels / 16, labels, test_size=HELD_OUT, stratify=labels, random_state=0)
        train, test = (torch.from_numpy(p.astype(np.float32)).view(-1, 1, 8, 8) for p in parts[:2])
        return cls(train, test, parts[2], parts[3])


def augment(images: Tensor) -> Tensor:
    """A random view of each image: rotated up to 20 degrees, sheared, scaled, shifted up to 0.8 pixels, with noise."""
    n = len(images)

    def uniform(most: float, *shape: int) -> Tensor:
        return (torch.rand(n, *shape) * 2 - 1) * most

    angle, size, shear, shift = uniform(math.radians(20)), 1 + uniform(0.1), uniform(0.2), uniform(0.2, 2)
    cos, sin = torch.cos(angle) * size, torch.sin(angle) * size
    affine = torch.stack([cos, shear - sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(n, 2, 3)
    views = F.grid_sample(images, F.affine_grid(affine, list(images.shape), align_corners=False), align_corners=False)
    return views + 0.1 * torch.randn_like(views)


def build_encoder() -> nn.Sequential:
    """Two convolutions and a linear layer: (n, 1, 8, 8) -> (n, FEATURES)."""
    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, padding=1),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(),
        nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1, stride=2),
        nn.BatchNorm2d(2 * WIDTH),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * WIDTH, FEATURES),
        nn.BatchNorm1d(FEATURES),
        nn.ReLU(),
    )


def build_head() -> nn.Sequential:
    """The projection head, which the loss sees and the probe does not."""
    return nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, PROJECTION))


def dense_nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent as it is usually written in torch: the whole 2N x 2N matrix."""
    z = F.normalize(torch.cat([z1, z2]))
    n = len(z1)
    scores = (z @ z.T / temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(scores, torch.arange(2 * n).roll(n))


@dataclass
class History:
    """What training leaves behind."""

    losses: list[float] = field(default_factory=list)
    fused_ms: list[float] = field(default_factory=list)
    dense_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)


def _timed(loss: Any, z1: Tensor, z2: Tensor) -> float:
    """Milliseconds of forward and backward on copies of the projections."""
    own = [z.detach().requires_grad_() for z in (z1, z2)]
    begin = time.perf_counter()
    loss(*own, temperature=TEMPERATURE).backward()
    return 1e3 * (time.perf_counter() - begin)


def pretrain(encoder: nn.Module, head: nn.Module, images: Tensor, epochs: int, progress: Progress) -> History:
    """SimCLR with the fused loss; every fourth step both losses are timed on the same projections, in turns."""
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=2e-3, weight_decay=1e-4)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 2), pct_start=0.1)
    history = History()
    task = progress.add_task("pre-training", total=steps)
    encoder.train()
    for step in range(steps):
        if step % (len(images) // BATCH) == 0:
            order = torch.randperm(len(images))
        begin = time.perf_counter()
        batch = images[order[:BATCH]]
        order = order[BATCH:]
        z1, z2 = head(encoder(torch.cat([augment(batch), augment(batch)]))).chunk(2)
        loss = nf.nt_xent_loss(z1, z2, temperature=TEMPERATURE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        history.step_ms.append(1e3 * (time.perf_counter() - begin))
        history.losses.append(loss.item())
        if step % 4 == 0:
            turns = [(nf.nt_xent_loss, history.fused_ms), (dense_nt_xent, history.dense_ms)]
            for function, times in turns if step % 8 == 0 else reversed(turns):
                times.append(_timed(function, z1, z2))
        progress.update(task, advance=1, description=f"pre-training, loss {history.losses[-1]:.3f}")
    return history


@torch.no_grad()
def features_of(encoder: nn.Module, images: Tensor) -> Tensor:
    """Frozen features."""
    encoder.eval()
    features: Tensor = encoder(images)
    return features


def _probe(train: NDArray[Any], labels: NDArray[Any], test: NDArray[Any], test_labels: NDArray[Any]) -> float:
    model = LogisticRegression(max_iter=500).fit(train, labels)
    return float(model.score(test, test_labels))


def judge(encoder: nn.Module, digits: Digits) -> tuple[dict[str, float], nf.Report]:
    """Accuracies of probes that learn from the training digits, and the report on the held-out ones."""
    train, test = features_of(encoder, digits.train), features_of(encoder, digits.test)
    views = [features_of(encoder, augment(digits.test)) for _ in range(2)]
    report = nf.evaluate(test, digits.test_labels, views=views)
    _, neighbours = nf.knn(test, train, k=5, metric="cosine")
    votes = digits.train_labels[neighbours.numpy()]
    nearest = np.array([np.bincount(row, minlength=10).argmax() for row in votes])
    center, spread = train.mean(0), train.std() + 1e-9
    own, other = ((z - center).div(spread).numpy() for z in (train, test))
    few = []
    for draw in range(10):
        rng = np.random.default_rng(draw)
        classes = [np.flatnonzero(digits.train_labels == c) for c in range(10)]
        chosen = np.concatenate([rng.permutation(c)[:FEW] for c in classes])
        few.append(_probe(own[chosen], digits.train_labels[chosen], other, digits.test_labels))
    accuracies = {
        "probe": _probe(own, digits.train_labels, other, digits.test_labels),
        "few": float(np.mean(few)),
        "knn": float(np.mean(nearest == digits.test_labels)),
    }
    return accuracies, report


Results = dict[str, tuple[dict[str, float], nf.Report]]


def _table(results: Results) -> Table:
    table = Table(title=f"held-out {HELD_OUT} digits")
    table.add_column("features")
    names = ("probe\nall", f"probe\n{FEW}/class", "\n5-NN", "align-\nment", "unifor-\nmity", "\noptimum")
    for name in names:
        table.add_column(name, justify="right")
    for name, (accuracies, r) in results.items():
        sphere = (f"{value:.3f}" for value in (r.alignment, r.uniformity, r.uniformity_optimum))
        table.add_row(name, *(f"{100 * value:.1f} %" for value in accuracies.values()), *sphere)
    return table


def picture(path: str, history: History, encoder: nn.Module, digits: Digits, results: Results) -> None:
    """Loss curve, features on the sphere, the table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Circle

    figure = plt.figure(figsize=(13, 4.4), layout="constrained")
    curve, sphere, table = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    curve.plot(history.losses, lw=1, color="0.25")
    curve.axhline(math.log(2 * BATCH - 1), lw=0.8, ls="--", color="tab:red")
    curve.text(
        len(history.losses), math.log(2 * BATCH - 1) - 0.03, "all points alike ", va="top", ha="right", color="tab:red"
    )
    curve.set(title="NT-Xent while pre-training", xlabel="step", ylabel="loss")

    # Three principal directions, brought to the sphere; the hemisphere in front is solid.
    features = features_of(encoder, digits.test)
    _, _, axes = torch.linalg.svd(features - features.mean(0), full_matrices=False)
    points = F.normalize((features - features.mean(0)) @ axes[:3].T).numpy()
    front = points[:, 2] >= 0
    sphere.add_patch(Circle((0, 0), 1, fill=False, color="0.8"))
    for side, alpha in ((~front, 0.25), (front, 0.9)):
        drawn = sphere.scatter(
            points[side, 0],
            points[side, 1],
            c=digits.test_labels[side],
            cmap="tab10",
            vmin=-0.5,
            vmax=9.5,
            s=9,
            alpha=alpha,
        )
    drawn.set_alpha(1)
    figure.colorbar(drawn, ax=sphere, ticks=range(10), shrink=0.8, label="digit")
    accuracies, report = results["trained encoder"]
    sphere.set(aspect="equal", xticks=[], yticks=[], xlim=(-1.05, 1.05), ylim=(-1.05, 1.05))
    sphere.set_title(
        f"held-out features, uniformity {report.uniformity:.2f}\n(the sphere's optimum {report.uniformity_optimum:.2f})"
    )
    for spine in sphere.spines.values():
        spine.set_visible(False)

    table.axis("off")
    columns = ["probe\nall labels", f"probe\n{FEW} a class", "5-NN", "alignment", "uniformity"]
    cells = [
        [*(f"{100 * value:.1f} %" for value in own.values()), f"{r.alignment:.3f}", f"{r.uniformity:.2f}"]
        for own, r in results.values()
    ]
    rows = [name.replace(" ", "\n") for name in results]
    drawn_table = table.table(cells, rowLabels=rows, colLabels=columns, loc="center", cellLoc="center")
    drawn_table.auto_set_font_size(False)
    drawn_table.set_fontsize(9)
    drawn_table.scale(1, 2.6)
    gain = 100 * (accuracies["few"] - results["raw pixels"][0]["few"])
    table.set_title(f"with {FEW} labels a class: {gain:+.1f} points over raw pixels")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run(args: argparse.Namespace) -> int:
    """Train, test, print the table and the times, save the picture."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    epochs = 4 if args.short else args.epochs
    console = Console()
    digits = Digits.load()
    console.print(f"{len(digits.train)} digits to learn from without labels, {HELD_OUT} held out")
    encoder, head = build_encoder(), build_head()
    results = {"raw pixels": judge(nn.Flatten(), digits), "random encoder": judge(encoder, digits)}
    begin = time.perf_counter()
    with Progress(console=console) as progress:
        history = pretrain(encoder, head, digits.train, epochs, progress)
    seconds = time.perf_counter() - begin
    results["trained encoder"] = judge(encoder, digits)
    console.print(_table(results))
    console.print(
        "nearfar.evaluate of the trained encoder's held-out features:", results["trained encoder"][1], sep="\n"
    )

    fused, dense = statistics.median(history.fused_ms), statistics.median(history.dense_ms)
    step = statistics.median(history.step_ms)
    console.print(
        f"{len(history.losses)} steps of {2 * BATCH} views in {seconds:.1f} s; a step takes {step:.1f} ms.\n"
        f"The loss, forward and backward, in this loop: fused {fused:.2f} ms, dense torch {dense:.2f} ms: "
        f"{dense / fused:.2f} times as fast ({torch.get_num_threads()} threads, medians of {len(history.fused_ms)})."
    )
    picture(args.output, history, encoder, digits, results)
    console.print(f"picture: {args.output}")
    return 0
