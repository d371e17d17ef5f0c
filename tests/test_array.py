"""How the core sees arrays: what it borrows, by which protocol, and every array that it must refuse."""

import array as stdlib_array
import ctypes
import sys

import numpy as np
import pytest

from nearfar import _core


def info(obj, **kwargs):
    return _core.array_info(obj, "query", **kwargs)


def refuses(error, message):
    """Expect exactly this error, with a message that names the argument first."""
    return pytest.raises(error, match=f"^(query|output): .*{message}")


# ---- a producer made by hand: says anything that DLPack can say ------------------------------------------------------


class Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


class DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", Device),
        ("ndim", ctypes.c_int32),
        ("dtype", DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class Managed(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class ManagedVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype = ctypes.py_object
new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
is_capsule = ctypes.pythonapi.PyCapsule_IsValid
is_capsule.restype = ctypes.c_int
is_capsule.argtypes = [ctypes.py_object, ctypes.c_char_p]


class Producer:
    """A (2, 3) float32 array in a versioned capsule, unless told otherwise."""

    def __init__(
        self,
        shape=(2, 3),
        strides=None,
        dtype=(2, 32, 1),
        device=(1, 0),
        version=(1, 1),
        flags=0,
        byte_offset=0,
        data=True,
        name=None,
    ):
        self.memory = np.arange(64, dtype=np.float64)
        self.shape = (ctypes.c_int64 * len(shape))(*shape)
        self.strides = None if strides is None else (ctypes.c_int64 * len(strides))(*strides)
        pointer = self.memory.ctypes.data if data else None
        tensor = Tensor(pointer, Device(*device), len(shape), DataType(*dtype), self.shape, self.strides, byte_offset)
        if version:
            self.managed = ManagedVersioned(*version, None, None, flags, tensor)
        else:
            self.managed = Managed(tensor, None, None)
        self.name = name or (b"dltensor_versioned" if version else b"dltensor")
        self.capsule = new_capsule(ctypes.addressof(self.managed), self.name, None)
        self.calls = []

    def __dlpack__(self, **kwargs):
        self.calls.append(kwargs)
        return self.capsule


# ---- what is borrowed ------------------------------------------------------------------------------------------------


def test_numpy():
    x = np.zeros((3, 4), np.float32)
    assert info(x) == {
        "shape": (3, 4),
        "strides": (4, 1),
        "dtype": "float32",
        "device": "cpu",
        "readonly": False,
        "path": "dlpack",
        "data": x.ctypes.data,
    }


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "int64"])
def test_numpy_dtypes(dtype):
    assert info(np.zeros((3, 4), dtype))["dtype"] == dtype


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0, 3), (1, 1, 1, 1)])
def test_numpy_shapes(shape):
    assert info(np.zeros(shape))["shape"] == shape


def test_negative_strides():
    x = np.zeros((3, 4))[::-1, ::-2]
    assert info(x)["strides"] == (-4, -2)
    assert info(x)["data"] == x.__array_interface__["data"][0]


def test_zero_strides():
    assert info(np.broadcast_to(np.zeros(4), (3, 4)))["strides"] == (0, 1)


def test_readonly_input():
    x = np.zeros(4)
    x.flags.writeable = False
    assert info(x)["readonly"] is True
    assert info(np.zeros(4))["readonly"] is False


def test_loan_ends_with_the_call():
    x = np.zeros(4)
    before = sys.getrefcount(x)
    info(x)
    info(memoryview(x))
    assert sys.getrefcount(x) == before


@pytest.mark.parametrize(
    ("obj", "dtype"),
    [
        (stdlib_array.array("d", [1, 2, 3]), "float64"),
        (stdlib_array.array("f", [1, 2, 3]), "float32"),
        (stdlib_array.array("i", [1, 2, 3]), "int32"),
        (stdlib_array.array("q", [1, 2, 3]), "int64"),
        (memoryview(np.zeros(3, np.float16)), "float16"),
        (memoryview(np.zeros(3, np.int64)), "int64"),
        ((ctypes.c_double * 3)(), "float64"),
        ((ctypes.c_int64 * 3)(), "int64"),
    ],
)
def test_buffer_protocol(obj, dtype):
    got = info(obj)
    assert (got["path"], got["dtype"], got["shape"], got["strides"]) == ("buffer", dtype, (3,), (1,))
    assert got["readonly"] is False


