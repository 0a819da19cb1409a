// Products of fp32 matrices around a ReLU, behind which half of the numbers are zero: nothing is multiplied with these,
// and no gradient computed that would be. For the bodies: c [rows][columns] (+)= a [rows][terms] b [terms][columns],
// where many numbers of a are zero, or many of c not wanted.
//
// Where a product of dense matrices holds a tile of sums in registers and reads both matrices past it, here each row
// picks its own rows of b. So these lie in the nearest cache, a panel of 64 terms at a time, and a row of sums comes
// and goes with every panel. A sum takes its terms in the order in which matrix_product does and lacks only those that
// would not change it: the bits are the same. Zero times what is not finite would: a panel with such numbers is
// multiplied whole. What is wanted of c is, each by itself, the product of two rows, of which that of a stays in
// registers and those of b in the cache.
//
// The idea is that of "SparseTrain: Leveraging Dynamic Sparsity in Software for Training DNNs on General-Purpose SIMD
// Processors" (arXiv 1911.10175), there for convolutions.
#pragma once

#include "matrix_product_body.h"

namespace fusekern::FUSEKERN_ISA {

namespace sparse {

constexpr int WIDEST = W == 16 ? 8 : 12;  // vectors of a panel
constexpr int64_t TERMS = 64;             // of a panel, at most: a bit each

// Bit i: term i of a row is not zero.
FUSEKERN_INLINE uint64_t terms_of(const float* a, int64_t terms) {
  uint64_t bits = 0;
  if (terms == TERMS) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < TERMS; i += W) bits |= static_cast<uint64_t>(not_zero(load(a + i))) << i;
    return bits;
  }
  for (int64_t i = 0; i < terms; i += W)
    bits |= static_cast<uint64_t>(not_zero(load(a + i, first(terms - i)))) << i;
  return bits;
}

// The terms of a product in panels: f(begin, end, from, to) of each, where those from `from` to `to` are added up before
// they meet c.
template <class F>
FUSEKERN_INLINE void for_panels(int64_t terms, const F& f) {
  int64_t begin = 0;
  for (int64_t blocks = (terms + product::TERMS - 1) / product::TERMS; blocks > 0; --blocks) {
    const int64_t from = begin, to = from + (terms - from + blocks - 1) / blocks;
    for (; begin < to; begin = begin + TERMS < to ? begin + TERMS : to)
      f(begin, begin + TERMS < to ? begin + TERMS : to, from, to);
  }
}

// Lines to be fetched, as many at a time.
struct Fetches {
  Fetches(const product::Ahead& lines, int64_t times) : lines(lines), each((lines.left + times - 1) / times) {}
  void next() {
    for (int64_t i = 0; i < each; ++i) product::Ahead::fetch(lines);
  }

  product::Ahead lines;
  int64_t each;
};

FUSEKERN_INLINE int64_t panels_of(const MatrixProduct& p, int64_t columns, int64_t terms) {
  return (p.columns + columns - 1) / columns * ((p.terms + terms - 1) / terms);
}

// Into the nearest cache.
FUSEKERN_INLINE void fetch_near(const float* a, int64_t count) {
  for (int64_t i = 0; i < count; i += product::LINE) __builtin_prefetch(a + i, 0, 3);
}

// Some terms of some columns: what all rows add of them to their sums.
struct Panel {
  const float* b;        // [terms][N * W]
  const uint64_t* kept;  // [rows]: which terms are not zero
  int64_t begin, terms;
  bool whole;        // no term is passed over
  bool first, last;  // of those that are added up before they meet c
  bool add;          // to what c holds then
};

