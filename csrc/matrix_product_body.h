// Products of matrices, of fp32 or of pairs of bf16: c [rows][columns] (+)= a [rows][terms] b [terms][columns].
//
// A panel of b, two vectors wide, is copied together and stays in the cache while all rows of a, which may have any
// strides, are multiplied with it. Each sum runs in one order, whatever the sizes around it.
#pragma once

#include "ahead.h"
#include "matrix_product.h"
#include "simd.h"

namespace fusekern::FUSEKERN_ISA {

namespace product {

constexpr int TALLEST = W == 16 ? 12 : 6;  // rows whose sums fill the registers
constexpr int64_t TERMS = 512;             // of a panel: no more of it would stay in the cache

struct Single {
  FUSEKERN_INLINE V add(V a, V b, V sum) { return fma(a, b, sum); }
};

#if FUSEKERN_WIDTH == 16
// Terms are two bf16, which lie where one float would.
struct Pairs {
  FUSEKERN_INLINE V add(V a, V b, V sum) { return dot(a, b, sum); }
};
#endif

// Between the terms a line of what is needed next is fetched now and then: it may lie far away.
template <class Terms, int M, int N>
static void tile(const float* a, int64_t row, int64_t step, const float* b, float* c, int64_t ldc, int64_t terms,
                 Lanes last, const float* addend, int64_t lda, Ahead ahead, Ahead& beside) {
  constexpr int64_t EACH = W == 16 ? 8 : 16;
  V sums[M][N];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sums[m][n] = zero();
  for (int m = 0; m < M; ++m) prefetch(c + m * ldc), prefetch(c + m * ldc + (N - 1) * W);
  if (addend != nullptr && addend != c)
    for (int m = 0; m < M; ++m) prefetch(addend + m * lda), prefetch(addend + m * lda + (N - 1) * W);
  const float *a4 = a + 4 * row, *a8 = a + 8 * row;
  for (int64_t i = 0; i < terms; i += EACH) {
    Ahead::fetch(ahead), Ahead::fetch(beside);
    for (int64_t end = i + EACH < terms ? i + EACH : terms, j = i; j < end; ++j, b += 2 * W) {
      V values[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) values[n] = load(b + n * W);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        const V factor = set1((m < 4 ? a : m < 8 ? a4 : a8)[m % 4 * row]);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) sums[m][n] = Terms::add(factor, values[n], sums[m][n]);
      }
      a += step, a4 += step, a8 += step;
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      float* const to = c + m * ldc + n * W;
      const float* const from = addend + m * lda + n * W;
      if (n < N - 1)
        store(to, addend != nullptr ? load(from) + sums[m][n] : sums[m][n]);
      else
        store(to, addend != nullptr ? load(from, last) + sums[m][n] : sums[m][n], last);
    }
}

template <class Terms, int M, int N, class... Rest>
FUSEKERN_INLINE void tile_of(int64_t rows, Rest&&... rest) {
  if constexpr (M > 1)
    if (rows < M) return tile_of<Terms, M - 1, N>(rows, rest...);
  tile<Terms, M, N>(rest...);
}

// Terms `begin` to `end` of the columns of a panel N vectors wide, with zeros beyond the last.
template <int N>
static void pack(const MatrixProduct& p, int64_t column, int64_t columns, int64_t begin, int64_t end, float* to) {
  const float* const from = p.b + column * p.b_column;
  if (p.b_column == 1) {
    Lanes lanes[N];
    for (int n = 0; n < N; ++n) lanes[n] = first(columns - n * W);
    for (int64_t i = begin; i < end; ++i, to += N * W)
#pragma GCC unroll 12
      for (int n = 0; n < N; ++n) store(to + n * W, load(from + i * p.b_term + n * W, lanes[n]));
    return;
  }
  for (int64_t j = 0; j < N * W; j += W)
    for (int64_t i = begin; i < end; i += W) {
      const float* const at = from + j * p.b_column + i * p.b_term;
      float* const turned = to + (i - begin) * N * W + j;
      V block[W];
      if (j + W <= columns && i + W <= end) {
#pragma GCC unroll 16
        for (int k = 0; k < W; ++k) block[k] = load(at + k * p.b_column);
        transpose(block);
#pragma GCC unroll 16
        for (int k = 0; k < W; ++k) store(turned + k * N * W, block[k]);
        continue;
      }
      for (int k = 0; k < W; ++k) block[k] = j + k >= columns ? zero() : load(at + k * p.b_column, first(end - i));
      transpose(block);
      for (int64_t k = 0; k < W && i + k < end; ++k) store(turned + k * N * W, block[k]);
    }
}

// A share of the next panel, N vectors wide.
template <int N>
static Ahead ahead_of(const MatrixProduct& p, int64_t column, int64_t begin, int64_t end, int64_t part,
                      int64_t parts) {
  const int64_t terms = end - begin, columns = p.columns - column < N * W ? p.columns - column : N * W;
  if (columns <= 0) return {p.b, 0, 1, 0, 0};
  const bool rows_are_terms = p.b_column == 1;
  const int64_t rows = rows_are_terms ? terms : columns, row = rows_are_terms ? p.b_term : p.b_column;
  const int64_t length = ((rows_are_terms ? columns : terms) + LINE - 1) / LINE;
  const int64_t from = rows * part / parts, to = rows * (part + 1) / parts;
  return {p.b + column * p.b_column + begin * p.b_term + from * row, (to - from) * length, length, row - length * LINE,
          0};
}

// With AVX2, where the terms of a lie far apart: rows of tiles are copied together, since lines a power of two apart, of
// which each tile takes a part, push each other out of the caches.
FUSEKERN_INLINE bool copies_rows(const MatrixProduct& p) {
  return W == 8 && p.a_row == 1 && p.a_term != 1 && p.columns >= 8 * W;
}

// Terms `begin` to `end` of all rows, in even parts: [part][term][row].
static void pack_rows(const MatrixProduct& p, int64_t begin, int64_t end, float* to) {
  constexpr int64_t EACH = 8;  // terms, whose lines stay near for the next part
  const int64_t parts = (p.rows + TALLEST - 1) / TALLEST, terms = end - begin;
  for (int64_t i = 0; i < terms; i += EACH)
    for (int64_t part = 0, row = 0; part < parts; ++part) {
      const int64_t some = (p.rows - row + parts - part - 1) / (parts - part);
      const int64_t last = i + EACH < terms ? i + EACH : terms;
      const Lanes lanes = first(some);
      const float* from = p.a + (begin + i) * p.a_term + row;
      float *at = to + row * terms + i * some, *const end = to + (row + some) * terms;
      for (int64_t j = i; j < last; ++j, from += p.a_term, at += some) {
        const V numbers = load(from, lanes);
        if (at + W <= end)
          store(at, numbers);  // what it stores beyond them, the next terms replace
        else
          store(at, numbers, lanes);
      }
      row += some;
    }
}

template <class Terms>
static void panels(const MatrixProduct& p, float* packed) {
  float* const rows_packed = packed + 2 * W * TERMS;
  Ahead beside = ahead_of(p.beside);
  int64_t begin = 0;
  for (int64_t blocks = (p.terms + TERMS - 1) / TERMS; blocks > 0; --blocks) {
    const int64_t end = begin + (p.terms - begin + blocks - 1) / blocks;
    const bool further = begin > 0 || p.addend == nullptr;  // c itself has what is added to
    const float* const addend = further ? p.add || begin > 0 ? p.c : nullptr : p.addend;
    const int64_t lda = further ? p.c_row : p.addend_row;
    if (copies_rows(p)) pack_rows(p, begin, end, rows_packed);
    for (int64_t column = 0; column < p.columns; column += 2 * W) {
      const int64_t columns = p.columns - column < 2 * W ? p.columns - column : 2 * W;
      pack<2>(p, column, columns, begin, end, packed);
      const float* a = copies_rows(p) ? rows_packed : p.a + begin * p.a_term;
      float* c = p.c + column;
      const float* from = addend == nullptr ? nullptr : addend + column;
      // Even parts: with few rows each sum would wait for itself.
      const int64_t parts = (p.rows + TALLEST - 1) / TALLEST;
      for (int64_t part = 0, rows = p.rows; part < parts; ++part) {
        const int64_t some = (rows + parts - part - 1) / (parts - part);
        const Ahead ahead = ahead_of<2>(p, column + 2 * W, begin, end, part, parts);
        const int64_t step = copies_rows(p) ? some : p.a_term;
        if (columns > W)
          tile_of<Terms, TALLEST, 2>(some, a, p.a_row, step, packed, c, p.c_row, end - begin, first(columns - W),
                                     from, lda, ahead, beside);
        else
          tile_of<Terms, TALLEST, 1>(some, a, p.a_row, step, packed, c, p.c_row, end - begin, first(columns), from,
                                     lda, ahead, beside);
        a += copies_rows(p) ? some * (end - begin) : some * p.a_row, c += some * p.c_row, rows -= some;
        if (from != nullptr) from += some * lda;
      }
    }
    begin = end;
  }
}

}  // namespace product

void turn_matrix(const float* matrix, int64_t rows, int64_t columns, float* to, int64_t ld) {
  for (int64_t c = 0; c < columns; c += W)
    for (int64_t r = 0; r < rows; r += W) {
      V block[W];
      for (int i = 0; i < W; ++i)
        block[i] = r + i < rows ? load(matrix + (r + i) * columns + c, first(columns - c)) : zero();
      transpose(block);
      for (int64_t i = 0; i < W && c + i < columns; ++i) store(to + (c + i) * ld + r, block[i], first(rows - r));
    }
}

int64_t matrix_product_floats(const MatrixProduct& p) {
  using namespace product;
  return 2 * W * TERMS + (copies_rows(p) ? p.rows * (p.terms < TERMS ? p.terms : TERMS) : 0);
}

void matrix_product(const MatrixProduct& p, float* packed) {
  using namespace product;
#if FUSEKERN_WIDTH == 16
  if (p.pairs) return panels<Pairs>(p, packed);
#endif
  panels<Single>(p, packed);
}

}  // namespace fusekern::FUSEKERN_ISA
