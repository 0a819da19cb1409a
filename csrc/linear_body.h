// What follows the product of a linear layer: the bias, a residual, GELU.
#pragma once

#include "matrix_product.h"
#include "simd.h"

namespace fusekern::FUSEKERN_ISA {

namespace text {

constexpr float LOG2E = 0x1.715476p0f, LN2 = 0x1.62e43p-1f;

FUSEKERN_INLINE V exponential(V x) { return exp2(x * set1(LOG2E)); }

FUSEKERN_INLINE V pick(Bits which, V a, V b) { return (V)(((Bits)a & which) | ((Bits)b & ~which)); }

// Within 7e-8. Below 1 x times a polynomial in x^2; above, 1 - exp(-x q(x)). Both fitted to the least largest error.
FUSEKERN_INLINE V erf(V x) {
  const Bits sign = (Bits)x & (Bits)set1(-0.f);
  const V size = (V)((Bits)x ^ sign), s = x * x;
  V p = set1(7.88911763e-05f);
  p = fma(p, s, set1(-0.000802084071f));
  p = fma(p, s, set1(0.00518953528f));
  p = fma(p, s, set1(-0.0268544446f));
  p = fma(p, s, set1(0.112836002f));
  p = fma(p, s, set1(-0.376126271f));
  p = fma(p, s, set1(0.128379166f));
  const V t = min(set1(4.f), size);
  V q = set1(2.9315557e-06f);
  q = fma(q, t, set1(-2.07702025e-05f));
  q = fma(q, t, set1(-0.000178102951f));
  q = fma(q, t, set1(0.00329177239f));
  q = fma(q, t, set1(-0.0232713251f));
  q = fma(q, t, set1(0.105841831f));
  q = fma(q, t, set1(0.635319712f));
  q = fma(q, t, set1(1.12861946f));
  const V far = set1(1.f) - exponential(zero() - q * t);
  return pick((Bits)(size >= set1(1.f)), (V)((Bits)far | sign), fma(p, x, x));  // NaN is not >= 1
}

FUSEKERN_INLINE V gelu(V x) { return set1(0.5f) * x * (set1(1.f) + erf(x * set1(0x1.6a09e6p-1f))); }

FUSEKERN_INLINE V gelu_slope(V x) {
  const V below = set1(0.5f) * (set1(1.f) + erf(x * set1(0x1.6a09e6p-1f)));
  return fma(x * set1(0.39894228f), exponential(set1(-0.5f) * x * x), below);
}

// f(i, lanes) for the vectors of `count` numbers.
template <class F>
FUSEKERN_INLINE void each(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + W <= count; i += W) f(i, first(W));
  if (i < count) f(i, first(count - i));
}

}  // namespace text

void widen_matrix(const uint16_t* matrix, int64_t rows, int64_t columns, int64_t from, float* out, int64_t to) {
  using namespace text;
  for (int64_t r = 0; r < rows; ++r)
    each(columns, [&](int64_t c, Lanes lanes) {
      store(out + r * to + c, load(reinterpret_cast<const bf16*>(matrix) + r * from + c, lanes), lanes);
    });
}

void pair_rows([[maybe_unused]] const void* matrix, [[maybe_unused]] bool is_bf16, [[maybe_unused]] int64_t rows,
               [[maybe_unused]] int64_t columns, [[maybe_unused]] int64_t ld, [[maybe_unused]] float* to) {
#if FUSEKERN_WIDTH == 16
  using namespace text;
  const auto pair = [&](const auto* x) {
    for (int64_t r = 0; r < rows; r += 2)
      each(columns, [&](int64_t c, Lanes lanes) {
        const V upper = r + 1 < rows ? load(x + (r + 1) * ld + c, lanes) : zero();
        store(to + r / 2 * columns + c, interleave(load(x + r * ld + c, lanes), upper), lanes);
      });
  };
  is_bf16 ? pair(static_cast<const bf16*>(matrix)) : pair(static_cast<const float*>(matrix));
#endif
}

void pair_columns(const float* matrix, int64_t rows, int64_t columns, int64_t ld, float* to) {
  using namespace text;
  const int64_t row = columns + columns % 2;
  for (int64_t r = 0; r < rows; ++r) {
    bf16* const out = reinterpret_cast<bf16*>(to) + r * row;
    each(columns, [&](int64_t c, Lanes lanes) { store(out + c, load(matrix + r * ld + c, lanes), lanes); });
    if (row > columns) out[columns] = bf16{0};
  }
}

namespace text {

template <class T>
static void finish(const LinearFinish& f) {
  for (int64_t r = 0; r < f.rows; ++r)
    each(f.columns, [&](int64_t c, Lanes lanes) {
      V x = load(f.product + r * f.product_ld + c, lanes);
      if (f.bias != nullptr) x = x + load(f.bias + c, lanes);
      if (f.residual != nullptr) x = x + load(static_cast<const T*>(f.residual) + r * f.residual_ld + c, lanes);
      T* const to = static_cast<T*>(f.out) + r * f.ld + c;
      store(to, x, lanes);
      if (f.activated != nullptr) store(static_cast<T*>(f.activated) + r * f.ld + c, gelu(load(to, lanes)), lanes);
    });
}

}  // namespace text

void linear_finish(const LinearFinish& f) {
  with_type(f.bf16, [&]<class T>(T) { text::finish<T>(f); });
}

}  // namespace fusekern::FUSEKERN_ISA
