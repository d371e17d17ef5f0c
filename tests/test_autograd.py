"""The glue to torch: operators, first and second derivatives, compiler, autocast, function transforms, modules."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from generators import assert_gradient, assert_value, compare, pairs, points, reference
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import nearfar as nf
from nearfar import autograd
from nearfar import second as second_derivatives


def leaf(*shape, seed=0, dtype=torch.float64):
    """A tensor that requires a gradient."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def scalar(value, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype, requires_grad=True)


# ---- operators -------------------------------------------------------------------------------------------------------


def softmax_samples():
    x, y, own = torch.randn(5, 3), torch.randn(9, 3), torch.randn(5, 2, 3)
    ids, scale, weights = torch.tensor([0, 1, 0, 2, 1]), torch.tensor(3.0, dtype=torch.float64), torch.randn(5)
    for wanted in ("", "0", "01234"):
        yield None, x, y, None, None, scale, ids, "rows", "mean", True, True, 0, wanted
        yield None, x, y[:0], x, own, scale, None, "rows", "sum", False, True, 0, wanted
        yield None, x, y[:5], None, None, scale, None, "both", "none", True, True, 0, wanted
        yield None, y[:6], None, None, None, scale, None, "pairs", "mean", True, True, 3, wanted
        yield None, x.half(), y.half(), None, own.half(), scale, None, "rows", "mean", True, True, 0, wanted
        yield None, x.double(), y.double(), x.double(), None, scale, None, "rows", "mean", True, False, 0, wanted
    yield weights, x, y, None, None, scale, None, "rows", "none", True, True, 0, "01234"
    yield weights[:0], x[:0], y[:0], None, None, scale, None, "rows", "none", True, True, 0, "01234"


def store_samples():
    x, y = torch.randn(2, 5, 3), torch.randn(2, 4, 3)
    for map, normalize in (("euclidean", False), ("sqeuclidean", False), ("one_minus_dot", True), ("dot", False)):
        yield x, y, map, normalize, False
        yield x, None, map, normalize, False
        yield x.bfloat16(), None, map, normalize, True


def store_grad_samples():
    for x, y, map, normalize, condensed in store_samples():
        value = torch.ops.nearfar.store(x, y, map, normalize, condensed)
        for wanted in ("01", "0") if y is None else ("01", "0", "1"):
            yield torch.randn_like(value), value, x, y, map, normalize, condensed, wanted


# The scores of a kernel on two sets of columns, side by side.
PROGRAM = "sqeuclidean 0 2; dot 2 3; matern52 0 0; affine 1 1; multiply 2 3"
PARAMETERS = torch.tensor([0.7, 1.0, 2.0], dtype=torch.float64)


def gram_samples():
    x, y = torch.randn(2, 5, 3), torch.randn(2, 4, 3)
    yield x, y, PARAMETERS, PROGRAM
    yield y.double(), None, PARAMETERS, PROGRAM
    yield x.half(), y.half(), PARAMETERS[:0], "dot 0 -1"
    yield x, y, PARAMETERS[:0], "unit_dot 0 2; dot 2 3; multiply 0 1"


def gram_grad_samples():
    for sample in gram_samples():
        grad = torch.randn_like(torch.ops.nearfar.gram(*sample))
        for wanted in ("012", "0", "2", ""):
            yield grad, *sample, wanted


def matmul_samples():
    x, y, v = torch.randn(2, 5, 3), torch.randn(2, 4, 3), torch.randn(2, 4, 2)
    yield x, y, v, PARAMETERS, PROGRAM
    yield y.double(), None, v.double(), PARAMETERS, PROGRAM
    yield x.half(), y.half(), v.half(), PARAMETERS, PROGRAM


def matmul_grad_samples():
    for sample in matmul_samples():
        grad = torch.randn_like(torch.ops.nearfar.matmul(*sample))
        for wanted in ("0123", "2", "13"):
            yield grad, *sample, wanted


def hsic_samples():
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    for dtype, diagonal in ((torch.float32, True), (torch.float64, False)):
        yield x.to(dtype), y.to(dtype), PARAMETERS, PARAMETERS[:1], PROGRAM, "sqeuclidean 0 -1; gaussian 0 0", diagonal


def hsic_grad_samples():
    for sample in hsic_samples():
        values = torch.ops.nearfar.hsic(*sample)
        for wanted in ("0123", "0", "13"):
            yield torch.randn_like(values), values, *sample, wanted


def labelled_lse_samples():
    maps = torch.tensor([[-1.0, 0.0, 2.0, 0.5], [1.0, 3.0, 0.5, -0.5]], dtype=torch.float64)
    for dtype, scale in ((torch.float32, 1.0), (torch.float64, 90.0), (torch.float16, 2.0)):
        x, y, one = torch.randn(7, 3).to(dtype), torch.randn(4, 3).to(dtype), torch.tensor(scale, dtype=torch.float64)
        yield x, None, one, torch.tensor([0, 1, 0, 2, 1, 5, -9], dtype=torch.int16), maps, 0.5, True
        yield y, x, one, torch.tensor([0, 1, 0, 2, 1, 3, 3]), maps, None, False


def labelled_lse_grad_samples():
    for sample in labelled_lse_samples():
        lse = torch.ops.nearfar.labelled_lse(*sample)
        yield torch.randn_like(lse), lse, *sample


def sup_con_samples():
    x, scale, weights = torch.randn(6, 3), torch.tensor(3.0, dtype=torch.float64), torch.randn(6)
    labels, mask = torch.tensor([0, 1, 0, 2, 1, 0]), torch.rand(6, 6) < 0.4
    for gradients in (False, True):
        yield None, x, scale, labels, None, "mean", True, gradients
        yield None, x.double(), scale, None, mask, "sum", False, gradients
        yield None, x.reshape(3, 2, 3).half(), scale, None, None, "none", True, gradients
        yield None, x.reshape(2, 3, 3), scale, labels[:2], None, "mean", True, gradients
    yield weights, x, scale, labels, None, "none", True, True
    yield weights.reshape(3, 2), x.reshape(3, 2, 3), scale, None, mask[:3, :3], "none", True, True


def sigmoid_samples():
    x, y, weights = torch.randn(5, 3), torch.randn(5, 3), torch.randn(5)
    scale, bias = torch.tensor(3.0, dtype=torch.float64), torch.tensor(-1.0)
    for wanted in ("", "03", "0123"):
        yield None, x, y, scale, bias, "mean", True, wanted
        yield None, x.double(), y.double(), scale, bias, "sum", False, wanted
        yield None, x.bfloat16(), y.bfloat16(), scale, bias, "none", True, wanted
    yield weights, x, y, scale, bias, "none", True, "0123"


def batch_triplet_samples():
    x, labels = torch.randn(7, 3), torch.tensor([0, 1, 0, 2, 1, 0, 2])
    for dtype, mining, gradients in ((torch.float32, "hard", True), (torch.float64, "semihard", False)):
        yield None, x.to(dtype), labels, mining, 0.2, False, False, "mean", True, gradients
    yield None, x.half(), labels.int(), "all", 0.2, True, False, "sum", False, True
    yield torch.randn(7), x, labels, "all", 0.2, False, True, "none", True, True


