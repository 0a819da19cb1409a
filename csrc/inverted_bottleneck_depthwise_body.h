// The depthwise convolution of an inverted bottleneck with the normalisation and the ReLU6 before it, forward and
// backward.
//
// It works on rows of fp32 pixels in groups of W channels, [group][pixel][W], whichever way the maps lie; maps
// [.., channel, column] are transposed when a row is read or written.
#pragma once

#include "inverted_bottleneck_pass_body.h"

namespace fusekern::FUSEKERN_ISA {

namespace bottleneck {

// A thread's memory for a block of channels. Vectors are padded with zeros to whole groups.
struct Block {
  int64_t c0, channels, n;  // first channel, how many, in how many groups
  int64_t k, pad, wide;     // wide: from one group of a row in the ring to the next, in floats
  float *scale1, *shift1, *mean1, *wd, *scale2, *shift2, *p, *q, *r, *mean2;
  float *mean, *squares;  // or the sums of the backward
  float* shift;           // mean is that of distances from it
  float *dwd, *zeros, *line;

  // With null for `memory` only counts: returns floats.
  int64_t lay_out(const BottleneckDepthwise& op, int64_t item, float* memory) {
    c0 = item * op.block, channels = least(op.block, op.channels - c0), n = groups(channels);
    k = op.k, pad = k / 2;
    const int64_t S = op.stride, size = groups(op.block) * W;
    wide = (op.W + 2 * pad + S - 1) / S * S * W;
    float* at = memory;
    const auto take = [&](float*& to, int64_t floats) { to = at, at += floats; };
    float** const vectors[] = {&scale1, &shift1, &mean1, &scale2, &shift2, &p, &q, &r, &mean2, &mean, &squares, &shift};
    for (float** vector : vectors) take(*vector, size);
    take(wd, k * k * size);
    take(dwd, k * k * size);
    take(zeros, wide);
    take(line, size * (op.W > op.w ? op.W : op.w));
    return at - memory;
  }

  void fill(float* to, const float* from) const {
    for (int64_t c = 0; c < n * W; c += W)
      store(to + c, from == nullptr ? zero() : load(from + c0 + c, first(channels - c)));
  }

  template <class T>
  void fill(const BottleneckDepthwise& op) {
    fill(scale1, op.affine1), fill(shift1, op.affine1 + op.pitch), fill(mean1, op.mean1);
    fill(scale2, op.affine2), fill(shift2, op.affine2 == nullptr ? nullptr : op.affine2 + op.pitch);
    const auto part = [&](int i) { return op.coef2 == nullptr ? nullptr : op.coef2 + i * op.pitch; };
    fill(p, part(0)), fill(q, part(1)), fill(r, part(2)), fill(mean2, part(3));
    each_tap(static_cast<const T*>(op.wd), [&](const T* from, int64_t t, Lanes taps, int64_t v, int64_t some) {
      V tile[W];
      for (int64_t c = 0; c < W; ++c) tile[c] = c < some ? load(from + c * k * k, taps) : zero();
      transpose(tile);
      for (int64_t i = 0; i < least(W, k * k - t); ++i) store(wd + (t + i) * n * W + v * W, tile[i]);
    });
    for (int64_t c = 0; c < n * W; c += W) store(mean + c, zero()), store(squares + c, zero());
    for (int64_t c = 0; c < k * k * n * W; c += W) store(dwd + c, zero());
    for (int64_t i = 0; i < wide; i += W) store(zeros + i, zero());
  }

  // f(what lies at tap t of channel v W, t, the taps from there on, v, channels) for weights [channels][k][k].
  template <class T, class F>
  void each_tap(T* weights, F f) const {
    for (int64_t v = 0; v < n; ++v)
      for (int64_t t = 0; t < k * k; t += W)
        f(weights + (c0 + v * W) * k * k + t, t, first(k * k - t), v, least(W, channels - v * W));
  }

