// Which instruction set: the one place where this is decided, once.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/ops.hpp"

namespace nearfar {

#define NEARFAR_LEVEL(name) \
  namespace name {          \
  const Ops& table();       \
  }
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

const Ops& choose() {
  // __builtin_cpu_supports asks cpuid and, through xgetbv, the operating system. Best first.
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  const Level levels[] = {
#if defined(NEARFAR_EMULATE_AVX512)
      {"v4_vnni", v4_vnni::table, __builtin_cpu_supports("x86-64-v3") != 0},
      {"v4", v4::table, __builtin_cpu_supports("x86-64-v3") != 0},
#else
#if defined(NEARFAR_HAVE_v4_vnni)
      {"v4_vnni", v4_vnni::table, __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512vnni")},
#endif
#if defined(NEARFAR_HAVE_v4)
      {"v4", v4::table, __builtin_cpu_supports("x86-64-v4") != 0},
#endif
#endif
#if defined(NEARFAR_HAVE_v3)
      {"v3", v3::table, __builtin_cpu_supports("x86-64-v3") != 0},
#endif
#if defined(NEARFAR_HAVE_v2)
      {"v2", v2::table, __builtin_cpu_supports("x86-64-v2") != 0},
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
