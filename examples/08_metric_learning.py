"""Does a learned metric help nearest neighbours? Ways to choose M in d_M(x, y)^2 = (x - y)^T M (x - y), on real data.

Claims, checked at the end:
- most of what a metric "learns" on wine is the scale of the columns: the baseline is scaled, not raw data;
- large-margin neighbours and neighbourhood components help on wine, and cost two points at most elsewhere;
- the optimum of Xing et al.'s program, proved to be one, is nearly of rank one: harmless with two or three classes,
  ruinous with ten (the digits lose more than ten points).
The time of nearfar's NCA is compared with scikit-learn's, whose objective it has.

    python 08_metric_learning.py [--short] [--output FILE.png]
"""

import argparse
import time
import warnings

import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neighbors import NeighborhoodComponentsAnalysis
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

import nearfar as nf

DATA = {"iris": load_iris, "wine": load_wine, "breast cancer": load_breast_cancer, "digits": load_digits}
SPLITS = {"iris": 10, "wine": 10, "breast cancer": 4, "digits": 2}
METRICS = {
    "scaled": FunctionTransformer,
    "whitening": lambda: PCA(whiten=True),
    "LDA": LinearDiscriminantAnalysis,
    "NCA (scikit-learn)": lambda: NeighborhoodComponentsAnalysis(random_state=0),
    "NCA": nf.NCA,
    "LMNN": nf.LMNN,
    "ITML": lambda: nf.ITML(random_state=0),
    "MMC": nf.MMC,
    "MMC diagonal": lambda: nf.MMC(diagonal=True),
}


def load(name):
    """Points and labels; the digits in their 30 first principal components, of which the first has variance one."""
    points, labels = DATA[name](return_X_y=True)
    if name == "digits":
        points = PCA(30).fit_transform(points)
        points /= points[:, 0].std()
    return points, labels


def accuracy(train, train_labels, test, test_labels):
    """Of the majority of the three nearest neighbours."""
    _, neighbors = nf.knn(np.ascontiguousarray(test), np.ascontiguousarray(train), k=3)
    votes = train_labels[neighbors]
    agreement = (votes[:, :, None] == votes[:, None, :]).sum(-1)
    chosen = np.take_along_axis(votes, agreement.argmax(1)[:, None], 1)[:, 0]
    return 100 * np.mean(chosen == test_labels)


def compare(name, splits):
    """Accuracies (split, method), seconds of fitting by method, and the last fitted learners."""
    points, labels = load(name)
    rows, seconds = [], dict.fromkeys(METRICS, 0.0)
    for split in range(splits):
        x, x_test, y, y_test = train_test_split(points, labels, test_size=0.3, stratify=labels, random_state=split)
        scaler = StandardScaler(with_std=name != "digits").fit(x)  # pixels have one unit already
        row, learners = [accuracy(x, y, x_test, y_test)], {}
        for method, make in METRICS.items():
            learners[method] = make()
            begin = time.process_time()
            learners[method].fit(scaler.transform(x), y)
            seconds[method] += time.process_time() - begin
            learn = make_pipeline(scaler, learners[method])
            row.append(accuracy(learn.transform(x), y, learn.transform(x_test), y_test))
        rows.append(row)
    return np.array(rows), seconds, learners


def picture(path):
    """Wine under each metric: the two directions that spread most."""
    points, labels = load("wine")
    points = StandardScaler().fit_transform(points)
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    figure.suptitle("wine, 178 rows: the two widest directions under each metric")
    shown = [method for method in METRICS if method not in ("NCA (scikit-learn)",)]
    for axis, method in zip(figure.subplots(2, 4).ravel(), shown, strict=True):
        mapped = METRICS[method]().fit(points, labels).transform(points)
        rank = min(2, np.linalg.matrix_rank(mapped - mapped.mean(0)))
        plane = PCA(rank).fit_transform(mapped)
        if rank == 1:  # spread by class, so that points do not hide each other
            plane = np.column_stack([plane[:, 0], labels + np.random.default_rng(0).uniform(-0.3, 0.3, len(labels))])
        for c in range(3):
            axis.scatter(*plane[labels == c].T, s=10, color=f"C{c}", alpha=0.8, lw=0)
        axis.set(title=method + (": rank one, classes stacked" if rank == 1 else ""), xticks=[], yticks=[])
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="one split each, breast cancer left out")
    parser.add_argument("--output", default="08_metric_learning.png", help="the picture")
    args = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)  # scikit-learn's NCA on its 50 iterations

    names = [name for name in DATA if not (args.short and name == "breast cancer")]
    found = {name: compare(name, 1 if args.short else SPLITS[name]) for name in names}
    print("3-NN accuracy in % (mean, +- standard deviation over splits), 70 % of the rows to learn from\n")
    print(f"{'':<20}" + "".join(f"{name:>17}" for name in names))
    for k, method in enumerate(["raw", *METRICS]):
        cells = (f"{rows[:, k].mean():.2f} +- {rows[:, k].std():.2f}" for rows, _, _ in found.values())
        print(f"{method:<20}" + "".join(f"{cell:>17}" for cell in cells))
    solved = {name: learners["MMC"] for name, (_, _, learners) in found.items()}
    facts = (f"{name}: rank {len(mmc.components_)}, gap to the optimum {mmc.gap_:.0e}" for name, mmc in solved.items())
    print("\nMMC: " + "; ".join(facts))

    columns = {method: k for k, method in enumerate(["raw", *METRICS])}
    mean = {name: dict(zip(columns, rows.mean(0), strict=True)) for name, (rows, _, _) in found.items()}
    seconds = found["digits"][1]
    ratio = seconds["NCA (scikit-learn)"] / seconds["NCA"]
    print(f"NCA on the digits (30 columns): {ratio:.1f} times as fast as scikit-learn's, CPU time of all threads")

    assert mean["wine"]["scaled"] > mean["wine"]["raw"] + 10, "scaling is most of the gain on wine"
    for name in names:
        for method in ("NCA", "LMNN"):
            assert mean[name][method] > mean[name]["scaled"] - 2, (name, method)
    assert max(mean["wine"]["NCA"], mean["wine"]["LMNN"]) >= mean["wine"]["scaled"], "a learned metric helps on wine"
    for name, mmc in solved.items():
        assert mmc.gap_ < 1e-5, f"{name}: not the optimum"
        assert len(mmc.components_) <= 4, f"{name}: not of low rank"
    assert mean["digits"]["MMC"] < mean["digits"]["scaled"] - 10, "MMC projects ten classes on a few lines"
    picture(args.output)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