  int64_t ring_row() const { return n * wide; }
};

// f(group)(pixel, vectors) for a row of `width` pixels of M maps alike, read from the data given.
template <class T, int M, class F>
FUSEKERN_INLINE void each_in(const Block& block, bool rows, const Map& map, const T* const (&data)[M], int64_t width,
                             F f) {
  const int64_t n = block.n, channels = block.channels, column = map.column;
  V values[M];
  if (rows) {
    // What f(group) holds serves a few pixels.
    const auto some = [&]<int N, bool WHOLE>(const T* const* from, int64_t x, int64_t v)
        __attribute__((always_inline)) {
      const Lanes lanes = first(channels - v * W);
      const auto put = f(v);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        for (int m = 0; m < M; ++m) values[m] = read<WHOLE>(from[m] + i * column + v * W, lanes);
        put(x + i, values);
      }
    };
    const auto across = [&]<int N>(int64_t x) __attribute__((always_inline)) {
      const T* from[M];
      for (int m = 0; m < M; ++m) from[m] = data[m] + x * column;
      for (int64_t v = 0; v < n - 1; ++v) some.template operator()<N, true>(from, x, v);
      some.template operator()<N, false>(from, x, n - 1);
    };
    int64_t x = 0;
    for (; x + 4 <= width; x += 4) across.template operator()<4>(x);
    for (; x < width; ++x) across.template operator()<1>(x);
    return;
  }
  for (int64_t v = 0; v < n; ++v) {
    const auto put = f(v);
    for (int64_t x = 0; x < width; x += W) {
      V tiles[M][W];
      for (int m = 0; m < M; ++m) {
        for (int64_t c = 0; c < W; ++c)
          tiles[m][c] = v * W + c < block.channels
                            ? load(data[m] + (v * W + c) * map.channel + x * map.column, first(width - x))
                            : zero();
        transpose(tiles[m]);
      }
      for (int64_t i = 0; i < least(W, width - x); ++i) {
        for (int m = 0; m < M; ++m) values[m] = tiles[m][i];
        put(x + i, values);
      }
    }
  }
}

// The other way: what lies in block.line, [group][pixel], becomes a row of `width` pixels.
template <class T>
FUSEKERN_INLINE void put_line(const Block& block, bool rows, const Map& map, T* data, int64_t width) {
  const int64_t n = block.n, channels = block.channels, column = map.column;
  const float* const line = block.line;
  if (rows) {
    const Lanes lanes = first(channels - (n - 1) * W);
    for (int64_t x = 0; x < width; ++x, data += column) {
      const float* from = line + x * W;
      T* to = data;
      for (int64_t v = 0; v < n - 1; ++v, from += width * W, to += W) store(to, load(from));
      store(to, load(from), lanes);
    }
    return;
  }
  for (int64_t v = 0; v < n; ++v)
    for (int64_t x = 0; x < width; x += W) {
      V tile[W];
      for (int64_t i = 0; i < W; ++i) tile[i] = x + i < width ? load(line + (v * width + x + i) * W) : zero();
      transpose(tile);
      for (int64_t c = 0; c < least(W, channels - v * W); ++c)
        store(data + (v * W + c) * map.channel + x * map.column, tile[c], first(width - x));
    }
}

template <class T>
FUSEKERN_INLINE T* row_of(const Map& map, int64_t b, int64_t y, int64_t c0) {
  return static_cast<T*>(map.data) + b * map.batch + y * map.row + c0 * map.channel;
}

// put(pixel, i, value) for pixels x + i of the result, N side by side. A row lies [S][columns / S][W]: what a tap meets
// lies side by side too.
template <int K, int S, int N, class F>
FUSEKERN_INLINE void filter(const float* const* rows, int64_t x, int64_t phase, const V* wd, F put) {
  V sums[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) sums[i] = zero();
#pragma GCC unroll 8
  for (int i = 0; i < K; ++i)
#pragma GCC unroll 32
    for (int o = 0; o < (N - 1) * S + K; ++o) {
      const V value = in_register(load(rows[i] + o % S * phase + (x + o / S) * W));
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j)
        if (o - j * S >= 0 && o - j * S < K) sums[j] = fma(wd[i * K + o - j * S], value, sums[j]);
    }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) put(x + i, i, sums[i]);
}

