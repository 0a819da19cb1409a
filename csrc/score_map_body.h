// Inner products of pixels and text tokens, forward:
//
//     s[p][k] = rx[p] rt[k] (x[p] . t[k]),    rx = 1 / |x|, rt = 1 / |t|, or both 1
//
// and backward, with y = rx x and u = rt t, from g, the gradient of s, and e, that of the image beside it:
//
//     d[p] = sum over k of g[p][k] u[k]          dx = rx (d - y (y . d)) + e
//     f[k] = sum over p of g[p][k] y[p]          dt = rt (f - u (u . f))
//
// Pixels are taken in tiles of P. A tile is brought into fp32 in the order of the output: as rows [P][channels] where
// channels lie side by side, as columns [channels][P] where pixels do. Vectors run along the inner dimension.
#pragma once

#include "score_map.h"
#include "simd.h"

namespace fusekern::FUSEKERN_ISA {

namespace score {

constexpr int P = 6 * W;         // pixels of a tile
constexpr int LDP = P + W;       // from column to column; an odd number of cache lines spreads them over the cache
constexpr float FLOOR = 1e-12f;  // shorter vectors count as zero

FUSEKERN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FUSEKERN_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
FUSEKERN_INLINE int64_t whole(int64_t count) { return (count + W - 1) / W * W; }
FUSEKERN_INLINE int64_t pitch(int64_t count) { return whole(count) + W; }  // from row to row

// ---- products ----------------------------------------------------------------------------------------------------

// c[m][n] (+)= sum over i < count of a[m a_row + i a_step] b[i ldb + n], for M rows and N vectors.
template <int M, int N>
static void product(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t ldb, float* c, int64_t ldc,
                    int64_t count, bool add) {
  V sums[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) sums[m][n] = zero();
  for (int64_t i = 0; i < count; ++i, a += a_step, b += ldb) {
    V row[N];
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) row[n] = load(b + n * W);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const V factor = set1(a[m * a_row]);
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n) sums[m][n] = fma(factor, row[n], sums[m][n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) {
      float* to = c + m * ldc + n * W;
      store(to, add ? load(to) + sums[m][n] : sums[m][n]);
    }
}

// The rows whose sums, with N vectors each, fill the registers.
constexpr int tallest(int n) { return W == 16 ? (n == 3 ? 8 : n == 2 ? 12 : 16) : (n == 3 ? 4 : n == 2 ? 6 : 8); }

template <int M, int N, class... Rest>
FUSEKERN_INLINE void product_of(int rows, Rest... rest) {
  if constexpr (M > 1)
    if (rows < M) return product_of<M - 1, N>(rows, rest...);
  product<M, N>(rest...);
}

template <int N>
static void panel(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t ldb, float* c, int64_t ldc,
                  int64_t rows, int64_t count, bool add) {
  // Even parts: in a short one each sum would wait for itself.
  for (int64_t parts = (rows + tallest(N) - 1) / tallest(N); parts > 0; --parts) {
    const int part = static_cast<int>((rows + parts - 1) / parts);
    product_of<tallest(N), N>(part, a, a_row, a_step, b, ldb, c, ldc, count, add);
    a += part * a_row, c += part * ldc, rows -= part;
  }
}

// Terms that are summed in a row: longer sums would round worse, and the rows of b leave the nearest cache.
constexpr int64_t TERMS = 64;

// c [rows][columns] (+)= a [rows][count], of any strides, times b [count][columns]; b and c have whole vectors.
static void multiply(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t ldb, float* c, int64_t ldc,
                     int64_t rows, int64_t columns, int64_t count, bool add) {
  for (int64_t blocks = (count + TERMS - 1) / TERMS; blocks > 0; --blocks, add = true) {
    const int64_t terms = (count + blocks - 1) / blocks;
    int64_t done = 0;
    for (int64_t parts = (whole(columns) / W + 2) / 3; parts > 0; --parts) {
      const int64_t part = (whole(columns) / W - done + parts - 1) / parts;
      const auto product = part == 3 ? panel<3> : part == 2 ? panel<2> : panel<1>;
      product(a, a_row, a_step, b + done * W, ldb, c + done * W, ldc, rows, terms, add);
      done += part;
    }
    a += terms * a_step, b += terms * ldb, count -= terms;
  }
}

// ---- loading and storing -----------------------------------------------------------------------------------------

// Channels of some pixels: data[pixel[i] + c channel]. Tokens [K, C] are read as pixels are.
template <class T>
struct View {
  const T* data;
  int64_t channel;  // stride
  const int64_t* pixel;
  bool run;  // the pixels lie side by side

