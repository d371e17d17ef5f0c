"""Guess hidden tokens, or copy all of them? Masked-token prediction (BERT, Devlin et al., 2019) on discrete codes.

    masked  min E -log p(hidden tokens | the others),    copying  min E -log p(tokens | the tokens)

A perceptron reads 16 tokens: a Markov chain, of which everything is known; and digits, whose 2 x 2 patches
become codes of k-means, as image tokens do in BEiT (Bao et al., 2022). Claims, checked at the end:
- of the chain, the error per hidden token reaches that of the exact posterior given what is left (forward and backward
  messages); who learnt to copy has no error on what it sees, and guesses what is hidden worse than without looking;
- of digits, hidden codes are guessed far better than from how often each occurs in its place, and with five labels a
  class, features from guessing beat those from copying, and the codes they are made of.

    python 12_masked_tokens.py [--short] [--output FILE.png]
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from _training import network, some, train
from matplotlib.figure import Figure
from torch import nn

import nearfar as nf
from nearfar.demo import Digits, judge

LENGTH, CODES, WIDTH, HIDDEN, BATCH = 16, 32, 16, 0.3, 256
CHAIN = 0.6 * torch.eye(4) + 0.25 * torch.eye(4).roll(1, 1) + 0.15 / 4  # p(next | state): stay, go round, or jump


class Reader(nn.Module):
    """What is read -> tokens (n, LENGTH) -> 128 features; `guess` makes logits (n, LENGTH, codes) of those."""

    def __init__(self, codes, read=None):
        super().__init__()
        self.read, self.unseen, embed = read, codes, nn.Embedding(codes + 1, WIDTH)
        self.features = nn.Sequential(embed, nn.Flatten(), network(LENGTH * WIDTH, 256, 128), nn.GELU())
        self.guess = nn.Sequential(network(128, 256, LENGTH * codes), nn.Unflatten(1, (LENGTH, codes)))

    def forward(self, images):
        return self.features(self.read(images))

    def error(self, tokens, hidden):
        """Mean -log p of the hidden tokens; of all where none is hidden."""
        counted = hidden if hidden.any() else ~hidden
        logits = self.guess(self.features(tokens.masked_fill(hidden, self.unseen)))
        return F.cross_entropy(logits[counted], tokens[counted])

    def learn(self, tokens, share, steps):
        """To guess a hidden share of the tokens, or, of share 0, to copy."""

        def loss():
            return self.error(some(tokens, BATCH), torch.rand(BATCH, LENGTH) < share)

        train(loss, steps, self, rate=6e-3, warm_up=0.1)
        return self


def chain(n):
    """Sequences of the chain (n, LENGTH), begun anywhere: every state is as frequent as any other."""
    tokens = [torch.randint(len(CHAIN), (n,))]
    for _ in range(LENGTH - 1):
        tokens.append(torch.multinomial(CHAIN[tokens[-1]], 1)[:, 0])
    return torch.stack(tokens, 1)


def least_error(tokens, hidden):
    """Mean -log p(hidden token | all that are seen) of the chain, exactly: messages from both sides."""
    seen = F.one_hot(tokens, len(CHAIN)).float().masked_fill(hidden[..., None], 1.0)
    left, right = [torch.ones_like(seen[:, 0])], [torch.ones_like(seen[:, 0])]
    for t in range(LENGTH - 1):
        left.append((left[-1] * seen[:, t]) @ CHAIN)
        right.append((right[-1] * seen[:, LENGTH - 1 - t]) @ CHAIN.T)
    posterior = F.normalize(torch.stack(left, 1) * torch.stack(right[::-1], 1), p=1, dim=2)
    return float(-posterior.gather(2, tokens[..., None])[..., 0][hidden].log().mean())


def frequency_error(tokens, test, hidden, codes):
    """Mean -log of how often a hidden token occurs in its place."""
    often = F.normalize(F.one_hot(tokens, codes).sum(0) + 1.0, p=1, dim=1)  # (LENGTH, codes)
    return float(-often[torch.arange(LENGTH), test][hidden].log().mean())


def patches(images):
    """(16 n, 4): what becomes a token."""
    return F.unfold(images, 2, stride=2).transpose(1, 2).reshape(-1, 4)


def picture(nats, few, path):
    """Bars of both tables."""
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    tables = {f"{name}: nats per hidden token": values for name, values in nats.items()} | {"5 labels a class, %": few}
    for axis, (title, values) in zip(figure.subplots(1, 3), tables.items(), strict=True):
        order = sorted(values, key=values.get)
        axis.barh(order, [values[n] for n in order], color=["tab:red" if "masked" in n else "0.6" for n in order])
        axis.bar_label(axis.containers[0], fmt="%.2f", padding=2)
        axis.set(title=title, xlim=(0.9 * min(values.values()) if "%" in title else 0, 1.15 * max(values.values())))
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer steps, one seed")
    parser.add_argument("--output", default="12_masked_tokens.png", help="the picture")
    args = parser.parse_args()
    steps, seeds = (150, 1) if args.short else (500, 3)
    torch.manual_seed(0)
    tokenizer = nf.KMeans(CODES, random_state=0).fit(patches((digits := Digits.load()).train))

    def read(images):
        return tokenizer.encode(patches(images)).view(-1, LENGTH)

    nats, few = {}, {}
    data = {"chain": (chain(20000), chain(2000), len(CHAIN)), "digits": (read(digits.train), read(digits.test), CODES)}
    for name, (tokens, test, codes) in data.items():
        hidden = torch.rand(test.shape) < HIDDEN
        nats[name] = {"frequencies": frequency_error(tokens, test, hidden, codes)}
        readers = {
            f"{how} tokens": [Reader(codes, read).learn(tokens, share, steps) for _ in range(seeds)]
            for how, share in (("copied", 0.0), ("masked", HIDDEN))
        }
        with torch.no_grad():
            for how, several in readers.items():
                nats[name][how] = float(np.mean([reader.error(test, hidden) for reader in several]))
        if name == "chain":
            nats[name]["exact"] = least_error(test, hidden)
    print(f"{'nats per hidden token':<24}{'chain':>12}{'digits':>12}")
    for name in ("frequencies", "copied tokens", "masked tokens", "exact"):
        print(f"{name:<24}" + "".join(f"{found[name]:>12.3f}" for found in nats.values() if name in found))
    one_hot = nn.Flatten()
    one_hot.register_forward_pre_hook(lambda _, images: F.one_hot(read(*images), CODES).float())
    readers |= {"random weights": [Reader(CODES, read)], "codes, one-hot": [one_hot], "pixels": [nn.Flatten()]}
    print(f"\n{'digits, %':<24}{'all labels':>18}{'5 labels a class':>18}{'5-NN':>18}")
    for name, several in readers.items():
        rows = 100 * np.array([list(judge(encoder, digits)[0].values()) for encoder in several])
        print(f"{name:<24}" + "{:>18}{:>18}{:>18}".format(*(f"{r.mean():.2f} +- {r.std():.2f}" for r in rows.T)))
        few[name] = rows[:, 1].mean()
    known = [nats["chain"]["frequencies"] - nats["chain"][name] for name in ("masked tokens", "exact")]
    assert (0.7 if args.short else 0.85) < known[0] / known[1] < 1.005, "most of what can be known"
    for found in nats.values():
        assert found["masked tokens"] < found["frequencies"] - 0.2, "a token is told from the others"
        assert found["copied tokens"] > found["frequencies"], "who copies has not learnt to"
    assert few["masked tokens"] > max(few["copied tokens"], few["codes, one-hot"]) + 0.5, "features worth having"
    picture(nats, few, args.output)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
