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
    const T* const from = static_cast<const T*>(op.wd) + c0 * k * k;
    for (int64_t c = 0; c < n * W; ++c)
      for (int64_t t = 0; t < k * k; ++t) wd[t * n * W + c] = c < channels ? get(from + c * k * k + t) : 0.f;
    for (int64_t c = 0; c < n * W; c += W) store(mean + c, zero()), store(squares + c, zero());
    for (int64_t c = 0; c < k * k * n * W; c += W) store(dwd + c, zero());
    for (int64_t i = 0; i < wide; i += W) store(zeros + i, zero());
  }

  int64_t ring_row() const { return n * wide; }
};

// f(group, pixel, vectors) for a row of `width` pixels of M maps alike, read from the data given.
template <class T, int M, class F>
FUSEKERN_INLINE void each_in(const Block& block, bool rows, const Map& map, const T* const (&data)[M], int64_t width,
                             F f) {
  V values[M];
  if (rows) {
    const Lanes lanes = first(block.channels - (block.n - 1) * W);
    for (int64_t x = 0; x < width; ++x) {
      const int64_t at = x * map.column;
      for (int64_t v = 0; v < block.n - 1; ++v) {
        for (int m = 0; m < M; ++m) values[m] = load(data[m] + at + v * W);
        f(v, x, values);
      }
      for (int m = 0; m < M; ++m) values[m] = load(data[m] + at + (block.n - 1) * W, lanes);
      f(block.n - 1, x, values);
    }
    return;
  }
  for (int64_t v = 0; v < block.n; ++v)
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
        f(v, x + i, values);
      }
    }
}

// The other way: a row of `width` pixels becomes f(group, pixel).
template <class T, class F>
FUSEKERN_INLINE void each_out(const Block& block, bool rows, const Map& map, T* data, int64_t width, F f) {
  if (rows) {
    const Lanes lanes = first(block.channels - (block.n - 1) * W);
    for (int64_t x = 0; x < width; ++x) {
      T* const to = data + x * map.column;
      for (int64_t v = 0; v < block.n - 1; ++v) store(to + v * W, f(v, x));
      store(to + (block.n - 1) * W, f(block.n - 1, x), lanes);
    }
    return;
  }
  for (int64_t v = 0; v < block.n; ++v)
    for (int64_t x = 0; x < width; x += W) {
      V tile[W];
      for (int64_t i = 0; i < W; ++i) tile[i] = x + i < width ? f(v, x + i) : zero();
      transpose(tile);
      for (int64_t c = 0; c < least(W, block.channels - v * W); ++c)
        store(data + (v * W + c) * map.channel + x * map.column, tile[c], first(width - x));
    }
}

template <class T>
FUSEKERN_INLINE T* row_of(const Map& map, int64_t b, int64_t y, int64_t c0) {
  return static_cast<T*>(map.data) + b * map.batch + y * map.row + c0 * map.channel;
}

// N pixels of the result side by side. A row lies [S][columns / S][W]: what a tap meets lies side by side too.
template <int K, int S, int N>
FUSEKERN_INLINE void filter(const float* const* rows, int64_t x, int64_t phase, const V* wd, float* to) {
  V sums[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) sums[i] = zero();
#pragma GCC unroll 8
  for (int i = 0; i < K; ++i)
#pragma GCC unroll 16
    for (int o = 0; o < (N - 1) * S + K; ++o) {
      const V value = load(rows[i] + o % S * phase + (x + o / S) * W);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j)
        if (o - j * S >= 0 && o - j * S < K) sums[j] = fma(wd[i * K + o - j * S], value, sums[j]);
    }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) store(to + (x + i) * W, sums[i]);
}