template <class T, int K, int S>
static void forward_rows(const BottleneckDepthwise& op, const Block& block, int64_t b, int64_t staged, int64_t begin,
                         int64_t end, float* ring, bool count) {
  // Copies of what loops read, which no store can change.
  const int64_t pad = K / 2, wide = block.wide, phase = wide / S, n = block.n, size = n * W, width = op.w;
  const int64_t column1 = op.y1.column, column2 = op.y2.column;
  const bool in_rows = op.rows;
  if (staged == 0)
    for (int64_t i = 0; i < K * block.ring_row(); i += W) store(ring + i, zero());
  for (int64_t y = begin; y < end; ++y) {
    for (; staged < least(op.H, y * S + K - pad); ++staged) {
      float* const to = ring + staged % K * block.ring_row();
      const T* const from[1] = {row_of<const T>(op.y1, b, staged, block.c0)};
      each_in(block, op.rows, op.y1, from, op.W, [&](int64_t v) {
        const V scale = load(block.scale1 + v * W), shift = load(block.shift1 + v * W);
        float* const row = to + v * wide;
        return [scale, shift, row, phase](int64_t x, const V* values) {
          store(row + (x + pad) % S * phase + (x + pad) / S * W, relu6(fma(scale, values[0], shift)));
        };
      });
    }
    for (int64_t v = 0; v < n; ++v) {
      const float* rows[K];
      V wd[K * K];
#pragma GCC unroll 25
      for (int t = 0; t < K * K; ++t) wd[t] = load(block.wd + t * size + v * W);
      for (int i = 0; i < K; ++i) {
        const int64_t from = y * S + i - pad;
        rows[i] = from < 0 || from >= op.H ? block.zeros : ring + from % K * block.ring_row() + v * wide;
      }
      float* const line = block.line + v * width * W;
      // While this is at work, the next row may come.
      const T* const next = row_of<const T>(op.y1, b, staged, block.c0) + v * W * op.y1.channel;
      const T* const into = row_of<const T>(op.y2, b, y, block.c0) + v * W * op.y2.channel;
      const auto along = [&](auto put) __attribute__((always_inline)) {
        constexpr int N = K == 3 ? 8 : 4;
        int64_t x = 0;
        const auto some = [&]<int M>() __attribute__((always_inline)) {
          for (; x + M <= width; x += M) {
            if (in_rows)
              for (int64_t i = x * S; i < (x + M) * S; ++i) prefetch(next + i * column1);
            if (in_rows)
              for (int64_t i = x; i < x + M; ++i) prefetch(into + i * column2);
            filter<K, S, M>(rows, x, phase, wd, put);
          }
        };
        some.template operator()<N>();
        some.template operator()<1>();
      };
      if (count) {
        if (b == 0 && y == 0)
          filter<K, S, 1>(rows, 0, phase, wd, [&](int64_t, int, V value) { store(block.shift + v * W, value); });
        const V shift = load(block.shift + v * W);
        V total[4] = {zero(), zero(), zero(), zero()}, apart[4] = {zero(), zero(), zero(), zero()};
        along([&](int64_t x, int i, V value) __attribute__((always_inline)) {
          store(line + x * W, value);
          total[i % 4] = total[i % 4] + (value - shift);
        });
        const V middle = ((total[0] + total[1]) + (total[2] + total[3])) * set1(1.f / static_cast<float>(width));
        const auto square = [&](int64_t x, int i) __attribute__((always_inline)) {
          const V distance = load(line + x * W) - shift - middle;
          apart[i] = fma(distance, distance, apart[i]);
        };
        int64_t x = 0;
        for (; x + 4 <= width; x += 4)
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) square(x + i, i);
        for (; x < width; ++x) square(x, 0);
        V mean = load(block.mean + v * W), squares = load(block.squares + v * W);
        join(mean, squares, (b * op.h + y) * width, middle, (apart[0] + apart[1]) + (apart[2] + apart[3]), width);
        store(block.mean + v * W, mean), store(block.squares + v * W, squares);
      } else if (op.affine2 == nullptr) {
        along([&](int64_t x, int, V value) __attribute__((always_inline)) { store(line + x * W, value); });
      } else {
        const V scale = load(block.scale2 + v * W), shift = load(block.shift2 + v * W);
        along([&](int64_t x, int, V value) __attribute__((always_inline)) {
          store(line + x * W, relu6(fma(scale, value, shift)));
        });
      }
    }
    put_line(block, op.rows, op.y2, row_of<T>(op.y2, b, y, block.c0), op.w);
  }
}

template <class T, class... Rest>
FUSEKERN_INLINE void forward(const BottleneckDepthwise& op, Rest&&... rest) {
  if (op.k == 3)
    (op.stride == 1 ? forward_rows<T, 3, 1> : forward_rows<T, 3, 2>)(op, rest...);
  else
    (op.stride == 1 ? forward_rows<T, 5, 1> : forward_rows<T, 5, 2>)(op, rest...);
}

// Gradients of N pixels side by side, which see K x K gradients of the result, and of the taps. In place of y1 stands
// d.
template <int K, int N>
FUSEKERN_INLINE void filter_back(const float* const* rows, int64_t x, const V* wd, V* dwd, V scale, V shift, V mean,
                                 V* sums, float* line) {
  V d[N], a[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) a[i] = relu6(fma(scale, load(line + (x + i) * W), shift)), d[i] = zero();
#pragma GCC unroll 8
  for (int i = 0; i < K; ++i)
#pragma GCC unroll 8
    for (int o = 0; o < N - 1 + K; ++o) {
      const V value = load(rows[i] + (x + o) * W);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j)
        if (o - j >= 0 && o - j < K) {
          const int tap = K * K - 1 - (i * K + o - j);
          d[j] = fma(wd[tap], value, d[j]);
          dwd[tap] = fma(a[j], value, dwd[tap]);
        }
    }
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    const V y = load(line + (x + i) * W);
    d[i] = masked(d[i], fma(scale, y, shift));
    sums[0] = sums[0] + d[i];
    sums[1] = fma(d[i], y - mean, sums[1]);
    store(line + (x + i) * W, d[i]);
  }
}

