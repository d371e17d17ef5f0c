"""Which functions are Mercer kernels, and what one can do with 20000 points and no Gram matrix?

Claims, all checked:
- Mercer kernels leave no negative eigenvalue beyond round-off, in float32, on handwritten digits;
- functions that look like kernels are not: a few points and weights c with c^T K c < 0 prove it, here by known values;
- on thousands of points the same question is answered without the matrix, with a bound and its probability;
- kernel ridge regression fills in a photograph from a share of its pixels, in a twentieth of the matrix's memory.

    python 09_mercer.py [--short] [--output FILE.png]
"""

import argparse
import time
import tracemalloc

import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits, load_sample_image

import nearfar as nf

k = nf.kernels
GRID = np.arange(6.0)[:, None]
MERCER = {
    "Gaussian": k.Gaussian(2.5),
    "Matern 1/2": k.Matern(2.5, nu=0.5),
    "periodic": k.Periodic(8.0, period=3.0),
    "polynomial": k.Polynomial(3),
    "cosine x (1 + linear)": k.Cosine() * k.Linear(1.0),
}


def radial(function):
    """A function of the distance, as one of a set of points on a line."""
    return lambda x: function(np.abs(x - x.T))


# name: (function of points, points, weights (None: the eigenvector), c^T K c)
NOT_MERCER = {
    "tanh(xy)": (k.Sigmoid(1.0, 0.0), np.array([[1.0], [10.0]]), (1, -0.9), -0.228406),
    "tanh(xy + 1)": (k.Sigmoid(1.0, 1.0), np.array([[0.0], [0.5], [1.0], [1.5], [2.0], [3.0]]), None, -0.087297),
    "(xy - 1)^2": (k.Polynomial(2, 1.0, -1.0), GRID[:5] - 2, None, -20.0),
    "exp(-r^3)": (radial(lambda r: np.exp(-(r**3))), 0.3 * GRID[:3], (1, -2, 1), -0.175419),
    "Epanechnikov": (radial(lambda r: np.maximum(0, 1 - r**2)), 0.5 * GRID[:3], (2, -3, 2), -1.0),
    "triweight": (radial(lambda r: np.maximum(0, 1 - r**2) ** 3), 0.23 * GRID[:5], (2, -7, 10, -7, 2), -0.242622),
}


def verdicts():
    """Both tables; asserts what they say."""
    digits = (load_digits().data / 16).astype(np.float32)
    print(f"{'Mercer, by theorem':<24}{'on the digits':<24}{'min eigenvalue':>16}{'noise floor':>13}{'rank':>6}")
    for name, kernel in MERCER.items():
        report = nf.psd_report(kernel, digits[:600])
        assert k.check_mercer(kernel).verdict == "proved", name
        assert report.is_psd, name
        numbers = f"{report.min_eigenvalue:>16.2e}{report.noise_floor:>13.1e}{report.rank:>6}"
        print(f"{name:<24}{report.verdict:<24}{numbers}")
    print(f"\n{'not Mercer':<24}{'points':>7}{'c^T K c':>12}{'  most negative c, |c| = 1':<26}")
    for name, (function, x, c, expected) in NOT_MERCER.items():
        report = nf.psd_report(function, x)
        matrix, weights = function(x), report.witness if c is None else np.array(c, float)
        value = weights @ matrix @ weights
        assert report.verdict == "not_psd", name
        assert abs(value - expected) < 1e-5 * abs(expected) + 1e-6, (name, value)
        print(f"{name:<24}{len(x):>7}{value:>12.6f}{report.witness_value:>14.6f}")


def implicit(n):
    """Reports on more points than anyone stores."""
    x = np.random.default_rng(0).standard_normal((n, 3)).astype(np.float32)
    good = nf.psd_report(1.5 * k.Gaussian(2.0) + (-0.5) * k.Gaussian(2.0), x)  # no theorem is told of a difference
    bad = nf.psd_report(k.Gaussian(1.0) + (-0.01) * k.Gaussian(0.5), x)
    print(f"\n{n} points in 3 dimensions, no matrix. 1.5 k - 0.5 k:\n{good}\nGaussian(1) - 0.01 Gaussian(1/2):\n{bad}")
    assert (good.is_psd, good.method, bad.verdict) == (True, "lanczos", "not_psd")


