// What the bodies of former2conv and conv2former share: register-tiled products, and the forms of pixels and tokens
// that they read.
//
// All works on one head and one block of up to PB pixels at a time, and on units of 32 bits, which hold PER values that
// are summed over: one fp32, or two bf16 that the CPU multiplies and adds in one go (A = Single or Pairs).
//   columns  [units(d)][PB]              lane = pixel, units of channels; zero where there is no pixel
//   rows     PB pointers to [d]          lane = channel; into the map where its channels lie side by side
//   scores   [K][LD]                     lane = pixel, fp32
//   joined   [units(K)][LD]              lane = pixel, units of tokens
//   tall     [units(d)] by tokens        units of channels; tokens in runs of at most MR, a run as [units(d)][run]
//   wide     [panels(d)][units(K)][W]    lane = channel, units of tokens; zero beyond d
#pragma once

#include "attention.h"
#include "simd.h"

namespace fusekern::FUSEKERN_ISA::attention {

// Register tiles have up to MR rows of NV vectors and fill the registers. AVX-512 reads one operand of a multiplication
// from memory for nothing; without it, each row read must serve two vectors.
constexpr int MR = W == 16 ? 16 : 6;
constexpr int NV = W == 16 ? 1 : 2;
constexpr int MW = W == 16 ? 16 : 4;  // rows where their number must divide W

constexpr int PB = 4 * W;   // pixels of a block
constexpr int LD = PB + W;  // length of a row of scores; the gap spreads rows over the cache's sets

constexpr float LOG2E = 0x1.715476p0f;
constexpr float LEAST = -0x1.fffffep127f;

FUSEKERN_INLINE int64_t panels(int64_t d) { return (d + W - 1) / W; }

// ---- arithmetic --------------------------------------------------------------------------------------------------

struct Single {
  static constexpr int PER = 1;

  FUSEKERN_INLINE V multiply_add(const float* a, V b, V c) { return fma(set1(*a), b, c); }
  FUSEKERN_INLINE V join(const V* x) { return x[0]; }
  FUSEKERN_INLINE void store_pixels(float* row, int64_t n, V x) { store(row + n, x); }
  FUSEKERN_INLINE V column(const float* columns, int64_t c) { return load(columns + c * PB); }

  template <class T>
  FUSEKERN_INLINE void put(T* to, V x, Lanes lanes) {
    store(to, x, lanes);
  }
};

#if FUSEKERN_WIDTH == 16
// For a CPU with AVX512_BF16.
struct Pairs {
  static constexpr int PER = 2;

  FUSEKERN_INLINE V multiply_add(const float* a, V b, V c) { return dot(a, b, c); }
  FUSEKERN_INLINE V join(const V* x) { return interleave(x[0], x[1]); }
  FUSEKERN_INLINE void store_pixels(float* row, int64_t n, V x) {
    *reinterpret_cast<LooseHalves*>(reinterpret_cast<bf16*>(row) + n) = to_bf16(x);
  }
  FUSEKERN_INLINE V column(const float* columns, int64_t c) {
    const Bits pair = (Bits)load(columns + c / 2 * PB);
    return (V)(c % 2 ? pair & 0xffff0000u : pair << 16);
  }
  FUSEKERN_INLINE void put(bf16* to, V x, Lanes lanes) { store(reinterpret_cast<rounded_bf16*>(to), x, lanes); }
};
#endif

template <class A>
FUSEKERN_INLINE int64_t units(int64_t n) {
  return (n + A::PER - 1) / A::PER;
}

// A unit of value(0) ... value(PER - 1), addresses of T or null for zero.
template <class A, class Address>
FUSEKERN_INLINE float unit(Address value) {
  if constexpr (A::PER == 1) {
    return value(0) ? get(value(0)) : 0.f;
  } else {
    const uint32_t low = value(0) ? value(0)->bits : 0, high = value(1) ? value(1)->bits : 0, bits = high << 16 | low;
    float pair;
    __builtin_memcpy(&pair, &bits, 4);
    return pair;
  }
}

// ---- products ----------------------------------------------------------------------------------------------------

// c[m][i] = sum over units k < count of a[k step + m AM] b(k, i): M rows of N vectors, each given to done(m, i, c[m][i]).
template <class A, int M, int N, int AM, class B, class Done>
FUSEKERN_INLINE void tile(const float* a, int64_t step, int64_t count, B b, Done done) {
  constexpr int CHAINS = M * N <= 2 ? 4 : M * N <= 4 ? 2 : 1;  // several sums each, or additions wait for each other
  V c[CHAINS][M][N];
  const auto add = [&](int chain, int64_t k) __attribute__((always_inline)) {
    V x[N];
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) x[i] = b(k, i);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int i = 0; i < N; ++i) c[chain][m][i] = A::multiply_add(a + m * AM, x[i], c[chain][m][i]);
    a += step;
  };