template <int N>
static void add_panel(const MatrixProduct& p, const Panel& panel, float* sums, float* c, Lanes lanes,
                      Fetches near, Fetches& beside) {
  const float* a = p.a + panel.begin;
  for (int64_t row = 0; row < p.rows; ++row, a += p.a_row, sums += N * W, c += p.c_row) {
    near.next(), beside.next();
    fetch_near(a + 3 * p.a_row, TERMS);  // a number that the compiler knows
    if (panel.first)
      for (int n = 0; n < N; ++n) prefetch(c + n * W);
    V sum[N];
#pragma GCC unroll 12
    for (int n = 0; n < N; ++n) sum[n] = panel.first ? zero() : load(sums + n * W);
    for (uint64_t bits = panel.whole ? ~uint64_t{0} >> (TERMS - panel.terms) : panel.kept[row]; bits != 0;
         bits &= bits - 1) {
      const int64_t i = __builtin_ctzll(bits);
      const V factor = through_register(a + i);
      const float* const b = panel.b + i * N * W;
#pragma GCC unroll 12
      for (int n = 0; n < N; ++n) sum[n] = fma(factor, load(b + n * W), sum[n]);
    }
    if (!panel.last) {
#pragma GCC unroll 12
      for (int n = 0; n < N; ++n) store(sums + n * W, sum[n]);
      continue;
    }
#pragma GCC unroll 12
    for (int n = 0; n < N; ++n) {
      float* const to = c + n * W;
      if (n < N - 1)
        store(to, panel.add ? load(to) + sum[n] : sum[n]);
      else
        store(to, panel.add ? load(to, lanes) + sum[n] : sum[n], lanes);
    }
  }
}

// The columns from `column` on, N vectors of them.
template <int N>
static void add_columns(const MatrixProduct& p, int64_t column, float* memory, Fetches& beside) {
  const int64_t columns = p.columns - column < N * W ? p.columns - column : N * W;
  float *const packed = memory, *const sums = memory + TERMS * WIDEST * W;
  const uint64_t* kept = p.kept;
  for_panels(p.terms, [&](int64_t begin, int64_t end, int64_t from, int64_t to) {
    product::pack<N>(p, column, columns, begin, end, packed);
    V spoilt = zero();
    for (int64_t i = 0; i < (end - begin) * N * W; i += W) spoilt = fma(load(packed + i), zero(), spoilt);
    const bool whole = sum(spoilt) != 0.f, add = p.add || from > 0;
    const Panel panel{packed, kept, begin, end - begin, whole, begin == from, end == to, add};
    const int64_t next = end < p.terms ? end : 0, further = next + TERMS < p.terms ? next + TERMS : p.terms;
    const product::Ahead ahead = product::ahead_of<N>(p, next > 0 ? column : column + N * W, next, further, 0, 1);
    add_panel<N>(p, panel, sums, p.c + column, first(columns - (N - 1) * W), {ahead, p.rows}, beside);
    kept += p.rows;
  });
}

template <int N = WIDEST>
static void add_vectors(int vectors, const MatrixProduct& p, int64_t column, float* memory, Fetches& beside) {
  if constexpr (N > 1)
    if (vectors < N) return add_vectors<N - 1>(vectors, p, column, memory, beside);
  add_columns<N>(p, column, memory, beside);
}

// ---- where few results are wanted ----------------------------------------------------------------------------------

constexpr int DEEPEST = W == 16 ? 16 : 8;  // vectors of terms: a row's, which stay in registers
constexpr int COLUMNS = 32;

// Columns from `column` on: b holds N vectors of terms of each, from `begin` on.
template <int N>
static void fill_wanted(const MatrixProduct& p, const float* b, int64_t column, int64_t begin, Fetches near,
                        Fetches& beside) {
  const Lanes last = first(p.terms - begin - (N - 1) * W);
  alignas(64) float dots[COLUMNS][W] = {};  // of the two rows, before their lanes are added up
  for (int64_t row = 0; row < p.rows; ++row) {
    near.next(), beside.next();
    fetch_near(p.a + (row + 1) * p.a_row + begin, N * W);
    uint32_t wanted;
    __builtin_memcpy(&wanted, p.wanted + row * p.wanted_row + column / 8, 4);
    V a[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n)
      a[n] = n < N - 1 ? load(p.a + row * p.a_row + begin + n * W) : load(p.a + row * p.a_row + begin + n * W, last);
    for (uint32_t bits = wanted; bits != 0; bits &= bits - 1) {
      const int i = __builtin_ctz(bits);
      const float* const from = b + i * N * W;
      V even = a[0] * load(from), odd = zero();
#pragma GCC unroll 16
      for (int n = 1; n < N; ++n) (n % 2 ? odd : even) = fma(a[n], load(from + n * W), n % 2 ? odd : even);
      store(dots[i], even + odd);
    }
    float* const c = p.c + row * p.c_row + column;
#pragma GCC unroll 8
    for (int i = 0; i < COLUMNS; i += W) {
      V rows[W];
#pragma GCC unroll 16
      for (int k = 0; k < W; ++k) rows[k] = load(dots[i + k]);
      const Lanes lanes = first(p.columns - column - i);
      const V found = only(sums(rows), wanted >> i);
      store(c + i, p.add || begin > 0 ? load(c + i, lanes) + found : found, lanes);
    }
  }
}

