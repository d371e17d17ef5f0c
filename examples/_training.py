"""What the examples with small networks share."""

import itertools

import torch
from torch import nn


def network(*widths):
    """A perceptron of these widths, linear at the end."""
    layers = [m for pair in itertools.pairwise(widths) for m in (nn.Linear(*pair), nn.GELU())]
    return nn.Sequential(*layers[:-1])


def train(loss, steps, *modules, rate=3e-3, warm_up=0.3):
    """Minimise what `loss()` draws, over the modules' parameters; the rate rises for a share `warm_up` of the steps."""
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=warm_up)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()


def some(rows, n):
    """So many rows, drawn with replacement."""
    return rows[torch.randint(len(rows), (n,))]
