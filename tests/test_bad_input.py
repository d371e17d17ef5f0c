"""Every bad input of a loss is refused with the right exception, whose message begins with the argument's name."""

import math
import re

import numpy as np
import pytest
import torch
from generators import of_kind, pairs, points

import nearfar as nf

X, Y = pairs(6, 4)

# Each loss with the names of its two sets of points.
SETS = {
    nf.info_nce_loss: ("query", "positive_key"),
    nf.clip_loss: ("image_features", "text_features"),
    nf.nt_xent_loss: ("z1", "z2"),
    nf.dcl_loss: ("z1", "z2"),
    nf.n_pairs_loss: ("anchor", "positive"),
    nf.siglip_loss: ("image_features", "text_features"),
    nf.info_nce_limit: ("x", "y"),
    nf.alignment: ("x", "y"),
    nf.uniformity: ("x",),
    nf.uniformity_gap: ("x",),
}
losses = pytest.mark.parametrize(("f", "names"), SETS.items(), ids=[f.__name__ for f in SETS])


def call(f, names, **changed):
    arguments = dict(zip(names, (X, Y), strict=False)) | changed
    return f(**arguments, **({"temperature": 0.5} if f is nf.info_nce_limit else {}))


def refuses(error, name, message):
    """Exactly this error, with a message that names the argument first."""
    return pytest.raises(error, match=rf"^{name}: .*{re.escape(message)}")


def unaligned(x):
    memory = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    memory[:] = x
    return memory


WRONG = {
    "list": (X.tolist(), TypeError, "expected a NumPy, PyTorch or CuPy array, got list"),
    "tuple": (tuple(X), TypeError, "expected a NumPy, PyTorch or CuPy array, got tuple"),
    "number": (1.0, TypeError, "expected a NumPy, PyTorch or CuPy array, got float"),
    "None": (None, TypeError, "expected a NumPy, PyTorch or CuPy array, got NoneType"),
    "memoryview": (memoryview(X), TypeError, "expected a NumPy, PyTorch or CuPy array, got memoryview"),
    "int": (X.astype(int), TypeError, "expected a floating dtype"),
    "bool": (X > 0, TypeError, "expected a floating dtype"),
    "complex": (X + 1j, TypeError, "expected a floating dtype"),
    "object": (X.astype(object), TypeError, "expected a floating dtype"),
    "string": (X.astype(str), TypeError, "expected a floating dtype"),
    "byte-swapped": (X.astype(X.dtype.newbyteorder()), TypeError, "expected native byte order"),
    "masked": (np.ma.masked_array(X, X > 0), TypeError, "expected a plain array, got a masked one"),
    "misaligned": (unaligned(X), ValueError, "got misaligned data"),
    "0-d": (np.array(1.0), ValueError, "expected shape"),
    "1-d": (X[0], ValueError, "expected shape"),
    "3-d": (X[None], ValueError, "expected shape"),
}


@losses
@pytest.mark.parametrize("what", WRONG)
def test_wrong_arrays(f, names, what):
    bad, error, message = WRONG[what]
    for name in names:
        with refuses(error, name, message):
            call(f, names, **{name: bad})


TENSOR = torch.from_numpy(X)
WRONG_TENSORS = {
    "int": (TENSOR.int(), TypeError, "expected a floating dtype"),
    "complex": (TENSOR + 1j, TypeError, "expected a floating dtype"),
    "float8": (TENSOR.to(torch.float8_e4m3fn), TypeError, "expected a floating dtype"),
    "sparse": (TENSOR.to_sparse(), TypeError, "expected a dense tensor"),
    "1-d": (TENSOR[0], ValueError, "expected shape"),
}


@losses
@pytest.mark.parametrize("what", WRONG_TENSORS)
def test_wrong_tensors(f, names, what):
    bad, error, message = WRONG_TENSORS[what]
    good = dict.fromkeys(names, TENSOR)
    for name in names:
        with refuses(error, name, message):
            call(f, names, **(good | {name: bad}))


@losses
def test_no_columns(f, names):
    with refuses(ValueError, names[0], "expected at least one column"):
        call(f, names, **dict.fromkeys(names, X[:, :0]))


@losses
def test_mixes(f, names):
    if len(names) == 1:
        pytest.skip("one set of points")
    first, second = names
    with refuses(TypeError, second, f"expected a numpy array to match {first}, got torch"):
        call(f, names, **{second: TENSOR})
    with refuses(TypeError, second, f"expected a torch array to match {first}, got numpy"):
        call(f, names, **{first: TENSOR})
    with refuses(TypeError, second, f"expected dtype float64 to match {first}, got float32"):
        call(f, names, **{second: Y.astype(np.float32)})
    with refuses(TypeError, second, f"expected dtype float16 to match {first}, got bfloat16"):
        call(f, names, **{first: TENSOR.half(), second: TENSOR.bfloat16()})
    for shape in ((5, 4), (7, 4), (6, 3), (6, 5), (1, 4)):
        with refuses(ValueError, second, f"expected shape (6, 4) to match {first}, got {shape}"):
            call(f, names, **{second: points(*shape)})
    with refuses(ValueError, second, f"expected device cpu to match {first}, got meta"):
        call(f, names, **{first: TENSOR, second: TENSOR.to("meta")})