  View from_pixel(int64_t i) const { return {data, channel, pixel + i, run}; }
  View from_channel(int64_t c) const { return {data + c * channel, channel, pixel, run}; }
};

// to[i][j] = row(i)[j], with zeros up to a whole vector.
template <class Row>
FUSEKERN_INLINE void copy(Row row, int64_t rows, int64_t columns, float* to, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i) {
    int64_t j = 0;
    for (; j + W <= columns; j += W) store(to + i * ld + j, load(row(i) + j));
    if (j < columns) store(to + i * ld + j, load(row(i) + j, first(columns - j)));
  }
}

// to[i][j] = column(j)[i], with zeros up to a whole vector.
template <class Column>
FUSEKERN_INLINE void transpose_copy(Column column, int64_t rows, int64_t columns, float* to, int64_t ld) {
  for (int64_t i = 0; i < rows; i += W)
    for (int64_t j = 0; j < columns; j += W) {
      V block[W];
      for (int64_t k = 0; k < W; ++k) {
        if (j + k >= columns)
          block[k] = zero();
        else if (i + W <= rows)
          block[k] = load(column(j + k) + i);
        else
          block[k] = load(column(j + k) + i, first(rows - i));
      }
      transpose(block);
      for (int64_t k = 0; k < W && i + k < rows; ++k) store(to + (i + k) * ld + j, block[k]);
    }
}

// to[i][c], with zeros up to a whole vector.
template <class T>
static void load_rows(const View<T>& from, int64_t pixels, int64_t channels, float* to, int64_t ld) {
  const auto pixel = [&](int64_t i) { return from.data + from.pixel[i]; };
  const auto channel = [&](int64_t c) { return from.data + from.pixel[0] + c * from.channel; };
  if (from.channel == 1) return copy(pixel, pixels, channels, to, ld);
  if (from.run) return transpose_copy(channel, pixels, channels, to, ld);
  for (int64_t i = 0; i < pixels; ++i)
    for (int64_t c = 0; c < whole(channels); ++c)
      to[i * ld + c] = c < channels ? get(pixel(i) + c * from.channel) : 0.f;
}

// to[c][i], with zeros up to a whole vector.
template <class T>
static void load_columns(const View<T>& from, int64_t pixels, int64_t channels, float* to, int64_t ld) {
  const auto pixel = [&](int64_t i) { return from.data + from.pixel[i]; };
  const auto channel = [&](int64_t c) { return from.data + from.pixel[0] + c * from.channel; };
  if (from.run) return copy(channel, channels, pixels, to, ld);
  if (from.channel == 1) return transpose_copy(pixel, channels, pixels, to, ld);
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = 0; i < whole(pixels); ++i)
      to[c * ld + i] = i < pixels ? get(pixel(i) + c * from.channel) : 0.f;
}

// to[j] = value(j), a vector at a time.
template <class T, class Value>
FUSEKERN_INLINE void store_row(T* to, int64_t count, Value value) {
  int64_t j = 0;
  for (; j + W <= count; j += W) store(to + j, value(j));
  if (j < count) store(to + j, value(j), first(count - j));
}

// ---- lengths -----------------------------------------------------------------------------------------------------

FUSEKERN_INLINE float dot(const float* a, const float* b, int64_t count) {
  V total = zero();
  for (int64_t j = 0; j < count; j += W) total = fma(load(a + j), load(b + j), total);
  return sum(total);
}

// Squared lengths become inverse lengths; a vector that is `bent` is as long as it says, so that its direction matters.
static void invert(float* squares, float* bent, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float length = __builtin_sqrtf(squares[i]);
    bent[i] = length < FLOOR ? 0.f : 1.f;
    squares[i] = 1.f / (length < FLOOR ? FLOOR : length);
  }
}

// ---- one tile ----------------------------------------------------------------------------------------------------

// A thread's memory: pixels, their gradients, scores in either order, and W rows or columns in passing.
struct Memory {
  int64_t wide, narrow, few;  // floats
  float *x, *d, *s, *t, *passing;

  Memory(float* scratch, int64_t C, int64_t K)
      : wide(most(P * pitch(C), C * LDP)), narrow(most(P * pitch(K), K * LDP)), few(W * most(pitch(C), LDP)) {
    x = scratch, d = x + wide, s = d + wide, t = s + narrow, passing = t + narrow;
  }
  int64_t floats() const { return 2 * wide + 2 * narrow + few; }
};

