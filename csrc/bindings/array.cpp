#include "bindings/array.hpp"

#include <algorithm>
#include <array>

namespace nearfar {

// ---- messages ---------------------------------------------------------------------------------------------

struct DTypeInfo {
  const char* name;
  DLDataType dlpack;
};

static constexpr DTypeInfo kDTypeInfo[] = {
    // in the order of DType
    {"float16", {kDLFloat, 16, 1}}, {"bfloat16", {kDLBfloat, 16, 1}}, {"float32", {kDLFloat, 32, 1}},
    {"float64", {kDLFloat, 64, 1}}, {"int32", {kDLInt, 32, 1}},       {"int64", {kDLInt, 64, 1}},
    {"uint8", {kDLUInt, 8, 1}},
};

static const DTypeInfo& info_of(DType type) { return kDTypeInfo[static_cast<int>(type)]; }

void refuse_type(const char* name, const std::string& text) { throw py::type_error(name + (": " + text)); }
void refuse_value(const char* name, const std::string& text) { throw py::value_error(name + (": " + text)); }

const char* name_of(DType type) { return info_of(type).name; }

std::string device_of(const Array& a) {
  if (a.on_cpu()) return "cpu";
  const std::string kind = a.device_type == kDLCUDA    ? "cuda"
                           : a.device_type == kDLROCM  ? "rocm"
                           : a.device_type == kDLMetal ? "metal"
                                                       : "DLPack device " + std::to_string(a.device_type);
  return kind + ":" + std::to_string(a.device_id);
}

std::string text_of(const int64_t* values, int count) {
  std::string text = "(";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + (count == 1 ? ",)" : ")");
}

static std::string text_of(DTypes types) {  // "float16, float32 or float64"
  std::string text;
  size_t left = types.size();
  for (DType type : types) {
    text += name_of(type);
    if (--left) text += left > 1 ? ", " : " or ";
  }
  return text;
}

static std::string text_of(DLDataType type) {  // "complex64"
  static const char* const kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex"};
  if (type.code == kDLBool) return "bool";
  if (type.code < kDLBool && type.lanes == 1) return kinds[type.code] + std::to_string(type.bits);
  return "DLPack type " + std::to_string(type.code) + " of " + std::to_string(type.bits) + " bits";
}

static std::string text_of(py::handle obj) {  // "list", "numpy.ndarray of dtype >f4"
  const py::handle type = py::type::handle_of(obj);
  const std::string module = py::str(type.attr("__module__")), name = py::str(type.attr("__name__"));
  std::string text = module == "builtins" ? name : module + "." + name;
  if (py::hasattr(obj, "dtype")) text += " of dtype " + std::string(py::str(obj.attr("dtype")));
  return text;
}

// A protocol failed with the Python exception that is now set: make it the cause of a TypeError that names the
// argument.
[[noreturn]] static void refuse_export(py::handle obj, const char* name) {
  if (!PyErr_ExceptionMatches(PyExc_Exception)) throw py::error_already_set();  // KeyboardInterrupt and the like
  py::error_already_set cause;
  const std::string got = text_of(obj);
  std::string reason = py::str(cause.value());
  reason.resize(std::min(reason.size(), reason.find('\n')));  // torch appends its call stack
  if (got.find("dtype bfloat16") != std::string::npos) reason = "bfloat16 needs torch, pass a torch tensor";
  py::raise_from(cause, PyExc_TypeError, (name + (": cannot read a " + got) + ": " + reason).c_str());
  throw py::error_already_set();
}

// ---- protocols --------------------------------------------------------------------------------------------

// What the type of an array tells about the protocols it speaks. Asking takes microseconds: once per type.
struct Producer {
  py::object type;
  const DLPackExchangeAPI* exchange = nullptr;
  py::object dlpack;             // type.__dlpack__, or empty
  py::object is_neg;             // torch's is_neg, or empty
  bool is_masked = false;        // numpy.ma, which exports its data without its mask
  bool same_stream = false;      // some order their stream before the default stream unless told not to
  bool always_writable = false;  // libraries that export no read-only memory in capsules that cannot say so

