"""Is an auto-encoder PCA, and what is k-means then? Three encoders and decoders of digits, by the same measure.

    min over f, g of  E |x - g(f(x))|^2,    code f(x) of k numbers, or one of K symbols (log2 K bits)

Claims, checked at the end:
- f, g linear, trained by gradients: the loss is the sum of the left-out eigenvalues of the covariance, and the decoder
  spans the first k principal directions (Baldi, Hornik: Neural networks and principal component analysis, 1989);
- f, g deep: fewer errors than PCA on digits that training did not see, at every k (Kramer, 1991: non-linear PCA);
- f one-hot: k-means. Its inertia is the error |X - Z C|^2, the best decoder for its codes is the means (least squares),
  and no code of K symbols is better than PCA with K - 1 directions (Ding, He, 2004);
- counted in bits, one of up to 256 symbols is a better code of held-out digits than PCA's coefficients, each rounded
  and charged with its entropy.

    python 06_autoencoder_is_pca.py [--short] [--output FILE.png]
"""

import argparse
import math

import numpy as np
import torch
from _training import network, some
from _training import train as minimise
from matplotlib.figure import Figure
from scipy.linalg import subspace_angles
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

import nearfar as nf
from nearfar.demo import Digits


def linear(x, sizes):
    """Linear auto-encoders of the rows of x, less their mean, trained by L-BFGS from random weights."""
    x = torch.from_numpy(x - x.mean(0)) / len(x) ** 0.5
    values, directions = (a.flip(-1) for a in torch.linalg.eigh(x.T @ x))
    x = torch.linalg.qr(x).R  # the loss sees the covariance only: 64 rows do for 1797
    print(f"{'linear, k':<12}{'left-out eigenvalues':>22}{'loss':>16}{'relative gap':>14}{'largest angle':>15}")
    for k in sizes:
        torch.manual_seed(k)
        encode, decode = (torch.randn(shape, dtype=x.dtype).mul_(0.1).requires_grad_() for shape in ((64, k), (k, 64)))
        options = {"max_iter": 3000, "history_size": 20, "tolerance_grad": 1e-7, "tolerance_change": 1e-8}
        optimizer = torch.optim.LBFGS([encode, decode], line_search_fn="strong_wolfe", **options)

        def loss(encode=encode, decode=decode, optimizer=optimizer):
            optimizer.zero_grad()
            error = (x - x @ encode @ decode).square().sum()
            error.backward()
            return error

        optimizer.step(loss)
        reached, best = loss().item(), values[k:].sum().item()
        angle = subspace_angles(decode.detach().T.numpy(), directions[:, :k].numpy()).max()
        print(f"{k:<12}{best:>22.9f}{reached:>16.9f}{reached / best - 1:>14.1e}{angle:>15.1e}")
        assert abs(reached / best - 1) < 1e-5, k
        assert angle < 0.01, k


def deep(digits, k, steps):
    """Held-out squared error a digit of a network 64-128-64-k-64-128-64."""
    torch.manual_seed(k)
    encode, decode = network(64, 128, 64, k), network(k, 64, 128, 64)

    def error(x):
        return (decode(encode(x)) - x).square().sum(1).mean()

    train, test = digits.train.flatten(1), digits.test.flatten(1)
    minimise(lambda: error(some(train, 128)), steps, encode, decode)
    with torch.no_grad():
        return error(test).item()


