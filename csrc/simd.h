// A thin vector of W floats: W = 16 with AVX-512, 8 with AVX2 and FMA, 4 with anything else.
//
// For the bodies, which are compiled once per instruction set: isa_*.cpp names the namespace in FUSEKERN_ISA, and all
// that is defined here lies in it, so that the linker never takes one instruction set's copy of a function for
// another's. For the same reason bodies use nothing inline from the standard library.
#pragma once

#include <stdint.h>

#include "cpu.h"

#ifndef FUSEKERN_ISA
#error "simd.h is for bodies: define FUSEKERN_ISA, the namespace of the instruction set, before including it"
#endif

// A pragma that chooses the target comes too late for g++'s own macros (__AVX2__ ...), so that the name decides.
#define FUSEKERN_WIDTH_baseline 4
#define FUSEKERN_WIDTH_avx2 8
#define FUSEKERN_WIDTH_avx512 16
#define FUSEKERN_JOIN_(a, b) a##b
#define FUSEKERN_JOIN(a, b) FUSEKERN_JOIN_(a, b)
#define FUSEKERN_WIDTH FUSEKERN_JOIN(FUSEKERN_WIDTH_, FUSEKERN_ISA)

#if FUSEKERN_WIDTH > 4
// GCC 12 warns of its own header's undefined operands.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define FUSEKERN_INLINE static inline __attribute__((always_inline))

namespace fusekern::FUSEKERN_ISA {

// The upper half of a float. Memory holds it; arithmetic is in fp32.
struct bf16 {
  uint16_t bits;
};

constexpr int W = FUSEKERN_WIDTH;

#if FUSEKERN_WIDTH == 16
typedef __m512 V;
#elif FUSEKERN_WIDTH == 8
typedef __m256 V;
#else
typedef float V __attribute__((vector_size(16), may_alias));
#endif

typedef uint32_t Bits __attribute__((vector_size(4 * W), may_alias));  // of a V
typedef uint16_t Halves __attribute__((vector_size(2 * W), may_alias));
typedef V LooseV __attribute__((aligned(4)));
typedef Halves LooseHalves __attribute__((aligned(2)));

// ---- lanes -------------------------------------------------------------------------------------------------------

// The first lanes of a vector: those that a masked load reads and a masked store writes.
struct Lanes {
#if FUSEKERN_WIDTH == 16
  __mmask16 mask;
#elif FUSEKERN_WIDTH == 8
  __m256i mask;
  int count;
#else
  int count;
#endif
};

// count may be anything; below 0 counts as 0, above W as W.
FUSEKERN_INLINE Lanes first(int64_t count) {
  const int n = count < 0 ? 0 : count > W ? W : static_cast<int>(count);
#if FUSEKERN_WIDTH == 16
  return {static_cast<__mmask16>((1u << n) - 1)};
#elif FUSEKERN_WIDTH == 8
  return {_mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)), n};
#else
  return {n};
#endif
}

// ---- arithmetic; + - * / and comparisons are the operators --------------------------------------------------------

FUSEKERN_INLINE V set1(float x) {
#if FUSEKERN_WIDTH == 16
  return _mm512_set1_ps(x);
#elif FUSEKERN_WIDTH == 8
  return _mm256_set1_ps(x);
#else
  return V{x, x, x, x};
#endif
}

FUSEKERN_INLINE V zero() { return set1(0.f); }