@losses
def test_other_devices(f, names):
    with pytest.raises(NotImplementedError, match=rf"^{names[0]}: .* got meta"):
        call(f, names, **{name: TENSOR.to("meta") for name in names})


@losses
@pytest.mark.parametrize("reduction", ["", "Mean", "batchmean", None, 1, ["mean"]])
def test_unknown_reduction(f, names, reduction):
    if f in (nf.uniformity, nf.uniformity_gap, nf.info_nce_limit):
        pytest.skip("always a scalar")
    with refuses(ValueError, "reduction", "expected 'mean', 'sum' or 'none'"):
        call(f, names, reduction=reduction)


# ---- temperature and logit_scale -------------------------------------------------------------------------------------

SCALED = [
    (nf.info_nce_loss, "temperature"),
    (nf.info_nce_loss, "logit_scale"),
    (nf.nt_xent_loss, "temperature"),
    (nf.nt_xent_loss, "logit_scale"),
    (nf.clip_loss, "logit_scale"),
    (nf.info_nce_limit, "temperature"),
    (nf.dcl_loss, "temperature"),
    (nf.siglip_loss, "logit_scale"),
]
scaled = pytest.mark.parametrize(("f", "name"), SCALED, ids=[f"{f.__name__}-{name}" for f, name in SCALED])


@scaled
@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, math.nan, math.inf, -math.inf])
def test_not_positive(f, name, value):
    for given in (value, np.array(value), np.float32(value)):
        with refuses(ValueError, name, "expected a positive number, got"):
            f(X, Y, **{name: given})
    for dtype in (torch.float32, torch.float64):
        given = torch.tensor(value, dtype=dtype, requires_grad=True)
        with pytest.raises(ValueError, match=rf"^(?=.*{name}).*: expected a positive number"):
            f(TENSOR, TENSOR, **{name: given})


@scaled
def test_beyond_float32(f, name):
    """A multiplier that the scores' type cannot hold is refused, not turned into NaN."""
    value = 1e40 if name == "logit_scale" else 1e-40
    with pytest.raises(ValueError, match=rf"^(?=.*{name}).*: expected a positive number"):
        f(X.astype(np.float32), Y.astype(np.float32), **{name: value})
    assert np.isfinite(f(X, X, **{name: value}))


@scaled
@pytest.mark.parametrize("value", ["0.5", 1j, [0.5], {}, object(), True])
def test_not_a_number(f, name, value):
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected a number"):
        f(X, Y, **{name: value})


@scaled
def test_shapes_of_a_number(f, name, kind):
    x, y = of_kind(kind, X), of_kind(kind, Y)
    for shape in ((1,), (6,), (1, 1)):
        with refuses(ValueError, name, f"expected a number or a 0-d array, got shape {shape}"):
            f(x, y, **{name: of_kind(kind, np.full(shape, 0.5))})
    with refuses(TypeError, name, "expected a real number, got complex64"):
        f(TENSOR, TENSOR, **{name: torch.tensor(1j)})
    with refuses(TypeError, name, "expected a number, got complex128"):
        f(x, y, **{name: np.complex128(1)})
    with refuses(TypeError, name, "to match the points, got a torch.Tensor"):
        f(X, Y, **{name: torch.tensor(0.5)})


@pytest.mark.parametrize("f", [nf.info_nce_loss, nf.nt_xent_loss])
def test_both(f, kind):
    x, y = of_kind(kind, X), of_kind(kind, Y)
    for temperature in (0.07, 0.5):
        with refuses(ValueError, "temperature", "give temperature or logit_scale, not both"):
            f(x, y, temperature=temperature, logit_scale=2.0)


def test_limit_needs_a_temperature():
    with refuses(TypeError, "temperature", "expected a number, got NoneType"):
        nf.info_nce_limit(X, Y, None)
    with refuses(ValueError, "x", "expected at least one row"):
        nf.info_nce_limit(X[:0], Y[:0], 0.5)


@pytest.mark.parametrize(("f", "name"), [(nf.alignment, "alpha"), (nf.uniformity, "t")])
def test_parameters_without_a_gradient(f, name):
    """A gradient that does not exist is refused, not silently left out."""
    arguments = (TENSOR,) if f is nf.uniformity else (TENSOR, TENSOR.flip(0))
    assert f(*arguments, **{name: torch.tensor(3.0)}) == f(*arguments, **{name: 3})
    with refuses(TypeError, name, "expected a number, got a tensor that requires a gradient"):
        f(*arguments, **{name: torch.tensor(3.0, requires_grad=True)})
    with refuses(TypeError, name, "expected a number, got str"):
        f(*arguments, **{name: "two"})


# ---- what info_nce_loss alone has ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (4,), (1, 1, 6, 4)])
def test_rank_of_negatives(shape, kind):
    with refuses(ValueError, "negative_keys", f"expected shape (m, 4) or (6, m, 4), got {shape}"):
        nf.info_nce_loss(of_kind(kind, X), of_kind(kind, Y), of_kind(kind, np.ones(shape)))


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 4), (6, 2, 5)])
def test_shape_of_negatives(shape, kind):
    with refuses(ValueError, "negative_keys", f"to match query, got {shape}"):
        nf.info_nce_loss(of_kind(kind, X), of_kind(kind, Y), of_kind(kind, np.ones(shape)))


