"""Compact, explanatory, interpretable, disentangled: a measure for each word, on images whose factors are known.

A digit is drawn with known position (two numbers), angle and size. An encoder learns from pairs of neighbouring factors

    InfoNCE with scores -|z - z'|^2 / 2 = <z, z'> - |z'|^2 / 2 + (what does not depend on z')

Claims, checked at the end:
- the measures are effective rank (Roy, Vetterli, 2007), R^2 of a linear probe, R^2 of the nearest neighbour's factors,
  and for disentangled the mutual information gap (Chen et al., 2018): each factor in a coordinate of its own;
- InfoNCE, ranks, probes and neighbours do not see a rotation of z, exactly. The gap does: so no loss of pairs supplies
  axes (Locatello et al., 2019), though it finds the factors up to a rotation (Zimmermann et al., 2021);
- independent component analysis afterwards finds the axes if the factors are independent and not Gaussian (Comon,
  1994); varimax (Kaiser, 1958), which turns to large fourth moments, if their tails are heavy (Rohe, Zeng, 2023).

    python 11_disentanglement.py [--short] [--output FILE.png]
"""

import argparse
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from _training import network, train
from matplotlib.figure import Figure
from scipy.linalg import polar
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA, FastICA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LinearRegression
from sklearn.metrics import mutual_info_score

import nearfar as nf

FACTORS = ("across", "down", "angle", "size")
BINS, NEAR = 20, 0.15  # of the mutual information; spread of the factors of a pair, in a box of side 2
GLYPH = torch.from_numpy(load_digits().images[4] / 16).float()[None, None]


def draw(factors):
    """Images (n, 256) of one digit, moved, turned and scaled by factors (n, 4), mostly between -1 and 1."""
    across, down, angle, scale = *factors.T[:3], 2.0 * torch.exp(-0.3 * factors[:, 3])
    cos, sin = torch.cos(0.9 * angle) * scale, torch.sin(0.9 * angle) * scale
    shift = [0.4 * (sin * down - cos * across), -0.4 * (sin * across + cos * down)]
    turn = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], 1).view(-1, 2, 3)
    grid = F.affine_grid(turn, [len(factors), 1, 16, 16], align_corners=False)
    return F.grid_sample(GLYPH.expand(len(factors), -1, -1, -1), grid, align_corners=False).flatten(1)


def info_nce(z, other, temperature=1.0):
    """Scores -|z - z'|^2 / 2 / temperature, but for a term of z alone, as dot products of rows."""
    query, key = F.pad(z, (0, 1), value=1.0), torch.cat([other, -other.square().sum(1, keepdim=True) / 2], 1)
    return nf.info_nce_loss(query, key, temperature=temperature, normalize=False)


def contrast(encoder):
    """The loss of an encoder for pairs of images."""
    factors = torch.rand(256, 4) * 2 - 1
    return info_nce(*encoder(draw(torch.cat([factors, factors + NEAR * torch.randn(256, 4)]))).chunk(2), NEAR**2)


