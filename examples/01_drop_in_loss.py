"""An existing torch loop, one line changed: the same training, in less time and memory.

    - loss = dense_nt_xent(z1, z2, temperature=0.5)    # a 2N x 2N matrix, a mask, a cross-entropy
    + loss = nf.nt_xent_loss(z1, z2, temperature=0.5)

    L = mean_i -s_{i p(i)} + log sum_{j != i} e^{s_ij},  s = cosines / temperature  (SimCLR, Chen et al. 2020, eq. 1)

Claims, checked at the end for an encoder of handwritten digits:
- the loss curve is the same but for the rounding of float32, which training amplifies: by how much, the dense loss
  itself tells when its sums are taken in another order;
- the matrix, its copies and their gradients are gone, but for scores that are kept while they fit 32 MiB, whatever the
  batch. Both losses are measured in the same loop, in turns, on the same projections: time of the processor, and how
  far the resident memory rises. Time is printed, memory is checked.

    python 01_drop_in_loss.py [--short] [--output FILE.png]
"""

import argparse
import ctypes
import time

import numpy as np
import torch
from _digits import perceptron
from matplotlib.figure import Figure

import nearfar as nf
from nearfar.bench.memory import peak, start_peak
from nearfar.demo import Digits, augment, dense_nt_xent

TEMPERATURE, DIM = 0.5, 64
TOLERANCE = 1e-3  # relative, between the two curves at any step; at the first one, before training amplifies, 1e-6


def in_another_order(z1, z2, temperature):
    """The dense loss, with the terms of every inner product summed backwards: other roundings, nothing else."""
    return dense_nt_xent(z1.flip(1), z2.flip(1), temperature)


def pretrain(loss_function, images, batch, steps, observe=None):
    """Somebody's loop. Returns the loss curve."""
    torch.manual_seed(0)
    network = perceptron(64, 256, 256, DIM)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        rows = torch.randperm(len(images))[:batch]
        z1, z2 = network(torch.cat([augment(images[rows]), augment(images[rows])])).chunk(2)
        loss = loss_function(z1, z2, temperature=TEMPERATURE)  # the line
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if observe:
            observe(z1, z2)
    return np.array(losses)


# glibc keeps freed memory for what comes next: give it back first, so that the rise is what a call needs.
give_back = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)


class Turns:
    """Milliseconds and bytes of both losses, forward and backward, on copies of the same projections, in turns."""

    def __init__(self):
        self.functions = {"dense": dense_nt_xent, "fused": nf.nt_xent_loss}
        self.ms = {name: [] for name in self.functions}
        self.bytes = {name: [] for name in self.functions}

    def __call__(self, z1, z2):
        for name, function in self.functions.items():
            own = [z.detach().clone().requires_grad_() for z in (z1, z2)]
            give_back(0)
            before, begin = start_peak(), time.process_time()
            function(*own, temperature=TEMPERATURE).backward()
            self.ms[name].append(1e3 * (time.process_time() - begin))
            self.bytes[name].append(peak() - before)
        self.functions = dict(reversed(self.functions.items()))


def picture(path, curves, costs, batch):
    """The curves on one another, their differences, time and memory by batch."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    curve, difference, bars, memory = figure.subplots(1, 4)
    curve.plot(curves["dense"], lw=4, color="0.8", label="dense")
    curve.plot(curves["fused"], lw=1, color="C0", label="fused")
    curve.set(title=f"NT-Xent, {2 * batch} views a step", xlabel="step", ylabel="loss")
    for name, color in (("fused", "C0"), ("dense, other order", "0.5")):
        gap = np.abs(curves[name] - curves["dense"])
        difference.semilogy(np.maximum(gap, 1e-8), lw=1, color=color, label=f"|{name} - dense|")
    difference.set(title="rounding, amplified by training", xlabel="step")
    for axis, kind, title in ((bars, 0, "CPU ms, forward and backward"), (memory, 1, "peak memory in MB")):
        for side, name, color in ((-0.2, "dense", "0.7"), (0.2, "fused", "C0")):
            values = [cost[name][kind] for cost in costs.values()]
            axis.bar(np.arange(len(costs)) + side, values, 0.4, color=color, label=name)
        axis.set_xticks(range(len(costs)), [2 * n for n in costs])
        axis.set(title=title, xlabel="views a step")
    for axis in (curve, difference, bars, memory):
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer steps, smaller batches")
    parser.add_argument("--output", default="01_drop_in_loss.png", help="the picture")
    args = parser.parse_args()
    images = Digits.load().train
    batch, steps = (256, 15) if args.short else (512, 150)
    losses = {"dense": dense_nt_xent, "fused": nf.nt_xent_loss, "dense, other order": in_another_order}
    curves = {name: pretrain(loss, images, batch, steps) for name, loss in losses.items()}
    print(f"{'step':>6}" + "".join(f"{name:>20}" for name in curves))
    for step in np.unique(np.linspace(0, steps - 1, 6).astype(int)):
        print(f"{step:>6}" + "".join(f"{curve[step]:>20.6f}" for curve in curves.values()))
    gap, rounding = (np.abs(curves[name] - curves["dense"]).max() for name in ("fused", "dense, other order"))
    print(f"largest difference from dense: fused {gap:.1e}, the dense loss in another order {rounding:.1e}")

    assert abs(curves["fused"][0] / curves["dense"][0] - 1) < 1e-6
    assert gap < TOLERANCE * curves["dense"].min(), gap
    assert gap < 20 * rounding, "more than rounding"

    costs = {}
    print(
        f"\n{'views':>6}{'matrix MB':>12}{'dense MB':>10}{'fused MB':>10}{'dense ms':>10}{'fused ms':>10}{'ratio':>8}"
    )
    for size in (256, 512) if args.short else (256, 512, 1024):
        turns = Turns()
        pretrain(nf.nt_xent_loss, images, size, 4 if args.short else 30, turns)
        cost = {name: (np.median(turns.ms[name]), np.median(turns.bytes[name]) / 1e6) for name in ("dense", "fused")}
        costs[size], (slow, big), (fast, small) = cost, cost["dense"], cost["fused"]
        matrix = 4 * (2 * size) ** 2 / 1e6
        cells = f"{2 * size:>6}{matrix:>12.1f}{big:>10.1f}{small:>10.1f}{slow:>10.2f}{fast:>10.2f}{slow / fast:>8.2f}"
        print(cells)
        assert big > 3 * matrix, "the matrix and its copies"
        assert small < matrix, "not even one"
    print(f"medians of memory and CPU time, {torch.get_num_threads()} threads; the machine may have other work")

    picture(args.output, curves, costs, batch)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
