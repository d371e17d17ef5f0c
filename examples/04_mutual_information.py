"""Contrastive losses bound mutual information from below. How well, and what is a good bound good for?

    I(X; Y) >= log K - InfoNCE (<= log K),   NWJ: E[f] - E[e^(f - 1)],   DV: E[f] - log E[e^f]

Claims, checked at the end:
- on correlated Gaussians, whose information is I = -d/2 log(1 - rho^2), with the best critic, InfoNCE of K pairs
  saturates at log K; NWJ and DV do not, but their variance grows with (e^2I - 1) / K(K - 1) (Poole et al. 2019,
  figure 2), in a tail so heavy that few draws see it;
- the same information can be useless: a bijection of features wrecks their nearest neighbours, and over the strength
  of augmentations the bound is largest where accuracy is not (Tschannen et al. 2020, sections 3.1 and 3.2).

    python 04_mutual_information.py [--short] [--output FILE.png]
"""

import argparse

import numpy as np
import torch
from _digits import nt_xent, perceptron, train, views
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

import nearfar as nf
from nearfar.demo import TEMPERATURE, Digits, features_of, judge

DIM = 20
ESTIMATORS = {"infonce": "InfoNCE", "nwj": "NWJ", "dv": "DV"}
INFORMATION = (1, 2, 4, 6, 8, 10)


def critic(information, count, rng):
    """Features of pairs of Gaussians whose inner products are 1 + log p(y|x) / p(y), the best critic for all three."""
    rho = np.sqrt(-np.expm1(-2 * information / DIM))
    x = rng.standard_normal((count, DIM))
    y = rho * x + np.sqrt(1 - rho**2) * rng.standard_normal((count, DIM))
    scale = rho / (1 - rho**2)
    own, other, one = (-rho * scale / 2) * (x**2).sum(1), (-rho * scale / 2) * (y**2).sum(1), np.ones(count)
    return np.column_stack([scale * x, own, one]), np.column_stack([y, one, other + 1 + information])


def gaussians(count, draws):
    """Estimates (information, estimator, draw) from so many pairs."""
    rng = np.random.default_rng(count)
    found = np.empty((len(INFORMATION), len(ESTIMATORS), draws))
    for i, information in enumerate(INFORMATION):
        for draw in range(draws):
            query, key = critic(information, count, rng)
            for e, name in enumerate(ESTIMATORS):
                found[i, e, draw] = nf.mi_lower_bound(query, key, temperature=1.0, estimator=name, normalize=False)
    return found


def deviation_of_nwj(information, count):
    """In theory: that of the mean score of positives and of the mean ratio over other pairs, taken as independent."""
    rho_squared = -np.expm1(-2 * information / DIM)
    return np.sqrt(DIM * rho_squared / count + np.expm1(2 * information) / (count * (count - 1)))


def bijections(digits):
    """Name: (5-NN accuracy of the same 40 principal components after an invertible map, error of the inverse)."""
    pca = PCA(40).fit(digits.train.flatten(1).numpy())
    x, test = (pca.transform(part.flatten(1).numpy()).astype(np.float64) for part in (digits.train, digits.test))
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((40, 40)))[0]
    scales = {"whitened": 1 / x.std(0), "scaled, 10^-3 to 10^3": np.logspace(-3, 3, 40)}
    found = {}
    for name, matrix in {"rotated": rotation, **{n: np.diag(s) for n, s in scales.items()}}.items():
        votes = digits.train_labels[nf.knn(test @ matrix, x @ matrix, k=5)[1]]
        chosen = np.array([np.bincount(row).argmax() for row in votes])
        restored = np.linalg.solve(matrix.T, (x @ matrix).T).T
        found[name] = 100 * np.mean(chosen == digits.test_labels), np.abs(restored - x).max()
    return found


def strengths(digits, values, steps):
    """Rows (strength, InfoNCE bound on held-out digits, accuracy of a probe with five labels a class)."""
    rows = []
    for strength in values:
        torch.manual_seed(0)
        network = perceptron(64, 256, 128, 32)
        train(network, digits.train, nt_xent, steps=steps, view=lambda x, s=strength: views(x, s)[0])
        pair = [features_of(network, views(digits.test, strength)[0]) for _ in range(2)]
        bound = float(nf.mi_lower_bound(*pair, temperature=TEMPERATURE))
        rows.append((strength, bound, 100 * judge(network, digits)[0]["few"]))
    return np.array(rows)