def fill_in(step, share):
    """A photograph from some of its pixels: kernel ridge against the nearest known pixel."""
    image = load_sample_image("china.jpg")[::step, ::step].astype(np.float32) / 255
    everywhere = np.argwhere(np.ones(image.shape[:2])).astype(np.float32)
    colours = image.reshape(-1, 3)
    known = np.sort(np.random.default_rng(0).permutation(len(colours))[: int(share * len(colours))])
    x, mean = everywhere[known], colours[known].mean(0)
    begin = time.process_time()
    tracemalloc.start()
    model = nf.KernelRidge(k.Matern(12.0, nu=0.5), alpha=0.02, tol=1e-4).fit(x, colours[known] - mean)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    seconds = time.process_time() - begin
    filled = np.clip(model.predict(everywhere) + mean, 0, 1)
    nearest = colours[known][nf.knn(everywhere, x, k=1)[1][:, 0]]
    unknown = np.setdiff1d(np.arange(len(colours)), known)
    error, base = (float(np.sqrt(np.mean((z[unknown] - colours[unknown]) ** 2))) for z in (filled, nearest))
    residual, matrix = model.residuals_[-1], 4 * len(x) ** 2
    print(f"\nkernel ridge on {len(x)} pixels: {model.n_iter_} steps, residual {residual:.1e}, {seconds:.1f} s of CPU")
    print(f"memory {peak / 1e6:.0f} MB, the matrix alone {matrix / 1e6:.0f} MB (once, in float32)")
    print(f"error on the other {len(unknown)} pixels: {error:.4f}, nearest known pixel {base:.4f}")
    assert residual <= 2e-4
    assert error < 0.85 * base
    assert peak < matrix / (20 if len(x) > 10000 else 2)  # the preconditioner has 4 sqrt(N) columns
    seen = np.ones_like(colours)
    seen[known] = colours[known]
    titles = f"{len(x)} known pixels", f"nearest: {base:.3f}", f"kernel ridge: {error:.3f}", "the photograph"
    return {t: z.reshape(image.shape) for t, z in zip(titles, (seen, nearest, filled, image), strict=True)}


def picture(images, path):
    """Gram matrices on a line with the eigenvector of the least eigenvalue; the photograph below."""
    x = np.linspace(-3, 3, 61)[:, None]
    shown = {"Gaussian": k.Gaussian(1.0), "Matern 1/2": k.Matern(nu=0.5), "periodic": k.Periodic(1.0, period=2.0)}
    shown |= {name: NOT_MERCER[name][0] for name in ("tanh(xy + 1)", "Epanechnikov", "exp(-r^3)")}
    figure = Figure(figsize=(12, 6.3), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.25, 1])
    top.suptitle("Gram matrices of 61 points on a line, and c with c$^T$K c < 0 where there is one", fontsize=11)
    axes = top.subplots(2, 6, height_ratios=[3, 1])
    for (name, kernel), above, below in zip(shown.items(), *axes, strict=True):
        report = nf.psd_report(kernel, x)
        colour = "tab:green" if report.is_psd else "tab:red"
        above.imshow(kernel(x), cmap="RdBu_r", vmin=-1, vmax=1)
        verdict = "Mercer" if report.is_psd else f"c$^T$K c = {report.witness_value:.2g}"
        above.set_title(f"{name}\n{verdict}", fontsize=9, color=colour)
        if report.witness is None:
            below.text(0.5, 0.5, "none", ha="center", va="center", color=colour, transform=below.transAxes)
        else:
            below.bar(x[:, 0], report.witness, width=0.1, color=colour)
        above.axis("off")
        below.axis("off")
    for (name, image), axis in zip(images.items(), bottom.subplots(1, 4), strict=True):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(name, fontsize=9)
        axis.axis("off")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer points")
    parser.add_argument("--output", default="09_mercer.png", help="the picture")
    args = parser.parse_args()
    verdicts()
    implicit(5000 if args.short else 10000)
    picture(fill_in(4, 0.3) if args.short else fill_in(2, 0.3), args.output)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