// a b + c, rounded once where the CPU has FMA.
FUSEKERN_INLINE V fma(V a, V b, V c) {
#if FUSEKERN_WIDTH == 16
  return _mm512_fmadd_ps(a, b, c);
#elif FUSEKERN_WIDTH == 8
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// The larger; b where either is NaN.
FUSEKERN_INLINE V max(V a, V b) {
#if FUSEKERN_WIDTH == 16
  return _mm512_max_ps(a, b);
#elif FUSEKERN_WIDTH == 8
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// The smaller; b where either is NaN.
FUSEKERN_INLINE V min(V a, V b) {
#if FUSEKERN_WIDTH == 16
  return _mm512_min_ps(a, b);
#elif FUSEKERN_WIDTH == 8
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// 2^t within one ulp; 0 below t = -126, infinity from t = 128 (or already 127.5) on, NaN for NaN.
FUSEKERN_INLINE V exp2(V t) {
  const V small = t;
  t = min(set1(128.f), t);
#if FUSEKERN_WIDTH == 16
  const V whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const V shifted = t + set1(0x1.8p23f);  // its lowest bits are round(t)
  const V whole = shifted - set1(0x1.8p23f);
#endif
  const V r = t - whole;  // in [-1/2, 1/2], exact
  V p = set1(0.00015353362f);
  p = fma(p, r, set1(0.0013398874f));
  p = fma(p, r, set1(0.009618437f));
  p = fma(p, r, set1(0.055503324f));
  p = fma(p, r, set1(0.24022648f));
  p = fma(p, r, set1(0.6931472f));
  p = fma(p, r, set1(1.f));
#if FUSEKERN_WIDTH == 16
  const __mmask16 kept = _mm512_cmp_ps_mask(small, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(kept, p, whole);
#else
  const V power = (V)(((Bits)shifted << 23) + 0x3f800000u);
  return (V)((Bits)(p * power) & ~(Bits)(small < set1(-126.f)));
#endif
}

// ---- memory ------------------------------------------------------------------------------------------------------

FUSEKERN_INLINE V load(const float* p) { return *reinterpret_cast<const LooseV*>(p); }

FUSEKERN_INLINE void store(float* p, V x) { *reinterpret_cast<LooseV*>(p) = x; }

FUSEKERN_INLINE V widen(Halves halves) { return (V)(__builtin_convertvector(halves, Bits) << 16); }

// To nearest, ties to even; NaN stays NaN.
FUSEKERN_INLINE Halves narrow(V x) {
  const Bits bits = (Bits)x;
  const Bits rounded = bits + (0x7fffu + ((bits >> 16) & 1u));
  const Bits nan = (Bits)(x != x);
  return __builtin_convertvector(((rounded & ~nan) | ((bits | 0x400000u) & nan)) >> 16, Halves);
}

FUSEKERN_INLINE V load(const bf16* p) { return widen(*reinterpret_cast<const LooseHalves*>(p)); }

FUSEKERN_INLINE void store(bf16* p, V x) { *reinterpret_cast<LooseHalves*>(p) = narrow(x); }

// x with zero in the lanes left out.
FUSEKERN_INLINE V only(V x, Lanes lanes) {
#if FUSEKERN_WIDTH == 16
  return _mm512_maskz_mov_ps(lanes.mask, x);
#elif FUSEKERN_WIDTH == 8
  return (V)((Bits)x & (Bits)lanes.mask);
#else
  for (int i = lanes.count; i < W; ++i) x[i] = 0.f;
  return x;
#endif
}

// Lanes left out read as zero; their memory is not touched, here and below.
FUSEKERN_INLINE V load(const float* p, Lanes lanes) {
#if FUSEKERN_WIDTH == 16
  return _mm512_maskz_loadu_ps(lanes.mask, p);
#elif FUSEKERN_WIDTH == 8
  return _mm256_maskload_ps(p, lanes.mask);
#else
  if (lanes.count == W) return load(p);
  V x = zero();
  for (int i = 0; i < lanes.count; ++i) x[i] = p[i];
  return x;
#endif
}

FUSEKERN_INLINE void store(float* p, V x, Lanes lanes) {
#if FUSEKERN_WIDTH == 16
  _mm512_mask_storeu_ps(p, lanes.mask, x);
#elif FUSEKERN_WIDTH == 8
  if (lanes.count == W) return store(p, x);  // a masked store of all takes many times as long on AMD
  _mm256_maskstore_ps(p, lanes.mask, x);
#else
  if (lanes.count == W) return store(p, x);
  for (int i = 0; i < lanes.count; ++i) p[i] = x[i];
#endif
}

FUSEKERN_INLINE V load(const bf16* p, Lanes lanes) {
#if FUSEKERN_WIDTH == 16
  return widen((Halves)_mm256_maskz_loadu_epi16(lanes.mask, p));
#else
  if (lanes.count == W) return load(p);
  Halves halves = {};
  for (int i = 0; i < lanes.count; ++i) halves[i] = p[i].bits;
  return widen(halves);
#endif
}

FUSEKERN_INLINE void store(bf16* p, V x, Lanes lanes) {
#if FUSEKERN_WIDTH == 16
  _mm256_mask_storeu_epi16(p, lanes.mask, (__m256i)narrow(x));
#else
  if (lanes.count == W) return store(p, x);
  const Halves halves = narrow(x);
  for (int i = 0; i < lanes.count; ++i) p[i].bits = halves[i];
#endif
}

// One value.
FUSEKERN_INLINE float get(const float* p) { return *p; }

FUSEKERN_INLINE float get(const bf16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

FUSEKERN_INLINE void put(float* p, float x) { *p = x; }

FUSEKERN_INLINE void put(bf16* p, float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t rounded = x != x ? bits | 0x400000u : bits + (0x7fffu + ((bits >> 16) & 1u));
  p->bits = static_cast<uint16_t>(rounded >> 16);
}

// Bring a line into the L2 cache; the address may be any. In assembler, because GCC takes a function of nothing but
// __builtin_prefetch for one without effect, and drops the calls.
FUSEKERN_INLINE void prefetch(const void* p) {
#if defined(__x86_64__)
  asm volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(p)));
#else
  __builtin_prefetch(p, 0, 2);
#endif
}

// The same into the L1 cache.
FUSEKERN_INLINE void prefetch_near(const void* p) {
#if defined(__x86_64__)
  asm volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(p)));
#else
  __builtin_prefetch(p, 0, 3);
#endif
}

// *p in all lanes, by way of a general register: where vectors are read at full rate, a broadcast from memory takes the
// place of one.
FUSEKERN_INLINE V through_register(const float* p) {
#if FUSEKERN_WIDTH > 4
  uint32_t bits;
  __builtin_memcpy(&bits, p, 4);
  V x;
#if FUSEKERN_WIDTH == 16
  asm("vpbroadcastd %1, %0" : "=v"(x) : "r"(bits));
#else
  asm("vmovd %1, %x0\n\tvbroadcastss %x0, %0" : "=x"(x) : "r"(bits));
#endif
  return x;
#else
  return set1(*p);
#endif
}

// x, which GCC then reads from memory once, instead of in every instruction that it is part of.
FUSEKERN_INLINE V in_register(V x) {
#if FUSEKERN_WIDTH == 16
  asm("" : "+v"(x));
#elif FUSEKERN_WIDTH == 8
  asm("" : "+x"(x));
#endif
  return x;
}

#if FUSEKERN_WIDTH == 16
// Two bf16 to each 32 bits, for CPUs where cpu_has_bf16(). In assembler, because a target that the file is not compiled
// for cannot be had for templates.

// c + a b for both bf16 of each lane, in fp32; the same a, read from memory, in all lanes.
FUSEKERN_INLINE V dot(const float* a, V b, V c) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(*a));
  return c;
}