SAMPLES = {
    "softmax": softmax_samples,
    "labelled_lse": labelled_lse_samples,
    "labelled_lse_grad": labelled_lse_grad_samples,
    "sup_con": sup_con_samples,
    "sigmoid": sigmoid_samples,
    "n_pairs": lambda: [
        (weights, torch.randn(5, 3).to(dtype), torch.randn(5, 3).to(dtype), l2_reg, reduction, gradients)
        for weights, dtype, l2_reg, reduction, gradients in (
            (None, torch.float32, 0.1, "mean", True), (torch.randn(5), torch.float64, 0.1, "none", True),
            (None, torch.float16, 0.0, "sum", False),
        )
    ],
    "potential": lambda: [
        (torch.randn(n, 3).to(dtype), t, normalize, gradients)
        for n, dtype, t, normalize, gradients in (
            (5, torch.float32, 2.0, True, True), (2, torch.float64, 0.5, False, True),
            (7, torch.bfloat16, 30.0, True, False),
        )
    ],
    "alignment": lambda: [
        (weights, torch.randn(5, 3).to(dtype), torch.randn(5, 3).to(dtype), alpha, reduction, normalize, gradients)
        for weights, dtype, alpha, reduction, normalize, gradients in (
            (None, torch.float32, 2.0, "mean", True, True), (torch.randn(5), torch.float32, 1.0, "none", True, True),
            (None, torch.float64, 3.0, "sum", False, True), (None, torch.float16, 2.0, "none", True, False),
        )
    ],
    "batch_triplet": batch_triplet_samples,
    "store": store_samples,
    "store_grad": store_grad_samples,
    "select": lambda: [
        (torch.randn(2, 5, 3).to(dtype), y, map, normalize, exclude, k)
        for dtype, y, map, normalize, exclude, k in (
            (torch.float32, torch.randn(2, 7, 3), "euclidean", False, False, 2),
            (torch.float64, None, "one_minus_dot", True, True, 4), (torch.float16, None, "dot", False, False, 1),
        )
    ],
    "gram": gram_samples,
    "gram_grad": gram_grad_samples,
    "matmul": matmul_samples,
    "matmul_grad": matmul_grad_samples,
    "hsic": hsic_samples,
    "hsic_grad": hsic_grad_samples,
}  # fmt: skip


def test_every_operator_has_samples():
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "nearfar::" in name}
    assert names == set(SAMPLES)


@pytest.mark.filterwarnings("ignore")  # torch's own: of traces, and of shapes in them
@torch.no_grad()
def test_who_looks_at_operators_sees_them():
    """Elsewhere they do not run, because of their fixed cost."""
    rows = [torch.randn(n, 3) for n in (5, 4, 5, 4)]
    traced = torch.jit.trace(nf.cdist, rows[:2])
    assert torch.equal(traced(*rows[2:]), nf.cdist(*rows[2:]))
    graph = make_fx(lambda x, y: nf.info_nce_loss(x, y))(rows[0], rows[2])
    assert torch.ops.nearfar.softmax.default in {node.target for node in graph.graph.nodes}
    with torch.profiler.profile() as profile:
        nf.cdist(*rows[:2])
    assert "nearfar::store" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name):
    torch.manual_seed(0)
    operator = getattr(torch.ops.nearfar, name).default
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for sample in SAMPLES[name]():
        torch.library.opcheck(operator, sample, test_utils=tests)
    # Tracing with symbolic shapes is the slow one: the first sample stands for all.
    torch.library.opcheck(operator, next(iter(SAMPLES[name]())))


# ---- derivatives -----------------------------------------------------------------------------------------------------

Q, K, NEG, OWN, TAU = leaf(5, 3), leaf(5, 3, seed=1), leaf(4, 3), leaf(5, 2, 3), scalar(0.3)
IDS = torch.tensor([0, 1, 0, 2, 1])
LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 0, 3, 3, 3])
MASK = torch.arange(100).reshape(10, 10) % 3 == 1
ARD = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)

CASES = {
    "info_nce": (lambda q, k, t: nf.info_nce_loss(q, k, temperature=t), (Q, K, TAU)),
    "info_nce none": (lambda q, k, t: nf.info_nce_loss(q, k, logit_scale=t, reduction="none"), (Q, K, scalar(2.0))),
    "ids symmetric": (lambda q, k, t: nf.info_nce_loss(q, k, temperature=t, ids=IDS, symmetric=True), (Q, K, TAU)),
    "plain": (lambda q, k: nf.info_nce_loss(q, k, temperature=0.9, normalize=False), (Q, K)),
    "shared": (lambda q, k, n, t: nf.info_nce_loss(q, k, n, temperature=t, reduction="sum"), (Q, K, NEG, TAU)),
    "shared and in batch": (
        lambda q, k, n, t: nf.info_nce_loss(q, k, n, temperature=t, in_batch=True, ids=IDS, reduction="none"),
        (Q, K, NEG, TAU),
    ),
    "own": (lambda q, k, n, t: nf.info_nce_loss(q, k, n, temperature=t), (Q, K, OWN, TAU)),
    "own and in batch": (
        lambda q, k, n, t: nf.info_nce_loss(q, k, n, logit_scale=1 / t, in_batch=True, normalize=False),
        (Q, K, OWN, TAU),
    ),
    "clip": (lambda q, k, t: nf.clip_loss(q, k, 1 / t), (Q, K, TAU)),
    "clip none": (lambda q, k: nf.clip_loss(q, k, 2.0, reduction="none"), (Q, K)),
    "nt_xent": (lambda q, k, t: nf.nt_xent_loss(q, k, temperature=t), (Q, K, TAU)),
    "nt_xent none": (lambda q, k, t: nf.nt_xent_loss(q, k, temperature=t, reduction="none"), (Q, K, TAU)),
    "hcl": (lambda q, k, t: nf.hcl_loss(q, k, temperature=t), (Q, K, TAU)),
    "hcl none": (lambda q, k, t: nf.hcl_loss(q, k, temperature=t, beta=0.5, reduction="none"), (Q, K, TAU)),
    "hcl plain": (lambda q, k: nf.hcl_loss(q, k, beta=0, tau_plus=0, normalize=False, reduction="sum"), (Q, K)),
    "multi similarity": (lambda q: nf.multi_similarity_loss(q, IDS, beta=5), (Q,)),
    "multi similarity none": (
        lambda q: nf.multi_similarity_loss(q, IDS, alpha=1, beta=3, reduction="none", normalize=False),
        (Q,),
    ),
    "proxy anchor": (lambda q, n: nf.proxy_anchor_loss(q, IDS, n, alpha=3), (Q, NEG)),
    "proxy anchor plain": (lambda q, n: nf.proxy_anchor_loss(q, IDS, n, alpha=1, normalize=False), (Q, NEG)),
    "dcl": (lambda q, k, t: nf.dcl_loss(q, k, temperature=t), (Q, K, TAU)),
    "sup_con": (lambda q, k, t: nf.sup_con_loss(torch.cat([q, k]), LABELS, temperature=t), (Q, K, TAU)),
    "sup_con none": (lambda q, t: nf.sup_con_loss(q, IDS, logit_scale=t, reduction="none"), (Q, scalar(2.0))),
    "sup_con mask": (lambda q, k: nf.sup_con_loss(torch.cat([q, k]), positive_mask=MASK, normalize=False), (Q, K)),
    "sup_con views": (lambda q, k: nf.sup_con_loss(torch.stack([q, k, -q], 1), IDS, reduction="none"), (Q, K)),
    "n_pairs": (lambda q, k: nf.n_pairs_loss(q, k, l2_reg=0.1), (Q, K)),
    "siglip": (lambda q, k, t, b: nf.siglip_loss(q, k, 1 / t, b), (Q, K, TAU, scalar(-2.0))),
    "siglip none": (lambda q, k, b: nf.siglip_loss(q, k, 3.0, b, reduction="none"), (Q, K, scalar(0.5))),
    "limit": (lambda q, k, t: nf.info_nce_limit(q, k, t), (Q, K, TAU)),
    "uniformity": (lambda q: nf.uniformity(q), (Q,)),
    "uniformity plain": (lambda q: nf.uniformity(q, t=0.3, normalize=False), (Q,)),
    "alignment": (lambda q, k: nf.alignment(q, k), (Q, K)),
    "alignment 3": (lambda q, k: nf.alignment(q, k, alpha=3, reduction="none", normalize=False), (Q, K)),
    "alignment 1": (lambda q, k: nf.alignment(q, k, alpha=1, reduction="sum"), (Q, K)),
    "cdist": (lambda q, n: nf.cdist(q, n), (Q, NEG)),
    "cdist self": (lambda q: nf.cdist(q, metric="sqeuclidean"), (Q,)),
    "cdist cosine": (lambda q, n: nf.cdist(q, n, "cosine"), (Q, NEG)),
    "cdist dot": (lambda q, n: nf.cdist(q, n, "dot"), (Q, NEG)),
    "cdist batch": (lambda q, n: nf.cdist(q, n), (leaf(2, 3, 2), leaf(4, 2))),
    "pdist": (lambda q: nf.pdist(q), (Q,)),
    "pdist cosine": (lambda q: nf.pdist(q, "cosine"), (Q,)),
    "gram": (lambda q, n: nf.gram(q, n), (Q, NEG)),
    "gram self": (lambda q, t: nf.gram(q, lengthscale=t), (Q, scalar(0.8))),
    "ard": (lambda q, n, scale: nf.kernels.Gaussian(scale)(q, n), (Q, NEG, ARD)),
    "cosine": (lambda q, n: nf.kernels.Cosine()(q, n), (Q, NEG)),
    "cosine self": (lambda q, v: (nf.kernels.Cosine() * nf.kernels.Gaussian()).matmul(q, None, v), (Q, leaf(5, 1))),
    "matmul": (lambda q, n, v, t: nf.kernels.Gaussian(t).matmul(q, n, v), (Q, NEG, leaf(4, 2), scalar(0.8))),
    "matmul self": (lambda q, v: nf.kernels.Gaussian().matmul(q, None, v), (Q, leaf(5, 1))),
    "matmul vector": (lambda q, n, v: nf.kernels.Gaussian().matmul(q, n, v), (Q, NEG, leaf(4))),
}
cases = pytest.mark.parametrize(("f", "arguments"), CASES.values(), ids=CASES)