def test_buffer_strides_and_readonly():
    x = np.zeros((4, 6), np.float32)
    assert info(memoryview(x[::-1, ::2]))["strides"] == (-6, 2)
    assert info(memoryview(x).toreadonly())["readonly"] is True


@pytest.mark.parametrize("version", [(1, 0), (1, 3), None])
def test_capsule_stays_unconsumed(version):
    producer = Producer(version=version)
    for _ in range(2):
        assert info(producer)["shape"] == (2, 3)
    assert is_capsule(producer.capsule, producer.name)
    assert producer.calls == [{"max_version": (1, 1)}] * 2


def test_missing_strides_mean_c_contiguous():
    assert info(Producer(shape=(2, 3, 4)))["strides"] == (12, 4, 1)


def test_byte_offset():
    producer = Producer(byte_offset=8)
    assert info(producer)["data"] == producer.memory.ctypes.data + 8


def test_producer_that_knows_no_keywords():
    class Old(Producer):
        def __dlpack__(self):
            return self.capsule

    assert info(Old())["path"] == "dlpack"


def test_cupy_is_asked_not_to_synchronise():
    cupy_ndarray = type("ndarray", (Producer,), {"__module__": "cupy"})
    x = cupy_ndarray(device=(2, 0))
    assert info(x)["device"] == "cuda:0"
    assert x.calls == [{"max_version": (1, 1), "stream": -1}]


@pytest.mark.parametrize("device_type", [1, 3, 13], ids=["plain", "pinned", "managed"])
def test_memory_that_the_cpu_reads(device_type):
    assert info(Producer(device=(device_type, 0)), ndim=2)["device"] == "cpu"


def test_more_types_than_the_cache_holds():
    types = [type(f"Producer{i}", (Producer,), {}) for i in range(20)]
    for _ in range(2):
        for producer in types:
            assert info(producer())["shape"] == (2, 3)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("obj", [[1.0], (1.0,), 1.0, 1, None, "text", {}, np.float64(1), object()])
def test_not_an_array(obj):
    with refuses(TypeError, f"expected a NumPy, PyTorch or CuPy array, got .*{type(obj).__name__}"):
        info(obj)


@pytest.mark.parametrize(
    ("dtype", "got"),
    [
        ("bool", "got bool"),
        ("uint8", "got uint8"),
        ("int16", "got int16"),
        ("complex64", "got complex64"),
        ("complex128", "got complex128"),
        (np.dtype("float32").newbyteorder(), "got numpy.ndarray of dtype [<>]f4"),
        ([("a", "f4")], "got numpy.ndarray of dtype .*'a'"),
        (object, "got numpy.ndarray of dtype object"),
        ("U3", "got numpy.ndarray of dtype .U3"),
        ("datetime64[s]", "cannot read a numpy.ndarray of dtype datetime64"),
    ],
)
def test_dtypes_that_no_kernel_reads(dtype, got):
    with refuses(TypeError, got):
        info(np.zeros(3, dtype))


@pytest.mark.skipif(np.dtype("longdouble").itemsize == 8, reason="longdouble is float64 here")
def test_longdouble():
    with refuses(TypeError, f"got .*{np.dtype('longdouble')}"):
        info(np.zeros(3, np.longdouble))


def test_other_dlpack_types():
    with refuses(TypeError, "got DLPack type 10 of 8 bits"):
        info(Producer(dtype=(10, 8, 1)))
    with refuses(TypeError, "got DLPack type 2 of 32 bits"):
        info(Producer(dtype=(2, 32, 4)))


def test_bytes():
    with refuses(TypeError, "got bytes"):
        info(b"text")


def test_numpy_bfloat16_needs_torch():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with refuses(TypeError, "dtype bfloat16: bfloat16 needs torch"):
        info(np.zeros(3, ml_dtypes.bfloat16))


def test_masked_array():
    with refuses(TypeError, "got a masked one"):
        info(np.ma.array([1.0, 2.0], mask=[False, True]))


def test_misaligned():
    with refuses(ValueError, "expected aligned float32, got misaligned data"):
        info(np.zeros(17, np.uint8)[1:].view(np.float32))
    with refuses(ValueError, "misaligned"):
        info(Producer(byte_offset=2))


def test_strides_of_a_field():
    with refuses(ValueError, "expected strides in whole items"):
        info(np.zeros(4, [("a", "f4"), ("b", "i2")])["a"])


def test_five_dimensions():
    for x in (np.zeros((1,) * 5), memoryview(np.zeros((1,) * 5))):
        with refuses(ValueError, "expected at most 4 dimensions, got 5"):
            info(x)