def test_kind_of_negatives():
    with refuses(TypeError, "negative_keys", "expected a numpy array to match query, got torch"):
        nf.info_nce_loss(X, Y, TENSOR)
    with refuses(TypeError, "negative_keys", "expected dtype float64 to match query, got float32"):
        nf.info_nce_loss(X, Y, X.astype(np.float32))
    with refuses(TypeError, "negative_keys", "expected a NumPy, PyTorch or CuPy array, got list"):
        nf.info_nce_loss(X, Y, X.tolist())


def test_no_scale():
    with refuses(TypeError, "logit_scale", "expected a number, got NoneType"):
        nf.clip_loss(X, Y, None)


def test_options_that_exclude_each_other():
    with refuses(ValueError, "negative_keys", "not with symmetric=True"):
        nf.info_nce_loss(X, Y, X, symmetric=True)
    with refuses(ValueError, "in_batch", "expected True without negative_keys, got False"):
        nf.info_nce_loss(X, Y, in_batch=False)
    with refuses(ValueError, "ids", "needs in-batch keys"):
        nf.info_nce_loss(X, Y, X, ids=np.arange(6))


def test_ids():
    for bad, error, message in (
        (np.ones(6), TypeError, "expected an integer dtype, got float64"),
        (np.ones(6, bool), TypeError, "expected an integer dtype, got bool"),
        ([1] * 6, TypeError, "expected a NumPy, PyTorch or CuPy array, got list"),
        (torch.arange(6), TypeError, "expected a numpy array to match query, got torch"),
        (np.arange(5), ValueError, "expected shape (6,) to match query, got (5,)"),
        (np.arange(6)[:, None], ValueError, "expected shape (6,) to match query, got (6, 1)"),
    ):
        with refuses(error, "ids", message):
            nf.info_nce_loss(X, Y, ids=bad)


LABELLED = [nf.batch_triplet_loss, nf.circle_loss, nf.mine_triplets, nf.multi_similarity_loss]


@pytest.mark.parametrize("f", LABELLED)
def test_no_labels(f):
    with refuses(TypeError, "labels", "expected a NumPy, PyTorch or CuPy array, got NoneType"):
        f(X, None)


def test_labels_on_another_device():
    elsewhere = torch.zeros(6, dtype=torch.int64, device="meta")
    for f in (*LABELLED, nf.sup_con_loss):
        with refuses(ValueError, "labels", "expected device cpu to match embeddings, got meta"):
            f(TENSOR, elsewhere)
    with refuses(ValueError, "ids", "expected device cpu to match query, got meta"):
        nf.info_nce_loss(TENSOR, TENSOR, ids=elsewhere)
    with refuses(ValueError, "same", "expected device cpu to match x1, got meta"):
        nf.contrastive_loss(TENSOR, TENSOR, elsewhere)


SEEDED = {
    "mine_triplets": lambda seed: nf.mine_triplets(X, np.arange(6) % 2, mining="all", max_triplets=2, seed=seed),
    "evaluate": lambda seed: nf.evaluate(X, seed=seed),
    "mmd_permutation_test": lambda seed: nf.mmd_permutation_test(X, Y, permutations=2, seed=seed),
    "nystrom": lambda seed: nf.nystrom("rbf", X, 2, seed=seed),
    "random_features": lambda seed: nf.random_features("gaussian", 4, 8, seed=seed),
    "psd_report": lambda seed: nf.psd_report(np.eye(3), seed=seed),
}


@pytest.mark.parametrize("name", SEEDED)
def test_seeds(name):
    SEEDED[name](np.int64(3))
    for bad, error, message in ((-1, ValueError, "of at least 0, got -1"), ("a", TypeError, "expected an integer")):
        with refuses(error, "seed", message):
            SEEDED[name](bad)
    with refuses(TypeError, "seed", "expected an integer"):
        SEEDED[name](0.5)


# ---- modules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [nf.InfoNCELoss, nf.NTXentLoss, nf.ClipLoss])
def test_modules(module):
    for temperature in (0, -1.0, math.nan, math.inf):
        with refuses(ValueError, "temperature", "expected a positive number"):
            module(temperature)
    for temperature in ("0.1", None):
        with refuses(TypeError, "temperature", "expected a number"):
            module(temperature)
    with refuses(ValueError, "reduction", "expected 'mean', 'sum' or 'none'"):
        module(reduction="max")


def test_modules_of_the_sphere():
    with refuses(ValueError, "reduction", "expected 'mean', 'sum' or 'none'"):
        nf.AlignmentLoss(reduction="max")
    with refuses(ValueError, "alpha", "expected a positive number"):
        nf.AlignmentLoss(alpha=0)(TENSOR, TENSOR)
    with refuses(ValueError, "t", "expected a positive number"):
        nf.UniformityLoss(t=-1)(TENSOR)