FUSEKERN_INLINE V dot(V a, V b, V c) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(b), "v"(a));
  return c;
}

// Of 2 W numbers the first `count`, in pairs.
FUSEKERN_INLINE V load_pairs(const bf16* p, int64_t count) {
  const uint32_t lanes = count < 2 * W ? (1u << count) - 1 : 0xffffffffu;
  return (V)_mm512_maskz_loadu_epi16(lanes, p);
}

// As narrow, but for numbers below the least normal one, which become 0.
FUSEKERN_INLINE Halves to_bf16(V x) {
  Halves halves;
  asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(x));
  return halves;
}

// Memory of bf16 that is stored by to_bf16.
struct rounded_bf16 {
  uint16_t bits;
};

FUSEKERN_INLINE V load(const rounded_bf16* p) { return load(reinterpret_cast<const bf16*>(p)); }

FUSEKERN_INLINE V load(const rounded_bf16* p, Lanes lanes) { return load(reinterpret_cast<const bf16*>(p), lanes); }

FUSEKERN_INLINE void store(rounded_bf16* p, V x) { *reinterpret_cast<LooseHalves*>(p) = to_bf16(x); }

FUSEKERN_INLINE void store(rounded_bf16* p, V x, Lanes lanes) {
  _mm256_mask_storeu_epi16(p, lanes.mask, (__m256i)to_bf16(x));
}