def test_impossible_shapes():
    for shape in [(2**40, 2**40), (-1, 3)]:
        with refuses(ValueError, "expected a size below 2"):
            info(Producer(shape=shape))


def test_null_pointer():
    with refuses(ValueError, "got a null pointer"):
        info(Producer(data=False))
    assert info(Producer(data=False, shape=(0, 3)))["shape"] == (0, 3)


def test_foreign_capsules():
    with refuses(TypeError, "expected a DLPack capsule"):
        info(Producer(name=b"used_dltensor_versioned"))
    with refuses(TypeError, "expected DLPack version 1, got 2"):
        info(Producer(version=(2, 0)))
    no_capsule = type("NoCapsule", (), {"__dlpack__": lambda self, **_: 1})
    with refuses(TypeError, "expected a DLPack capsule from __dlpack__, got int"):
        info(no_capsule())


@pytest.mark.parametrize("error", [TypeError, ValueError, BufferError, RuntimeError])
def test_producer_that_fails(error):
    class Failing:
        def __dlpack__(self, **_):
            raise error("no luck\nand a long story")

    with refuses(TypeError, "cannot read a .*Failing: no luck$") as failure:
        info(Failing())
    assert type(failure.value.__cause__) is error


def test_interrupt_passes():
    class Interrupted:
        def __dlpack__(self, **_):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        info(Interrupted())


# ---- inputs ----------------------------------------------------------------------------------------------------------


def test_input():
    assert info(np.zeros((3, 4)), ndim=2)["shape"] == (3, 4)


def test_input_rank():
    with refuses(ValueError, r"expected 2 dimensions, got shape \(3,\)"):
        info(np.zeros(3), ndim=2)
    with refuses(ValueError, r"expected 1 dimension, got shape \(3, 4\)"):
        info(np.zeros((3, 4)), ndim=1)


def test_integers_where_floats_are_meant():
    with refuses(TypeError, "expected float16, bfloat16, float32 or float64, got int64"):
        info(np.zeros((3, 4), np.int64), ndim=2)


@pytest.mark.parametrize(
    ("device", "text"), [((2, 1), "cuda:1"), ((10, 0), "rocm:0"), ((8, 0), "metal:0"), ((14, 2), "DLPack device 14:2")]
)
def test_input_on_another_device(device, text):
    assert info(Producer(device=device))["device"] == text
    with refuses(ValueError, f"expected CPU memory, got an array on {text}"):
        info(Producer(device=device), ndim=2)


# ---- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (0, 4), (1, 4), (3, 1)])
def test_output(shape):
    _core.check_output(np.zeros(shape, np.float32), shape)


def test_output_strides_that_do_not_matter():
    _core.check_output(Producer(shape=(1, 4), strides=(100, 1)), (1, 4))
    _core.check_output(Producer(shape=(3, 1), strides=(1, 0)), (3, 1))


def test_output_in_a_buffer():
    _core.check_output(stdlib_array.array("f", [0, 0]), (2,))


@pytest.mark.parametrize("shape", [(3, 5), (3,), (3, 4, 1), (1,) * 9])
def test_output_shape(shape):
    with refuses(ValueError, r"expected shape \(.*\), got \(3, 4\)$"):
        _core.check_output(np.zeros((3, 4), np.float32), shape)


def test_output_dtype():
    with refuses(TypeError, "expected float32, got float64"):
        _core.check_output(np.zeros((3, 4)), (3, 4))


def test_output_order():
    with refuses(ValueError, r"expected a C-contiguous array, got strides \(1, 3\)"):
        _core.check_output(np.zeros((3, 4), np.float32, order="F"), (3, 4))
    with refuses(ValueError, r"got strides \(-4, 1\)"):
        _core.check_output(np.zeros((3, 4), np.float32)[::-1], (3, 4))


def test_output_with_zero_strides():
    with refuses(ValueError, r"expected a C-contiguous array, got strides \(0, 1\)"):
        _core.check_output(Producer(shape=(3, 4), strides=(0, 1)), (3, 4))


def test_output_readonly():
    x = np.zeros((3, 4), np.float32)
    x.flags.writeable = False
    for obj in (x, np.broadcast_to(np.zeros(4, np.float32), (3, 4)), memoryview(x)):
        with refuses(ValueError, "expected a writable array, got a read-only one"):
            _core.check_output(obj, (3, 4))