// The same for one pixel of any stride; only what lies in the map counts, even if it is not a number.
FUSEKERN_INLINE void filter_back_exactly(const BottleneckDepthwise& op, const Block& block, int64_t y, int64_t v,
                                         int64_t x, const float* ring, const V* wd, V* dwd, V scale, V shift, V mean,
                                         V* sums, float* line) {
  const int64_t K = op.k, S = op.stride;
  const V at = load(line + x * W), normal = fma(scale, at, shift), a = relu6(normal);
  V d = zero();
  for (int64_t i = K - 1; i >= 0; --i) {
    const int64_t down = y + block.pad - i;
    if (down < 0 || down % S != 0 || down / S >= op.h) continue;
    for (int64_t j = K - 1; j >= 0; --j) {
      const int64_t right = x + block.pad - j;
      if (right < 0 || right % S != 0 || right / S >= op.w) continue;
      const V value = load(ring + down / S % K * block.ring_row() + v * block.wide + (right / S + block.pad) * W);
      d = fma(wd[i * K + j], value, d);
      dwd[i * K + j] = fma(a, value, dwd[i * K + j]);
    }
  }
  d = masked(d, normal);
  sums[0] = sums[0] + d;
  sums[1] = fma(d, at - mean, sums[1]);
  store(line + x * W, d);
}

template <class T, int K, bool EXACT>
static void backward_image(const BottleneckDepthwise& op, const Block& block, int64_t b, float* ring) {
  const int64_t pad = block.pad, size = block.n * W;
  for (int64_t i = 0; i < K * block.ring_row(); i += W) store(ring + i, zero());
  int64_t staged = 0;
  for (int64_t y = 0; y < op.H; ++y) {
    for (; staged < least(op.h, (y + pad) / op.stride + 1); ++staged) {
      float* const to = ring + staged % K * block.ring_row();
      const T* const from[2] = {row_of<const T>(op.dz, b, staged, block.c0),
                                row_of<const T>(op.y2, b, staged, block.c0)};
      each_in(block, op.rows, op.y2, from, op.w, [&](int64_t v) {
        const auto at = [&](const float* vector) { return load(vector + v * W); };
        const V p = at(block.p), q = at(block.q), r = at(block.r), mean = at(block.mean2);
        float* const row = to + v * block.wide + pad * W;
        return [=](int64_t x, const V* values) {
          store(row + x * W, through_norm(p, q, r, mean, values[0], values[1]));
        };
      });
    }
    const T* const from[1] = {row_of<const T>(op.y1, b, y, block.c0)};
    each_in(block, op.rows, op.y1, from, op.W, [&](int64_t v) {
      float* const line = block.line + v * op.W * W;
      return [=](int64_t x, const V* values) { store(line + x * W, values[0]); };
    });
    for (int64_t v = 0; v < block.n; ++v) {
      V wd[K * K], dwd[K * K], sums[2] = {zero(), zero()};
#pragma GCC unroll 25
      for (int t = 0; t < K * K; ++t) wd[t] = load(block.wd + t * size + v * W), dwd[t] = zero();
      const V scale = load(block.scale1 + v * W), shift = load(block.shift1 + v * W), mean = load(block.mean1 + v * W);
      float* const line = block.line + v * op.W * W;
      if constexpr (EXACT) {
        for (int64_t x = 0; x < op.W; ++x)
          filter_back_exactly(op, block, y, v, x, ring, wd, dwd, scale, shift, mean, sums, line);
      } else {
        const float* rows[K];
        for (int i = 0; i < K; ++i) {
          const int64_t at = y + i - pad;
          rows[i] = at < 0 || at >= op.h ? block.zeros : ring + at % K * block.ring_row() + v * block.wide;
        }
        // While this is at work, the next rows may come, and the lines that it goes into.
        const auto group = [&](const Map& map, int64_t row) {
          return row_of<const T>(map, b, row, block.c0) + v * W * map.channel;
        };
        const T* const next[] = {group(op.dz, staged), group(op.y2, staged), group(op.y1, y + 1), group(op.d, y)};
        int64_t x = 0;
        for (; x + 2 <= op.W; x += 2) {
          if (op.rows)
            for (const T* from : next) prefetch(from + x * op.y1.column), prefetch(from + (x + 1) * op.y1.column);
          filter_back<K, 2>(rows, x, wd, dwd, scale, shift, mean, sums, line);
        }
        if (x < op.W) filter_back<K, 1>(rows, x, wd, dwd, scale, shift, mean, sums, line);
      }
#pragma GCC unroll 25
      for (int t = 0; t < K * K; ++t) {
        float* const to = block.dwd + t * size + v * W;
        store(to, load(to) + dwd[t]);
      }
      store(block.mean + v * W, load(block.mean + v * W) + sums[0]);
      store(block.squares + v * W, load(block.squares + v * W) + sums[1]);
    }
    put_line(block, op.rows, op.d, row_of<T>(op.d, b, y, block.c0), op.W);
  }
}