template <class T, int K, int S>
static void forward_rows(const BottleneckDepthwise& op, const Block& block, int64_t b, int64_t staged, int64_t begin,
                         int64_t end, float* ring, bool count) {
  const int64_t pad = K / 2, phase = block.wide / S, size = block.n * W;
  if (staged == 0)
    for (int64_t i = 0; i < K * block.ring_row(); i += W) store(ring + i, zero());
  for (int64_t y = begin; y < end; ++y) {
    for (; staged < least(op.H, y * S + K - pad); ++staged) {
      float* const to = ring + staged % K * block.ring_row();
      const T* const from[1] = {row_of<const T>(op.y1, b, staged, block.c0)};
      each_in(block, op.rows, op.y1, from, op.W, [&](int64_t v, int64_t x, const V* values) {
        const V activated = relu6(fma(load(block.scale1 + v * W), values[0], load(block.shift1 + v * W)));
        store(to + v * block.wide + (x + pad) % S * phase + (x + pad) / S * W, activated);
      });
    }
    for (int64_t v = 0; v < block.n; ++v) {
      const float* rows[K];
      V wd[K * K];
#pragma GCC unroll 25
      for (int t = 0; t < K * K; ++t) wd[t] = load(block.wd + t * size + v * W);
      for (int i = 0; i < K; ++i) {
        const int64_t from = y * S + i - pad;
        rows[i] = from < 0 || from >= op.H ? block.zeros : ring + from % K * block.ring_row() + v * block.wide;
      }
      float* const line = block.line + v * op.w * W;
      // While this is at work, the next row may come.
      const T* const next = row_of<const T>(op.y1, b, staged, block.c0) + v * W * op.y1.channel;
      const T* const into = row_of<const T>(op.y2, b, y, block.c0) + v * W * op.y2.channel;
      int64_t x = 0;
      for (; x + 4 <= op.w; x += 4) {
        if (op.rows)
          for (int64_t i = x * S; i < (x + 4) * S; ++i) prefetch(next + i * op.y1.column);
        if (op.rows)
          for (int64_t i = x; i < x + 4; ++i) prefetch(into + i * op.y2.column);
        filter<K, S, 4>(rows, x, phase, wd, line);
      }
      for (; x < op.w; ++x) filter<K, S, 1>(rows, x, phase, wd, line);
      if (count) {
        if (b == 0 && y == 0) store(block.shift + v * W, load(line));
        const V shift = load(block.shift + v * W);
        V total[4] = {zero(), zero(), zero(), zero()}, apart[4] = {zero(), zero(), zero(), zero()};
        for (x = 0; x < op.w; ++x) total[x % 4] = total[x % 4] + (load(line + x * W) - shift);
        const V middle = ((total[0] + total[1]) + (total[2] + total[3])) * set1(1.f / static_cast<float>(op.w));
        for (x = 0; x < op.w; ++x) {
          const V distance = load(line + x * W) - shift - middle;
          apart[x % 4] = fma(distance, distance, apart[x % 4]);
        }
        V mean = load(block.mean + v * W), squares = load(block.squares + v * W);
        join(mean, squares, (b * op.h + y) * op.w, middle, (apart[0] + apart[1]) + (apart[2] + apart[3]), op.w);
        store(block.mean + v * W, mean), store(block.squares + v * W, squares);
      }
    }
    T* const to = row_of<T>(op.y2, b, y, block.c0);
    const auto result = [&](int64_t v, int64_t x) { return load(block.line + (v * op.w + x) * W); };
    if (op.affine2 == nullptr)
      each_out(block, op.rows, op.y2, to, op.w, result);
    else
      each_out(block, op.rows, op.y2, to, op.w, [&](int64_t v, int64_t x) {
        return relu6(fma(load(block.scale2 + v * W), result(v, x), load(block.shift2 + v * W)));
      });
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
  V d[N], a[N], v[N], y[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
    y[i] = load(line + (x + i) * W);
    v[i] = fma(scale, y[i], shift);
    a[i] = relu6(v[i]), d[i] = zero();
  }
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
    d[i] = masked(d[i], v[i]);
    sums[0] = sums[0] + d[i];
    sums[1] = fma(d[i], y[i] - mean, sums[1]);
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
      each_in(block, op.rows, op.y2, from, op.w, [&](int64_t v, int64_t x, const V* values) {
        const auto at = [&](const float* vector) { return load(vector + v * W); };
        store(to + v * block.wide + (x + pad) * W,
              through_norm(at(block.p), at(block.q), at(block.r), at(block.mean2), values[0], values[1]));
      });
    }
    const T* const from[1] = {row_of<const T>(op.y1, b, y, block.c0)};
    each_in(block, op.rows, op.y1, from, op.W,
            [&](int64_t v, int64_t x, const V* values) { store(block.line + (v * op.W + x) * W, values[0]); });
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
    each_out(block, op.rows, op.d, row_of<T>(op.d, b, y, block.c0), op.W,
             [&](int64_t v, int64_t x) { return load(block.line + (v * op.W + x) * W); });
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
  T* const dwd = static_cast<T*>(op.dwd) + block.c0 * taps;
  for (int64_t c = 0; c < block.channels; ++c)
    for (int64_t t = 0; t < taps; ++t) put(dwd + c * taps + t, block.dwd[t * size + c]);
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

void bottleneck_depthwise_rows(const BottleneckDepthwise& op, int64_t item, int64_t staged, int64_t begin, int64_t end,
                               float* ring, float* scratch) {
  bottleneck::Block block;
  block.lay_out(op, item, scratch);
  if (op.bf16) {
    block.fill<bf16>(op);
    bottleneck::forward<bf16>(op, block, 0, staged, begin, end, ring, false);
  } else {
    block.fill<float>(op);
    bottleneck::forward<float>(op, block, 0, staged, begin, end, ring, false);
  }
}

void bottleneck_depthwise_fwd(const BottleneckDepthwise& op, int64_t begin, int64_t end, float* scratch) {
  for (int64_t item = begin; item < end; ++item)
    (op.bf16 ? bottleneck::forward_all<bf16> : bottleneck::forward_all<float>)(op, item, scratch + op.scratch_floats,
                                                                               scratch);
}

void bottleneck_depthwise_bwd(const BottleneckDepthwise& op, int64_t begin, int64_t end, float* scratch) {
  for (int64_t item = begin; item < end; ++item)
    (op.bf16 ? bottleneck::backward<bf16> : bottleneck::backward<float>)(op, item, scratch + op.scratch_floats,
                                                                         scratch);
}

}  // namespace fusekern::FUSEKERN_ISA
