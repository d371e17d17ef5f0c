// What a function of the vocabulary is declared with: compiled for the host and the device.
#pragma once

#if defined(__CUDACC__)
#define NEARFAR_FN __host__ __device__ __forceinline__
#else
#define NEARFAR_FN inline __attribute__((always_inline))
#endif
