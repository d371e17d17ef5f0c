"""What the gallery's encoders of handwritten digits share: a small network, the loop, views whose parameters are known.

Data, split, views and probes are those of `nearfar.demo`; a perceptron stands in for its convolutions: an encoder
takes seconds, so that a sweep of them takes a minute.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from _training import train as minimise
from sklearn.linear_model import Ridge
from torch import nn

import nearfar as nf
from nearfar.demo import TEMPERATURE, augment, features_of


def views(images, strength=1.0):
    """A random view of each image, and what was done to it: (n, 1, 8, 8) and (n, 3), rotation and two shifts.

    At strength 1: up to 25 degrees and one pixel, and noise of standard deviation 0.1.
    """
    done = strength * (2 * torch.rand(len(images), 3) - 1)
    angle, shift = math.radians(25) * done[:, 0], done[:, 1:] / 4
    cos, sin = torch.cos(angle), torch.sin(angle)
    affine = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(-1, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    seen = F.grid_sample(images, grid, align_corners=False)
    return seen + 0.1 * strength * torch.randn_like(seen), done


def perceptron(*widths):
    """Linear layers with batch normalisation and ReLU between them: (n, ...) -> (n, widths[-1])."""
    layers = [nn.Flatten(), nn.Linear(*widths[:2])]
    for width, after in itertools.pairwise(widths[1:]):
        layers += [nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, after)]
    return nn.Sequential(*layers)


def nt_xent(z1, z2, _):
    """The plainest loss for `train`."""
    return nf.nt_xent_loss(z1, z2, temperature=TEMPERATURE)


def train(network, images, loss, *, steps, view=augment, batch=256):
    """Steps of AdamW on `loss(z1, z2, rows)`: embeddings of two views of a batch, and which images those are."""

    def draw():
        rows = torch.randperm(len(images))[:batch]
        both = torch.cat([view(images[rows]), view(images[rows])])
        return loss(*network(both).chunk(2), rows)

    minimise(draw, steps, network.train(), rate=4e-3, warm_up=0.1)
    return network.eval()


def parameters_explained(encoder, digits, repeats=4):
    """R^2, on views of held-out images, of a linear map from features to what was done to the image: (3,)."""
    parts = []
    for images in (digits.train, digits.test):
        seen, done = views(images.repeat(repeats, 1, 1, 1))
        parts += [features_of(encoder, seen).numpy(), done.numpy()]
    features, done, other, truth = parts
    scale = features.std(0) + 1e-6 * features.std()
    error = truth - Ridge(1.0).fit(features / scale, done).predict(other / scale)
    return 1 - (error**2).mean(0) / truth.var(0)