def picture(path, tables, sweep):
    """Estimates against the truth; accuracy against the bound."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, len(tables) + 1)
    for axis, (count, found) in zip(axes, tables.items(), strict=False):
        axis.plot(INFORMATION, INFORMATION, color="0.25", lw=1, ls="--", label="truth")
        axis.axhline(np.log(count), color="tab:red", lw=1, ls=":", label="log K")
        for e, name in enumerate(ESTIMATORS.values()):
            mean, deviation = found[:, e].mean(1), found[:, e].std(1)
            axis.errorbar(INFORMATION, mean, deviation, capsize=2, lw=1, color=f"C{e}", label=name)
        axis.set(title=f"K = {count} pairs", xlabel="mutual information", ylabel="estimate", ylim=(-1, 13))
        axis.legend(frameon=False, fontsize=8)
    axes[-1].plot(sweep[:, 1], sweep[:, 2], "o-", color="C4", lw=1)
    for strength, bound, accuracy in sweep:
        axes[-1].annotate(f"{strength:g}", (bound, accuracy), (4, 4), textcoords="offset points", fontsize=9)
    axes[-1].set(title="digits, by strength of the views", xlabel="InfoNCE bound in nats", ylabel="accuracy in %")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer pairs, draws, encoders and steps")
    parser.add_argument("--output", default="04_mutual_information.png", help="the picture")
    args = parser.parse_args()
    tables = {count: gaussians(count, draws) for count, draws in ((64, 100), (512 if args.short else 2048, 20))}
    for count, found in tables.items():
        print(f"K = {count} pairs, log K = {np.log(count):.3f}: bias +- standard deviation")
        print(f"{'nats':>6}" + "".join(f"{name:>18}" for name in ESTIMATORS.values()) + f"{'NWJ, theory':>14}")
        for i, nats in enumerate(INFORMATION):
            cells = (f"{v.mean() - nats:+.3f} +- {v.std():.3f}" for v in found[i])
            print(f"{nats:>6}" + "".join(f"{cell:>18}" for cell in cells) + f"{deviation_of_nwj(nats, count):>14.3f}")
    digits = Digits.load()
    moved = bijections(digits)
    print("\nthe same 40 numbers of a digit, invertibly mapped: accuracy of 5 neighbours, error of the inverse")
    for name, (accuracy, error) in moved.items():
        print(f"{name:>24}{accuracy:>7.1f} %{error:>10.0e}")
    values = (0.05, 1.0) if args.short else (0.05, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0)
    sweep = strengths(digits, values, 80 if args.short else 300)
    print("\nviews of strength  InfoNCE bound  accuracy with 5 labels a class")
    for strength, bound, accuracy in sweep:
        print(f"{strength:>17g}{bound:>15.3f}{accuracy:>14.1f} %")

    for count, found in tables.items():
        mean, deviation = found.mean(2), found.std(2)
        assert (found[:, 0] <= np.log(count)).all(), "InfoNCE is at most log K"
        assert mean[-1, 0] > np.log(count) - 0.6, "and gets there"
        assert (mean[:, 0] <= INFORMATION + 4 * deviation[:, 0] / np.sqrt(found.shape[2])).all(), "a lower bound"
        assert deviation[-1, 1] > 5 * deviation[-1, 0], "NWJ has no ceiling, but a variance"
        for i in range(2):  # where the tail is light enough to be seen
            assert 0.5 < deviation[i, 1] / deviation_of_nwj(INFORMATION[i], count) < 1.5, (count, INFORMATION[i])
            assert abs(mean[i, 1] - INFORMATION[i]) < 0.15, "NWJ is nearly unbiased"
    assert max(error for _, error in moved.values()) < 1e-9, "nothing is lost"
    assert moved["scaled, 10^-3 to 10^3"][0] < moved["rotated"][0] - 30, "and it is of no use"
    assert (np.diff(sweep[:, 1]) < 0).all(), "stronger views share less"
    assert sweep[0, 2] < sweep[:, 2].max() - 5, "the largest bound is not the best encoder"
    picture(args.output, tables, sweep)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