// A tile of one image, what is read from it and where it goes.
template <class T>
struct Tile {
  int64_t n;  // pixels
  View<T> image, grad;
  T* to;
  int64_t at[3][P];  // of its pixels, in image, grad and `to`
  alignas(64) float rx[P], bent[P];
  const float* text;

  Tile(const ScoreMap& op, const Map& out, int64_t b, int64_t tile) : n(least(P, op.H * op.W - tile * P)) {
    image = view(op.image, op, b, tile, at[0]);
    if (op.grad.data != nullptr) grad = view(op.grad, op, b, tile, at[1]);
    to = const_cast<T*>(view(out, op, b, tile, at[2]).data);
    text = op.packed + b * op.text_floats;
    for (int i = 0; i < P; ++i) rx[i] = 1.f, bent[i] = 0.f;
  }

  View<T> view(const Map& map, const ScoreMap& op, int64_t b, int64_t tile, int64_t* pixel) {
    bool run = true;
    for (int64_t i = 0, y = tile * P / op.W, x = tile * P % op.W; i < n; ++i) {
      pixel[i] = y * map.row + x * map.column;
      run = run && pixel[i] == pixel[0] + i;
      if (++x == op.W) x = 0, ++y;
    }
    return {static_cast<const T*>(map.data) + b * map.batch, map.channel, pixel, run};
  }
};

// x[i][c] from the image, and rx; each(i, x[i]) sees every row while it is near.
template <class T, class Each>
FUSEKERN_INLINE void take_rows(const ScoreMap& op, Tile<T>& tile, float* x, Each each) {
  for (int64_t i = 0; i < tile.n; i += W) {
    const int64_t some = least(W, tile.n - i);
    load_rows(tile.image.from_pixel(i), some, op.C, x + i * pitch(op.C), pitch(op.C));
    for (int64_t j = i; j < i + some; ++j) {
      const float* row = x + j * pitch(op.C);
      if (op.normalize) tile.rx[j] = dot(row, row, op.C);
      each(j, row);
    }
  }
  if (op.normalize) invert(tile.rx, tile.bent, tile.n);
}

// x[c][i] from the image, and rx; each(c, x[c]) sees every column while it is near.
template <class T, class Each>
FUSEKERN_INLINE void take_columns(const ScoreMap& op, Tile<T>& tile, float* x, Each each) {
  V squares[P / W];
  for (V& square : squares) square = zero();
  for (int64_t c = 0; c < op.C; c += W) {
    const int64_t some = least(W, op.C - c);
    load_columns(tile.image.from_channel(c), tile.n, some, x + c * LDP, LDP);
    for (int64_t j = c; j < c + some; ++j) {
      const float* column = x + j * LDP;
      if (op.normalize)
        for (int64_t i = 0; i < tile.n; i += W)
          squares[i / W] = fma(load(column + i), load(column + i), squares[i / W]);
      each(j, column);
    }
  }
  if (!op.normalize) return;
  for (int64_t i = 0; i < P / W; ++i) store(tile.rx + i * W, squares[i]);
  invert(tile.rx, tile.bent, tile.n);
}

template <class T>
static void forward(const ScoreMap& op, int64_t b, int64_t index, float* scratch) {
  const int64_t C = op.C, K = op.K, above = op.concat ? C : 0;
  const Memory memory(scratch, C, K);
  Tile<T> tile(op, op.out, b, index);
  if (op.out.channel == 1) {
    take_rows(op, tile, memory.x, [&](int64_t i, const float* x) {
      if (op.concat) store_row(tile.to + tile.at[2][i], C, [&](int64_t c) { return load(x + c); });
    });
    multiply(memory.x, pitch(C), 1, tile.text, pitch(K), memory.s, pitch(K), tile.n, K, C, false);
    for (int64_t i = 0; i < tile.n; ++i) {
      const float* s = memory.s + i * pitch(K);
      store_row(tile.to + tile.at[2][i] + above, K, [&](int64_t k) { return set1(tile.rx[i]) * load(s + k); });
    }
  } else {
    T* to = tile.to + tile.at[2][0];
    take_columns(op, tile, memory.x, [&](int64_t c, const float* x) {
      if (op.concat) store_row(to + c * op.out.channel, tile.n, [&](int64_t i) { return load(x + i); });
    });
    multiply(tile.text, 1, pitch(K), memory.x, LDP, memory.s, LDP, K, tile.n, C, false);
    for (int64_t k = 0; k < K; ++k) {
      const float* s = memory.s + k * LDP;
      store_row(to + (above + k) * op.out.channel, tile.n, [&](int64_t i) { return load(tile.rx + i) * load(s + i); });
    }
  }
}