#pragma GCC unroll 4
  for (int chain = 0; chain < CHAINS; ++chain)
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int i = 0; i < N; ++i) c[chain][m][i] = zero();
  int64_t k = 0;
  for (; k + CHAINS <= count; k += CHAINS)
#pragma GCC unroll 4
    for (int chain = 0; chain < CHAINS; ++chain) add(chain, k + chain);
  if (CHAINS > 1)
    for (; k < count; ++k) add(0, k);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
      for (int chain = 1; chain < CHAINS; ++chain) c[0][m][i] = c[0][m][i] + c[chain][m][i];
      done(m, i, c[0][m][i]);
    }
}

// The same for a number of rows, at most M, that is known at run time.
template <class A, int N, int AM, int M = MR, class B, class Done>
FUSEKERN_INLINE void tile_of(int64_t rows, const float* a, int64_t step, int64_t count, B b, Done done) {
  if constexpr (M > 1) {
    if (rows < M) return tile_of<A, N, AM, M - 1>(rows, a, step, count, b, done);
  }
  tile<A, M, N, AM>(a, step, count, b, done);
}

// MW rows whose sums may be long, and are added up in spans first: that keeps rounding errors small.
template <class A, int N, class B, class Done>
FUSEKERN_INLINE void long_tile(const float* a, int64_t step, int64_t count, B b, Done done) {
  constexpr int64_t SPAN = 256;
  if (count <= SPAN) return tile<A, MW, N, 1>(a, step, count, b, done);
  V sums[MW][N];
  for (int m = 0; m < MW; ++m)
    for (int i = 0; i < N; ++i) sums[m][i] = zero();
  for (int64_t k = 0; k < count; k += SPAN)
    tile<A, MW, N, 1>(
        a + k * step, step, count - k < SPAN ? count - k : SPAN, [=](int64_t l, int i) { return b(k + l, i); },
        [&](int m, int i, V x) { sums[m][i] = sums[m][i] + x; });
  for (int m = 0; m < MW; ++m)
    for (int i = 0; i < N; ++i) done(m, i, sums[m][i]);
}

// Calls f(i, N) for vectors i to i + N - 1 of `count`; N, NV or a last 1, is known at compile time.
template <int N>
struct Vectors {
  static constexpr int COUNT = N;
};

template <class F>
FUSEKERN_INLINE void for_vectors(int64_t count, F f) {
  int64_t i = 0;
  for (; i + NV <= count; i += NV) f(i, Vectors<NV>());
  if (NV > 1 && i < count) f(i, Vectors<1>());
}

// K tokens in runs of at most MR, as even as they go: a run of few would leave the pipelines waiting.
struct Runs {
  int64_t tokens, count;

  explicit Runs(int64_t tokens) : tokens(tokens), count((tokens + MR - 1) / MR) {}
  int64_t begin(int64_t run) const { return tokens * run / count; }
};

struct Nothing {
  void operator()(int64_t, int64_t) const {}
};

