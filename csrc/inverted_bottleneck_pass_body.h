// What an inverted bottleneck does between its matrix products, pixel by pixel and channel by channel, with the sums of it.
//
// Vectors run along that of pixels and channels which lies side by side.
#pragma once

#include "inverted_bottleneck.h"
#include "simd.h"

namespace fusekern::FUSEKERN_ISA {

namespace bottleneck {

FUSEKERN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FUSEKERN_INLINE int64_t groups(int64_t channels) { return (channels + W - 1) / W; }

FUSEKERN_INLINE float total(V x) { return sum(x); }
FUSEKERN_INLINE V relu6(V v) { return min(set1(6.f), max(zero(), v)); }  // NaN stays NaN

// x where ReLU6 has a slope at v, as PyTorch has it: not at 0 and 6, but for NaN.
FUSEKERN_INLINE V masked(V x, V v) { return (V)((Bits)x & ~((Bits)(v <= zero()) | (Bits)(v >= set1(6.f)))); }

// p dv + q (y - mean) + r; where q is 0, y does not count, not even if it is infinite.
FUSEKERN_INLINE V through_norm(V p, V q, V r, V mean, V dv, V y) {
  return fma(p, dv, r + (V)((Bits)(q * (y - mean)) & ~(Bits)(q == zero())));
}

// Mean and sum of squared distances of `more` numbers join those of `before`.
FUSEKERN_INLINE void join(V& mean, V& squares, int64_t before, V mean_more, V squares_more, int64_t more) {
  const double share = static_cast<double>(more) / static_cast<double>(before + more);
  const V apart = mean_more - mean;
  mean = before == 0 ? mean_more : fma(apart, set1(static_cast<float>(share)), mean);
  squares = squares + squares_more;
  if (before > 0) squares = fma(apart * apart, set1(static_cast<float>(share * static_cast<double>(before))), squares);
}

// ---- element-wise passes -------------------------------------------------------------------------------------------

constexpr int PIECE = 512;  // numbers of a line in a row
constexpr int LINES = 4;    // at a time

FUSEKERN_INLINE int64_t offset(const Pixels& at, int64_t pixel) {
  const int64_t n = at.first + pixel;
  if (at.W == 0) return n * at.column;
  const int64_t row = n / at.W;
  return row / at.H * at.batch + row % at.H * at.row + n % at.W * at.column;
}

// `count` numbers of a line, a pixel or a channel, from `start` on; copied if they do not lie side by side.
template <class T, bool ROWS>
static const T* line_of(const Pixels& at, int64_t line, int64_t start, int64_t count, T* copy) {
  const T* const data = static_cast<const T*>(at.data);
  if constexpr (ROWS) {
    const T* const from = data + offset(at, line) + start * at.channel;
    if (at.channel == 1) return from;
    for (int64_t c = 0; c < count; ++c) copy[c] = from[c * at.channel];
  } else {
    const T* const from = data + line * at.channel;
    if (at.column == 1 && (at.W == 0 || (at.row == at.W && at.first % (at.H * at.W) + start + count <= at.H * at.W)))
      return from + offset(at, start);
    for (int64_t i = 0; i < count; ++i) copy[i] = from[offset(at, start + i)];
  }
  return copy;
}

template <bool WHOLE, class T>
FUSEKERN_INLINE V read(const T* p, Lanes lanes) {
  if constexpr (WHOLE) return load(p);
  return load(p, lanes);
}

template <bool WHOLE, class T>
FUSEKERN_INLINE void write(T* p, V x, Lanes lanes) {
  if constexpr (WHOLE)
    store(p, x);
  else
    store(p, x, lanes);
}

struct Activate {
  static constexpr int VECTORS = 2;
  static constexpr bool B = false, OUT = true, SUMS = false;
  FUSEKERN_INLINE V of(V a, V, const V* v, V&, V&) { return relu6(fma(v[0], a, v[1])); }
};

struct Affine {
  static constexpr int VECTORS = 2;
  static constexpr bool B = false, OUT = true, SUMS = false;
  FUSEKERN_INLINE V of(V a, V, const V* v, V&, V&) { return fma(v[0], a, v[1]); }
};

struct AffineAndAdd {
  static constexpr int VECTORS = 2;
  static constexpr bool B = true, OUT = true, SUMS = false;
  FUSEKERN_INLINE V of(V a, V b, const V* v, V&, V&) { return fma(v[0], a, v[1]) + b; }
};

struct Coef {
  static constexpr int VECTORS = 4;
  static constexpr bool B = true, OUT = true, SUMS = false;
  FUSEKERN_INLINE V of(V a, V b, const V* v, V&, V&) { return through_norm(v[0], v[1], v[2], v[3], a, b); }
};

struct Mask {
  static constexpr int VECTORS = 3;
  static constexpr bool B = true, OUT = true, SUMS = true;
  FUSEKERN_INLINE V of(V a, V b, const V* v, V& sum, V& product) {
    const V x = masked(a, fma(v[0], b, v[1]));
    sum = sum + x;
    product = fma(x, b - v[2], product);
    return x;
  }
};

struct Sums {
  static constexpr int VECTORS = 1;
  static constexpr bool B = true, OUT = false, SUMS = true;
  FUSEKERN_INLINE V of(V a, V b, const V* v, V& sum, V& product) {
    sum = sum + a;
    product = fma(a, b - v[0], product);
    return a;
  }
};

// Channels side by side: of a few pixels one vector of channels after the other.
template <class F, class T, bool WHOLE>
FUSEKERN_INLINE void across(const BottleneckPass& p, int lines, const T* const* a, const T* const* b, T* const* out,
                            int64_t start, int64_t c, int64_t count, float (*sums)[PIECE]) {
  const Lanes lanes = first(count - c);
  // The lines after these: the jumps from one to the next are too far for the CPU to foresee.
  if constexpr (WHOLE)
    for (int i = 0; i < lines; ++i) {
      prefetch(a[i] + c + LINES * p.a.column);
      if constexpr (F::B) prefetch(b[i] + c + LINES * p.b.column);
      if constexpr (F::OUT) prefetch(out[i] + c + LINES * p.out.column);
    }
  V vectors[4], sum = zero(), product = zero();
#pragma GCC unroll 4
  for (int i = 0; i < F::VECTORS; ++i) vectors[i] = read<WHOLE>(p.vectors[i] + start + c, lanes);
#pragma GCC unroll 4
  for (int i = 0; i < lines; ++i) {
    const V x = read<WHOLE>(a[i] + c, lanes);
    const V result = F::of(x, F::B ? read<WHOLE>(b[i] + c, lanes) : x, vectors, sum, product);
    if constexpr (F::OUT) write<WHOLE>(out[i] + c, result, lanes);
  }
  if constexpr (F::SUMS) {
    store(sums[0] + c, load(sums[0] + c) + sum);
    store(sums[1] + c, load(sums[1] + c) + product);
  }
}

// Pixels side by side: one channel.
template <class F, class T>
FUSEKERN_INLINE void along(const BottleneckPass& p, const T* a, const T* b, T* out, int64_t channel, int64_t count) {
  V vectors[4], sum = zero(), product = zero();
  for (int i = 0; i < F::VECTORS; ++i) vectors[i] = set1(p.vectors[i][channel]);
  const auto step = [&]<bool WHOLE>(int64_t n) __attribute__((always_inline)) {
    const Lanes lanes = first(count - n);
    const V x = read<WHOLE>(a + n, lanes);
    const V result = F::of(x, F::B ? read<WHOLE>(b + n, lanes) : x, vectors, sum, product);
    if constexpr (F::OUT) write<WHOLE>(out + n, result, lanes);
  };
  int64_t n = 0;
  for (; n + W <= count; n += W) step.template operator()<true>(n);
  if (n < count) step.template operator()<false>(n);
  if constexpr (F::SUMS) p.sums[0][channel] += total(sum), p.sums[1][channel] += total(product);
}

template <class F, class T, bool ROWS>
static void pass_of(const BottleneckPass& p) {
  const int64_t lines = ROWS ? p.pixels : p.channels, length = ROWS ? p.channels : p.pixels;
  T copies[2][LINES][PIECE];
  for (int64_t start = 0; start < length; start += PIECE) {
    const int64_t count = least(PIECE, length - start);
    alignas(64) float sums[2][PIECE];
    if constexpr (F::SUMS && ROWS)
      for (int64_t c = 0; c < PIECE; c += W) store(sums[0] + c, zero()), store(sums[1] + c, zero());
    for (int64_t line = 0; line < lines; line += LINES) {
      const int some = static_cast<int>(least(LINES, lines - line));
      const T *a[LINES], *b[LINES];
      T* out[LINES];
      for (int i = 0; i < some; ++i) {
        a[i] = line_of<T, ROWS>(p.a, line + i, start, count, copies[0][i]);
        if constexpr (F::B) b[i] = line_of<T, ROWS>(p.b, line + i, start, count, copies[1][i]);
        if constexpr (F::OUT) out[i] = const_cast<T*>(line_of<T, ROWS>(p.out, line + i, start, count, nullptr));
      }
      if constexpr (ROWS) {
        int64_t c = 0;
        if (some == LINES)
          for (; c + W <= count; c += W) across<F, T, true>(p, LINES, a, b, out, start, c, count, sums);
        for (; c + W <= count; c += W) across<F, T, true>(p, some, a, b, out, start, c, count, sums);
        if (c < count) across<F, T, false>(p, some, a, b, out, start, c, count, sums);
      } else {
        for (int i = 0; i < some; ++i) along<F, T>(p, a[i], b[i], out[i], line + i, count);
      }
    }
    if constexpr (F::SUMS && ROWS)
      for (int64_t c = 0; c < count; ++c) p.sums[0][start + c] += sums[0][c], p.sums[1][start + c] += sums[1][c];
  }
}

template <class F>
static void pass(const BottleneckPass& p) {
  with_type(p.bf16, [&]<class T>(T) { (p.rows ? pass_of<F, T, true> : pass_of<F, T, false>)(p); });
}

// Blocks of W pixels by W channels.
static int64_t activate_turned(const BottleneckPass& p, uint8_t* bits, int64_t row) {
  float* const out = static_cast<float*>(p.out.data);
  int64_t found = 0;
  for (int64_t n = 0; n < p.pixels; n += W) {
    const int64_t some = least(W, p.pixels - n);
    const float* from[W];
    for (int64_t i = 0; i < some; ++i) from[i] = static_cast<const float*>(p.a.data) + (n + i) * p.a.column;
    for (int64_t c = 0; c < p.channels; c += W) {
      const Lanes lanes = first(p.channels - c);
      const V scale = load(p.vectors[0] + c, lanes), shift = load(p.vectors[1] + c, lanes);
      V block[W];
      for (int64_t i = 0; i < W; ++i) {
        block[i] = zero();
        if (i >= some) continue;
        prefetch(from[i] + c + W * p.a.column);  // too far from one another for the CPU to foresee
        block[i] = relu6(fma(scale, load(from[i] + c, lanes), shift));
        const uint32_t kept = not_zero(block[i]);
        found += __builtin_popcount(kept);
        uint8_t* const to = bits + (n + i) * row + c / 8;
        if constexpr (W >= 8)
          __builtin_memcpy(to, &kept, W / 8);
        else
          *to = static_cast<uint8_t>(c % 8 == 0 ? kept : *to | kept << 4);
      }
      transpose(block);
      const Lanes down = first(some);
      for (int64_t i = 0; i < W && c + i < p.channels; ++i) store(out + (c + i) * p.out.channel + n, block[i], down);
    }
  }
  return found;
}

// ---- mean and squares ----------------------------------------------------------------------------------------------

template <class T, bool WHOLE>
FUSEKERN_INLINE void join_across(const T* const* a, int lines, int64_t c, int64_t count, const float* shifts,
                                 int64_t seen, float* mean, float* squares) {
  const Lanes lanes = first(count - c);
  const V shift = read<WHOLE>(shifts + c, lanes);
  V total = zero(), apart = zero();
#pragma GCC unroll 8
  for (int i = 0; i < lines; ++i) total = total + (read<WHOLE>(a[i] + c, lanes) - shift);
  const V middle = total * set1(1.f / static_cast<float>(lines));
#pragma GCC unroll 8
  for (int i = 0; i < lines; ++i) {
    const V distance = read<WHOLE>(a[i] + c, lanes) - shift - middle;
    apart = fma(distance, distance, apart);
  }
  V m = load(mean + c), s = load(squares + c);
  join(m, s, seen, middle, apart, lines);
  store(mean + c, m), store(squares + c, s);
}

// Of numbers side by side.
template <class T>
static void moments_along(const T* a, int64_t count, V shift, V& mean, V& squares) {
  V total = zero(), apart = zero();
  int64_t n = 0;
  for (; n + W <= count; n += W) total = total + (load(a + n) - shift);
  if (n < count) total = total + only(load(a + n, first(count - n)) - shift, first(count - n));
  mean = set1(sum(total) / static_cast<float>(count));
  for (n = 0; n < count; n += W) {
    const Lanes lanes = first(count - n);
    const V x = only(load(a + n, lanes) - shift - mean, lanes);
    apart = fma(x, x, apart);
  }
  squares = set1(sum(apart));
}

template <class T, bool ROWS>
static void moments(const BottleneckPass& p) {
  // Distances from a value of each channel: of a mean far from zero nothing is lost.
  float* const shifts = p.sums[2];
  if (p.before == 0)
    for (int64_t c = 0; c < p.channels; ++c)
      shifts[c] = get(static_cast<const T*>(p.a.data) + offset(p.a, 0) + c * p.a.channel);
  const auto join_in = [&](int64_t c, int64_t before, V mean, V squares, int64_t more, Lanes lanes) {
    V m = load(p.sums[0] + c, lanes), s = load(p.sums[1] + c, lanes);
    join(m, s, before, mean, squares, more);
    store(p.sums[0] + c, m, lanes), store(p.sums[1] + c, s, lanes);
  };
  if constexpr (ROWS) {
    constexpr int MOST = 2 * LINES;
    for (int64_t start = 0; start < p.channels; start += PIECE) {
      const int64_t count = least(PIECE, p.channels - start);
      alignas(64) float mean[PIECE], squares[PIECE];
      for (int64_t c = 0; c < PIECE; c += W) store(mean + c, zero()), store(squares + c, zero());
      for (int64_t line = 0; line < p.pixels; line += MOST) {
        const int some = static_cast<int>(least(MOST, p.pixels - line));
        const T* a[MOST];
        for (int i = 0; i < some; ++i) a[i] = line_of<T, true>(p.a, line + i, start, count, nullptr);
        int64_t c = 0;
        if (some == MOST)
          for (; c + W <= count; c += W) join_across<T, true>(a, MOST, c, count, shifts + start, line, mean, squares);
        for (; c + W <= count; c += W) join_across<T, true>(a, some, c, count, shifts + start, line, mean, squares);
        if (c < count) join_across<T, false>(a, some, c, count, shifts + start, line, mean, squares);
      }
      for (int64_t c = 0; c < count; c += W)
        join_in(start + c, p.before, load(mean + c), load(squares + c), p.pixels, first(count - c));
    }
  } else {
    for (int64_t c = 0; c < p.channels; ++c)
      for (int64_t start = 0; start < p.pixels; start += PIECE) {
        const int64_t count = least(PIECE, p.pixels - start);
        V mean, squares;
        moments_along(line_of<T, false>(p.a, c, start, count, nullptr), count, set1(shifts[c]), mean, squares);
        join_in(c, p.before + start, mean, squares, count, first(1));
      }
  }
}

}  // namespace bottleneck

void bottleneck_activate(const BottleneckPass& p) { bottleneck::pass<bottleneck::Activate>(p); }

int64_t bottleneck_activate_turned(const BottleneckPass& p, uint8_t* bits, int64_t row) {
  return bottleneck::activate_turned(p, bits, row);
}

void bottleneck_affine(const BottleneckPass& p) {
  (p.b.data == nullptr ? bottleneck::pass<bottleneck::Affine> : bottleneck::pass<bottleneck::AffineAndAdd>)(p);
}

void bottleneck_coef(const BottleneckPass& p) { bottleneck::pass<bottleneck::Coef>(p); }

void bottleneck_mask(const BottleneckPass& p) { bottleneck::pass<bottleneck::Mask>(p); }

void bottleneck_sums(const BottleneckPass& p) { bottleneck::pass<bottleneck::Sums>(p); }

void bottleneck_moments(const BottleneckPass& p) {
  using namespace bottleneck;
  if (p.bf16)
    (p.rows ? moments<bf16, true> : moments<bf16, false>)(p);
  else
    (p.rows ? moments<float, true> : moments<float, false>)(p);
}

}  // namespace fusekern::FUSEKERN_ISA