  Producer() = default;
  explicit Producer(py::handle of) : type(py::reinterpret_borrow<py::object>(of)) {
    const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
    if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api"))
      exchange = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    while (exchange && exchange->version.major != 1) exchange = exchange->previous;
    if (exchange && !exchange->tensor_from_object) exchange = nullptr;
    if (py::hasattr(type, "__dlpack__")) dlpack = type.attr("__dlpack__");
    if (py::hasattr(type, "is_neg") && py::hasattr(type, "requires_grad")) is_neg = type.attr("is_neg");
    is_masked = py::hasattr(type, "filled") && py::hasattr(type, "mask");
    std::string library = py::str(type.attr("__module__"));
    library.resize(std::min(library.size(), library.find('.')));
    same_stream = library == "cupy" || library == "torch";
    always_writable = library == "numpy" || library == "cupy" || is_neg;
  }
};

static Producer producer_of(py::handle obj) {
  static auto& recent = *new std::array<Producer, 8>;  // never destroyed: the interpreter may be gone by then
  static size_t next = 0;
  const py::handle type = py::type::handle_of(obj);
  for (const Producer& known : recent)
    if (known.type.is(type)) return known;
  Producer producer(type);
  recent[next++ % recent.size()] = producer;
  return producer;
}

// Two kinds of torch tensors mean something else than their memory says, and torch exports them without a word. (The
// third, lazily conjugated ones, are complex and refused as such.)
static void refuse_lazy(const Producer& producer, py::handle obj, const char* name) {
  static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
  const auto grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(obj.ptr(), requires_grad));
  if (!grad) throw py::error_already_set();
  const auto negated = py::reinterpret_steal<py::object>(PyObject_CallOneArg(producer.is_neg.ptr(), obj.ptr()));
  if (!negated) throw py::error_already_set();
  if (grad.ptr() == Py_True)
    refuse_value(name, "expected a tensor without gradient, got one that requires grad; pass .detach()");
  if (negated.ptr() == Py_True)
    refuse_value(name, "expected a plain tensor, got a lazily negated view; pass .resolve_neg()");
}

// Copies what a producer says into `a`, and refuses what no kernel can read.
static void describe(Array& a, const DLTensor& t, const char* name, DTypes allowed) {
  if (t.ndim < 0 || t.ndim > 4) refuse_value(name, "expected at most 4 dimensions, got " + std::to_string(t.ndim));
  const DType* type = std::find_if(allowed.begin(), allowed.end(), [&](DType candidate) {
    const DLDataType d = info_of(candidate).dlpack;
    return d.code == t.dtype.code && d.bits == t.dtype.bits && d.lanes == t.dtype.lanes;
  });
  if (type == allowed.end()) refuse_type(name, "expected " + text_of(allowed) + ", got " + text_of(t.dtype));
  a.ndim = t.ndim;
  a.dtype = *type;
  a.device_type = t.device.type;
  a.device_id = t.device.id;
  int64_t size = 1;
  for (int i = t.ndim; i-- > 0;) {
    a.shape[i] = t.shape[i];
    a.strides[i] = t.strides ? t.strides[i] : size;
    if (t.shape[i] < 0 || __builtin_mul_overflow(size, t.shape[i], &size))
      refuse_value(name, "expected a size below 2^63, got shape " + text_of(t.shape, t.ndim));
  }
  if (size == 0) return;  // no memory to speak of
  if (!t.data) refuse_value(name, "expected an array with memory, got a null pointer (a fake tensor?)");
  a.data = static_cast<char*>(t.data) + t.byte_offset;
  if (reinterpret_cast<uintptr_t>(a.data) % size_of(a.dtype))
    refuse_value(name, std::string("expected aligned ") + name_of(a.dtype) + ", got misaligned data; pass a copy");
}

static bool from_exchange(Array& a, const Producer& producer, py::handle obj, const char* name, DTypes allowed) {
  if (!producer.exchange) return false;
  DLTensor tensor;
  if (producer.exchange->tensor_from_object(obj.ptr(), &tensor)) refuse_export(obj, name);
  describe(a, tensor, name, allowed);
  a.path = "exchange";
  a.owner = py::reinterpret_borrow<py::object>(obj);
  return true;
}

// Asks for a version that can mark read-only memory; older producers know no keywords. May return empty, with the
// Python error set.
static py::object capsule_of(const Producer& producer, py::handle obj) {
  static PyObject* const version = Py_BuildValue("(ii)", 1, 1);
  static PyObject* const no_sync = PyLong_FromLong(-1);  // we launch on the producer's own stream
  static PyObject* const keys = Py_BuildValue("(s)", "max_version");
  static PyObject* const keys_stream = Py_BuildValue("(ss)", "max_version", "stream");
  PyObject* const arguments[] = {obj.ptr(), version, no_sync};
  PyObject* capsule =
      PyObject_Vectorcall(producer.dlpack.ptr(), arguments, 1, producer.same_stream ? keys_stream : keys);
  if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {
    PyErr_Clear();
    capsule = PyObject_CallOneArg(producer.dlpack.ptr(), obj.ptr());
  }
  return py::reinterpret_steal<py::object>(capsule);
}

// The capsule stays unconsumed: its own destructor ends the loan.
static bool from_dlpack(Array& a, const Producer& producer, py::handle obj, const char* name, DTypes allowed) {
  if (!producer.dlpack) return false;
  a.owner = capsule_of(producer, obj);
  if (!a.owner) {
    // The buffer protocol can lend read-only memory (which NumPy before 2.1 refuses here) and name odd dtypes.
    if (!PyErr_ExceptionMatches(PyExc_BufferError) || !PyObject_CheckBuffer(obj.ptr())) refuse_export(obj, name);
    PyErr_Clear();
    return false;
  }
  PyObject* const capsule = a.owner.ptr();
  if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
    const auto* managed = static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
    if (managed->version.major != 1)
      refuse_type(name, "expected DLPack version 1, got " + std::to_string(managed->version.major));
    describe(a, managed->tensor, name, allowed);
    a.readonly = managed->flags & (kDLReadOnly | kDLCopied);  // writing to a copy would be lost
  } else if (PyCapsule_IsValid(capsule, "dltensor")) {
    describe(a, static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"))->tensor, name, allowed);
    a.readonly = !producer.always_writable;
  } else {
    refuse_type(name, "expected a DLPack capsule from __dlpack__, got " + text_of(a.owner));
  }
  a.path = "dlpack";
  return true;
}