def information_gap(z, factors):
    """Mean over factors of (largest - second largest mutual information with a coordinate) / entropy."""
    z, factors = ((np.argsort(np.argsort(x, 0), 0) * BINS) // len(x) for x in (z, factors))
    table = np.array([[mutual_info_score(a, b) for b in factors.T] for a in z.T])
    return float(np.diff(np.sort(table, 0)[-2:], axis=0).mean() / np.log(BINS)), table


def measures(z, other, factors):
    """InfoNCE, effective rank, R^2 of a linear probe, R^2 of the nearest neighbour's factors, information gap."""
    half = len(z) // 2
    probe = LinearRegression().fit(z[:half], factors[:half]).score(z[half:], factors[half:])
    nearest = factors[nf.knn(np.ascontiguousarray(z), k=1)[1][:, 0]]
    neighbour = 1 - np.square(factors - nearest).mean(0) / (2 * factors.var(0))  # 0 for a neighbour at random
    scale = 2 / np.sqrt(np.square(z - other).sum(1).mean())  # pairs at squared distance 4, whatever the unit
    loss = float(info_nce(torch.from_numpy(scale * z), torch.from_numpy(scale * other)))
    return loss, nf.evaluate(z - z.mean(0)).effective_rank, probe, neighbour.mean(), information_gap(z, factors)[0]


def unmixed(z, other):
    """Independent components of z, and of what is paired with it by the same map."""
    return [FastICA(whiten="unit-variance", random_state=0, max_iter=1000).fit(z).transform(x) for x in (z, other)]


def varimax(z, other):
    """The same by the rotation of whitened z that has the largest fourth moments: each step finds larger ones."""
    white, turn = (pca := PCA(whiten=True).fit(z)).transform(z), np.eye(z.shape[1])
    for _ in range(300):
        turn = polar(white.T @ (white @ turn) ** 3)[0]
    return white @ turn, pca.transform(other) @ turn


def picture(images, rows, gap, path):
    """Some images, and the mutual information of every coordinate with every factor."""
    left, *axes = (figure := Figure(figsize=(11, 3.4), layout="constrained")).subplots(1, 4)
    left.imshow(images[:36].view(6, 6, 16, 16).transpose(1, 2).reshape(96, 96), cmap="gray_r")
    left.set(title="one digit, four factors", xticks=[], yticks=[])
    for axis, (name, (z, _, factors)) in zip(axes, rows.items(), strict=True):
        axis.imshow(information_gap(z, factors)[1] / np.log(BINS), cmap="Blues", vmin=0, vmax=1)
        axis.set(xticks=range(4), xticklabels=FACTORS, yticks=range(4), title=f"{name}: gap {gap[name]:.2f}")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer steps and images")
    parser.add_argument("--output", default="11_disentanglement.png", help="the picture")
    args = parser.parse_args()
    torch.manual_seed(0)
    warnings.simplefilter("ignore", ConvergenceWarning)  # of Gaussian factors there is nothing to converge to
    n, steps = (2000, 150) if args.short else (5000, 1200)
    factors = (rng := np.random.default_rng(0)).uniform(-1, 1, (n, 4))
    pair = factors + NEAR * rng.standard_normal((n, 4))
    images, others = (draw(torch.from_numpy(f).float()) for f in (factors, pair))
    encoder = network(256, 256, 128, 4)
    train(lambda: contrast(encoder), steps, encoder)
    with torch.no_grad():
        z, near = (encoder(x).double().numpy() for x in (images, others))
    pixels = [PCA(4).fit(images).transform(x).astype(np.float64) for x in (images, others)]
    turn = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    rows = {
        "the factors": (factors, pair, factors),
        "pixels, 4 of PCA": (*pixels, factors),
        "InfoNCE": (z, near, factors),
        "InfoNCE, rotated": (z @ turn, near @ turn, factors),
        "InfoNCE, then ICA": (*unmixed(z, near), factors),
        "InfoNCE, then varimax": (*varimax(z, near), factors),
    }
    for law, drawn in (("Gaussian", rng.standard_normal((n, 4))), ("Laplace", rng.laplace(size=(n, 4)))):
        two = [x @ turn for x in (drawn, drawn + NEAR * rng.standard_normal((n, 4)))]
        rows |= {f"{law}, then ICA": (*unmixed(*two), drawn), f"{law}, then varimax": (*varimax(*two), drawn)}
    print(f"{n} images, 4 factors       InfoNCE     compact    explains   neighbour         gap")
    found = {name: measures(*row) for name, row in rows.items()}
    for name, values in found.items():
        print(f"{name:<24}" + "".join(f"{value:>12.4f}" for value in values))
    change = np.subtract(found["InfoNCE"], found["InfoNCE, rotated"])
    print("changed by rotation     " + "".join(f"{value:>12.1e}" for value in change))
    gap = {name: values[-1] for name, values in found.items()}
    assert max(abs(change[:4])) < 1e-9, "what the loss, rank, probe and neighbours see"
    assert found["InfoNCE"][2] > (0.75 if args.short else 0.85), "the factors are there"
    assert gap["InfoNCE"] < 0.5 * gap["InfoNCE, then ICA"] < gap["the factors"], "their axes only after ICA"
    assert gap["Gaussian, then ICA"] < 0.5 * gap["Laplace, then ICA"], "there are none of Gaussian factors"
    varimax_over_ica = [gap[f"{law}, then varimax"] / gap[f"{law}, then ICA"] for law in ("InfoNCE", "Laplace")]
    assert varimax_over_ica[0] < 0.5 < 0.8 < varimax_over_ica[1], "varimax wants heavy tails; these are uniform"
    picture(images, {name: rows[name] for name in ("the factors", "InfoNCE", "InfoNCE, then ICA")}, gap, args.output)


if __name__ == "__main__":
    main()
