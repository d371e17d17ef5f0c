#pragma once
#include <cstdint>

// The part of the DLPack 1.x ABI that a consumer needs: struct layouts and numbers, nothing else.
// Specification: https://dmlc.github.io/dlpack/latest/

namespace nearfar {

// DLDevice::type. The memory of Host and Managed is readable by the CPU although the GPU driver owns it.
enum DLDeviceType : int32_t {
  kDLCPU = 1,
  kDLCUDA = 2,
  kDLCUDAHost = 3,
  kDLMetal = 8,
  kDLROCM = 10,
  kDLCUDAManaged = 13
};

enum DLDataTypeCode : uint8_t { kDLInt, kDLUInt, kDLFloat, kDLOpaque, kDLBfloat, kDLComplex, kDLBool };

struct DLDevice {
  int32_t type;
  int32_t id;
};

struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; before version 1.2, NULL means C-contiguous
  uint64_t byte_offset;
};

// What a capsule named "dltensor" points to.
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

struct DLPackVersion {
  uint32_t major;
  uint32_t minor;
};

// What a capsule named "dltensor_versioned" points to.
struct DLManagedTensorVersioned {
  DLPackVersion version;
  void* context;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;
  DLTensor tensor;
};

inline constexpr uint64_t kDLReadOnly = 1, kDLCopied = 2;  // bits of DLManagedTensorVersioned::flags

// What the capsule type(array).__dlpack_c_exchange_api__, named "dlpack_exchange_api", points to. Functions return 0,
// or -1 with a Python exception set.
struct DLPackExchangeAPI {
  DLPackVersion version;
  DLPackExchangeAPI* previous;  // the table of an older major version, or NULL
  int (*allocate)(DLTensor*, DLManagedTensorVersioned**, void*, void (*)(void*, const char*, const char*));
  int (*managed_tensor_from_object)(void*, DLManagedTensorVersioned**);
  int (*object_from_managed_tensor)(DLManagedTensorVersioned*, void**);
  int (*tensor_from_object)(void*, DLTensor*);  // may be NULL; borrows: valid until control returns to the producer
  int (*current_stream)(int32_t device_type, int32_t device_id, void**);
};

static_assert(sizeof(DLTensor) == 48 && sizeof(DLManagedTensorVersioned) == 80, "the DLPack ABI of 64-bit machines");

}  // namespace nearfar