// scores[k][n] = factor sum over c of tall[c][k] columns[c][n]; most, if given, becomes each pixel's largest. Calls
// between(i, count) in between, for i from 0 to count - 1.
template <class A, bool MOST, class Between = Nothing>
static void score(const float* tall, const float* columns, int64_t K, int64_t d, int vectors, float factor,
                  float* scores, V* most, Between between = Between()) {
  constexpr int64_t SPAN = 64;  // long sums are added up in spans first, which keeps rounding errors small
  constexpr bool KEPT = W == 16;  // is there a register for the largest, or would it cost one of the tile's sums its own?
  const Runs runs(K);
  if (MOST)
    for (int j = 0; j < vectors; ++j) most[j] = set1(LEAST);
  for (int64_t run = 0; run < runs.count; ++run) {
    const int64_t begin = runs.begin(run), size = runs.begin(run + 1) - begin;
    between(run, runs.count);
    for_vectors(vectors, [&](int64_t j, auto N) {
      float* to = scores + begin * LD + j * W;
      V top[N.COUNT];
      for (int i = 0; i < N.COUNT; ++i) top[i] = MOST && KEPT ? most[j + i] : zero();
      for (int64_t u = 0; u < units<A>(d); u += SPAN) {
        const bool last = u + SPAN >= units<A>(d);
        tile_of<A, N.COUNT, 1>(
            size, tall + begin * units<A>(d) + u * size, size, last ? units<A>(d) - u : SPAN,
            [=](int64_t c, int i) { return load(columns + (u + c) * PB + (j + i) * W); },
            [&](int m, int i, V x) {
              float* at = to + m * LD + i * W;
              if (u > 0) x = x + load(at);
              if (last) x = x * set1(factor);
              store(at, x);
              if (MOST && KEPT && last) top[i] = max(x, top[i]);
              if (MOST && !KEPT && last) most[j + i] = max(x, most[j + i]);
            });
      }
      if (MOST && KEPT)
        for (int i = 0; i < N.COUNT; ++i) most[j + i] = top[i];
    });
  }
}

// sums[k][c] = decay[k] sums[k][c] + sum over n of scores[k][n] rows[n][c], for units n < count; no decay where it is
// null. The scores have been stored by store_pixels. sums is [K][W panels(d)].
template <class A, class Row>
static void gather(const float* scores, const Row* const* rows, int64_t K, int64_t d, int64_t count,
                   const float* decay, float* sums) {
  const Runs runs(K);
  const int64_t length = W * panels(d);
  for_vectors(panels(d), [&](int64_t j, auto N) {
    for (int64_t run = 0; run < runs.count; ++run) {
      const int64_t begin = runs.begin(run), size = runs.begin(run + 1) - begin;
      float* to = sums + begin * length + j * W;
      tile_of<A, N.COUNT, LD>(
          size, scores + begin * LD, 1, count, [=](int64_t n, int i) { return load(rows[n] + (j + i) * W); },
          [=](int m, int i, V x) {
            float* sum = to + m * length + i * W;
            store(sum, fma(set1(decay ? decay[begin + m] : 1.f), load(sum), x));
          });
    }
  });
}

// ---- pixels ------------------------------------------------------------------------------------------------------

// How many pixels of those left are the next block's.
FUSEKERN_INLINE int at_most_a_block(int64_t left) { return left < 0 ? 0 : left < PB ? static_cast<int>(left) : PB; }

// One head of a block of pixels of a map.
template <class T>
struct Block {
  T* base;             // the head's first channel
  int64_t channel;     // stride of channels
  int64_t offset[PB];  // of each pixel
  int pixels;          // at most PB
  bool lined[4] = {};  // are the W pixels of a vector side by side?