@cases
def test_gradcheck(f, arguments):
    assert gradcheck(f, arguments)


@cases
def test_gradgradcheck(f, arguments):
    assert gradgradcheck(f, arguments)


def gradients_of(f, arguments, chosen):
    """The value and the gradients where only the chosen arguments require one."""
    own = [a.detach().requires_grad_(k in chosen) for k, a in enumerate(arguments)]
    value = f(*own)
    weights = torch.arange(1, value.numel() + 1, dtype=value.dtype).reshape(value.shape)
    return value.detach(), torch.autograd.grad((value * weights).sum(), [own[k] for k in chosen])


def assert_the_same_with_constants(f, arguments):
    every = range(len(arguments))
    value, grads = gradients_of(f, arguments, every)
    for chosen in (c for size in every for c in itertools.combinations(every, size) if size):
        same, own = gradients_of(f, arguments, chosen)
        assert torch.equal(same, value)
        assert all(torch.equal(g, grads[k]) for g, k in zip(own, chosen, strict=True)), chosen


@cases
def test_arguments_that_are_constant(f, arguments):
    """Gradients that are not wanted are not computed; those that are keep their bits."""
    assert_the_same_with_constants(f, arguments)


@pytest.mark.parametrize("name", ["info_nce", "shared", "own and in batch", "clip", "siglip none", "cdist"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constants_of_whole_tiles(name, dtype):
    f, arguments = CASES[name]
    shapes = {2: (150, 70), 3: (150, 2, 70)}
    large = [leaf(*shapes[a.dim()], seed=k).to(dtype) if a.dim() else a for k, a in enumerate(arguments)]
    assert_the_same_with_constants(f, large)


class Told(TorchDispatchMode):
    """The gradients that operators are asked for, by the operators' names."""

    def __init__(self):
        super().__init__()
        self.wanted = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "nearfar" and func._schema.arguments[-1].name == "wanted":
            self.wanted[func._schema.name] = args[-1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("operator", "f"),
    [
        ("nearfar::store_grad", lambda x, y: nf.cdist(x, y)),
        ("nearfar::gram_grad", lambda x, y: nf.kernels.Gaussian(2.0)(x, y)),
        ("nearfar::matmul_grad", lambda x, y: nf.kernels.Gaussian(2.0).matmul(x, y, y.detach())),
    ],
)
def test_wanted_gradients_are_numbers_of_tensors(operator, f):
    x, y = leaf(5, 3), leaf(4, 3, seed=1)
    for pair, wanted in (((x, y.detach()), "0"), ((x.detach(), y), "1")):
        with Told() as told:
            f(*pair).sum().backward()
        assert told.wanted == {operator: wanted}


@cases
def test_third_derivatives_raise(f, arguments):
    """Not implemented, and said so: never a silently detached gradient."""
    value = f(*arguments).square().sum()
    (first,) = torch.autograd.grad(value, arguments[:1], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), arguments[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="has no third derivative"):
        torch.autograd.grad(second.square().sum(), arguments[:1])


# ---- forward mode ----------------------------------------------------------------------------------------------------

MORE = {
    "hsic": (lambda q, k: nf.hsic(q, k, nf.kernels.Gaussian(), nf.kernels.Linear()), (Q, K)),
    "cka": (lambda q, k: nf.cka(q, k, nf.kernels.Gaussian(), unbiased=True), (Q, K)),
    "cka cosine": (lambda q, k: nf.cka(q, k, nf.kernels.Cosine()), (Q, K)),
    "mmd": (lambda q, n: nf.mmd(q, n), (Q, NEG)),
    "batch_triplet": (lambda q: nf.batch_triplet_loss(q, IDS), (Q,)),
    "batch_triplet none": (lambda q: nf.batch_triplet_loss(q, IDS, mining="all", reduction="none"), (Q,)),
    "triplet_margin": (lambda q, k: nf.triplet_margin_loss(q, k, k.flip(0)), (Q, K)),
    "contrastive": (lambda q, k: nf.contrastive_loss(q, k, torch.arange(5) % 2), (Q, K)),
    "cdist cityblock": (lambda q, n: nf.cdist(q, n, "cityblock"), (Q, NEG)),
    "knn": (lambda q, n: nf.knn(q, n, 2)[0], (Q, NEG)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on the first jvp
@pytest.mark.parametrize("name", [*CASES, *MORE])
def test_forward_mode(name):
    """Along some vectors, those of dual tensors and of torch.func, against finite differences and the gradient."""
    f, arguments = {**CASES, **MORE}[name]
    assert gradcheck(f, arguments, check_forward_ad=True, check_backward_ad=False)
    vectors = tuple(torch.linspace(-1, 2, a.numel(), dtype=a.dtype).reshape(a.shape) for a in arguments)
    value, along = torch.func.jvp(f, tuple(a.detach() for a in arguments), vectors)
    torch.testing.assert_close(value, f(*arguments).detach(), rtol=0, atol=0)
    grads = torch.autograd.grad(f(*arguments).sum(), arguments)
    expected = sum((g * v).sum() for g, v in zip(grads, vectors, strict=True))
    torch.testing.assert_close(along.sum(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@cases
def test_forward_over_reverse(f, arguments):
    assert gradgradcheck(f, arguments, check_fwd_over_rev=True, check_rev_over_rev=False, check_undefined_grad=False)


@pytest.mark.parametrize("name", ["info_nce", "own", "nt_xent none", "siglip", "uniformity", "cdist", "matmul", "hsic"])
def test_hessian_of_torch_func(name):
    f, arguments = {**CASES, **MORE}[name]

    def number(*own):
        return f(*own).square().sum()

    detached = tuple(a.detach() for a in arguments)
    expected = torch.autograd.functional.hessian(number, detached)
    ours = torch.func.hessian(number, argnums=tuple(range(len(arguments))))(*detached)
    for row, other in zip(ours, expected, strict=True):
        for own, block in zip(row, other, strict=True):
            assert torch.linalg.norm(own - block) <= 1e-10 * torch.linalg.norm(block) + 1e-13


@pytest.mark.parametrize("name", ["info_nce", "sup_con", "uniformity"])
def test_hessian_by_forward_mode_alone(name):
    """Of a number; that of an array would be a third derivative to us, and raises."""
    f, arguments = CASES[name]
    x, rest = arguments[0].detach(), [a.detach() for a in arguments[1:]]
    one = torch.func.jacfwd(torch.func.jacfwd(lambda z: f(z, *rest)))(x)
    other = torch.autograd.functional.hessian(lambda z: f(z, *rest), x)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    with pytest.raises(NotImplementedError, match="of an array has no derivative"):
        torch.func.jacfwd(torch.func.jacfwd(lambda z: nf.cdist(z, x)))(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_memory_of_the_caller_has_no_tangent():
    x = torch.randn(4, 3)
    with forward_ad.dual_level(), pytest.raises(ValueError, match="^out: not for inputs that require a gradient"):
        nf.cdist(forward_ad.make_dual(x, x), out=torch.empty(4, 4))


def test_forward_mode_of_some_rows():
    """Without tangents nothing is recorded; half precision keeps its dtype."""
    x, v = torch.randn(6, 4).bfloat16(), torch.randn(6, 4).bfloat16()
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(nf.uniformity(x)).tangent is None
        along = forward_ad.unpack_dual(nf.cdist(forward_ad.make_dual(x, v), x)).tangent
        number = forward_ad.unpack_dual(nf.uniformity(forward_ad.make_dual(x, v))).tangent
    for f, own in ((lambda z: nf.cdist(z, x.double()), along), (nf.uniformity, number)):
        _, expected = torch.func.jvp(f, (x.double(),), (v.double(),))
        assert torch.linalg.norm(own - expected) <= 2e-2 * torch.linalg.norm(expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own forward mode
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("f", [
    lambda x, y, s: nf.info_nce_loss(x, y), lambda x, y, s: nf.nt_xent_loss(x, y, temperature=s[0].abs()),
    lambda x, y, s: nf.siglip_loss(x, y, 9.0, s[0]), lambda x, y, s: nf.uniformity(x), lambda x, y, s: nf.alignment(x, y),
    lambda x, y, s: nf.batch_triplet_loss(x, torch.arange(30) % 3), lambda x, y, s: nf.hcl_loss(x, y),
])  # fmt: skip
def test_tangents_of_half_precision(f, dtype):
    """A loss is float32, and so is its tangent: neither gradients nor their products with vectors are rounded."""
    inputs, vectors = (
        tuple(leaf(*shape, seed=seed + k, dtype=dtype).detach() for k, shape in enumerate(((30, 4), (30, 4), (1,))))
        for seed in (0, 10)
    )
    value, along = torch.func.jvp(f, inputs, vectors)
    other, expected = torch.func.jvp(f, tuple(z.float() for z in inputs), tuple(v.float() for v in vectors))
    assert along.dtype == value.dtype == torch.float32
    torch.testing.assert_close(value, other, rtol=1e-6, atol=0)
    torch.testing.assert_close(along, expected, rtol=1e-5, atol=0)


def test_third_derivative_along_a_constant():
    """A Hessian-vector product depends on the points even if the vector does not."""
    (first,) = torch.autograd.grad(nf.info_nce_loss(Q, K), Q, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), Q, create_graph=True)
    with pytest.raises(NotImplementedError, match="softmax has no third derivative"):
        torch.autograd.grad(second.sum() + Q.sum(), Q)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_second_derivatives_of_other_dtypes(dtype):
    x, y = (torch.from_numpy(a).to(getattr(torch, dtype)).requires_grad_() for a in pairs(30, 6))
    wide = [a.detach().double().requires_grad_() for a in (x, y)]
    results = []
    for a, b in ((x, y), wide):
        (first,) = torch.autograd.grad(nf.info_nce_loss(a, b, temperature=0.5), a, create_graph=True)
        results.append(torch.autograd.grad((first.double() ** 2).sum() * 100, (a, b)))
    for own, expected in zip(*results, strict=True):
        assert own.dtype == x.dtype
        # The first gradient is the vector of the second product: its rounding comes in once more.
        error = {"float16": 1e-2, "bfloat16": 3e-2, "float32": 1e-5}[dtype]
        assert torch.linalg.norm(own.double() - expected) <= error * torch.linalg.norm(expected)


NORMALIZED = [
    "info_nce",
    "own",
    "nt_xent",
    "hcl",
    "multi similarity",
    "proxy anchor",
    "sup_con",
    "siglip",
    "uniformity",
]


@pytest.mark.parametrize("scale", [2.0**-70, 2.0**70])
@pytest.mark.parametrize("name", [*NORMALIZED, "alignment", "cdist cosine", "pdist cosine"])
def test_second_derivatives_of_rows_of_any_norm(name, scale):
    """They scale with the inverse square of the rows; squares of these are not in the range of float32."""
    f, arguments = CASES[name]

    def product(scale):
        own = [(scale * a if a.dim() else a).detach().float().requires_grad_() for a in arguments]
        (first,) = torch.autograd.grad(f(*own).square().sum(), own[:1], create_graph=True)
        return torch.autograd.grad((first * scale).square().sum(), own[0])[0] * scale

    expected = product(1.0)
    assert torch.linalg.norm(product(scale) - expected) <= 1e-5 * torch.linalg.norm(expected)


def test_second_derivative_in_blocks(monkeypatch):
    q, k, negatives = leaf(23, 4), leaf(23, 4, seed=1), leaf(9, 4)
    functions = [
        lambda: nf.info_nce_loss(q, k, negatives, in_batch=True, temperature=0.4),
        lambda: nf.nt_xent_loss(q, k),
        lambda: nf.sup_con_loss(torch.stack([q, k], 1), torch.arange(23) % 5),
        lambda: nf.siglip_loss(q, k, 2.0, -1.0),
        lambda: nf.clip_loss(q, k, 2.0, reduction="none").square().sum(),
        lambda: nf.uniformity(q),
        lambda: nf.pdist(q).square().sum(),
        lambda: nf.cdist(q).square().sum(),
    ]
    for f in functions:
        results = []
        for block in (512, 5):
            monkeypatch.setattr(second_derivatives, "_BLOCK", block)
            (first,) = torch.autograd.grad(f(), q, create_graph=True)
            results.append(torch.autograd.grad(first.square().sum(), q)[0])
        assert_gradient(results[1], results[0].numpy(), 1e-12)


def test_hessian_of_uniformity():
    q = leaf(6, 3)
    ours = torch.autograd.functional.hessian(lambda x: nf.uniformity(x), q)

    def dense(x):
        x = torch.nn.functional.normalize(x)
        i, j = torch.triu_indices(6, 6, 1)
        return torch.logsumexp(-2 * (x[i] - x[j]).square().sum(1), 0)

    assert_gradient(ours, torch.autograd.functional.hessian(dense, q).numpy(), 1e-10)


def test_gradient_penalty_trains():
    """A second derivative where it is used: a penalty on the gradient, through a network."""
    torch.manual_seed(0)
    net = torch.nn.Linear(8, 4).double()
    x = leaf(12, 8)
    loss = nf.nt_xent_loss(net(x), net(x + 0.1))
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + slope.square().sum()).backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in net.parameters())


# ---- what autograd may ask for ---------------------------------------------------------------------------------------


def test_only_one_input_requires_a_gradient():
    x, y = (torch.from_numpy(a) for a in pairs(30, 5))
    negatives = torch.from_numpy(points(20, 5))
    tensors = {"query": x, "positive_key": y, "negative_keys": negatives}
    tensors["temperature"] = torch.tensor(0.2, dtype=torch.float64)
    _, expected = reference(nf.info_nce_loss, list(tensors), **tensors)
    for name, gradient in zip(tensors, expected, strict=True):
        own = {key: a.clone().requires_grad_(key == name) for key, a in tensors.items()}
        nf.info_nce_loss(**own).backward()
        for key, a in own.items():
            if key == name:
                assert_gradient(a.grad, gradient, 1e-12)
            else:
                assert a.grad is None


def test_no_grad():
    for f in (lambda q, k: nf.info_nce_loss(q, k), lambda q, k: nf.cdist(q, k), lambda q, k: nf.uniformity(q)):
        with torch.no_grad():
            assert not f(Q, K).requires_grad
        with torch.inference_mode():
            assert not f(Q, K).requires_grad
        assert not f(Q.detach(), K.detach()).requires_grad
        assert f(Q, K).requires_grad


def test_upstream_gradient():
    x, y = (torch.from_numpy(a) for a in pairs(30, 5))
    leaf_x = x.clone().requires_grad_()
    (-2.5 * nf.info_nce_loss(leaf_x, y) + 1).backward()
    assert_gradient(leaf_x.grad, -2.5 * reference(nf.info_nce_loss, ["query"], query=x, positive_key=y)[1][0], 1e-12)
    # Twice from one graph, then it is gone.
    leaf_x.grad = None
    loss = nf.info_nce_loss(leaf_x, y)
    loss.backward(retain_graph=True)
    once = leaf_x.grad.clone()
    loss.backward()
    assert torch.equal(leaf_x.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_of_rows(dtype):
    """reduction 'none' with any upstream weights, zeros and negative ones too."""
    x, y = (torch.from_numpy(a) for a in pairs(150, 5, dtype))
    weights = torch.from_numpy(points(150, 1, dtype)[:, 0])
    weights[::3] = 0
    for f, names in (
        (nf.info_nce_loss, ("query", "positive_key")),
        (nf.clip_loss, ("image_features", "text_features")),
    ):
        arguments = dict(zip(names, (x, y), strict=True)) | {"logit_scale": torch.tensor(3.0, dtype=torch.float64)}
        compare(f, list(arguments), dtype, weights=weights, reduction="none", **arguments, value_floor=1.0)
    # As an expanded scalar: zero strides.
    leaf_x = x.clone().requires_grad_()
    nf.info_nce_loss(leaf_x, y, reduction="none").sum().backward()
    other = x.clone().requires_grad_()
    nf.info_nce_loss(other, y, reduction="sum").backward()
    assert_gradient(leaf_x.grad, other.grad.numpy(), 1e-6 if dtype == "float32" else 1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scaled_and_rounded_at_once(dtype):
    """The product in float32 is rounded once, beyond the range of float16 too: what the GPU does in one kernel."""
    grad = torch.from_numpy(points(70, 5)).float() * torch.logspace(-9, 5, 70)[:, None]
    for g in (0.37, 65536.0):
        factor = torch.tensor(g)
        scaled = autograd._scale(grad, factor, dtype)
        assert scaled.dtype == dtype
        assert torch.equal(scaled, (grad * factor).to(dtype))


def test_loss_scaler():
    """float16 gradients are rounded after the upstream factor, not before: what a gradient scaler is for."""
    x, y = (torch.from_numpy(a).half().requires_grad_() for a in pairs(400, 20))
    wide = [a.detach().float().requires_grad_() for a in (x, y)]
    functions = (nf.info_nce_loss, nf.nt_xent_loss, nf.alignment, lambda x, y: nf.uniformity(x) + nf.uniformity(y))
    for f in functions:
        own = torch.autograd.grad(f(x, y) * 2**14, (x, y))
        expected = torch.autograd.grad(f(*wide) * 2**14, wide)
        for grad, other in zip(own, expected, strict=True):
            assert grad.dtype == torch.float16
            assert torch.equal(grad, other.half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_upstream_is_not_rounded(dtype):
    """The result of a half-precision call is float32, and so is what comes back through it."""
    x, y, v = leaf(30, 5, dtype=dtype), leaf(20, 5, dtype=dtype), leaf(20, 3, dtype=dtype)
    wide = [a.detach().float().requires_grad_() for a in (x, y, v)]
    functions = (
        lambda x, y, v: nf.kernels.Gaussian().matmul(x, y, v),
        lambda x, y, v: nf.cdist(x, y) + v.sum(),
        lambda x, y, v: nf.gram(x, y) + v.sum(),
        lambda x, y, v: nf.kernels.Cosine().matmul(x, y, v),
    )
    for f in functions:
        value = f(x, y, v)
        upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
        own = torch.autograd.grad((value * upstream).sum(), (x, y, v))
        expected = torch.autograd.grad((f(*wide) * upstream).sum(), wide)
        for grad, other in list(zip(own, expected, strict=True))[:2]:
            assert torch.equal(grad, other.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("f", [
    lambda x, y, v: nf.knn(x, None, 3, metric="sqeuclidean")[0],
    lambda x, y, v: nf.knn(x, x, 3, metric="cosine", exclude_self=True)[0],
    lambda x, y, v: nf.info_nce_limit(x, y, 0.3),
    lambda x, y, v: nf.cdist(x[None], y.reshape(3, 1, 5, 4)),
    lambda x, y, v: nf.gram(x.reshape(3, 5, 4), y),
    lambda x, y, v: nf.kernels.Gaussian().matmul(x.reshape(3, 5, 4), y, v),
    lambda x, y, v: nf.kernels.Gaussian().matmul(x.reshape(3, 5, 4), y.reshape(3, 5, 4), v[:5]),
])  # fmt: skip
def test_several_roles_are_rounded_once(f, dtype):
    """The gradients of rows that stand in several places are added before they are rounded, also beyond their range."""
    arrays = [leaf(15, 4, seed=seed, dtype=dtype) for seed in range(3)]
    wide = [a.detach().float().requires_grad_() for a in arrays]
    value, other = f(*arrays), f(*wide)
    assert torch.equal(value, other)
    upstream = 2.0**12 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    own, expected = (
        torch.autograd.grad((z * upstream).sum(), inputs, allow_unused=True)
        for z, inputs in ((value, arrays), (other, wide))
    )
    for grad, exact in zip(own, expected, strict=True):
        assert (grad is None) == (exact is None)
        assert grad is None or torch.equal(grad, exact.to(dtype))


def test_changed_in_place():
    """What the backward pass needs is guarded as torch guards it."""
    x, y = leaf(6, 3), leaf(6, 3, seed=1)
    moved = x * 1
    value = nf.cdist(moved, y).sum()
    with torch.no_grad():
        moved.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_learnable_temperature(dtype):
    x, y = (torch.from_numpy(a).float() for a in pairs(40, 6))
    for name in ("temperature", "logit_scale"):
        value = torch.tensor(0.5, dtype=dtype, requires_grad=True)
        loss = nf.info_nce_loss(x, y, **{name: value})
        loss.backward()
        assert value.grad.dtype == dtype
        _, (expected,) = reference(nf.info_nce_loss, [name], query=x, positive_key=y, **{name: value.detach()})
        assert value.grad.item() == pytest.approx(float(expected), rel=max(1e-5, torch.finfo(dtype).eps))


def test_frozen_views_and_shared_storage():
    both = leaf(20, 4)
    loss = nf.info_nce_loss(both[:10], both[10:])
    loss.backward()
    _, grads = reference(nf.info_nce_loss, ["query", "positive_key"], query=both[:10], positive_key=both[10:])
    assert_gradient(both.grad, np.concatenate(grads), 1e-12)


# ---- compiler --------------------------------------------------------------------------------------------------------

COMPILED = {
    "info_nce": lambda q, k: nf.info_nce_loss(q * 2, k.sin(), temperature=0.3),
    "learnable": lambda q, k: nf.info_nce_loss(q, k, logit_scale=q.mean().exp().clamp(max=100)),
    "negatives": lambda q, k: nf.info_nce_loss(q, k, k.flip(0), in_batch=True, reduction="none").square().mean(),
    "clip": lambda q, k: nf.clip_loss(q, k, 5.0),
    "nt_xent": lambda q, k: nf.nt_xent_loss(q, k),
    "dcl": lambda q, k: nf.dcl_loss(q, k),
    "sup_con": lambda q, k: nf.sup_con_loss(torch.stack([q, k], 1), torch.arange(q.shape[0]) % 3),
    "sup_con mask": lambda q, k: nf.sup_con_loss(q + k, positive_mask=q @ k.T > 0, reduction="none").square().sum(),
    "siglip": lambda q, k: nf.siglip_loss(q, k, q.mean().exp(), k.mean()),
    "n_pairs": lambda q, k: nf.n_pairs_loss(q, k, l2_reg=0.1),
    "limit": lambda q, k: nf.info_nce_limit(q, k, 0.5),
    "hcl": lambda q, k: nf.hcl_loss(q, k, logit_scale=q.mean().exp(), reduction="none").square().sum(),
    "by label": lambda q, k: nf.multi_similarity_loss(q * k, LABELS[: len(q)]) + nf.circle_loss(q, LABELS[: len(q)]),
    "proxy anchor": lambda q, k: nf.proxy_anchor_loss(q, LABELS[: len(q)], k),
    "sphere": lambda q, k: nf.alignment(q, k) + nf.uniformity(q),
    "cdist": lambda q, k: nf.cdist(q, k).square().mean(),
    "pdist": lambda q, k: nf.pdist(q + k, "cosine").sum(),
    "one tensor twice": lambda q, k: nf.info_nce_loss(q, q, k),
    "gram": lambda q, k: nf.kernels.Gaussian(0.5)(q, k).sum(),
    "cosine": lambda q, k: (nf.kernels.Cosine() ** 2)(q, k).sum() + nf.cka(q, k, "cosine"),
    "matmul": lambda q, k: nf.kernels.Gaussian(0.5).matmul(q, k, k).sum(),
    "knn": lambda q, k: nf.knn(q, k, 2)[0].sum() + nf.knn(q, k=2, metric="cosine")[0].sum(),
    "mmd": lambda q, k: nf.mmd(q, k) + nf.mmd(q, k, nf.kernels.Gaussian(q.mean().exp()), unbiased=False),
    "hsic": lambda q, k: nf.hsic(q, k) + nf.cka(q, k, "gaussian", unbiased=True) + nf.cka(q, k),
    "bounds": lambda q, k: nf.mi_lower_bound(q, k, temperature=0.5, estimator="nwj") + nf.uniformity_gap(q),
    "kmeans_assign": lambda q, k: nf.kmeans_assign(q, k[:3])[1].sum() + k[nf.kmeans_assign(q, k[:3])[0]].sum(),
}


def gradients(f, *shapes):
    x, y = (leaf(*shape, seed=k) for k, shape in enumerate(shapes))
    value = f(x, y)
    value.backward()
    return value.detach(), x.grad, y.grad


quiet = pytest.mark.filterwarnings("ignore")  # what the compiler warns about while it traces is not ours


@quiet
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(name, dynamic):
    torch._dynamo.reset()
    f = COMPILED[name]
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (6, 9) if dynamic else (6,):
        for own, expected in zip(gradients(compiled, (n, 4), (n, 4)), gradients(f, (n, 4), (n, 4)), strict=True):
            if expected is None:
                assert own is None
            else:
                torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-14)


@quiet
def test_compile_once_for_all_sizes():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(COMPILED["info_nce"], fullgraph=True, dynamic=True, backend=counter)
    for n in (6, 9, 17):
        gradients(compiled, (n, 4), (n, 4))
    assert counter.frame_count == 1


SCHEDULED = {
    "temperature": lambda q, k, s: nf.info_nce_loss(q, k, temperature=s) + nf.nt_xent_loss(q, k, logit_scale=s),
    "logit_scale": lambda q, k, s: nf.clip_loss(q, k, s) + nf.siglip_loss(q, k, s, -s),
    "margin": lambda q, k, s: nf.contrastive_loss(q, k, torch.arange(len(q)) < 3, margin=s),
    "sphere": lambda q, k, s: nf.alignment(q, k, alpha=s) + nf.uniformity(q, t=s),
    "n_pairs": lambda q, k, s: nf.n_pairs_loss(q, k, l2_reg=s),
    "kernel": lambda q, k, s: (s * nf.kernels.RationalQuadratic(s, s) + nf.kernels.Linear(s))(q, k).sum(),
}


@quiet
@pytest.mark.parametrize("name", SCHEDULED)
def test_compile_a_number_that_changes(name):
    """The compiler makes it an input, of which it knows no value."""
    torch._dynamo.reset()
    f = SCHEDULED[name]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    q, k = Q.detach(), K.detach()
    for s in (0.5, 0.75, 1.25):
        torch.testing.assert_close(compiled(q, k, s), f(q, k, s), rtol=1e-12, atol=1e-14)


@quiet
@pytest.mark.parametrize("f", [nf.info_nce_loss, nf.clip_loss, nf.siglip_loss, nf.n_pairs_loss, nf.hcl_loss])
def test_compile_defaults(f):
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(Q.detach(), K.detach()), f(Q.detach(), K.detach()))


@quiet
def test_compile_module():
    torch._dynamo.reset()
    module = torch.nn.Sequential(torch.nn.Linear(4, 4))
    loss = nf.InfoNCELoss(learnable_temperature=True)

    def step(x, y):
        return loss(module(x), module(y))

    x, y = torch.randn(6, 4), torch.randn(6, 4)
    step(x, y).backward()
    expected = loss.log_logit_scale.grad.clone()
    loss.log_logit_scale.grad = None
    torch.compile(step, fullgraph=True, backend="aot_eager")(x, y).backward()
    torch.testing.assert_close(loss.log_logit_scale.grad, expected)


@quiet
def test_inductor():
    torch._dynamo.reset()
    f = COMPILED["info_nce"]
    try:
        results = gradients(torch.compile(f, fullgraph=True), (6, 4), (6, 4))
    except torch._inductor.exc.InductorError as error:  # no C++ compiler for torch on this machine
        pytest.skip(str(error).splitlines()[0])
    for own, expected in zip(results, gradients(f, (6, 4), (6, 4)), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-14)


# ---- autocast --------------------------------------------------------------------------------------------------------

CUSTOM = nf.kernels.Custom(lambda r: (1 + r) ** -1.5, lambda r: -1.5 * (1 + r) ** -2.5)


@pytest.mark.parametrize("f", [
    nf.info_nce_loss, nf.nt_xent_loss, nf.clip_loss, lambda x, y: nf.uniformity(x + y), nf.dcl_loss, nf.siglip_loss,
    lambda x, y: nf.sup_con_loss(torch.stack([x, y], 1)), nf.n_pairs_loss,
])  # fmt: skip
def test_autocast(f):
    """Losses of bfloat16 features are float32 and those of the features as they are; gradients reach the weights."""
    torch.manual_seed(0)
    net = torch.nn.Linear(8, 5)
    x, y = torch.randn(30, 8), torch.randn(30, 8)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = net(x), net(y)
        assert a.dtype == torch.bfloat16
        loss = f(a, b)
    assert loss.dtype == torch.float32
    loss.backward()
    assert net.weight.grad.dtype == torch.float32
    outside = net(x).bfloat16(), net(y).bfloat16()
    assert abs(f(*outside) - loss) < 0.05 * abs(loss)
    exact = net.weight.grad.clone()
    net.zero_grad()
    f(net(x), net(y)).backward()
    assert torch.linalg.norm(exact - net.weight.grad) < 0.05 * torch.linalg.norm(net.weight.grad)


def test_autocast_does_not_lower_what_is_computed():
    """float32 inputs stay float32, in second derivatives too, whose formulas are torch's own matrix products."""
    x, y = leaf(20, 4, dtype=torch.float32), leaf(20, 4, seed=1, dtype=torch.float32)

    def both(x, y):
        value = nf.info_nce_loss(x, y, temperature=0.4)
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        (second,) = torch.autograd.grad((first * y.detach()).sum(), x)
        return value.detach(), first.detach(), second

    expected = both(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        inside = both(x, y)
    for own, other in zip(inside, expected, strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("f", [
    lambda x, y: nf.cdist(x, y, "mahalanobis", M=torch.diag(x[0].detach().square())),
    lambda x, y: nf.knn(x, y, 3, metric="cosine")[0],
    lambda x, y: nf.knn(x, y, 3, metric="dot")[0],
    lambda x, y: nf.cka(x, y),
    lambda x, y: nf.hsic(x, y, "linear", "linear"),
    lambda x, y: nf.random_features(nf.kernels.Gaussian(), 4, 8).matmul(x, None, y),
    lambda x, y: nf.random_features(nf.kernels.Gaussian(), 4, 8).matmul(x, None, y[:, 0]),
    lambda x, y: CUSTOM.matmul(x, y, y),
    lambda x, y: (CUSTOM + nf.kernels.Linear()).matmul(x[None], None, y[None]),
    lambda x, y: nf.mmd(x, y, CUSTOM),
])  # fmt: skip
@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_autocast_does_not_lower_products_of_torch(f, forward, backward):
    """Nor those of first and second derivatives, whose autocast is that of whoever asks for them."""

    def derivatives(forward, backward):
        x, y = leaf(20, 4, dtype=torch.float32), leaf(20, 4, seed=1, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=forward):
            value = f(x, y)
        with torch.autocast("cpu", torch.bfloat16, enabled=backward):
            first = torch.autograd.grad(value.square().sum(), (x, y), create_graph=True)
            return value, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, y))

    for own, expected in zip(derivatives(forward, backward), derivatives(False, False), strict=True):
        assert torch.equal(own, expected)


@pytest.mark.parametrize("f", [
    nf.nt_xent_loss, nf.dcl_loss, nf.hcl_loss, lambda x, y: nf.info_nce_loss(x[:9], y[:9], y[9:], in_batch=True),
    lambda x, y: nf.cdist(x, y, "mahalanobis", M=torch.eye(4)).sum(),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_to_the_other_half_precision(f, dtype):
    """Rows are put together as they are; torch refuses to."""
    x, y = leaf(20, 4, dtype=dtype), leaf(20, 4, seed=1, dtype=dtype)
    expected = torch.autograd.grad(f(x, y), (x, y))
    for cast in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", cast):
            value = f(x, y)
        assert torch.equal(value, f(x, y))
        assert all(map(torch.equal, torch.autograd.grad(value, (x, y)), expected))


@pytest.mark.parametrize("f", [
    lambda x, y: nf.knn(x, y, 3, metric="cosine")[0],
    lambda x, y: nf.knn(x, y, 3, metric="dot")[0],
    lambda x, y: nf.kmeans_assign(x, y, metric="cosine")[1],
])  # fmt: skip
def test_backward_under_autocast(f):
    """Derivatives of chosen pairs are no matrix products, which autocast would round to bfloat16."""
    x, y = leaf(20, 4, dtype=torch.float32), leaf(20, 4, seed=1, dtype=torch.float32)
    expected = torch.autograd.grad(f(x, y).square().sum(), (x, y))
    with torch.autocast("cpu", torch.bfloat16):
        own = torch.autograd.grad(f(x, y).square().sum(), (x, y))
    assert all(map(torch.equal, own, expected))


# ---- function transforms ---------------------------------------------------------------------------------------------


def test_func_grad():
    for name in ("info_nce", "nt_xent", "clip", "uniformity", "alignment", "dcl", "sup_con", "siglip", "n_pairs"):
        f, arguments = CASES[name]
        detached = tuple(a.detach() for a in arguments)
        grads = torch.func.grad(f, argnums=tuple(range(len(arguments))))(*detached)
        expected = torch.autograd.grad(f(*arguments), arguments)
        for grad, other in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-13, atol=1e-15)


def test_func_grad_of_grad():
    f, (q, k, tau) = CASES["info_nce"]

    def slope(q):
        return torch.func.grad(lambda z: f(z, k.detach(), tau.detach()))(q).square().sum()

    own = torch.func.grad(slope)(q.detach())
    (first,) = torch.autograd.grad(f(q, k, tau), q, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), q)
    torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-14)


def test_func_jacrev():
    jacobian = torch.func.jacrev(lambda q: nf.info_nce_loss(q, K.detach(), reduction="none"))(Q.detach())
    expected = torch.autograd.functional.jacobian(lambda q: nf.info_nce_loss(q, K.detach(), reduction="none"), Q)
    torch.testing.assert_close(jacobian, expected, rtol=1e-12, atol=1e-14)


VMAPPED = {
    "info_nce": lambda q, k: nf.info_nce_loss(q, k, temperature=0.3),
    "none": lambda q, k: nf.nt_xent_loss(q, k, reduction="none"),
    "sphere": lambda q, k: nf.alignment(q, k) + nf.uniformity(k),
    "sup_con": lambda q, k: nf.sup_con_loss(q + k, torch.tensor([0, 1, 0, 2, 1]), reduction="none"),
    "siglip": lambda q, k: nf.siglip_loss(q, k, 3.0, -1.0) + nf.n_pairs_loss(q, k, l2_reg=0.1),
    "cdist": lambda q, k: nf.cdist(q, k),
    "matmul": lambda q, k: nf.kernels.Gaussian().matmul(q, k, k),
    "cosine": lambda q, k: nf.kernels.Cosine()(q, k),
    "knn": lambda q, k: nf.knn(q, k, 2)[0] + nf.knn(k, k=2)[0],
    "kmeans_assign": lambda q, k: nf.kmeans_assign(q, k)[1],
    "cka": lambda q, k: nf.cka(q, k),
    "kernel cka": lambda q, k: nf.cka(q, k, "gaussian") + nf.hsic(q, k, unbiased=True) + nf.mmd(q, k),
    "custom kernel": lambda q, k: CUSTOM.matmul(q, k, k),
    "chi-squared": lambda q, k: nf.gram(q**2, k**2, "chi2"),
    "bounds": lambda q, k: nf.mi_lower_bound(q, k, temperature=0.5, estimator="dv") + nf.uniformity_gap(q),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", VMAPPED)
def test_vmap(name, requires_grad, capfd):
    f = VMAPPED[name]
    many, one = leaf(3, 5, 4).detach(), leaf(5, 4).detach()
    many.requires_grad_(requires_grad)
    torch.testing.assert_close(torch.func.vmap(f)(many, 2 * many), torch.stack([f(a, 2 * a) for a in many]))
    torch.testing.assert_close(torch.func.vmap(f, (0, None))(many, one), torch.stack([f(a, one) for a in many]))
    torch.testing.assert_close(torch.func.vmap(f, (None, 0))(one, many), torch.stack([f(one, a) for a in many]))
    middle = many.detach().movedim(0, 1).requires_grad_(requires_grad)
    torch.testing.assert_close(torch.func.vmap(f, (1, None))(middle, one), torch.stack([f(a, one) for a in many]))
    if requires_grad:
        (grad,) = torch.autograd.grad(torch.func.vmap(f, (0, None))(many, one).sum(), many)
        (expected,) = torch.autograd.grad(torch.stack([f(a, one) for a in many]).sum(), many)
        torch.testing.assert_close(grad, expected)
    assert "performance drop" not in capfd.readouterr().err  # torch's own fallback, which also loses gradients


@pytest.mark.parametrize("name", VMAPPED)
def test_vmap_of_grad(name):
    """Gradients of an ensemble."""
    many, one = leaf(3, 5, 4).detach(), leaf(5, 4).detach()
    slope = torch.func.grad(lambda q, k: VMAPPED[name](q, k).sum())
    torch.testing.assert_close(torch.func.vmap(slope, (0, None))(many, one), torch.stack([slope(a, one) for a in many]))


def test_vmap_of_vmap():
    many = leaf(2, 3, 5, 4)
    losses = torch.func.vmap(torch.func.vmap(nf.uniformity))(many)
    expected = torch.stack([torch.stack([nf.uniformity(a) for a in row]) for row in many])
    torch.testing.assert_close(losses, expected)
    (grad,) = torch.autograd.grad(losses.sum(), many)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), many)[0])


def test_vmap_of_temperatures():
    taus = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    q, k = Q.detach(), K.detach()
    losses = torch.func.vmap(lambda t: nf.info_nce_loss(q, k, temperature=t))(taus)
    torch.testing.assert_close(losses, torch.stack([nf.info_nce_loss(q, k, temperature=t) for t in taus]))
    slopes = torch.func.vmap(torch.func.grad(lambda t: nf.info_nce_loss(q, k, temperature=t)))(taus)
    for t, slope in zip(taus, slopes, strict=True):
        _, (expected,) = reference(nf.info_nce_loss, ["temperature"], query=q, positive_key=k, temperature=t)
        assert slope.item() == pytest.approx(float(expected), rel=1e-12)


# ---- modules ---------------------------------------------------------------------------------------------------------


def test_modules_are_the_functions():
    x, y = (torch.from_numpy(a) for a in pairs(20, 5))
    negatives, ids = torch.from_numpy(points(9, 5)), torch.arange(20) // 2
    assert nf.InfoNCELoss()(x, y) == nf.info_nce_loss(x, y)
    assert nf.InfoNCELoss(0.2, symmetric=True)(x, y, ids=ids) == nf.info_nce_loss(
        x, y, temperature=0.2, symmetric=True, ids=ids
    )
    assert nf.InfoNCELoss(0.2, reduction="sum", normalize=False)(x, y, negatives, in_batch=True) == nf.info_nce_loss(
        x, y, negatives, temperature=0.2, reduction="sum", normalize=False, in_batch=True
    )
    assert nf.NTXentLoss()(x, y) == nf.nt_xent_loss(x, y)
    assert torch.equal(
        nf.NTXentLoss(0.1, reduction="none")(x, y), nf.nt_xent_loss(x, y, logit_scale=10, reduction="none")
    )
    assert nf.DCLLoss(0.2)(x, y) == nf.dcl_loss(x, y, temperature=0.2)
    assert nf.SupConLoss(0.2)(x, ids) == nf.sup_con_loss(x, ids, temperature=0.2)
    assert nf.SupConLoss()(x, positive_mask=ids[:, None] == ids) == nf.sup_con_loss(
        x, positive_mask=ids[:, None] == ids
    )
    assert nf.SupConLoss(reduction="sum", normalize=False)(torch.stack([x, y], 1)) == nf.sup_con_loss(
        torch.stack([x, y], 1), reduction="sum", normalize=False
    )
    assert nf.NPairsLoss(0.1, reduction="sum")(x, y) == nf.n_pairs_loss(x, y, l2_reg=0.1, reduction="sum")
    assert nf.ClipLoss()(x, y) == nf.clip_loss(x, y)
    assert nf.ClipLoss()(x, y, 20.0) == nf.clip_loss(x, y, 20.0)
    assert nf.ClipLoss(0.2, normalize=False)(x, y) == nf.clip_loss(x, y, 5.0, normalize=False)
    assert nf.AlignmentLoss(1, reduction="sum")(x, y) == nf.alignment(x, y, alpha=1, reduction="sum")
    assert nf.AlignmentLoss(normalize=False)(x, y) == nf.alignment(x, y, normalize=False)
    assert nf.UniformityLoss(3)(x) == nf.uniformity(x, t=3)
    assert nf.UniformityLoss(normalize=False)(x) == nf.uniformity(x, normalize=False)


LEARNABLE = pytest.mark.parametrize(
    ("module", "default"), [(nf.InfoNCELoss, 0.07), (nf.NTXentLoss, 0.5), (nf.ClipLoss, 0.07), (nf.DCLLoss, 0.1)]
)


@LEARNABLE
def test_learned_temperature(module, default):
    x, y = (torch.from_numpy(a).float() for a in pairs(20, 5))
    loss = module(learnable_temperature=True)
    assert list(dict(loss.named_parameters())) == ["log_logit_scale"]
    assert loss.log_logit_scale.item() == pytest.approx(math.log(1 / default), rel=1e-6)
    assert list(module().parameters()) == []
    assert_value(loss(x, y), module()(x, y).double().numpy(), 1e-6)
    loss(x, y).backward()
    # d L / d log s = s d L / d s
    scale = torch.tensor(1 / default, requires_grad=True)
    name = {
        nf.InfoNCELoss: nf.info_nce_loss, nf.NTXentLoss: nf.nt_xent_loss, nf.ClipLoss: nf.clip_loss,
        nf.DCLLoss: nf.dcl_loss,
    }[module]  # fmt: skip
    name(x, y, logit_scale=scale).backward()
    assert loss.log_logit_scale.grad.item() == pytest.approx(scale.grad.item() / default, rel=1e-5)


@LEARNABLE
def test_clamp(module, default):
    """At most ln 100 in forward, whatever the parameter is; the parameter itself is left alone."""
    x, y = (torch.from_numpy(a).float() for a in pairs(20, 5))
    loss = module(0.001, learnable_temperature=True)
    assert loss.log_logit_scale.item() == pytest.approx(math.log(1000))
    assert loss.logit_scale.item() == pytest.approx(100, rel=1e-6)
    floor = 100.0 if module is nf.DCLLoss else 0.0  # a difference of two scores
    assert_value(loss(x, y), module(0.01)(x, y).double().numpy(), 1e-6, floor)
    loss(x, y).backward()
    assert loss.log_logit_scale.grad == 0
    assert loss.log_logit_scale.item() == pytest.approx(math.log(1000))
    # A fixed temperature is the user's word and is not clamped.
    assert module(0.001).logit_scale == pytest.approx(1000)


@LEARNABLE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameter_in_half_precision(module, default, dtype):
    """The multiplier made of it is that of its value: rounded once more it would be off by up to 0.4 %."""
    x, y = (torch.from_numpy(a).to(dtype) for a in pairs(20, 5))
    loss = module(learnable_temperature=True).to(dtype)
    exact = module(learnable_temperature=True).double()
    exact.load_state_dict(loss.state_dict())
    value, expected = loss(x, y), exact(x.double(), y.double())
    assert_value(value, expected.detach().numpy(), 1e-6)
    slopes = [torch.autograd.grad(v, m.log_logit_scale)[0] for v, m in ((value, loss), (expected, exact))]
    assert slopes[0].dtype == dtype
    assert slopes[0].item() == pytest.approx(slopes[1].item(), rel=torch.finfo(dtype).eps / 2 + 1e-5)


@LEARNABLE
def test_training_moves_the_temperature(module, default):
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    y = x + 0.1 * torch.randn(64, 8)
    loss = module(learnable_temperature=True)
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    first = loss(x, y).item()
    for _ in range(20):
        optimizer.zero_grad()
        loss(x, y).backward()
        optimizer.step()
    assert loss(x, y).item() < first
    assert loss.log_logit_scale.item() > math.log(1 / default)  # views agree: sharper is better


@LEARNABLE
def test_state(module, default):
    loss = module(0.2, learnable_temperature=True)
    with torch.no_grad():
        loss.log_logit_scale.fill_(1.25)
    other = module(learnable_temperature=True)
    other.load_state_dict(loss.state_dict())
    assert other.log_logit_scale.item() == 1.25
    assert set(loss.state_dict()) == {"log_logit_scale"}
    assert module().state_dict() == {}
    assert copy.deepcopy(loss).log_logit_scale.item() == 1.25
    x, y = (torch.from_numpy(a) for a in pairs(20, 5))
    assert loss.double()(x, y) == other.double()(x, y)


def test_repr():
    assert repr(nf.InfoNCELoss(0.2)) == "InfoNCELoss(temperature=0.2, learnable_temperature=False)"
    assert repr(nf.NTXentLoss(learnable_temperature=True)) == "NTXentLoss(temperature=0.5, learnable_temperature=True)"
    assert repr(nf.ClipLoss()) == "ClipLoss(temperature=0.07, learnable_temperature=False)"
    assert repr(nf.AlignmentLoss()) == "AlignmentLoss(alpha=2)"
    assert repr(nf.UniformityLoss(3)) == "UniformityLoss(t=3)"


# ---- mixed with NumPy ------------------------------------------------------------------------------------------------


def test_numpy_of_a_tensor_that_requires_a_gradient():
    """torch itself refuses to show it to NumPy; detached, it is an array like any other."""
    with pytest.raises(RuntimeError, match="requires grad"):
        nf.info_nce_loss(Q.numpy(), K.numpy())
    value = nf.info_nce_loss(Q.detach().numpy(), K.detach().numpy())
    assert isinstance(value, np.float64)
    assert value == nf.info_nce_loss(Q, K).item()
    with pytest.raises(TypeError, match=r"^positive_key: expected a numpy array to match query, got torch"):
        nf.info_nce_loss(Q.detach().numpy(), K)
    with pytest.raises(TypeError, match=r"^temperature: .*got a torch.Tensor"):
        nf.info_nce_loss(Q.detach().numpy(), K.detach().numpy(), temperature=TAU)