// The bf16 of low and of high in the lower and the upper half of each lane.
FUSEKERN_INLINE V interleave(V low, V high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  __m512i both;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(low), "v"(high));
  return (V)_mm512_permutexvar_epi16(order, both);
}
#endif

// f(a number of the type that memory of bf16, or of fp32, is best written as).
template <class F>
FUSEKERN_INLINE auto with_type(bool is_bf16, F f) {
#if FUSEKERN_WIDTH == 16
  if (is_bf16 && cpu_has_bf16()) return f(rounded_bf16{});
#endif
  return is_bf16 ? f(bf16{}) : f(float{});
}

// ---- across lanes ------------------------------------------------------------------------------------------------

// Bit i: lane i is not zero; a NaN is not.
FUSEKERN_INLINE uint32_t not_zero(V x) {
#if FUSEKERN_WIDTH == 16
  return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_UQ);
#elif FUSEKERN_WIDTH == 8
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NEQ_UQ)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= static_cast<uint32_t>(x[i] != 0.f) << i;
  return bits;
#endif
}

// x with zero in the lanes whose bits are not set.
FUSEKERN_INLINE V only(V x, uint32_t bits) {
#if FUSEKERN_WIDTH == 16
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), x);
#elif FUSEKERN_WIDTH == 8
  const Bits each = {1, 2, 4, 8, 16, 32, 64, 128};
  return (V)((Bits)x & (Bits)((each & bits) == each));
#else
  const Bits each = {1, 2, 4, 8};
  return (V)((Bits)x & (Bits)((each & bits) == each));
#endif
}

FUSEKERN_INLINE float sum(V x) {
#if FUSEKERN_WIDTH == 16
  return _mm512_reduce_add_ps(x);
#else
  float total = x[0];
  for (int i = 1; i < W; ++i) total += x[i];
  return total;
#endif
}

// Of lanes that hold no NaN; with NaN among them, NaN or any of the others.
FUSEKERN_INLINE float max(V x) {
#if FUSEKERN_WIDTH == 16
  return _mm512_reduce_max_ps(x);
#else
  float most = x[0];
  for (int i = 1; i < W; ++i) most = x[i] > most ? x[i] : most;
  return most;
#endif
}

// The sum of each.
FUSEKERN_INLINE void four_sums(V a, V b, V c, V d, float (&to)[4]) {
#if FUSEKERN_WIDTH == 4
  to[0] = sum(a), to[1] = sum(b), to[2] = sum(c), to[3] = sum(d);
#else
#if FUSEKERN_WIDTH == 16
  const V ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  const V cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
  const V quarters = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
  const __m256 halves = _mm512_castps512_ps256(quarters) + _mm512_extractf32x8_ps(quarters, 1);
#else
  const V ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
  const V cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
  const __m256 halves = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xee);
#endif
  _mm_storeu_ps(to, _mm256_castps256_ps128(halves) + _mm256_extractf128_ps(halves, 1));
#endif
}

