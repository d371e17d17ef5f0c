"""Three stages, and what each may see: pre-training sees images, adaptation a few labels, neither sees the test.

    bias of a protocol = E (accuracy that it claims - accuracy of the same classifier on digits that nobody touched)

Claims, checked at the end:
- done in order the bias is zero within its error; so it is, here, when the test's images, without labels, are among
  those for scaling or pre-training: a smaller sin than its name, though not one to commit with few rows;
- it is many points when pre-training sees the test's labels, when images are augmented before they are split, when the
  probe is chosen on the test, and when it is scored on what it has learnt from;
- on pure noise, where every accuracy is 1/2: choosing 100 of 5000 columns before cross-validation makes 1-NN right on
  97 % (Hastie, Tibshirani, Friedman, The Elements of Statistical Learning, 7.10.2; Ambroise, McLachlan, 2002), and
  the best of m guesses on n labels gets E max of m binomials, exactly.

    python 10_pretrain_adapt_test.py [--short] [--output FILE.png]
"""

import argparse

import numpy as np
import torch
from _training import network, train
from matplotlib.figure import Figure
from scipy.stats import binom
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import nearfar as nf
from nearfar.demo import augment

PER_CLASS, TEST, POOL = 6, 100, 800  # labels for adaptation; digits of the test and for pre-training


def pretrained(images, labels=None, steps=80):
    """An encoder from views of images: SimCLR, or supervised contrastive where labels are given."""
    encoder = network(64, 256, 64)

    def loss():
        chosen = torch.randint(len(images), (256,))
        z = [encoder(augment(images[chosen]).flatten(1)) for _ in range(2)]
        return nf.nt_xent_loss(*z) if labels is None else nf.sup_con_loss(torch.cat(z), labels[chosen].repeat(2))

    train(loss, steps, encoder)
    return lambda x: encoder(x.flatten(1)).detach().numpy()


def nearest(x, labels, other):
    """The label of the nearest row of x."""
    return labels[nf.knn(np.ascontiguousarray(other), np.ascontiguousarray(x), k=1)[1][:, 0]]


