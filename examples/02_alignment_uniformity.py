"""A contrastive loss pulls the views of an image together and spreads images over the sphere.

    alignment = E |f(x) - f(y)|^2 over positives,   uniformity = log E exp(-2 |f(x) - f(x')|^2) over all pairs

Claims for encoders of handwritten digits, trained without labels and judged on held-out ones (Wang & Isola 2020):
- on the plane of the two, accuracy is a matter of both (their figure 5): the higher the temperature, the better aligned
  and the less uniform are encoders, from 0.1 up, and the best is between; below, only the very nearest count;
- uniformity comes near the least any law on the sphere can have, -4 + log 0F1(; d/2; 4) (proposition 1), without a
  label; on the circle as well, where a supervised loss stays far (figures 3 and 4);
- alignment alone collapses (figures 7 and 8).

    python 02_alignment_uniformity.py [--short] [--output FILE.png]
"""

import argparse
import itertools

import numpy as np
import torch
from _digits import perceptron, train
from matplotlib.figure import Figure

import nearfar as nf
from nearfar.demo import Digits, features_of, judge

DIM = 16


def contrast(temperature):
    """NT-Xent at a temperature, as a loss of two views."""
    return lambda x, y, _: nf.nt_xent_loss(x, y, temperature=temperature)


def align(x, y, _):
    """Alignment and nothing else."""
    return nf.alignment(x, y)


def both(x, y, _):
    """The two terms by themselves, with Wang & Isola's weights."""
    return nf.alignment(x, y) + (nf.uniformity(x) + nf.uniformity(y)) / 2


def encode(digits, loss, dim, steps):
    """An encoder to the unit sphere of R^dim, trained for some steps from the same start."""
    torch.manual_seed(0)
    network = perceptron(64, 256, 128, dim)
    return train(network, digits.train, loss, steps=steps) if loss else network


def picture(path, found, circles, labels):
    """The plane, and encoders to the circle."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.2, 1])
    axis = left.subplots()
    reports = [report for _, report in found.values()]
    x, y = ([getattr(r, name) for r in reports] for name in ("uniformity", "alignment"))
    drawn = axis.scatter(
        x, y, c=[100 * accuracy["few"] for accuracy, _ in found.values()], s=70, cmap="viridis", zorder=3
    )
    left.colorbar(drawn, label="accuracy in %, five labels a class")
    for name, u, a in zip(found, x, y, strict=True):
        axis.annotate(name, (u, a), (6, 5), textcoords="offset points", fontsize=9)
    axis.axvline(reports[0].uniformity_optimum, color="tab:red", lw=1, ls="--")
    axis.text(
        reports[0].uniformity_optimum,
        0.02,
        " the sphere's optimum",
        color="tab:red",
        va="bottom",
        transform=axis.get_xaxis_transform(),
    )
    axis.set(
        xlabel="uniformity",
        ylabel="alignment",
        title=f"held-out digits on the sphere of R$^{{{DIM}}}$: lower is better",
    )
    axis.spines[["top", "right"]].set_visible(False)
    right.suptitle(f"encoders to the circle, whose optimum is {nf.uniformity_of_sphere(2):.3f}")
    rng = np.random.default_rng(0)
    for axis, (name, z) in zip(right.subplots(2, 2).ravel(), circles.items(), strict=True):
        points = (z / np.linalg.norm(z, axis=1, keepdims=True)) * rng.uniform(0.8, 1.0, (len(z), 1))
        axis.scatter(*points.T, c=labels, cmap="tab10", s=6, lw=0)
        axis.set(title=f"{name}: {float(nf.uniformity(z)):.3f}", xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal")
        axis.axis("off")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer encoders and steps")
    parser.add_argument("--output", default="02_alignment_uniformity.png", help="the picture")
    args = parser.parse_args()
    steps = 45 if args.short else 300
    digits = Digits.load()
    temperatures = (0.3, 10.0) if args.short else (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 3.0, 10.0)
    losses = {
        "random": None,
        **{f"tau = {t:g}": contrast(t) for t in temperatures},
        "both terms": both,
        "align only": align,
    }
    found = {}
    print(f"{'':<12}{'alignment':>10}{'uniformity':>12}{'optimum':>9}{'5 labels a class':>18}{'5-NN':>10}{'rank':>6}")
    for name, loss in losses.items():
        accuracy, report = found[name] = judge(encode(digits, loss, DIM, steps), digits)
        print(
            f"{name:<12}{report.alignment:>10.4f}{report.uniformity:>12.3f}{report.uniformity_optimum:>9.3f}"
            f"{100 * accuracy['few']:>16.1f} %{100 * accuracy['knn']:>8.1f} %{report.effective_rank:>6.1f}"
        )

    classes = torch.from_numpy(digits.train_labels)
    losses = {
        "random": None,
        "supervised": lambda x, y, rows: nf.sup_con_loss(torch.cat([x, y]), classes[rows].repeat(2)),
        "both terms": both,
        "align only": align,
    }
    circles = {name: features_of(encode(digits, loss, 2, steps), digits.test).numpy() for name, loss in losses.items()}
    print(
        f"\non the circle, optimum {nf.uniformity_of_sphere(2):.3f}: "
        + ", ".join(f"{name} {float(nf.uniformity(z)):.3f}" for name, z in circles.items())
    )

    report = {name: own for name, (_, own) in found.items()}
    few = {name: 100 * accuracy["few"] for name, (accuracy, _) in found.items()}
    best = max(few, key=few.get)
    assert best not in ("random", "align only", "tau = 10"), best
    assert few["align only"] - (5 if args.short else 0) < few["random"] < few["both terms"] - 10
    assert report["align only"].alignment < 0.02 < report["both terms"].alignment
    assert report["align only"].uniformity > -0.2, "alignment alone collapses"
    assert min(report, key=lambda name: report[name].uniformity) == "both terms"
    assert report["both terms"].uniformity < report["both terms"].uniformity_optimum + 0.7
    chain = [report[f"tau = {t:g}"] for t in temperatures if t >= 0.2]
    assert all(cold.uniformity < hot.uniformity for cold, hot in itertools.pairwise(chain))
    assert chain[0].alignment > chain[-1].alignment + 0.05
    assert few["tau = 0.3"] > few["tau = 10"] + 5
    spread = {name: float(nf.uniformity(z)) for name, z in circles.items()}
    assert spread["both terms"] < nf.uniformity_of_sphere(2) + 0.1 < spread["supervised"] - 0.2
    picture(args.output, found, circles, digits.test_labels)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