// Lane i: the sum of row i.
FUSEKERN_INLINE V sums(V (&rows)[W]) {
#if FUSEKERN_WIDTH == 16
  // Of four rows at a time the sums within each quarter, then those of the quarters.
#pragma GCC unroll 4
  for (int i = 0; i < W; i += 4) {
    const V a = _mm512_unpacklo_ps(rows[i], rows[i + 1]) + _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    const V b = _mm512_unpacklo_ps(rows[i + 2], rows[i + 3]) + _mm512_unpackhi_ps(rows[i + 2], rows[i + 3]);
    rows[i / 4] = _mm512_shuffle_ps(a, b, 0x44) + _mm512_shuffle_ps(a, b, 0xee);
  }
  const V a = _mm512_shuffle_f32x4(rows[0], rows[1], 0x44) + _mm512_shuffle_f32x4(rows[0], rows[1], 0xee);
  const V b = _mm512_shuffle_f32x4(rows[2], rows[3], 0x44) + _mm512_shuffle_f32x4(rows[2], rows[3], 0xee);
  return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
#elif FUSEKERN_WIDTH == 8
#pragma GCC unroll 2
  for (int i = 0; i < W; i += 4) {
    const V a = _mm256_unpacklo_ps(rows[i], rows[i + 1]) + _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    const V b = _mm256_unpacklo_ps(rows[i + 2], rows[i + 3]) + _mm256_unpackhi_ps(rows[i + 2], rows[i + 3]);
    rows[i / 4] = _mm256_shuffle_ps(a, b, 0x44) + _mm256_shuffle_ps(a, b, 0xee);
  }
  return _mm256_permute2f128_ps(rows[0], rows[1], 0x20) + _mm256_permute2f128_ps(rows[0], rows[1], 0x31);
#else
  return V{sum(rows[0]), sum(rows[1]), sum(rows[2]), sum(rows[3])};
#endif
}

// The W x W matrix whose rows are given, in place.
FUSEKERN_INLINE void transpose(V (&rows)[W]) {
#if FUSEKERN_WIDTH == 16
  V a[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; i += 2) {
    a[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; i += 4) {  // now column j + 4 k of rows i .. i + 3 is lane group k of rows[i + j]
    rows[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    rows[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
    rows[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    rows[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
#pragma GCC unroll 16
  for (int j = 0; j < 4; ++j) {
    const V even01 = _mm512_shuffle_f32x4(rows[j], rows[j + 4], 0x88);
    const V odd01 = _mm512_shuffle_f32x4(rows[j], rows[j + 4], 0xdd);
    const V even23 = _mm512_shuffle_f32x4(rows[j + 8], rows[j + 12], 0x88);
    const V odd23 = _mm512_shuffle_f32x4(rows[j + 8], rows[j + 12], 0xdd);
    a[j] = _mm512_shuffle_f32x4(even01, even23, 0x88);
    a[j + 4] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    a[j + 8] = _mm512_shuffle_f32x4(even01, even23, 0xdd);
    a[j + 12] = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) rows[i] = a[i];
#elif FUSEKERN_WIDTH == 8
  V a[W];
#pragma GCC unroll 8
  for (int i = 0; i < W; i += 2) {
    a[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < W; i += 4) {
    rows[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    rows[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    rows[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    rows[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
#pragma GCC unroll 8
  for (int j = 0; j < 4; ++j) {
    a[j] = _mm256_permute2f128_ps(rows[j], rows[j + 4], 0x20);
    a[j + 4] = _mm256_permute2f128_ps(rows[j], rows[j + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < W; ++i) rows[i] = a[i];
#else
  const V a = rows[0], b = rows[1], c = rows[2], d = rows[3];
  rows[0] = V{a[0], b[0], c[0], d[0]};
  rows[1] = V{a[1], b[1], c[1], d[1]};
  rows[2] = V{a[2], b[2], c[2], d[2]};
  rows[3] = V{a[3], b[3], c[3], d[3]};
#endif
}

}  // namespace fusekern::FUSEKERN_ISA