// Terms from `begin` on, N vectors of them.
template <int N>
static void fill_terms(const MatrixProduct& p, int64_t begin, float* packed, Fetches& beside) {
  MatrixProduct across = p;  // its columns are the terms
  across.b_term = p.b_column, across.b_column = p.b_term, across.columns = p.terms, across.terms = p.columns;
  const int64_t terms = p.terms - begin < N * W ? p.terms - begin : N * W;
  for (int64_t column = 0; column < p.columns; column += COLUMNS) {
    const auto end = [&](int64_t from) { return from + COLUMNS < p.columns ? from + COLUMNS : p.columns; };
    product::pack<N>(across, begin, terms, column, end(column), packed);
    const int64_t next = end(column) < p.columns ? end(column) : 0;
    const product::Ahead ahead = product::ahead_of<N>(across, next > 0 ? begin : begin + N * W, next, end(next), 0, 1);
    fill_wanted<N>(p, packed, column, begin, {ahead, p.rows}, beside);
  }
}

template <int N>
static void fill_last(const MatrixProduct& p, int64_t begin, float* packed, Fetches& beside) {
  if constexpr (N > 1)
    if (p.terms - begin <= (N - 1) * W) return fill_last<N - 1>(p, begin, packed, beside);
  fill_terms<N>(p, begin, packed, beside);
}

}  // namespace sparse

int64_t sparse_product_words(const MatrixProduct& p) {
  int64_t panels = 0;
  sparse::for_panels(p.terms, [&](int64_t, int64_t, int64_t, int64_t) { ++panels; });
  return panels * p.rows;
}

int64_t find_not_zero(const MatrixProduct& p, uint64_t* bits) {
  int64_t found = 0;
  for (int64_t row = 0; row < p.rows; ++row) {
    const float* const a = p.a + row * p.a_row;
    uint64_t* to = bits + row;
    sparse::for_panels(p.terms, [&](int64_t begin, int64_t end, int64_t, int64_t) {
      *to = sparse::terms_of(a + begin, end - begin);
      found += __builtin_popcountll(*to), to += p.rows;
    });
  }
  return found;
}

int64_t sparse_product_floats(const MatrixProduct& p) { return (sparse::TERMS + p.rows) * sparse::WIDEST * W; }

int64_t masked_product_floats() { return sparse::COLUMNS * sparse::DEEPEST * W; }

void masked_product(const MatrixProduct& p, float* memory) {
  using namespace sparse;
  Fetches beside(product::ahead_of(p.beside), p.rows * panels_of(p, COLUMNS, DEEPEST * W));
  int64_t begin = 0;
  for (; begin + DEEPEST * W <= p.terms; begin += DEEPEST * W) fill_terms<DEEPEST>(p, begin, memory, beside);
  if (begin < p.terms) fill_last<DEEPEST>(p, begin, memory, beside);
}

void sparse_product(const MatrixProduct& p, float* memory) {
  using namespace sparse;
  Fetches beside(product::ahead_of(p.beside), p.rows * panels_of(p, WIDEST * W, TERMS));
  int64_t column = 0;
  for (int64_t panels = (p.columns + WIDEST * W - 1) / (WIDEST * W); panels > 0; --panels) {  // even ones
    const int64_t left = (p.columns - column + W - 1) / W, vectors = (left + panels - 1) / panels;
    add_vectors(static_cast<int>(vectors), p, column, memory, beside);
    column += vectors * W;
  }
}

}  // namespace fusekern::FUSEKERN_ISA