// The gradient of the texts goes into `partial`: [K][C] by rows, [C][K] by columns.
template <class T>
static void backward_rows(const ScoreMap& op, Tile<T>& tile, float* partial, bool add, const Memory& memory) {
  const int64_t C = op.C, K = op.K, ldc = pitch(C), ldk = pitch(K);
  take_rows(op, tile, memory.x, [](int64_t, const float*) {});
  load_rows(tile.grad.from_channel(op.concat ? C : 0), tile.n, K, memory.s, ldk);
  multiply(memory.s, ldk, 1, tile.text, ldc, memory.d, ldc, tile.n, C, K, false);
  for (int64_t i = 0; i < tile.n; ++i) {
    const float *x = memory.x + i * ldc, *d = memory.d + i * ldc, *e = memory.passing + i % W * ldc;
    if (op.concat && i % W == 0)
      load_rows(tile.grad.from_pixel(i), least(W, tile.n - i), C, memory.passing, ldc);
    const V r = set1(tile.rx[i]), along = set1(tile.bent[i] == 0.f ? 0.f : -tile.rx[i] * tile.rx[i] * dot(x, d, C));
    store_row(tile.to + tile.at[2][i], C, [&](int64_t c) {
      const V dx = r * fma(along, load(x + c), load(d + c));
      return op.concat ? dx + load(e + c) : dx;
    });
    for (int64_t k = 0; k < K; k += W) store(memory.s + i * ldk + k, r * load(memory.s + i * ldk + k));
  }
  multiply(memory.s, 1, ldk, memory.x, ldc, partial, ldc, K, C, tile.n, add);
}

template <class T>
static void backward_columns(const ScoreMap& op, Tile<T>& tile, float* partial, bool add, const Memory& memory) {
  const int64_t C = op.C, K = op.K, n = tile.n, ldk = pitch(K);
  take_columns(op, tile, memory.x, [](int64_t, const float*) {});
  load_columns(tile.grad.from_channel(op.concat ? C : 0), n, K, memory.s, LDP);
  multiply(tile.text, 1, pitch(C), memory.s, LDP, memory.d, LDP, C, n, K, false);
  V along[P / W];
  for (V& sum : along) sum = zero();
  for (int64_t c = 0; c < C; ++c)
    for (int64_t i = 0; i < n; i += W)
      along[i / W] = fma(load(memory.x + c * LDP + i), load(memory.d + c * LDP + i), along[i / W]);
  for (int64_t i = 0; i < n; i += W) {
    const V r = load(tile.rx + i);
    along[i / W] = load(tile.bent + i) == zero() ? zero() : zero() - r * r * along[i / W];
  }
  for (int64_t c = 0; c < C; ++c) {
    const float *x = memory.x + c * LDP, *d = memory.d + c * LDP, *e = memory.passing + c % W * LDP;
    if (op.concat && c % W == 0) load_columns(tile.grad.from_channel(c), n, least(W, C - c), memory.passing, LDP);
    store_row(tile.to + tile.at[2][0] + c * op.dimage.channel, n, [&](int64_t i) {
      const V dx = load(tile.rx + i) * fma(along[i / W], load(x + i), load(d + i));
      return op.concat ? dx + load(e + i) : dx;
    });
  }
  load_rows(tile.grad.from_channel(op.concat ? C : 0), n, K, memory.t, ldk);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < K; k += W)
      store(memory.t + i * ldk + k, set1(tile.rx[i]) * load(memory.t + i * ldk + k));
  multiply(memory.x, LDP, 1, memory.t, ldk, partial, ldk, C, K, n, add);
}

// A chunk of tiles; the gradient of the text adds up in one place.
template <class T>
static void backward(const ScoreMap& op, int64_t b, int64_t chunk, float* scratch) {
  const Memory memory(scratch, op.C, op.K);
  float* partial = op.partial + (b * op.chunks + chunk) * op.text_floats;
  const int64_t from = chunk * op.chunk_tiles;
  for (int64_t index = from; index < least(from + op.chunk_tiles, op.tiles); ++index) {
    Tile<T> tile(op, op.dimage, b, index);
    (op.dimage.channel == 1 ? backward_rows<T> : backward_columns<T>)(op, tile, partial, index > from, memory);
  }
}

// ---- texts -------------------------------------------------------------------------------------------------------