  Block(const Map& map, int64_t width, int64_t b, int64_t channel0, int64_t pixel0, int pixels)
      : base(static_cast<T*>(map.data) + b * map.batch + channel0 * map.channel), channel(map.channel), pixels(pixels) {
    if (map.row == width * map.column) {  // as if there were but one row
      for (int n = 0; n < PB; ++n) offset[n] = (pixel0 + n) * map.column;
      for (int j = 0; j < 4; ++j) lined[j] = map.column == 1;
      return;
    }
    int64_t h = pixel0 / width, w = pixel0 % width;
    for (int n = 0; n < pixels; ++n) {
      offset[n] = h * map.row + w * map.column;
      if (++w == width) w = 0, ++h;
    }
    for (int j = 0; j * W < pixels; ++j) {
      lined[j] = true;
      for (int n = j * W + 1; n < (j + 1) * W && n < pixels; ++n) lined[j] &= offset[n] == offset[j * W] + n - j * W;
    }
  }

  int vectors() const { return (pixels + W - 1) / W; }
  int pixels_of(int j) const { return pixels - j * W < W ? pixels - j * W : W; }
  T* at(int64_t n, int64_t c) const { return base + offset[n] + c * channel; }

  // Brings the part'th of `parts` parts of d channels into the L2 cache.
  void prefetch(int64_t d, int64_t part, int64_t parts) const {
    constexpr int LINE = 64 / sizeof(T);
    if (channel == 1) {
      for (int64_t n = pixels * part / parts; n < pixels * (part + 1) / parts; ++n)
        for (int64_t c = 0; c < d; c += LINE) FUSEKERN_ISA::prefetch(at(n, c));
    } else if (lined[0]) {
      for (int64_t c = d * part / parts; c < d * (part + 1) / parts; ++c)
        for (int n = 0; n < pixels; n += LINE) FUSEKERN_ISA::prefetch(at(n, c));
    }
  }
};

template <class A, class T>
static void to_columns(const Block<T>& from, int64_t d, float* columns) {
  for (int j = 0; j < from.vectors(); ++j) {
    const int pixels = from.pixels_of(j), n0 = j * W;
    float* to = columns + n0;
    if (from.channel == 1) {
      for (int64_t u = 0; u < units<A>(d); u += W) {
        const Lanes lanes = first(units<A>(d) - u);
        V x[W];
        for (int n = 0; n < W; ++n) {
          if (n >= pixels)
            x[n] = zero();
          else if constexpr (A::PER == 1)
            x[n] = load(from.at(n0 + n, u), lanes);
          else
            x[n] = load(reinterpret_cast<const float*>(from.at(n0 + n, 0)) + u, lanes);
        }
        transpose(x);
        for (int m = 0; m < W && u + m < units<A>(d); ++m) store(to + (u + m) * PB, x[m]);
      }
    } else if (from.lined[j]) {
      const Lanes lanes = first(pixels);
      for (int64_t u = 0; u < units<A>(d); ++u) {
        V x = load(from.at(n0, u * A::PER), lanes);
        if constexpr (A::PER == 2) x = (V)((Bits)x >> 16 | (Bits)load(from.at(n0, u * 2 + 1), lanes));
        store(to + u * PB, x);
      }
    } else {
      for (int64_t u = 0; u < units<A>(d); ++u)
        for (int n = 0; n < W; ++n)
          to[u * PB + n] = unit<A>([&](int i) { return n < pixels ? from.at(n0 + n, u * A::PER + i) : nullptr; });
    }
  }
}

// Rows point into the map if its channels lie side by side and fill whole vectors, else at a copy in buffer,
// [PB][W panels(d)].
template <class A, class T>
static void to_rows(const Block<T>& from, const float* columns, int64_t d, T* buffer, const T** rows) {
  const int64_t length = W * panels(d);
  const bool in_place = from.channel == 1 && length == d;
  for (int n = 0; n < from.pixels; ++n) rows[n] = in_place ? from.at(n, 0) : buffer + n * length;
  if (in_place) return;
  for (int n = 0; n < from.pixels; n += W)
    for (int64_t u = 0; u < units<A>(d); u += W) {
      V x[W];
      for (int m = 0; m < W; ++m) x[m] = u + m < units<A>(d) ? load(columns + (u + m) * PB + n) : zero();
      transpose(x);
      for (int m = 0; m < W && n + m < from.pixels; ++m) {
        T* to = buffer + (n + m) * length + u * A::PER;
        if constexpr (A::PER == 1)
          store(to, x[m]);
        else
          store(reinterpret_cast<float*>(to), x[m], first(length / 2 - u));
      }
    }
}

