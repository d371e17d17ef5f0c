"""Predict what is hidden, or copy what is seen? Features of digits by what the encoder was trained for.

    masked prediction  min E |m (x - g(f((1 - m) x)))|^2,    copying  min E |x - g(f(x))|^2,    m draws what is hidden

Claims, checked at the end:
- linear, pixels kept with probability q: the best map is W = q C (q^2 C + q (1 - q) diag C)^-1, C the covariance. For
  q = 1 it is the identity, which has learnt nothing; for q < 1 it must use what pixels have to do with each other;
- with five labels a class, features that were trained to predict hidden pixels beat those trained to copy, whether the
  code is wide or a bottleneck; with all labels, or by neighbours, they do not;
- He et al. (Masked Autoencoders, 2022) hide 75 % of a photograph: of an 8 x 8 image that is too much;
- a pretext task does not help by itself: which of four rotations was applied (Gidaris et al., 2018) is told from so
  little of a digit that the features are worse than those of random weights.

    python 07_masked_prediction.py [--short] [--output FILE.png]
"""

import argparse
import functools

import numpy as np
import torch
import torch.nn.functional as F
from _training import network, some, train
from matplotlib.figure import Figure
from torch import nn

from nearfar.demo import Digits, judge


def linear(images):
    """The relative error of the linear masked auto-encoder, from the formula and from drawn masks."""
    torch.manual_seed(0)
    x = (images - images.mean(0)).flatten(1).double()
    c = x.T @ x / len(x)
    print(f"{'linear, kept':<24}{'closed form':>18}{'drawn':>16}")
    for q in (1.0, 0.75, 0.25):
        w = q * c @ torch.linalg.pinv(q * q * c + q * (1 - q) * c.diag().diag(), rtol=1e-12)
        exact = 1 - q * torch.trace(w @ c) / torch.trace(c)
        drawn = (
            np.mean([float(((x - x * (torch.rand_like(x) < q) @ w.T) ** 2).sum()) for _ in range(10)]) / (x**2).sum()
        )
        print(f"{q:<24}{exact:>18.4f}{drawn:>16.4f}")
        assert abs(drawn - exact) < (0.003 if q < 1 else 1e-9), q


def copy(encoder, decoder, x):
    """Plain auto-encoding."""
    return (x.flatten(1) - decoder(encoder(x))).square().mean()


def masked(share, patch):
    """Only what is hidden counts."""

    def loss(encoder, decoder, x):
        hidden = F.interpolate((torch.rand(len(x), 1, 8 // patch, 8 // patch) < share).float(), scale_factor=patch)
        return (hidden.flatten(1) * (x.flatten(1) - decoder(encoder(x * (1 - hidden))))).square().sum() / hidden.sum()

    return loss


def rotation(encoder, decoder, x):
    """A pretext task: by how many right angles was it turned?"""
    turned = torch.cat([x.rot90(k, (2, 3)) for k in range(4)])
    return F.cross_entropy(decoder(encoder(turned)), torch.arange(4).repeat_interleave(len(x)))


OBJECTIVES = {  # widths of the decoder, loss
    "masked pixels, 25 %": ((128, 256, 64), masked(0.25, 1)),
    "copy, code of 128": ((128, 256, 64), copy),
    "copy, code of 32": ((128, 32, 256, 64), copy),
    "copy, code of 10": ((128, 10, 256, 64), copy),
    "masked pixels, 75 %": ((128, 256, 64), masked(0.75, 1)),
    "masked patches, 50 %": ((128, 256, 64), masked(0.5, 2)),
    "which rotation": ((128, 64, 4), rotation),
    "random weights": (None, None),
}


def compare(digits, names, seeds, steps):
    """Prints accuracies; returns those of five labels a class, and the first network of the first objective."""
    few, shown = {}, None
    print(f"\n{'digits, %':<24}{'5 labels a class':>18}{'all labels':>16}{'5-NN':>16}")
    for name in names:
        rows = []
        widths, loss = OBJECTIVES[name]
        for seed in range(seeds):
            torch.manual_seed(seed)
            encoder = nn.Sequential(nn.Flatten(), network(64, 256, 128), nn.GELU())
            if loss is not None:
                decoder = network(*widths)
                draw = functools.partial(lambda f, e, d: f(e, d, some(digits.train, 256)), loss, encoder, decoder)
                train(draw, steps, encoder, decoder)
                shown = shown or (encoder, decoder)
            accuracies, _ = judge(encoder, digits)
            rows.append([100 * accuracies[key] for key in ("few", "probe", "knn")])
        cells = (f"{r.mean():.2f} +- {r.std():.2f}" for r in np.array(rows).T)
        print("{:<24}{:>18}{:>16}{:>16}".format(name, *cells))
        few[name] = float(np.mean(rows, 0)[0])
    return few, shown


def picture(few, encoder, decoder, digits, path):
    """The bars of the table, and what the masked auto-encoder makes of held-out digits."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.2, 1])
    axis = left.subplots()
    order = sorted(few, key=few.get)
    colours = {"mask": "tab:red", "copy": "tab:blue", "whic": "tab:green", "rand": "0.6"}
    axis.barh(order, [few[name] for name in order], color=[colours[name[:4]] for name in order])
    axis.set(xlim=(min(few.values()) - 3, max(few.values()) + 2), title="accuracy in %, five labels a class")
    axis.spines[["top", "right"]].set_visible(False)
    torch.manual_seed(1)
    x = digits.test[:8]
    hidden = (torch.rand(x.shape) < 0.25).float()
    with torch.no_grad():
        guess = decoder(encoder(x * (1 - hidden))).view_as(x)
    rows = {"seen": x.where(hidden == 0, torch.nan), "predicted": torch.where(hidden > 0, guess, x), "truth": x}
    right.suptitle("held-out digits, 25 % of the pixels hidden", fontsize=10)
    for line, (name, images) in zip(right.subplots(3, 8), rows.items(), strict=True):
        for axis, image in zip(line, images[:, 0], strict=True):
            axis.imshow(image, cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[], facecolor="tab:orange")
        line[0].set_ylabel(name)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="two objectives, one seed")
    parser.add_argument("--output", default="07_masked_prediction.png", help="the picture")
    args = parser.parse_args()
    digits = Digits.load()
    linear(digits.train)
    names = list(OBJECTIVES)[: 2 if args.short else None]
    few, shown = compare(digits, names, *((1, 300) if args.short else (2, 1000)))
    copied = {name: value for name, value in few.items() if name.startswith("copy")}
    assert few["masked pixels, 25 %"] > max(copied.values()) + 0.5, "prediction beats copying"
    if not args.short:
        assert few["masked pixels, 25 %"] > few["masked pixels, 75 %"], "75 % is too much here"
        assert few["which rotation"] < few["random weights"], "a pretext task need not help"
    picture(few, *shown, digits, args.output)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
