#include "cpu.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace fusekern {

namespace {

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi"))
    return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa lowered(Isa found) {
  const char* asked = std::getenv("FUSEKERN_CPU_CAPABILITY");
  if (asked == nullptr) return found;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
    if (std::strcmp(asked, name(isa)) == 0 && isa < found) return isa;
  return found;
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = lowered(detect());
  return isa;
}

const char* name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline"; }

bool cpu_has_bf16() {
#if defined(__x86_64__)
  static const bool found = cpu_isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
  return found;
#else
  return false;
#endif
}

}  // namespace fusekern
