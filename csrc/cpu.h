// Which instructions the CPU has, and the choice between the bodies that are compiled for them.
#pragma once

namespace fusekern {

enum class Isa { baseline, avx2, avx512 };

// The best that this CPU runs, lowered by the environment variable FUSEKERN_CPU_CAPABILITY=baseline|avx2|avx512.
Isa cpu_isa();

const char* name(Isa isa);

// Does the CPU multiply pairs of bf16 (AVX512_BF16)? Never without Isa::avx512.
bool cpu_has_bf16();

}  // namespace fusekern

// FUSEKERN_BODY(void f(int);) declares f in the namespace of every ISA; FUSEKERN_PICK(f) is the f to call on this CPU.
#if defined(__x86_64__)
#define FUSEKERN_BODY(...)             \
  namespace baseline { __VA_ARGS__ }   \
  namespace avx2 { __VA_ARGS__ }       \
  namespace avx512 { __VA_ARGS__ }
#define FUSEKERN_PICK(f)                                                    \
  (::fusekern::cpu_isa() == ::fusekern::Isa::avx512 ? &avx512::f            \
   : ::fusekern::cpu_isa() == ::fusekern::Isa::avx2 ? &avx2::f : &baseline::f)
#else
#define FUSEKERN_BODY(...) namespace baseline { __VA_ARGS__ }
#define FUSEKERN_PICK(f) (&baseline::f)
#endif
