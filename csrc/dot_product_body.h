// Products of fp32 matrices whose terms lie side by side in both, as in a linear layer. A vector holds terms of one sum,
// so that nothing is copied together and no lane is left over, however few the rows: matrix_product fills its lanes with
// columns, and copies. With AVX2, which has half the registers, it is a tenth faster from some hundred rows on; but then
// the bits would depend on how many there are.
#pragma once

#include "ahead.h"
#include "matrix_product.h"
#include "simd.h"

namespace fusekern::FUSEKERN_ISA {

namespace dots {

// Rows and columns whose sums fill the registers, with the terms of a row and of the columns.
constexpr int TALL = W == 16 ? 6 : W == 8 ? 4 : 2, WIDE = W == 8 ? 3 : 4;
constexpr int64_t TERMS = 2048;       // at a time, and as many rows as leave these numbers in the cache
constexpr int64_t NUMBERS = 1 << 17;

// c = some terms, or if there were others += them; each step fetches a few lines of what comes next.
template <int M>
static void tile(const float* a, int64_t row, const float* b, int64_t column, int64_t columns, int64_t terms,
                 float* c, int64_t ldc, bool further, product::Ahead& ahead, int lines) {
  V sums[M][WIDE];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < WIDE; ++n) sums[m][n] = zero();
  const float* of[WIDE];  // a column beyond the last one is the last one
#pragma GCC unroll 4
  for (int n = 0; n < WIDE; ++n) of[n] = b + (n < columns ? n : columns - 1) * column;
  int64_t i = 0;
  const auto add = [&](auto... lanes) __attribute__((always_inline)) {
    V values[WIDE];
#pragma GCC unroll 4
    for (int n = 0; n < WIDE; ++n) values[n] = load(of[n] + i, lanes...);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const V x = in_register(load(a + m * row + i, lanes...));
#pragma GCC unroll 4
      for (int n = 0; n < WIDE; ++n) sums[m][n] = fma(x, values[n], sums[m][n]);
    }
    i += W;
  };
  while (i + product::LINE <= terms) {
    for (int line = 0; line < lines; ++line) product::Ahead::fetch<true>(ahead);
#pragma GCC unroll 4
    for (int part = 0; part < product::LINE / W; ++part) add();
  }
  while (i < terms) add(first(terms - i));
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

template <int M, class... Rest>
FUSEKERN_INLINE void tile_of(int64_t rows, Rest&&... rest) {
  if constexpr (M > 1)
    if (rows < M) return tile_of<M - 1>(rows, rest...);
  tile<M>(rest...);
}

// Some rows and terms.
static void block(const MatrixProduct& p) {
  const int64_t parts = (p.rows + TALL - 1) / TALL, length = (p.terms + product::LINE - 1) / product::LINE;
  const int lines = static_cast<int>((WIDE + parts - 1) / parts);
  for (int64_t j = 0; j < p.columns; j += WIDE) {
    const int64_t after = p.columns - j - WIDE;
    product::Ahead ahead{p.b + (j + WIDE) * p.b_column, (after < 0 ? 0 : after < WIDE ? after : WIDE) * length, length,
                         p.b_column - length * product::LINE, 0};
    for (int64_t part = 0, r = 0; part < parts; ++part) {
      const int64_t some = (p.rows - r + parts - part - 1) / (parts - part);
      tile_of<TALL>(some, p.a + r * p.a_row, p.a_row, p.b + j * p.b_column, p.b_column, p.columns - j, p.terms,
                    p.c + r * p.c_row + j, p.c_row, p.add, ahead, lines);
      r += some;
    }
  }
}

}  // namespace dots

// The blocks of terms are the same for any number of rows and columns, and so are the bits.
void dot_product(const MatrixProduct& p) {
  using namespace dots;
  const int64_t blocks = (p.terms + TERMS - 1) / TERMS, rows = NUMBERS * blocks / p.terms;
  for (int64_t r = 0; r < p.rows; r += rows)
    for (int64_t i = 0, begin = 0; i < blocks; ++i) {
      MatrixProduct some = p;
      some.rows = p.rows - r < rows ? p.rows - r : rows;
      some.terms = (p.terms - begin + blocks - i - 1) / (blocks - i);
      some.a += r * p.a_row + begin, some.b += begin, some.c += r * p.c_row;
      some.add = p.add || i > 0;
      block(some);
      begin += some.terms;
    }
}

}  // namespace fusekern::FUSEKERN_ISA