@pytest.mark.parametrize("how", [{"version": None}, {"flags": 1}, {"flags": 2}])
def test_output_that_cannot_be_written(how):
    """Unversioned capsules cannot mark read-only memory (jax), and what is written to a copy is lost."""
    with refuses(ValueError, "expected a writable array, got a read-only one"):
        _core.check_output(Producer(**how), (2, 3))
    _core.check_output(Producer(), (2, 3))


def test_output_of_a_library_without_readonly_arrays():
    cupy_ndarray = type("ndarray", (Producer,), {"__module__": "cupy"})
    _core.check_output(cupy_ndarray(version=None), (2, 3))


def test_output_on_another_device():
    with refuses(ValueError, "expected CPU memory, got an array on cuda:0"):
        _core.check_output(Producer(device=(2, 0)), (2, 3))


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def test_torch(torch):
    x = torch.zeros(3, 4)
    got = info(x)
    assert (got["shape"], got["strides"], got["dtype"], got["device"]) == ((3, 4), (4, 1), "float32", "cpu")
    assert got["data"] == x.data_ptr()
    assert got["path"] == ("exchange" if hasattr(torch.Tensor, "__dlpack_c_exchange_api__") else "dlpack")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int32", "int64"])
def test_torch_dtypes(torch, dtype):
    assert info(torch.zeros(3, dtype=getattr(torch, dtype)))["dtype"] == dtype


def test_torch_views(torch):
    x = torch.zeros(5, 6)
    view = x[1:, ::2]
    assert info(view)["data"] == view.data_ptr()
    assert info(view)["strides"] == (6, 2)
    assert info(x.T)["strides"] == (1, 6)
    assert info(torch.zeros(1, 4).expand(3, 4))["strides"] == (0, 1)
    assert info(torch.zeros(0, 4))["shape"] == (0, 4)


def test_torch_subclasses(torch):
    subclass = type("Subclass", (torch.Tensor,), {})
    assert info(torch.zeros(3).as_subclass(subclass))["shape"] == (3,)
    assert info(torch.nn.Parameter(torch.zeros(3)).detach())["shape"] == (3,)


def test_torch_requires_grad(torch):
    for x in (torch.zeros(3, requires_grad=True), torch.nn.Parameter(torch.zeros(3))):
        with refuses(ValueError, r"got one that requires grad; pass \.detach\(\)"):
            info(x)
        with torch.no_grad(), refuses(ValueError, "requires grad"):
            info(x)
        assert info(x.detach())["data"] == x.data_ptr()


def test_torch_negated_view(torch):
    view = torch.zeros(3, dtype=torch.complex64).conj().imag
    assert view.is_neg()
    with refuses(ValueError, r"got a lazily negated view; pass \.resolve_neg\(\)"):
        info(view)
    assert info(view.resolve_neg())["dtype"] == "float32"


def test_torch_conjugated_view(torch):
    with refuses(TypeError, "got complex64"):
        info(torch.zeros(3, dtype=torch.complex64).conj())


def test_torch_bool(torch):
    with refuses(TypeError, "got bool"):
        info(torch.zeros(3, dtype=torch.bool))


def test_torch_without_memory(torch):
    with refuses(TypeError, "cannot read a torch.Tensor of dtype torch.float32: "):
        info(torch.zeros(3, device="meta"))
    with refuses(TypeError, "cannot read a torch.Tensor of dtype torch.float32: "):
        info(torch.eye(3).to_sparse())


def test_torch_batched(torch):
    with refuses(TypeError, "cannot read a torch.Tensor"):
        torch.func.vmap(lambda x: info(x) and x)(torch.zeros(2, 3))


def test_torch_output(torch):
    _core.check_output(torch.empty(3, 4), (3, 4))
    with refuses(ValueError, "requires grad"):
        _core.check_output(torch.empty(3, 4, requires_grad=True), (3, 4))
    with refuses(ValueError, r"got strides \(0, 1\)"):
        _core.check_output(torch.empty(1, 4).expand(3, 4), (3, 4))
    with refuses(TypeError, "expected float32, got bfloat16"):
        _core.check_output(torch.empty(3, 4, dtype=torch.bfloat16), (3, 4))


def test_torch_on_cuda(torch):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    assert info(torch.zeros(3, device="cuda"))["device"] == "cuda:0"
    with refuses(ValueError, "expected CPU memory, got an array on cuda:0"):
        info(torch.zeros(3, device="cuda"), ndim=1)
    assert info(torch.zeros(3).pin_memory(), ndim=1)["device"] == "cpu"
