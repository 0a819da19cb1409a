// BN1, ReLU6 and the depthwise convolution, as one thread computes them within a tile: shapes, windows and statistics.
// Plain C++ apart from its marks for the device, so that the host's tests cover it.
#pragma once

#include "batch_norm.h"

#if defined(__CUDACC__)
#define FUSEKERN_UNROLL _Pragma("unroll")
#else
#define FUSEKERN_UNROLL
#endif

namespace fusekern::dw {

// ---- shapes ------------------------------------------------------------------------------------------------------

// A tile is ROWS x COLUMNS pixels of what the kernel writes: of y2 in the forward, of d in the backward. SOURCE_* is
// the tile, with its halo, of what a window reads: relu6(v1) in the forward, dy2 in the backward. A thread walks down
// a strip of P columns and V channels, so that each row of the source is read once for all rows that it adds to.
//
// Channels lie side by side in the tile where they do so in memory (LAST), else columns do.
template <int BYTES, int K_, int S_, bool LAST_, bool BACKWARD_>
struct Tile {
  static constexpr int K = K_, S = S_, PAD = K / 2;
  static constexpr bool LAST = LAST_, BACKWARD = BACKWARD_;
  static constexpr int VECTOR = 16 / BYTES;  // elements of a 16-byte access
  // Wider strips read less of the tile twice, and take more registers.
  static constexpr int V = LAST ? 2 : 1, P = LAST && !BACKWARD && K == 3 ? 4 : 2;
  // 128 bytes of channels, a whole cache line; or of columns, half that for fp32.
  static constexpr int CHANNELS = LAST ? 128 / BYTES : 8;
  static constexpr int COLUMNS = LAST ? 16 : 32;
  // As many as fit into 48 KiB of shared memory with the source, of which a forward with stride 2 has four times as
  // much.
  static constexpr int ROWS = BACKWARD || S == 1 ? (K == 3 ? 8 : 6) : (K == 3 ? 4 : 2);

  // What the window of `n` pixels in a row (or column) covers of the source, and where it starts: at source pixel
  // S * first + START in the forward, first / S + START in the backward.
  static constexpr int covered(int n) {
    return BACKWARD ? (n - 1 + PAD) / S + PAD / S + 1 : (n - 1) * S + K;
  }
  static constexpr int START = BACKWARD ? -(PAD / S) : -PAD;
  static constexpr int SOURCE_ROWS = covered(ROWS), SOURCE_COLUMNS = covered(COLUMNS), SOURCE_P = covered(P);

  // Strides within the tiles, in elements.
  static constexpr int SOURCE_COLUMN = LAST ? CHANNELS : 1, COLUMN = LAST ? CHANNELS : 1;
  static constexpr int SOURCE_ROW = SOURCE_COLUMNS * SOURCE_COLUMN, ROW = COLUMNS * COLUMN;
  static constexpr int SOURCE_CHANNEL = LAST ? 1 : SOURCE_ROWS * SOURCE_ROW, CHANNEL = LAST ? 1 : ROWS * ROW;
  static constexpr int SOURCE_SIZE = SOURCE_ROWS * SOURCE_COLUMNS * CHANNELS, SIZE = ROWS * COLUMNS * CHANNELS;

  // Threads of the same channels stand next to each other in LAST, those of the same columns else. STRIPS of them share
  // their channels, and what they sum.
  static constexpr int LANES = CHANNELS / V, STRIPS = COLUMNS / P, THREADS = LANES * STRIPS;
  // What a multiprocessor shall run at once bounds the registers, here to 128 or 255. If it is not stated, ptxas spills
  // a few to fit one more.
  static constexpr int BLOCKS = (BACKWARD && LAST && K == 5 ? 256 : 512) / THREADS;
  static constexpr FUSEKERN_BOTH int lane(int thread) { return LAST ? thread % LANES : thread / STRIPS; }
  static constexpr FUSEKERN_BOTH int strip(int thread) { return LAST ? thread / LANES : thread % STRIPS; }
  // Where a thread's strip begins in the two tiles.
  static constexpr FUSEKERN_BOTH int source_offset(int thread) {
    const int first = BACKWARD ? strip(thread) * P / S : strip(thread) * P * S;
    return lane(thread) * V * SOURCE_CHANNEL + first * SOURCE_COLUMN;
  }
  static constexpr FUSEKERN_BOTH int offset(int thread) {
    return lane(thread) * V * CHANNEL + strip(thread) * P * COLUMN;
  }

  // Numbers per channel that a backward sums: the gradients of the taps, sum d and sum d (y1 - mean1).
  static constexpr int SUMS = K * K + 2;
};

// Where tile `i` of a map lies, and which image it is of.
struct Place {
  int image, row, column;
};

template <class Tile>
FUSEKERN_BOTH Place place_of(int i, int tiles_down, int tiles_across) {
  return {i / tiles_across / tiles_down, i / tiles_across % tiles_down * Tile::ROWS, i % tiles_across * Tile::COLUMNS};
}

// ---- element by element ------------------------------------------------------------------------------------------

FUSEKERN_BOTH float relu6(float v) {
#if defined(__CUDA_ARCH__)
  // fminf and fmaxf would lose a NaN.
  asm("max.NaN.f32 %0, %0, 0f00000000;\n\tmin.NaN.f32 %0, %0, 0f40C00000;" : "+f"(v));
  return v;
#else
  return v < 0.f ? 0.f : v > 6.f ? 6.f : v;
#endif
}

// Does the gradient pass ReLU6? Of v or, which is the same, of relu6(v).
FUSEKERN_BOTH bool passes(float v) { return v > 0.f && v < 6.f; }

// dy = p dv + q (y - mean) + r
FUSEKERN_BOTH float norm_gradient(float dv, float y, float p, float q, float r, float mean) {
  return p * dv + (q * (y - mean) + r);
}

// N elements that lie in one access.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T values[N];
};