// Units of pixels out of rows, into [units(PB)][W panels(d)]; one fp32 is a unit as it is.
template <class A, class T>
static const auto* const* to_pixel_units(const T** rows, int pixels, int64_t d, float* buffer, const float** pairs) {
  if constexpr (A::PER == 1) {
    return rows;
  } else {
    const int64_t length = W * panels(d);
    for (int n = 0; n < pixels; n += 2) {
      float* to = buffer + n / 2 * length;
      pairs[n / 2] = to;
      for (int64_t c = 0; c < length; c += W) {
        const V low = load(rows[n] + c), high = n + 1 < pixels ? load(rows[n + 1] + c) : zero();
        store(to + c, (V)((Bits)low >> 16 | (Bits)high));
      }
    }
    return pairs;
  }
}

// map[n][c] = residual[n][c] + factor[n] sum over units k < count of joined[k][n] wide[k][c]. The residual is read
// from rows if the map's channels lie side by side, and from columns otherwise; without it neither is read.
template <class A, bool RESIDUAL, class T>
static void spread(const float* joined, const float* wide, int64_t count, int64_t d, const float* factor,
                   const T* const* rows, const float* columns, const Block<T>& to) {
  const int pixels = to.pixels;
  if (to.channel == 1) {
    for (int n = 0; n < pixels; n += MW)
      for_vectors(panels(d), [&](int64_t j, auto N) {
        const float* panel = wide + j * W * count;
        Lanes lanes[N.COUNT];
        for (int i = 0; i < N.COUNT; ++i) lanes[i] = first(d - (j + i) * W);
        long_tile<A, N.COUNT>(
            joined + n, LD, count, [=](int64_t k, int i) { return load(panel + (i * count + k) * W); },
            [&](int m, int i, V x) {
              if (n + m >= pixels) return;
              const int64_t c = (j + i) * W;
              const V y = RESIDUAL ? fma(x, set1(factor[n + m]), load(rows[n + m] + c)) : x;
              A::put(to.at(n + m, c), y, lanes[i]);
            });
      });
    return;
  }
  for (int64_t c = 0; c < d; c += MW)
    for_vectors(to.vectors(), [&](int64_t j, auto N) {
      Lanes lanes[N.COUNT];
      V factors[N.COUNT];
      bool lined[N.COUNT];
      for (int i = 0; i < N.COUNT; ++i) {
        lanes[i] = first(pixels - (j + i) * W);
        factors[i] = RESIDUAL ? load(factor + (j + i) * W) : zero();
        lined[i] = to.lined[j + i];
      }
      long_tile<A, N.COUNT>(
          wide + c / W * W * count + c % W, W, count,
          [=](int64_t k, int i) { return load(joined + k * LD + (j + i) * W); },
          [&](int m, int i, V x) {
            if (c + m >= d) return;
            const int64_t n = (j + i) * W;
            const V y = RESIDUAL ? fma(x, factors[i], A::column(columns + units<A>(c) * PB + n, m)) : x;
            if (lined[i]) return A::put(to.at(n, c + m), y, lanes[i]);
            float values[W];
            store(values, y);
            for (int l = 0; l < W && n + l < pixels; ++l) put(to.at(n + l, c + m), values[l]);
          });
    });
}

// ---- tokens ------------------------------------------------------------------------------------------------------

// One head of the tokens of one text.
template <class T>
struct Head {
  T* base;                 // the head's first channel of the first token
  int64_t token, channel;  // strides