def one_hot(x, sizes):
    """k-means of all rows as an auto-encoder: inertia, error, least squares."""
    variances = np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1]
    names = ("inertia", "scikit-learn", "error / it", "C - Z^+ X", "bound")
    print(f"\n{'k-means, K':<12}{'bits':>6}" + "".join(f"{name:>14}" for name in names))
    for k in sizes:
        model = nf.KMeans(k, random_state=0, n_init=3).fit(x)
        peer = KMeans(k, random_state=0, n_init=3).fit(x).inertia_
        z = np.eye(k)[model.encode(x)]
        error = ((x - z @ model.cluster_centers_) ** 2).sum() / model.inertia_ - 1
        gap = abs(np.linalg.lstsq(z, x, rcond=None)[0] - model.decode(np.arange(k))).max()
        bound = len(x) * variances[k - 1 :].sum()  # what PCA with K - 1 directions leaves
        print(
            f"{k:<12}{math.log2(k):>6.2f}{model.inertia_:>14.2f}{peer:>14.2f}{error:>14.1e}{gap:>14.1e}{bound:>14.1f}"
        )
        assert abs(error) < 1e-12, k
        assert gap < 1e-9, k
        assert bound <= model.inertia_ < 1.02 * peer, k


def rounded(train, test, step):
    """Bits and held-out error of PCA's coefficients rounded to a grid, each coded for the training digits."""
    mean, (_, _, axes) = train.mean(0), np.linalg.svd(train - train.mean(0), full_matrices=False)
    own, other = (np.rint((x - mean) @ axes.T / step).astype(int) for x in (train, test))
    bits = 0.0
    for a, b in zip(own.T, other.T, strict=True):
        low = min(a.min(), b.min())
        counts = np.bincount(a - low, minlength=b.max() - low + 1) + 0.01  # no symbol costs infinitely much
        bits -= np.log2(counts / counts.sum())[b - low].mean()
    return bits, ((test - mean - step * other @ axes) ** 2).sum(1).mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer sizes and steps")
    parser.add_argument("--output", default="06_autoencoder_is_pca.png", help="the picture")
    args = parser.parse_args()
    pixels, digits = load_digits().data, Digits.load()
    linear(pixels, (2,) if args.short else (2, 5, 10, 20, 32))
    one_hot(pixels, (2, 10, 100) if args.short else (2, 10, 50, 100, 256))

    train, test = (images.flatten(1).numpy().astype(np.float64) for images in (digits.train, digits.test))
    axes = np.linalg.svd(train - train.mean(0), full_matrices=False)[2]
    energy = np.square((test - train.mean(0)) @ axes.T).mean(0)
    pca = energy.sum() - np.concatenate([[0], np.cumsum(energy)])
    sizes = (2,) if args.short else (2, 5, 10, 20)
    print(f"\n{'held-out, k':<14}{'PCA':>8}{'deep':>8}{'ratio':>7}")
    errors = {k: deep(digits, k, 250 if args.short else 1500) for k in sizes}
    for k, error in errors.items():
        print(f"{k:<14}{pca[k]:>8.4f}{error:>8.4f}{error / pca[k]:>7.2f}")
        assert error < 0.85 * pca[k], k

    symbols = 2 ** np.arange(1, 9)
    means = [nf.KMeans(int(k), random_state=0).fit(train).reconstruction_error(test) / len(test) for k in symbols]
    coded = np.array([rounded(train, test, step) for step in np.geomspace(6, 0.6, 25)])
    same = np.interp(np.log2(symbols), *coded.T)
    print(f"\n{'held-out, bits':<16}{'k-means':>9}{'rounded PCA':>13}")
    for k, a, b in zip(symbols, means, same, strict=True):
        print(f"{np.log2(k):<16.0f}{a:>9.4f}{b:>13.4f}")
        assert a < b, k

    figure = Figure(figsize=(10.5, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(range(33), pca[:33], color="0.25", label="PCA = linear auto-encoder")
    left.plot(errors.keys(), errors.values(), "o", color="tab:red", label="deep auto-encoder")
    left.set(xlabel="k, numbers a code", ylabel="squared error a held-out digit", yscale="log", title="k numbers")
    right.plot(*coded.T, color="0.25", label="PCA, coefficients rounded")
    right.plot(np.log2(symbols), means, "o-", color="tab:blue", label="k-means, one of K symbols")
    right.set(xlabel="bits a digit", xlim=(0, 25), title="codes of bits")
    for axis in (left, right):
        axis.legend(frameon=False)
    figure.savefig(args.output, dpi=120)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