template <class T, int N>
FUSEKERN_BOTH void read(const T* from, float (&to)[N]) {
  const auto pack = *reinterpret_cast<const Pack<T, N>*>(from);
  FUSEKERN_UNROLL
  for (int v = 0; v < N; ++v) to[v] = static_cast<float>(pack.values[v]);
}

template <class T, int N>
FUSEKERN_BOTH void write(T* to, const float (&from)[N]) {
  Pack<T, N> pack;
  FUSEKERN_UNROLL
  for (int v = 0; v < N; ++v) pack.values[v] = static_cast<T>(from[v]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// ---- windows -----------------------------------------------------------------------------------------------------

// The forward of a strip. done(row, y) takes y2 of each row, [P][V], from top to bottom.
template <class Tile, class T, class Done>
FUSEKERN_BOTH void convolve(const T* source, const float (&weight)[Tile::K][Tile::K][Tile::V], const Done& done) {
  constexpr int K = Tile::K, S = Tile::S, P = Tile::P, V = Tile::V;
  float y[Tile::ROWS][P][V] = {};
  FUSEKERN_UNROLL
  for (int t = 0; t < Tile::SOURCE_ROWS; ++t) {
    float a[Tile::SOURCE_P][V];
    FUSEKERN_UNROLL
    for (int x = 0; x < Tile::SOURCE_P; ++x) read(source + t * Tile::SOURCE_ROW + x * Tile::SOURCE_COLUMN, a[x]);
    FUSEKERN_UNROLL
    for (int i = 0; i < K; ++i) {
      const int row = (t - i) / S;
      if (t < i || (t - i) % S || row >= Tile::ROWS) continue;
      FUSEKERN_UNROLL
      for (int j = 0; j < K; ++j) FUSEKERN_UNROLL
        for (int p = 0; p < P; ++p) FUSEKERN_UNROLL
          for (int v = 0; v < V; ++v) y[row][p][v] += weight[i][j][v] * a[p * S + j][v];
    }
    if (t >= K - 1 && (t - K + 1) % S == 0) done((t - K + 1) / S, y[(t - K + 1) / S]);
  }
}

// The backward of a strip, of which one window of dy2 serves both gradients: source is dy2; load(row, a) gives
// relu6(v1) of a row, [P][V]; taps take the gradient of the weight; done(row, d, a) takes Wd^T * dy2, still without the
// mask, and what load gave.
template <class Tile, class T, class Load, class Done>
FUSEKERN_BOTH void differentiate(const T* source, const float (&weight)[Tile::K][Tile::K][Tile::V],
                                 float (&taps)[Tile::K][Tile::K][Tile::V], const Load& load, const Done& done) {
  constexpr int K = Tile::K, S = Tile::S, P = Tile::P, V = Tile::V, PAD = Tile::PAD, START = Tile::START;
  float d[Tile::ROWS][P][V] = {}, a[Tile::ROWS][P][V];
  FUSEKERN_UNROLL
  for (int t = 0; t < Tile::SOURCE_ROWS; ++t) {
    float g[Tile::SOURCE_P][V];
    FUSEKERN_UNROLL
    for (int x = 0; x < Tile::SOURCE_P; ++x) read(source + t * Tile::SOURCE_ROW + x * Tile::SOURCE_COLUMN, g[x]);
    FUSEKERN_UNROLL
    for (int i = K - 1; i >= 0; --i) {
      const int row = S * (t + START) + i - PAD;
      if (row < 0 || row >= Tile::ROWS) continue;
      if (i + S >= K || t == 0) load(row, a[row]);  // the first row of dy2 that it meets
      FUSEKERN_UNROLL
      for (int x = 0; x < Tile::SOURCE_P; ++x) FUSEKERN_UNROLL
        for (int j = 0; j < K; ++j) {
          const int p = S * (x + START) + j - PAD;
          if (p < 0 || p >= P) continue;
          FUSEKERN_UNROLL
          for (int v = 0; v < V; ++v) {
            d[row][p][v] += weight[i][j][v] * g[x][v];
            taps[i][j][v] += a[row][p][v] * g[x][v];
          }
        }
      if (i < S) done(row, d[row], a[row]);  // the last
    }
  }
}

// ---- statistics --------------------------------------------------------------------------------------------------

// Of some values: how many, their mean, and the sum of the squares of their distances from it.
struct Moments {
  float count, mean, m2;
};

FUSEKERN_BOTH Moments merge(const Moments& a, const Moments& b) {
  if (b.count == 0.f) return a;
  if (a.count == 0.f) return b;
  const float count = a.count + b.count, delta = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * (a.count * share)};
}

// Sums of the distances from the first value.
struct Shifted {
  float shift = 0.f, sum = 0.f, squares = 0.f;

  FUSEKERN_BOTH void add(float value) {
    const float distance = value - shift;
    sum += distance;
    squares += distance * distance;
  }
  FUSEKERN_BOTH Moments moments(float count) const {
    if (count == 0.f) return {0.f, 0.f, 0.f};
    const float mean = sum / count, m2 = squares - sum * mean;
    return {count, shift + mean, m2 < 0.f ? 0.f : m2};
  }
};

}  // namespace fusekern::dw