// The tokens k .. k + n - 1 of a text as rows of length 1, if so it is to be, and their inverse lengths.
template <class T>
static int64_t take_tokens(const ScoreMap& op, int64_t b, int64_t k, float* rows, float* rt, float* bent) {
  const int64_t n = least(W, op.K - k), ld = pitch(op.C);
  int64_t at[W];
  for (int64_t i = 0; i < n; ++i) at[i] = (k + i) * op.text.token;
  const T* text = static_cast<const T*>(op.text.data) + b * op.text.batch;
  const View<T> from = {text, op.text.channel, at, op.text.token == 1};
  load_rows(from, n, op.C, rows, ld);
  for (int64_t i = 0; i < n; ++i) rt[i] = 1.f, bent[i] = 0.f;
  if (!op.normalize) return n;
  for (int64_t i = 0; i < n; ++i) rt[i] = dot(rows + i * ld, rows + i * ld, op.C);
  invert(rt, bent, n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < op.C; c += W) store(rows + i * ld + c, set1(rt[i]) * load(rows + i * ld + c));
  return n;
}

// [C][K] for the forward, [K][C] for the backward.
template <class T>
static void pack(const ScoreMap& op, bool backward, int64_t b, float* scratch) {
  float rt[W], bent[W];
  int64_t at[W];
  for (int64_t i = 0; i < W; ++i) at[i] = i * pitch(op.C);
  for (int64_t k = 0; k < op.K; k += W) {
    float* packed = op.packed + b * op.text_floats;
    float* rows = backward ? packed + k * pitch(op.C) : scratch;
    const int64_t n = take_tokens<T>(op, b, k, rows, rt, bent);
    if (!backward) load_columns(View<float>{rows, 1, at, false}, n, op.C, packed + k, pitch(op.K));
  }
}

// The gradient of a text from its parts.
template <class T>
static void sum_parts(const ScoreMap& op, int64_t b, float* scratch) {
  const int64_t C = op.C, ld = pitch(C);
  float *u = scratch, *total = u + W * ld, *part = total + W * ld;
  float rt[W], bent[W];
  int64_t at[W];
  const bool rows = op.dimage.channel == 1;
  for (int64_t k = 0; k < op.K; k += W) {
    const int64_t n = take_tokens<T>(op, b, k, u, rt, bent);
    for (int64_t i = 0; i < n; ++i) at[i] = (k + i) * (rows ? ld : 1);
    for (int64_t chunk = 0; chunk < op.chunks; ++chunk) {
      const float* from = op.partial + (b * op.chunks + chunk) * op.text_floats;
      load_rows(View<float>{from, rows ? 1 : pitch(op.K), at, !rows}, n, C, chunk == 0 ? total : part, ld);
      for (int64_t j = 0; chunk > 0 && j < n * ld; j += W) store(total + j, load(total + j) + load(part + j));
    }
    for (int64_t i = 0; i < n; ++i) {
      const float *f = total + i * ld, *unit = u + i * ld;
      T* to = static_cast<T*>(op.dtext.data) + b * op.dtext.batch + (k + i) * op.dtext.token;
      const float along = bent[i] == 0.f ? 0.f : dot(unit, f, C);
      for (int64_t c = 0; c < C; ++c) put(to + c * op.dtext.channel, rt[i] * (f[c] - unit[c] * along));
    }
  }
}

}  // namespace score

void score_map_plan(ScoreMap& op) {
  using namespace score;
  op.tiles = (op.H * op.W + P - 1) / P;
  op.text_floats = most(op.K * pitch(op.C), op.C * pitch(op.K));
  op.scratch_floats = most(Memory(nullptr, op.C, op.K).floats(), 3 * W * pitch(op.C));
}

void score_map_pack(const ScoreMap& op, bool backward, int64_t begin, int64_t end, float* scratch) {
  for (int64_t b = begin; b < end; ++b) (op.bf16 ? score::pack<bf16> : score::pack<float>)(op, backward, b, scratch);
}

void score_map_fwd(const ScoreMap& op, int64_t begin, int64_t end, float* scratch) {
  const auto forward = op.bf16 ? score::forward<bf16> : score::forward<float>;
  for (int64_t item = begin; item < end; ++item) forward(op, item / op.tiles, item % op.tiles, scratch);
}

void score_map_bwd(const ScoreMap& op, int64_t begin, int64_t end, float* scratch) {
  const auto backward = op.bf16 ? score::backward<bf16> : score::backward<float>;
  for (int64_t item = begin; item < end; ++item) backward(op, item / op.chunks, item % op.chunks, scratch);
}

void score_map_sum(const ScoreMap& op, int64_t begin, int64_t end, float* scratch) {
  for (int64_t b = begin; b < end; ++b) (op.bf16 ? score::sum_parts<bf16> : score::sum_parts<float>)(op, b, scratch);
}

}  // namespace fusekern::FUSEKERN_ISA