def digits(seed, steps, probes):
    """{protocol: (claimed, true)} accuracies in % of one split into pool, test and the world outside."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    x, y = load_digits(return_X_y=True)
    x = torch.from_numpy(x / 16).float().view(-1, 1, 8, 8)
    pool, rest = train_test_split(np.arange(len(y)), train_size=POOL, stratify=y, random_state=seed)
    test, world = train_test_split(rest, train_size=TEST, stratify=y[rest], random_state=seed)
    few = np.concatenate([pool[y[pool] == c][:PER_CLASS] for c in range(10)])
    both, found = np.concatenate([few, test]), {}

    def judge(name, features, scaled_on=few):
        scaler = StandardScaler().fit(features[scaled_on])
        model = LogisticRegression(max_iter=200).fit(scaler.transform(features[few]), y[few])
        found[name] = [model.score(scaler.transform(features[rows]), y[rows]) for rows in (test, world)]
        return model, scaler.transform(features)

    features = pretrained(x[pool], steps=steps)(x)
    model, scaled = judge("in order", features)
    judge("scaled with the test's images", features, both)
    judge("pre-trained with the test's images", pretrained(x[np.concatenate([pool, test])], steps=steps)(x))
    judge("pre-trained with the test's labels", pretrained(x[both], torch.from_numpy(y[both]), steps)(x))
    found["scored on its own labels"] = [model.score(scaled[rows], y[rows]) for rows in (few, world)]

    best = [0.0, 0.0]  # of probes that see a quarter of the features, the one that the test likes most
    for _ in range(probes):
        columns = rng.choice(64, 16, replace=False)
        model = LogisticRegression(C=10 ** rng.uniform(-2, 2)).fit(scaled[np.ix_(few, columns)], y[few])
        scores = [model.score(scaled[np.ix_(rows, columns)], y[rows]) for rows in (test, world)]
        best = max(best, scores, key=lambda pair: pair[0])
    found["probe chosen on the test"] = best

    views = torch.cat([augment(x[few]) for _ in range(5)]).flatten(1).numpy()  # of which four fifths are learnt from
    labels = np.tile(y[few], 5)
    own, held = np.split(rng.permutation(len(views)), [4 * len(few)])
    pairs = (views[held], labels[held]), (augment(x[world]).flatten(1).numpy(), y[world])
    found["augmented, then split"] = [np.mean(nearest(views[own], labels[own], a) == b) for a, b in pairs]
    return {name: 100 * np.array(pair) for name, pair in found.items()}


def noise(seed, rows=50, columns=5000, kept=100, guesses=100):
    """The same on labels that nothing predicts; the truth is 50 %."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((rows, columns)), np.arange(rows) % 2
    fold = np.arange(rows) // 2 % 5

    def cross_validated(inside, right=0):
        for f in range(5):
            own, seen = fold != f, (fold != f) | (not inside)
            shift = abs(x[seen & (y == 1)].mean(0) - x[seen & (y == 0)].mean(0))
            columns = np.argsort(-shift)[:kept]
            right += (nearest(x[own][:, columns], y[own], x[~own][:, columns]) == y[~own]).sum()
        return 100 * right / rows

    most = 100 * (rng.integers(0, 2, (guesses, rows)) == y).mean(1).max()
    claims = {"columns chosen inside": cross_validated(True), "columns chosen before": cross_validated(False)}
    return {f"noise: {name}": (claim, 50.0) for name, claim in {**claims, "best of 100 guesses": most}.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer seeds and steps")
    parser.add_argument("--output", default="10_pretrain_adapt_test.png", help="the picture")
    args = parser.parse_args()
    seeds, steps, probes = (3, 20, 10) if args.short else (12, 100, 100)
    rows = [digits(seed, steps, probes) for seed in range(seeds)]
    chance = [noise(seed) for seed in range(10 if args.short else 40)]
    at_most = 1 - binom.cdf(np.arange(50), 50, 0.5) ** 100  # P(max > k), whose sum is E max
    published = {"noise: columns chosen before": 97.0, "noise: best of 100 guesses": 100 * at_most.sum() / 50}
    print(f"{'accuracy in %':<38}{'claimed':>9}{'true':>9}{'bias':>8}{'+-':>6}{'expected claim':>17}")
    bias = {}
    for name in (*rows[0], *chance[0]):
        claimed, true = np.array([row[name] for row in (rows if name in rows[0] else chance)]).T
        gap = claimed - true
        bias[name] = gap.mean(), gap.std(ddof=1) / len(gap) ** 0.5
        numbers = f"{claimed.mean():>9.1f}{true.mean():>9.1f}{bias[name][0]:>8.1f}{bias[name][1]:>6.1f}"
        print(f"{name:<38}{numbers}" + (f"{published[name]:>17.1f}" if name in published else ""))

    for name in ("in order", "scaled with the test's images", "pre-trained with the test's images"):
        assert abs(bias[name][0]) < 3 * bias[name][1] + 1.5, name
    large = ("scored on its own labels", "augmented, then split")
    for name in large if args.short else list(rows[0])[3:]:
        assert bias[name][0] > 2, name
    for name, value in published.items():
        assert abs(50 + bias[name][0] - value) < 3 * bias[name][1] + 1, name
    assert abs(bias["noise: columns chosen inside"][0]) < 3 * bias["noise: columns chosen inside"][1] + 1

    axis = (figure := Figure(figsize=(9, 4), layout="constrained")).subplots()
    means, errors = np.array(list(bias.values())).T
    axis.barh(list(bias), means, xerr=2 * errors, color=["tab:red" if mean > 2 else "tab:green" for mean in means])
    axis.set(xlabel="claimed less true accuracy, points (two standard errors)")
    figure.savefig(args.output, dpi=110)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