  Head(const Tokens& tokens, const Attention& size, int64_t head)
      : base(static_cast<T*>(tokens.data) + head / size.heads * tokens.batch +
             head % size.heads * size.d * tokens.channel),
        token(tokens.token),
        channel(tokens.channel) {}

  T* at(int64_t k, int64_t c) const { return base + k * token + c * channel; }
};

template <class A>
static int64_t tall_floats(int64_t K, int64_t d) {
  return W * panels(K * units<A>(d));
}

template <class A>
static int64_t wide_floats(int64_t K, int64_t d) {
  return W * panels(d) * units<A>(K);
}

static inline int64_t sums_floats(int64_t K, int64_t d) { return W * panels(d) * K; }

// Units u to u + W - 1 of channels of token k, zero beyond d.
template <class A, class T>
static V channel_units(const Head<T>& from, int64_t k, int64_t u, int64_t d) {
  const Lanes lanes = first(units<A>(d) - u);
  if (from.channel == 1 && d % A::PER == 0) {
    if constexpr (A::PER == 1)
      return load(from.at(k, u), lanes);
    else
      return load(reinterpret_cast<const float*>(from.at(k, 0)) + u, lanes);
  }
  float values[W];
  for (int m = 0; m < W; ++m)
    values[m] = unit<A>([&](int i) { return (u + m) * A::PER + i < d ? from.at(k, (u + m) * A::PER + i) : nullptr; });
  return load(values);
}

// Tokens begin to end - 1.
template <class A, class T>
static void to_tall(const Head<T>& from, int64_t begin, int64_t end, int64_t d, float* tall) {
  const Runs runs(end - begin);
  for (int64_t run = 0; run < runs.count; ++run) {
    const int64_t first_token = runs.begin(run), size = runs.begin(run + 1) - first_token;
    float* to = tall + first_token * units<A>(d);
    for (int64_t k = 0; k < size; k += W)
      for (int64_t u = 0; u < units<A>(d); u += W) {
        V x[W];
        for (int m = 0; m < W; ++m)
          x[m] = k + m < size ? channel_units<A>(from, begin + first_token + k + m, u, d) : zero();
        transpose(x);
        for (int m = 0; m < W && u + m < units<A>(d); ++m) store(to + (u + m) * size + k, x[m], first(size - k));
      }
  }
}

// All tokens; `pitch` units to a panel, of which these are the first.
template <class A, class T>
static void to_wide(const Head<T>& from, int64_t K, int64_t d, int64_t pitch, float* wide) {
  for (int64_t c = 0; c < d; c += W)
    for (int64_t k = 0; k < K; k += A::PER) {
      V x = channel_units<Single>(from, k, c, d);
      if constexpr (A::PER == 2) {
        const V next = k + 1 < K ? channel_units<Single>(from, k + 1, c, d) : zero();
        x = (V)((Bits)x >> 16 | (Bits)next);
      }
      store(wide + c * pitch + k / A::PER * W, x);
    }
}

// to[k][c] to to[k][c + W - 1], as far as d goes, become x.
template <class T>
static void store_channels(const Head<T>& to, int64_t k, int64_t c, int64_t d, V x) {
  if (to.channel == 1) return store(to.at(k, c), x, first(d - c));
  float values[W];
  store(values, x);
  for (int m = 0; m < W && c + m < d; ++m) put(to.at(k, c + m), values[m]);
}

// to[k][c] = sum over parts of from[part][k][c], each part [K][W panels(d)] and `step` floats after the one before.
template <class T>
static void add_up(const float* from, int64_t parts, int64_t step, int64_t K, int64_t d, const Head<T>& to) {
  for (int64_t k = 0; k < K; ++k)
    for (int64_t c = 0; c < d; c += W) {
      V sum = zero();
      for (int64_t part = 0; part < parts; ++part) sum = sum + load(from + part * step + k * W * panels(d) + c);
      store_channels(to, k, c, d, sum);
    }
}

}  // namespace fusekern::FUSEKERN_ISA::attention
