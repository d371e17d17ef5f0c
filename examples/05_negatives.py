"""What goes into contrastive learning beside the loss: number of negatives, hard ones, false ones, a projection head.

NT-Xent of 256 digits, tau = 0.5, after a head of two layers; one ingredient is changed at a time. Judged on held-out
digits: logistic regression on frozen features h with all labels and with five a class, and 5 nearest neighbours.

Claims, checked at the end; the rest of the table is what it is, on 8 x 8 digits:
- the loss makes the head's output z forget what was done to an image, and the head lets h remember: R^2 of a linear map
  to rotation and shift (SimCLR, Chen et al. 2020, table 3: rotation is read from h with 67.6 %, from z with 25.6 %);
- hcl_loss with beta = 0, tau+ = 0 is nt_xent_loss: the same encoder (Robinson et al. 2021);
- with few labels the head helps, and leaving false negatives out by an oracle (`ids`) does (Chuang et al. 2020).

    python 05_negatives.py [--short] [--output FILE.png]
"""

import argparse

import numpy as np
import torch
from _digits import nt_xent, parameters_explained, perceptron, train, views
from matplotlib.figure import Figure
from torch import nn

import nearfar as nf
from nearfar.demo import TEMPERATURE, Digits, judge

BATCH, FEATURES, PROJECTION, QUEUE = 256, 128, 32, 2048
HEADS = {
    "two layers": lambda: perceptron(FEATURES, FEATURES, PROJECTION),
    "one layer": lambda: nn.Linear(FEATURES, PROJECTION),
    "none": nn.Identity,
}


def hard(beta, tau_plus=0.0):
    """NT-Xent with hard negatives weighted up, and a share of them taken for false."""
    return lambda x, y, _: nf.hcl_loss(x, y, temperature=TEMPERATURE, beta=beta, tau_plus=tau_plus)


def some(count):
    """InfoNCE with so many negatives from the batch, each query its own."""
    others = (torch.arange(BATCH)[:, None] + 1 + torch.arange(count)) % BATCH
    return lambda x, y, _: nf.info_nce_loss(x, y, y[others], temperature=TEMPERATURE)


def queue():
    """InfoNCE with the batch and a queue of keys from earlier ones."""
    bank = nf.MemoryBank(QUEUE, PROJECTION)

    def loss(x, y, _):
        value = nf.info_nce_loss(x, y, bank.keys, in_batch=True, temperature=TEMPERATURE)
        bank.enqueue(y.detach())
        return value

    return loss


def oracle(labels):
    """InfoNCE whose negatives are of other classes than the query: what only labels know."""
    return lambda x, y, rows: nf.info_nce_loss(x, y, ids=labels[rows], temperature=TEMPERATURE)


def ablation(labels):
    """(ingredient, value): what builds its loss, head."""
    plain = {("base", "NT-Xent, 510 negatives"): lambda: nt_xent}
    plain |= {("negatives", str(count)): lambda count=count: some(count) for count in (1, 4, 16)}
    plain |= {("negatives", f"and {QUEUE} in a queue"): queue}
    plain |= {("hard", f"beta = {beta:g}"): lambda beta=beta: hard(beta) for beta in (0, 1, 2)}
    plain |= {("false", "tau+ = 0.1"): lambda: hard(0.0, 0.1)}
    plain |= {("false", "left out by an oracle"): lambda: oracle(labels)}
    rows = {key: (build, "two layers") for key, build in plain.items()}
    return rows | {("head", name): (lambda: nt_xent, name) for name in ("one layer", "none")}


def measure(digits, build, head, steps, seed):
    """Accuracies in %: all labels, five a class, neighbours; R^2 of what was done to a view from h and from z."""
    torch.manual_seed(seed)
    after = [] if head == "none" else [nn.BatchNorm1d(FEATURES), nn.ReLU()]
    encoder = nn.Sequential(perceptron(64, 256, FEATURES), *after)
    network = nn.Sequential(encoder, HEADS[head]())
    train(network, digits.train, build(), steps=steps, view=lambda x: views(x)[0], batch=BATCH)
    accuracy = [100 * value for value in judge(encoder, digits)[0].values()]
    return [*accuracy, *(parameters_explained(part, digits).mean() for part in (encoder, network))]


def picture(path, found):
    """Accuracy with few labels by ingredient; what h and z remember by head."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2.2, 1])
    colors = {"base": "0.25", "negatives": "C0", "hard": "C1", "false": "C2", "head": "C4"}
    for place, ((ingredient, _), runs) in enumerate(found.items()):
        left.errorbar(runs[:, 1].mean(), -place, xerr=runs[:, 1].std(), fmt="o", color=colors[ingredient], capsize=2)
    left.axvline(next(iter(found.values()))[:, 1].mean(), color="0.6", lw=1, ls="--")
    labels = [f"{ingredient}: {value}" for ingredient, value in found]
    left.set_yticks(-np.arange(len(labels)), labels)
    left.set(xlabel="accuracy in %, five labels a class")
    heads = {"two layers": next(iter(found.values()))}
    heads |= {value: runs for (ingredient, value), runs in found.items() if ingredient == "head"}
    for side, name in ((-0.2, "h, the features"), (0.2, "z, what the loss sees")):
        values = [runs[:, 3 if side < 0 else 4].mean() for runs in heads.values()]
        right.bar(np.arange(len(heads)) + side, values, 0.4, label=name)
    right.set_xticks(range(len(heads)), heads)
    right.set(title="R$^2$ of rotation and shift", xlabel="head", ylim=(0, 1))
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="five rows, one seed, fewer steps")
    parser.add_argument("--output", default="05_negatives.png", help="the picture")
    args = parser.parse_args()
    digits = Digits.load()
    rows = ablation(torch.from_numpy(digits.train_labels))
    steps, seeds = (50, 1) if args.short else (120, 3)
    if args.short:
        short = ("NT-Xent, 510 negatives", "1", "beta = 0", "left out by an oracle", "none")
        rows = {key: row for key, row in rows.items() if key[1] in short}
    print(f"{seeds} seeds, {steps} steps: mean +- standard deviation over seeds\n")
    print(f"{'':<34}{'all labels':>16}{'5 a class':>16}{'5-NN':>16}{'R^2 of h':>11}{'of z':>7}")
    found = {}
    for (ingredient, value), (build, head) in rows.items():
        runs = found[ingredient, value] = np.array([measure(digits, build, head, steps, s) for s in range(seeds)])
        cells = "".join(f"{f'{v.mean():.1f} +- {v.std():.1f}':>16}" for v in runs.T[:3])
        print(f"{ingredient + ': ' + value:<34}{cells}{runs[:, 3].mean():>11.2f}{runs[:, 4].mean():>7.2f}", flush=True)

    base, heads = found["base", "NT-Xent, 510 negatives"], found["head", "none"]
    assert (base[:, 3] > 0.5).all(), "h remembers"
    assert (base[:, 4] < 0.3).all(), "z forgets"
    assert (heads[:, 3] < base[:, 3] - 0.2).all(), "without a head, h is z"
    assert np.abs(found["hard", "beta = 0"] - base)[:, :3].max() < 2, "the same loss, summed in another order"
    few = {value: runs[:, 1].mean() for (_, value), runs in found.items()}
    assert few["none"] < base[:, 1].mean() - 2, "the head helps"
    assert few["left out by an oracle"] > base[:, 1].mean() + 1, "false negatives hurt"
    assert few["1"] < few["left out by an oracle"]
    picture(args.output, found)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
