// Products of matrices whose terms lie side by side in both, as in a linear layer. A vector holds terms of one sum, so that
// nothing is copied together and no lane is left over, however few the rows: matrix_product fills its lanes with columns,
// and copies.
#pragma once

#include "matrix_product.h"
#include "simd.h"

namespace fusekern::FUSEKERN_ISA {

namespace dots {

// Rows and columns whose sums fill the registers, with the terms of a row and of the columns.
constexpr int TALL = W == 16 ? 6 : W == 8 ? 3 : 2, WIDE = W == 8 ? 3 : 4;
constexpr int64_t TERMS = 2048;       // at a time, and as many rows as leave these numbers in the cache
constexpr int64_t NUMBERS = 1 << 17;
constexpr int64_t NEAR = 8 * 1024;    // bytes of the next columns that the L1 cache holds beside what is multiplied

// Terms in a vector: floats, or bf16 that become floats.
template <class T>
struct Single {
  typedef T Number;
  static constexpr int COUNT = W;
  FUSEKERN_INLINE V some(const T* p) { return load(p); }
  FUSEKERN_INLINE V some(const T* p, int64_t count) { return load(p, first(count)); }
  FUSEKERN_INLINE V add(V a, V b, V sum) { return fma(a, b, sum); }
};

#if FUSEKERN_WIDTH == 16
// Two bf16 in each lane.
struct Pairs {
  typedef bf16 Number;
  static constexpr int COUNT = 2 * W;
  FUSEKERN_INLINE V some(const bf16* p) { return load(reinterpret_cast<const float*>(p)); }
  FUSEKERN_INLINE V some(const bf16* p, int64_t count) { return load_pairs(p, count); }
  FUSEKERN_INLINE V add(V a, V b, V sum) { return dot(a, b, sum); }
};
#endif

// What a tile fetches beside its work: `columns` of the columns that come next, while it is at terms `from` to `to`.
template <class T>
struct Share {
  const T* at;
  int64_t columns, from, to;
  bool near;  // into the L1 cache
};

// c = some terms, or if there were others += them.
template <class Terms, int M>
static void tile(const typename Terms::Number* a, int64_t row, const typename Terms::Number* b, int64_t column,
                 int64_t columns, int64_t terms, float* c, int64_t ldc, bool further,
                 const Share<typename Terms::Number>& next) {
  constexpr int LINE = 64 / sizeof(typename Terms::Number);
  V sums[M][WIDE];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < WIDE; ++n) sums[m][n] = zero();
  const typename Terms::Number* of[WIDE];  // a column beyond the last one is the last one
#pragma GCC unroll 4
  for (int n = 0; n < WIDE; ++n) of[n] = b + (n < columns ? n : columns - 1) * column;
  int64_t i = 0;
  const auto add = [&](auto... count) __attribute__((always_inline)) {
    V values[WIDE];
#pragma GCC unroll 4
    for (int n = 0; n < WIDE; ++n) values[n] = Terms::some(of[n] + i, count...);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const V x = in_register(Terms::some(a + m * row + i, count...));
#pragma GCC unroll 4
      for (int n = 0; n < WIDE; ++n) sums[m][n] = Terms::add(x, values[n], sums[m][n]);
    }
    i += Terms::COUNT;
  };
  const auto line = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int part = 0; part < LINE / Terms::COUNT; ++part) add();
  };
  while (i < next.from) line();
  for (; i < next.to; line())
    for (int64_t n = 0; n < next.columns; ++n) {
      const void* const p = next.at + n * column + i;
      next.near ? prefetch_near(p) : prefetch(p);
    }
  while (i + LINE <= terms) line();
  while (i < terms) add(terms - i);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    float of_row[4];
    four_sums(sums[m][0], sums[m][1], sums[m][2], WIDE == 4 ? sums[m][WIDE - 1] : zero(), of_row);
    if (columns >= WIDE && !further)
      __builtin_memcpy(c + m * ldc, of_row, sizeof(float) * WIDE);
    else
      for (int n = 0; n < WIDE && n < columns; ++n) c[m * ldc + n] = further ? c[m * ldc + n] + of_row[n] : of_row[n];
  }
}

template <class Terms, int M, class... Rest>
FUSEKERN_INLINE void tile_of(int64_t rows, Rest&&... rest) {
  if constexpr (M > 1)
    if (rows < M) return tile_of<Terms, M - 1>(rows, rest...);
  tile<Terms, M>(rest...);
}

// Some rows and terms.
template <class Terms>
static void block(const DotProduct& p, int64_t r0, int64_t rows, int64_t begin, int64_t terms) {
  typedef typename Terms::Number T;
  constexpr int64_t LINE = 64 / sizeof(T);
  const T *const a = static_cast<const T*>(p.a) + r0 * p.a_row + begin, *const b = static_cast<const T*>(p.b) + begin;
  // A tile fetches some of the next columns, or a few tiles share one.
  const int64_t parts = (rows + TALL - 1) / TALL, lines = terms / LINE;
  const int64_t each = (WIDE + parts - 1) / parts, together = parts < WIDE ? 1 : parts / WIDE;
  for (int64_t j = 0; j < p.columns; j += WIDE)
    for (int64_t part = 0, r = 0; part < parts; ++part) {
      const int64_t some = (rows - r + parts - part - 1) / (parts - part);
      const int64_t n = part / together * each, turn = part % together, column = j + WIDE + n;
      Share<T> next{b + column * p.b_column, each, 0, 0, WIDE * terms * static_cast<int64_t>(sizeof(T)) <= NEAR};
      if (n < WIDE && column < p.columns)
        next.from = lines * turn / together * LINE, next.to = lines * (turn + 1) / together * LINE;
      tile_of<Terms, TALL>(some, a + r * p.a_row, p.a_row, b + j * p.b_column, p.b_column, p.columns - j, terms,
                           p.c + (r0 + r) * p.c_row + j, p.c_row, begin > 0, next);
      r += some;
    }
}

// The blocks of terms are the same for any number of rows and columns, and so are the bits.
template <class Terms>
static void blocks(const DotProduct& p) {
  const int64_t count = (p.terms + TERMS - 1) / TERMS, rows = NUMBERS * count / p.terms;
  for (int64_t r = 0; r < p.rows; r += rows)
    for (int64_t i = 0, begin = 0; i < count; ++i) {
      const int64_t terms = (p.terms - begin + count - i - 1) / (count - i);
      block<Terms>(p, r, p.rows - r < rows ? p.rows - r : rows, begin, terms);
      begin += terms;
    }
}

}  // namespace dots

void dot_product(const DotProduct& p) {
  using namespace dots;
#if FUSEKERN_WIDTH == 16
  if (p.bf16 && p.pairs) return blocks<Pairs>(p);
#endif
  p.bf16 ? blocks<Single<bf16>>(p) : blocks<Single<float>>(p);
}

}  // namespace fusekern::FUSEKERN_ISA