static bool from_buffer(Array& a, py::handle obj, const char* name, DTypes allowed) {
  constexpr char native = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? '<' : '>';
  if (!PyObject_CheckBuffer(obj.ptr())) return false;
  a.owner = py::reinterpret_steal<py::object>(PyMemoryView_FromObject(obj.ptr()));
  if (!a.owner) refuse_export(obj, name);
  const Py_buffer& view = *PyMemoryView_GET_BUFFER(a.owner.ptr());
  if (view.ndim == 0) return false;  // a scalar of NumPy or ctypes
  std::string format = view.format ? view.format : "B";
  if (format[0] == '@' || format[0] == '=' || format[0] == native) format.erase(0, 1);
  const bool is_float = format == "e" || format == "f" || format == "d";
  const bool is_byte = format == "B" && std::find(allowed.begin(), allowed.end(), DType::u8) != allowed.end();
  if (!is_float && !is_byte && format != "i" && format != "l" && format != "q")
    refuse_type(name, "expected " + text_of(allowed) + ", got " + text_of(obj) + " (buffer format '" + format + "')");
  int64_t shape[4] = {}, strides[4] = {};
  for (int i = 0; i < std::min(view.ndim, 4); ++i) {
    shape[i] = view.shape[i];
    strides[i] = view.strides[i] / view.itemsize;
    if (view.strides[i] % view.itemsize || view.suboffsets)
      refuse_value(name, "expected strides in whole items, got an array of fields or pointers; pass a copy");
  }
  const DLDataTypeCode code = is_float ? kDLFloat : is_byte ? kDLUInt : kDLInt;
  const DLDataType dtype = {code, static_cast<uint8_t>(8 * view.itemsize), 1};
  describe(a, {view.buf, {kDLCPU, 0}, view.ndim, dtype, shape, strides, 0}, name, allowed);
  a.readonly = view.readonly;
  a.path = "buffer";
  return true;
}

// ---- what bindings call -----------------------------------------------------------------------------------

bool Array::contiguous() const {
  int64_t expected = 1;
  bool same = true;
  for (int i = ndim; i-- > 0; expected *= shape[i]) same = same && (shape[i] == 1 || strides[i] == expected);
  return same || expected == 0;  // the strides of an extent of 1 and of an empty array do not matter
}

Array borrow(py::handle obj, const char* name, DTypes allowed) {
  const Producer producer = producer_of(obj);
  if (producer.is_masked) refuse_type(name, "expected a plain array, got a masked one; pass .filled(value)");
  if (producer.is_neg) refuse_lazy(producer, obj, name);
  Array a;
  if (!from_exchange(a, producer, obj, name, allowed) && !from_dlpack(a, producer, obj, name, allowed) &&
      !from_buffer(a, obj, name, allowed))
    refuse_type(name, "expected a NumPy, PyTorch or CuPy array, got " + text_of(obj));
  return a;
}

static void add_axis(Array& a) {
  std::copy_backward(a.shape, a.shape + a.ndim, a.shape + a.ndim + 1);
  std::copy_backward(a.strides, a.strides + a.ndim, a.strides + a.ndim + 1);
  a.shape[0] = 1;
  a.strides[0] = 0;
  ++a.ndim;
}

void add_batch(Array& a, int ndim) {
  if (ndim == 3 && a.ndim == 2) add_axis(a);
}

void add_batch(Array& a, const int64_t* shape, int ndim) {
  if (ndim > 1 && shape[0] == 1 && a.ndim == ndim - 1) add_axis(a);
}

Array input(py::handle obj, const char* name, int ndim, DTypes allowed) {
  Array a = borrow(obj, name, allowed);
  add_batch(a, ndim);
  if (a.ndim != ndim)
    refuse_value(name, "expected " + std::to_string(ndim) + (ndim == 1 ? " dimension" : " dimensions") +
                           ", got shape " + shape_of(a));
  if (!a.on_cpu()) refuse_value(name, "expected CPU memory, got an array on " + device_of(a));
  return a;
}

void* output(py::handle obj, const char* name, DType dtype, const int64_t* shape, int ndim) {
  Array a = borrow(obj, name, {dtype});
  add_batch(a, shape, ndim);
  if (a.ndim != ndim || !std::equal(shape, shape + ndim, a.shape))
    refuse_value(name, "expected shape " + text_of(shape, ndim) + ", got " + shape_of(a));
  if (!a.on_cpu()) refuse_value(name, "expected CPU memory, got an array on " + device_of(a));
  if (a.readonly) refuse_value(name, "expected a writable array, got a read-only one");
  if (!a.contiguous()) refuse_value(name, "expected a C-contiguous array, got strides " + text_of(a.strides, a.ndim));
  return a.data;
}

}  // namespace nearfar
