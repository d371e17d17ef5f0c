// Which instruction set: the one place where this is decided, once.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/ops.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace nearfar {

#define NEARFAR_LEVEL(name) \
  namespace name {          \
  const Ops& table();       \
  }
NEARFAR_LEVEL(v4_bf16)
NEARFAR_LEVEL(v4_vnni)
NEARFAR_LEVEL(v4)
NEARFAR_LEVEL(v3)
NEARFAR_LEVEL(v2)
NEARFAR_LEVEL(generic)
#undef NEARFAR_LEVEL

namespace {

struct Level {
  const char* name;
  const Ops& (*table)();
  bool supported;
};

#if defined(__x86_64__)
/// What this CPU has of the levels of the x86-64 ABI. __builtin_cpu_supports asks cpuid and, through xgetbv, the
/// operating system; names of levels are known to it since GCC 12 and Clang 18 only, three features not even there.
struct Supported {
  bool v2 = false, v3 = false, v4 = false, v4_vnni = false, v4_bf16 = false;

  Supported() {
    __builtin_cpu_init();
    unsigned a, b, c, d;
    const auto has = [&](unsigned leaf, unsigned bits) {
      return __get_cpuid(leaf, &a, &b, &c, &d) && (c & bits) == bits;
    };
    v2 = __builtin_cpu_supports("ssse3") && __builtin_cpu_supports("sse4.1") && __builtin_cpu_supports("sse4.2") &&
         __builtin_cpu_supports("popcnt") && has(1, bit_SSE3 | bit_CMPXCHG16B) && has(0x80000001, bit_LAHF_LM);
    v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && has(1, bit_F16C | bit_MOVBE) && has(0x80000001, bit_LZCNT);
    v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    v4_vnni = v4 && __builtin_cpu_supports("avx512vnni");
    v4_bf16 = v4_vnni && __builtin_cpu_supports("avx512bf16");
#if defined(NEARFAR_EMULATE_AVX512)
    v4 = v4_vnni = v4_bf16 = v3;
#endif
  }
};
#endif

const Ops& choose() {
#if defined(__x86_64__)
  [[maybe_unused]] const Supported cpu;
#endif
  // Best first.
  const Level levels[] = {
#if defined(NEARFAR_HAVE_v4_bf16)
      {"v4_bf16", v4_bf16::table, cpu.v4_bf16},
#endif
#if defined(NEARFAR_HAVE_v4_vnni)
      {"v4_vnni", v4_vnni::table, cpu.v4_vnni},
#endif
#if defined(NEARFAR_HAVE_v4)
      {"v4", v4::table, cpu.v4},
#endif
#if defined(NEARFAR_HAVE_v3)
      {"v3", v3::table, cpu.v3},
#endif
#if defined(NEARFAR_HAVE_v2)
      {"v2", v2::table, cpu.v2},
#endif
#if defined(NEARFAR_HAVE_generic)
      {"generic", generic::table, true},
#endif
  };
  const char* wanted = std::getenv("NEARFAR_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  std::string known;
  for (const Level& level : levels) {
    known += std::string(known.empty() ? "" : ", ") + level.name;
    if (any ? level.supported : wanted == std::string(level.name)) {
      if (level.supported) return level.table();
      throw std::runtime_error(std::string("NEARFAR_ISA=") + wanted + ": this CPU does not have it");
    }
  }
  throw std::runtime_error(any ? "nearfar needs at least an x86-64-v2 CPU"
                               : "NEARFAR_ISA=" + std::string(wanted) + ": expected one of " + known);
}

}  // namespace

const Ops& ops() {
  static const Ops& chosen = choose();
  return chosen;
}

}  // namespace nearfar
