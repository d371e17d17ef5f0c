"""Predict the future by contrast (CPC, van den Oord et al., 2018): what does the code keep, and how much of it?

    I(past; x_k) >= log K - InfoNCE(features of the past, features of x_k),    k steps ahead, K sequences

Sequences have a hidden state, a Gaussian AR(1), and are seen in noise: all is known in closed form. Claims, checked:
- CPC reaches the information of the past about the future from below, of one frame and of sixteen, at every k;
- a state that is never seen is found: four numbers explain as much of it as the Kalman filter, the most that the past
  can; those of a linear auto-encoder of the past explain much less, being spent on the middle of it;
- being predictable is not enough: beside numbers that stay the same through a sequence, the state is not kept.

    python 13_predict_future.py [--short] [--output FILE.png]
"""

import argparse

import numpy as np
import torch
from _training import network, train
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression
from torch import nn

import nearfar as nf

PAST, STEPS, DIM, RHO, NOISE, PAIRS = 16, (1, 2, 4, 8), 4, 0.95, 1.0, 512


def sequences(n, constant=0.0):
    """Frames (n, PAST + farthest step, 2 DIM): the state in noise, and numbers of the sequence; the state at PAST."""
    states = [torch.randn(n, DIM)]
    for _ in range(PAST + STEPS[-1] - 1):
        states.append(RHO * states[-1] + (1 - RHO**2) ** 0.5 * torch.randn(n, DIM))
    states = torch.stack(states, 1)
    beside = constant * torch.randn(n, 1, DIM).expand_as(states)
    return torch.cat([states + NOISE * torch.randn_like(states), beside], 2), states[:, PAST - 1]


def uncertainty(length):
    """Variance of the state given so many frames: the Kalman filter."""
    before = 1.0
    for _ in range(length):
        after = before * NOISE**2 / (before + NOISE**2)
        before = RHO**2 * after + 1 - RHO**2
    return after


def information(length, k):
    """I(so many frames; the one k steps after them) in nats."""
    error = RHO ** (2 * k) * uncertainty(length) + 1 - RHO ** (2 * k)
    return DIM / 2 * np.log((1 + NOISE**2) / (error + NOISE**2))


class Predictive(nn.Module):
    """A code of DIM numbers for the last `length` frames of the past; scores of later frames, bilinear in features."""

    def __init__(self, length, constant=0.0):
        super().__init__()
        self.length, self.constant = length, constant
        self.past, self.code = nn.GRU(2 * DIM, 32, batch_first=True), nn.Linear(32, DIM)
        self.key, self.ahead = network(2 * DIM, 64, 16), nn.ModuleList(nn.Linear(DIM, 16) for _ in STEPS)

    def forward(self, frames):
        return self.code(self.past(frames[:, PAST - self.length : PAST])[1][0])

    def over_steps(self, function):
        """`function` (a loss, a bound) of new sequences, for every k."""
        frames = sequences(PAIRS, self.constant)[0]
        code, keys = self(frames), self.key(frames[:, [PAST + k - 1 for k in STEPS]]).unbind(1)
        pairs = [(ahead(code), key.contiguous()) for ahead, key in zip(self.ahead, keys, strict=True)]
        return torch.stack([function(*pair, temperature=1.0, normalize=False) for pair in pairs])

    def learn(self, steps):
        train(lambda: self.over_steps(nf.info_nce_loss).sum(), steps, self, rate=1e-2, warm_up=0.1)
        return self.requires_grad_(False)

    def bounds(self, batches):
        """Mean and standard error of the bound, for every k."""
        found = torch.stack([self.over_steps(nf.mi_lower_bound) for _ in range(batches)])
        return found.mean(0).numpy(), (found.std(0) / batches**0.5).numpy()


def explained(code, state):
    """R^2 of a linear map from code to state, fitted on the first half, on the second."""
    half = len(code) // 2
    return LinearRegression().fit(code[:half], state[:half]).score(code[half:], state[half:])


def auto_encoder():
    """R^2 of the state for the principal components of the past, one for each of its coordinates: exactly."""
    when = np.arange(PAST)
    value, vector = np.linalg.eigh(RHO ** abs(when[:, None] - when) + NOISE**2 * np.eye(PAST))
    return (vector[:, -1] @ RHO ** (PAST - 1 - when)) ** 2 / value[-1]


def picture(bounds, rows, path):
    """Bounds over k beside the information; how much of the state is found."""
    left, right = (figure := Figure(figsize=(10, 3.4), layout="constrained")).subplots(1, 2)
    k = np.linspace(1, STEPS[-1], 50)
    for colour, (length, (mean, error)) in zip(("C0", "C3"), bounds.items(), strict=True):
        left.plot(k, information(length, k), color=colour, label=f"information, frames: {length}")
        left.errorbar(STEPS, mean, 2 * error, fmt="o", color=colour, label=f"CPC, frames: {length}")
    left.set(xlabel="steps ahead", ylabel="nats", ylim=(0, None), title="information about the future")
    right.barh(list(rows), [measured for _, measured in rows.values()], color="0.7")
    right.plot([exact for exact, _ in rows.values()], range(len(rows)), "k|", markersize=18, label="exact")
    right.set(title="$R^2$ of the hidden state, codes of 4 numbers", xlim=(0, 1))
    for axis in (left, right):
        axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer steps and sequences")
    parser.add_argument("--output", default="13_predict_future.png", help="the picture")
    args = parser.parse_args()
    steps, batches, n = (100, 40, 4000) if args.short else (500, 400, 40000)
    torch.manual_seed(0)
    models = {length: Predictive(length).learn(steps) for length in (1, PAST)}
    bounds = {length: model.bounds(batches) for length, model in models.items()}
    print("nats" + "".join(f"{f'I, {length} frames':>16}{'CPC':>20}" for length in bounds))
    for i, k in enumerate(STEPS):
        cells = (f"{information(n, k):>16.4f}{f'{m[i]:.4f} +- {e[i]:.4f}':>20}" for n, (m, e) in bounds.items())
        print(f"{'k = ' + str(k):<4}" + "".join(cells))

    frames, state = sequences(n)
    past, (other, hidden) = frames[:, :PAST, :DIM], sequences(n, 1.0)
    rows = {
        "the last frame": (1 - uncertainty(1), explained(past[:, -1], state)),
        "auto-encoder": (auto_encoder(), explained(PCA(DIM).fit_transform(past.flatten(1)), state)),
        "CPC, 1 frame": (1 - uncertainty(1), explained(models[1](frames), state)),
        "CPC": (1 - uncertainty(PAST), explained(models[PAST](frames), state)),
        "CPC, constants beside": (0.0, explained(Predictive(PAST, 1.0).learn(steps)(other), hidden)),
    }
    print(f"\n{'R^2 of the state, 4 numbers':<28}{'exact':>10}{'measured':>12}")
    for name, (exact, measured) in rows.items():
        print(f"{name:<28}{exact:>10.4f}{measured:>12.4f}")
    for length, (mean, error) in bounds.items():
        truth = np.array([information(length, k) for k in STEPS])
        assert (mean < truth + 4 * error).all(), "a lower bound"
        assert (mean > (0.8 if args.short else 0.95) * truth).all(), "and a tight one"
    assert all(abs(exact - measured) < (0.1 if args.short else 0.02) for exact, measured in rows.values())
    assert rows["auto-encoder"][1] < rows["CPC"][1] - 0.1, "what predicts is not what reconstructs"
    picture(bounds, rows, args.output)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
