"""What InfoNCE becomes when negatives are many, and how fast.

    L_M = E[-a + log(e^a + sum_{j <= M} e^{b_j})],  a = <f(x), f(y)> / tau,  b_j = <f(x), f(x_j)> / tau

Claims, checked for the embeddings of handwritten digits, M negatives drawn from them:
- L_M - log M tends to -E[a] + E_x log E[e^b] (Wang & Isola 2020, theorem 1): alignment plus uniformity;
- the error is c / M, faster than the O(M^-1/2) of the theorem, with a constant that is known (delta method):
  c = E[e^a / m_x] - E[Var(e^b | x) / 2 m_x^2], m_x = E[e^b | x], the larger, the lower the temperature.

    python 03_infonce_limit.py [--short] [--output FILE.png]
"""

import argparse

import numpy as np
import torch
from _digits import nt_xent, perceptron, train
from matplotlib.figure import Figure

import nearfar as nf
from nearfar.demo import Digits, augment, features_of

TEMPERATURES = (1.0, 0.5, 0.2, 0.1)


def population(steps):
    """Unit embeddings of all training digits and of a view of each, of an encoder trained for some steps."""
    torch.manual_seed(0)
    images = Digits.load().train
    encoder = train(perceptron(64, 256, 128, 16), images, nt_xent, steps=steps)
    both = features_of(encoder, images), features_of(encoder, augment(images))
    return [(z / z.norm(dim=1, keepdim=True)).double().numpy() for z in both]


def constant(x, y, temperature):
    """c, and by how much each row, drawn once more than its share, raises L_M to first order."""
    weights = np.exp(x @ x.T / temperature)
    mean, variance = weights.mean(1), weights.var(1)
    c = np.mean(np.exp((x * y).sum(1) / temperature) / mean) - np.mean(variance / (2 * mean**2))
    return c, (weights / mean[:, None]).mean(0)


def deviations(x, y, sizes, pairs):
    """L_M - log M less the limit and its standard error, (temperature, size); the limit and c of each temperature.

    Negatives are drawn with replacement from the rows of x, so the limit has no sampling error. What a draw adds to
    first order has mean zero and is known, and is taken off: a control variate, without which 1 / M drowns in noise.
    """
    rng = np.random.default_rng(0)
    limits = [float(nf.info_nce_limit(x, y, t)) for t in TEMPERATURES]
    constants, pulls = zip(*(constant(x, y, t) for t in TEMPERATURES), strict=True)
    error, spread = np.empty((2, len(TEMPERATURES), len(sizes)))
    for s, size in enumerate(sizes):
        drawn = [rng.integers(len(x), size=size) for _ in range(min(64, max(4, pairs // size)))]
        for t, temperature in enumerate(TEMPERATURES):
            losses = [float(nf.info_nce_loss(x, y, x[rows], temperature=temperature)) for rows in drawn]
            values = np.array(losses) - np.log(size) - limits[t] - [pulls[t][rows].mean() - 1 for rows in drawn]
            error[t, s], spread[t, s] = values.mean(), values.std() / np.sqrt(len(drawn) - 1)
    return error, spread, limits, constants


def picture(path, sizes, error, constants):
    """|deviation| against M in logarithms."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axis = figure.subplots()
    for t, temperature in enumerate(TEMPERATURES):
        axis.loglog(sizes, constants[t] / sizes, color=f"C{t}", lw=1, ls="--")
        label = rf"$\tau$ = {temperature:g}, c = {constants[t]:.3g}"
        axis.loglog(sizes, error[t], "o", color=f"C{t}", label=label)
    axis.loglog(
        sizes, error[0, 0] * (sizes / sizes[0]) ** -0.5, color="0.6", lw=1, label="the theorem's rate, M$^{-1/2}$"
    )
    axis.set(xlabel="negatives M", ylabel="InfoNCE - log M - limit", title="Circles: measured. Dashed: c / M")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer negatives and draws")
    parser.add_argument("--output", default="03_infonce_limit.png", help="the picture")
    args = parser.parse_args()
    x, y = population(60 if args.short else 300)
    sizes = 2 ** np.arange(5, 14 if args.short else 18, 2)
    error, spread, limits, constants = deviations(x, y, sizes, 2**15 if args.short else 2**19)

    print(f"(InfoNCE - log M - limit) M for {len(x)} queries, in float64; beside it c, to which it tends\n")
    print(
        f"{'temperature':>11}{'limit':>10}"
        + "".join(f"{'M = ' + str(m):>12}" for m in sizes)
        + f"{'c':>12}{'slope':>8}"
    )
    slopes = []
    for t, temperature in enumerate(TEMPERATURES):
        slopes.append(np.polyfit(np.log(sizes[-3:]), np.log(error[t, -3:]), 1)[0])
        cells = "".join(f"{e * m:>12.4f}" for e, m in zip(error[t], sizes, strict=True))
        print(f"{temperature:>11}{limits[t]:>10.4f}{cells}{constants[t]:>12.4f}{slopes[-1]:>8.3f}")
    store = 8 * len(x) * sizes[-1] / 1e6
    print(f"\nslope of the logarithms over the three largest M; {store:.0f} MB of scores at the last, not stored")

    for t, temperature in enumerate(TEMPERATURES):
        c, m = constants[t], sizes[-1]
        # The next term of the expansion is of order (c / M)^2.
        assert abs(m * error[t, -1] - c) < 4 * m * spread[t, -1] + c * c / m, (temperature, m * error[t, -1], c)
        assert m * spread[t, -1] < 0.1 * c, "too noisy to tell"
    assert all(abs(slope + 1) < 0.1 for slope in slopes), "1 / M, not M^-1/2"
    assert constants == tuple(sorted(constants)), "the colder, the later"
    picture(args.output, sizes, error, constants)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