template <class T>
static void backward(const BottleneckDepthwise& op, int64_t item, float* ring, float* scratch) {
  Block block;
  block.lay_out(op, item, scratch);
  const int64_t size = block.n * W, taps = op.k * op.k;
  const auto run = [&](auto* image) {
    block.fill<T>(op);
    for (int64_t b = 0; b < op.B; ++b) image(op, block, b, ring);
  };
  const auto fast = op.k == 3 ? &backward_image<T, 3, false> : &backward_image<T, 5, false>;
  const auto exact = op.k == 3 ? &backward_image<T, 3, true> : &backward_image<T, 5, true>;
  run(op.stride == 1 ? fast : exact);
  if (op.stride == 1) {
    // The zeros around the map times what is not finite would have spread.
    V spoilt = zero();
    for (int64_t i = 0; i < taps * size; i += W) spoilt = fma(load(block.dwd + i), zero(), spoilt);
    if (sum(spoilt) != 0.f) run(exact);
  }
  block.each_tap(static_cast<T*>(op.dwd), [&](T* to, int64_t t, Lanes some_taps, int64_t v, int64_t some) {
    V tile[W];
    for (int64_t i = 0; i < W; ++i) tile[i] = t + i < taps ? load(block.dwd + (t + i) * size + v * W) : zero();
    transpose(tile);
    for (int64_t c = 0; c < some; ++c) store(to + c * taps, tile[c], some_taps);
  });
  if (op.sums1 == nullptr) return;
  for (int64_t c = 0; c < block.channels; ++c)
    op.sums1[block.c0 + c] = block.mean[c], op.sums1[op.pitch + block.c0 + c] = block.squares[c];
}

template <class T>
static void forward_all(const BottleneckDepthwise& op, int64_t item, float* ring, float* scratch) {
  Block block;
  block.lay_out(op, item, scratch);
  block.fill<T>(op);
  for (int64_t b = 0; b < op.B; ++b) forward<T>(op, block, b, 0, 0, op.h, ring, op.stats2 != nullptr);
  if (op.stats2 == nullptr) return;
  for (int64_t c = 0; c < block.channels; ++c)
    op.stats2[block.c0 + c] = block.shift[c] + block.mean[c], op.stats2[op.pitch + block.c0 + c] = block.squares[c];
}

}  // namespace bottleneck

void bottleneck_depthwise_plan(BottleneckDepthwise& op) {
  bottleneck::Block block;
  op.scratch_floats = block.lay_out(op, 0, nullptr);
  op.ring_floats = op.k * block.ring_row();
}

void bottleneck_depthwise_rows(const BottleneckDepthwise& op, int64_t staged, int64_t begin, int64_t end, float* rings,
                               float* scratch) {
  with_type(op.bf16, [&]<class T>(T) {
    for (int64_t item = 0; item * op.block < op.channels; ++item) {
      bottleneck::Block block;
      block.lay_out(op, item, scratch);
      block.fill<T>(op);
      bottleneck::forward<T>(op, block, 0, staged, begin, end, rings + item * op.ring_floats, false);
    }
  });
}

void bottleneck_depthwise_fwd(const BottleneckDepthwise& op, int64_t begin, int64_t end, float* scratch) {
  with_type(op.bf16, [&]<class T>(T) {
    for (int64_t item = begin; item < end; ++item)
      bottleneck::forward_all<T>(op, item, scratch + op.scratch_floats, scratch);
  });
}

void bottleneck_depthwise_bwd(const BottleneckDepthwise& op, int64_t begin, int64_t end, float* scratch) {
  with_type(op.bf16, [&]<class T>(T) {
    for (int64_t item = begin; item < end; ++item)
      bottleneck::backward<T>(op, item, scratch + op.scratch_floats, scratch);
  });
}

}  // namespace fusekern::FUSEKERN_ISA
