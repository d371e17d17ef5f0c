"""float32 scores on a Hopper GPU by plain sums and by three products of tf32 (NEARFAR_CUDA_SPLIT), one line each: the
largest error against float64 of some rows, then milliseconds. `tests/gpu.sh` runs this; there is nothing to see elsewhere.
"""

import os

import torch

import nearfar as nf


def points(n, d, seed):
    """The same every time, away from the origin."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(n, d, device="cuda", generator=generator) + 3


def milliseconds(f, repeats=5):
    """The least of some runs."""
    f()
    least = float("inf")
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        f()
        end.record()
        end.synchronize()
        least = min(least, begin.elapsed_time(end))
    return least


def squares(x, y):
    """Squared distances of the first rows, in float64."""
    return torch.cdist(x[:ROWS].double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist") ** 2


def loss_and_grad(x, y):
    """InfoNCE of unit rows: the gradient's first rows."""
    query = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(nf.info_nce_loss(query, y, temperature=0.1), query)
    return grad[:ROWS]


def exact_grad(x, y):
    """The same by its formula."""
    query, key = (torch.nn.functional.normalize(z.double(), dim=1) for z in (x[:ROWS], y))
    weights = torch.softmax(10 * query @ key.T, 1)
    weights[torch.arange(ROWS), torch.arange(ROWS)] -= 1
    grad = 10 * weights @ key / len(x)
    grad -= query * (grad * query).sum(1, keepdim=True)
    return grad / x[:ROWS].double().norm(dim=1, keepdim=True)


ROWS = 64
CASES = {
    "cdist 16384 x 128": (16384, 16384, 128, nf.cdist, lambda r: r[:ROWS], lambda x, y: squares(x, y).sqrt()),
    "cdist 16384 x 768": (16384, 16384, 768, nf.cdist, lambda r: r[:ROWS], lambda x, y: squares(x, y).sqrt()),
    "knn 10 of 65536 x 128": (
        65536, 65536, 128, lambda x, y: nf.knn(x, y, 10), lambda r: r[0][:ROWS],
        lambda x, y: squares(x, y).sqrt().topk(10, largest=False).values,
    ),
    "kmeans_assign 1000000 x 1024, 64": (
        1000000, 1024, 64, nf.kmeans_assign, lambda r: r[1][:ROWS], lambda x, y: squares(x, y).min(1).values,
    ),
    "gaussian matmul 65536 x 64, 3 columns": (
        65536, 65536, 64, lambda x, y: nf.kernels.Gaussian(12.0).matmul(x, y, y[:, :3].contiguous()), lambda r: r[:ROWS],
        lambda x, y: torch.exp(-squares(x, y) / 288) @ y[:, :3].double(),
    ),
    "info_nce 16384 x 256, value and gradient": (16384, 16384, 256, loss_and_grad, lambda r: r, exact_grad),
}  # fmt: skip


def main():
    """Every case by both paths."""
    print(f"{'':42}   error: sums      split   ms:   sums    split   ratio")
    for name, (n, m, d, f, rows_of, exact) in CASES.items():
        x, y = points(n, d, 0), points(m, d, 1)
        expected = exact(x, y)
        errors, times = [], []
        for path in "01":
            os.environ["NEARFAR_CUDA_SPLIT"] = path
            found = rows_of(f(x, y)).double()
            errors.append(((found - expected).norm() / expected.norm()).item())
            times.append(milliseconds(lambda f=f, x=x, y=y: f(x, y)))
        print(
            f"{name:42} {errors[0]:13.2e} {errors[1]:10.2e}   {times[0]:10.3f} {times[1]:8.3f} {times[0] / times[1]:7.2f}"
        )
        if not errors[1] <= max(2 * errors[0], 1e-5):
            raise SystemExit(f"{name}: three products of tf32 are less exact than float32")


if __name__ == "__main__":
    main()
