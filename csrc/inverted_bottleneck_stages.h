// What the stages of inverted_bottleneck on a CPU share: layouts, tiles, products of matrices, passes over tiles.
//
// A tile holds some pixels and some of the E channels. Sums over E or over pixels go through one tile after the other
// in a fixed order, whoever computes them; in bf16, which would be rounded each time, one product takes them all.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <optional>
#include <vector>

#include "arguments.h"
#include "inverted_bottleneck.h"
#include "matrix_product.h"

namespace fusekern::stages {

constexpr int64_t TILE_PIXELS = 512, TILE_FLOATS = 128 * 1024;  // half of an L2 cache

// ---- layouts -------------------------------------------------------------------------------------------------------

// All that is dense lies either channels_last, a matrix of N pixels, or as images, B matrices with a channel a row.
struct Layout {
  bool rows, bf16;
  int64_t B, HW;
  ScalarType dtype;
  torch::stable::Device device;

  int64_t N() const { return B * HW; }
  int64_t bytes() const { return bf16 ? 2 : 4; }
};

inline bool is_dense(const Tensor& t, bool rows) {
  const int64_t C = t.size(1), H = t.size(2), W = t.size(3);
  const int64_t strides[] = {C * H * W, rows ? 1 : H * W, rows ? W * C : W, rows ? C : 1};
  for (int i = 0; i < 4; ++i)
    if (t.size(i) > 1 && t.stride(i) != strides[i]) return false;
  return true;
}

// The layout that all of `tensors`, of the same batch and pixels or not, have in common.
inline bool lie_in_rows(std::initializer_list<const Tensor*> tensors) {
  for (const bool rows : {true, false})
    if (std::all_of(tensors.begin(), tensors.end(), [&](const Tensor* t) { return is_dense(*t, rows); })) return rows;
  STD_TORCH_CHECK(false, "all but x and g must be dense, either channels_last or contiguous");
}

inline Layout layout_of(const Tensor& t, bool rows) {
  return {rows, is_bf16(t), t.size(0), t.size(2) * t.size(3), t.scalar_type(), t.device()};
}

// Some pixels, which in images lie within one of them.
struct Chunk {
  int64_t b, first, count;  // of an image; in rows b is 0 and pixels are those of all images
  int64_t before;           // pixels of all images ahead of these
};

inline std::vector<Chunk> chunks_of(const Layout& layout, int64_t most) {
  std::vector<Chunk> chunks;
  const int64_t images = layout.rows ? 1 : layout.B, pixels = layout.rows ? layout.N() : layout.HW;
  const int64_t count = parts(pixels, most), size = parts(pixels, count);
  for (int64_t b = 0; b < images; ++b)
    for (int64_t first = 0; first < pixels; first += size)
      chunks.push_back({b, first, std::min(size, pixels - first), b * pixels + first});
  return chunks;
}

// A dense tensor of C channels, or a tile of one, whose lines are `gap` numbers apart.
struct Dense {
  void* data;
  int64_t C;
  Layout layout;
  int64_t gap = 0;

  int64_t pixel() const { return layout.rows ? C + gap : 1; }  // strides
  int64_t channel() const { return layout.rows ? 1 : layout.HW + gap; }
  void* at(const Chunk& chunk, int64_t c) const {
    const int64_t n = chunk.b * C * layout.HW + chunk.first * pixel() + c * channel();
    return static_cast<char*>(data) + n * layout.bytes();
  }
  Pixels pixels(const Chunk& chunk, int64_t c) const { return {at(chunk, c), 0, 0, 0, 0, 0, pixel(), channel()}; }
  Beside lines(const Chunk& chunk, int64_t c, int64_t channels) const {  // of fp32
    const float* const data = static_cast<const float*>(at(chunk, c));
    if (layout.rows) return {data, chunk.count, pixel(), parts(channels, 16)};
    return {data, channels, channel(), parts(chunk.count, 16)};
  }
  Tensor matrix(const Chunk& chunk, int64_t c, int64_t channels) const {  // [pixels, channels]
    const int64_t shape[] = {chunk.count, channels}, strides[] = {pixel(), channel()};
    return torch::stable::from_blob(at(chunk, c), {shape, 2}, {strides, 2}, layout.device, layout.dtype);
  }
};

inline Dense dense(const Tensor& t, const Layout& layout) { return {t.data_ptr(), t.size(1), layout}; }

inline int64_t floats(const Layout& layout, int64_t numbers) { return (numbers * layout.bytes() + 3) / 4; }

// A tile of all pixels of a chunk in memory of its own: one image, however many there are. Lines a power of two apart
// would share their places in the cache.
constexpr int64_t GAP = 16;

inline Dense tile_of(float* memory, const Layout& layout, int64_t pixels, int64_t channels) {
  Layout own = layout;
  own.B = 1, own.HW = pixels;
  return {memory, channels, own, GAP};
}

inline int64_t tile_floats(const Layout& layout, int64_t pixels, int64_t channels) {
  return floats(layout, (pixels + GAP) * (channels + GAP));
}

inline Chunk all_of(int64_t pixels) { return {0, 0, pixels, 0}; }

// The pixels of a chunk of a map with any strides.
inline Pixels pixels_of(const Tensor& t, const Layout& layout, const Chunk& chunk, int64_t c0) {
  const Map map = map_of(t);
  const int64_t n = (layout.rows ? 0 : chunk.b * map.batch) + c0 * map.channel;
  char* const data = static_cast<char*>(map.data) + n * layout.bytes();
  return {data, chunk.first, t.size(2), t.size(3), map.batch, map.row, map.column, map.channel};
}

// x as it is, if its pixels are rows or columns of matrices, else a copy in this layout.
struct Image {
  Image(const Tensor& x, const Layout& layout, bool joined) : C(x.size(1)), layout(layout) {
    const Map map = map_of(x);
    const int64_t B = x.size(0), H = x.size(2), W = x.size(3);
    pixel = W > 1 ? map.column : H > 1 ? map.row : layout.rows && B > 1 ? map.batch : map.channel == 1 ? C : 1;
    channel = C > 1 ? map.channel : pixel == 1 ? layout.N() : 1;
    batch = map.batch;
    const bool one_row = W == 1 || H == 1 || map.row == W * pixel;
    const bool one_matrix = B == 1 || (H == 1 && W == 1) || map.batch == H * W * pixel;
    const bool flat = (channel == 1 && pixel >= C) || (pixel == 1 && channel >= layout.HW);
    if (one_row && flat && ((!layout.rows && !joined) || one_matrix)) {
      data = static_cast<char*>(map.data);
      return;
    }
    copy.emplace(floats(layout, x.numel()));
    data = reinterpret_cast<char*>(copy->data);
    // Images that are joined lie channel by channel: [C, B, H, W].
    pixel = layout.rows ? C : 1, channel = layout.rows ? 1 : joined ? layout.N() : layout.HW;
    batch = layout.rows || joined ? layout.HW * pixel : C * layout.HW;
    const int64_t shape[] = {B, C, H, W}, strides[] = {batch, channel, W * pixel, pixel};
    Tensor to = torch::stable::from_blob(data, {shape, 4}, {strides, 4}, layout.device, layout.dtype);
    torch::stable::copy_(to, x);
  }

  Tensor matrix(const Chunk& chunk) const {  // [pixels, C]
    const int64_t shape[] = {chunk.count, C}, strides[] = {pixel, channel};
    char* const at = data + (chunk.b * batch + chunk.first * pixel) * layout.bytes();
    return torch::stable::from_blob(at, {shape, 2}, {strides, 2}, layout.device, layout.dtype);
  }

  int64_t C;
  Layout layout;
  int64_t pixel, channel, batch;
  char* data;
  std::optional<Scratch> copy;
};

// A weight [rows, columns], contiguous: some of its rows and columns, or the other way round.
inline Tensor block(const Tensor& weight, int64_t row, int64_t rows, int64_t column, int64_t columns,
                    bool turned = false) {
  const int64_t ld = weight.size(1), size = weight.scalar_type() == ScalarType::Float ? 4 : 2;
  const int64_t shape[] = {turned ? columns : rows, turned ? rows : columns},
                strides[] = {turned ? 1 : ld, turned ? ld : 1};
  char* const at = static_cast<char*>(weight.data_ptr()) + (row * ld + column) * size;
  return torch::stable::from_blob(at, {shape, 2}, {strides, 2}, weight.device(), weight.scalar_type());
}

inline Tensor turned(const Tensor& matrix) {
  const int64_t shape[] = {matrix.size(1), matrix.size(0)}, strides[] = {matrix.stride(1), matrix.stride(0)};
  return torch::stable::from_blob(matrix.data_ptr(), {shape, 2}, {strides, 2}, matrix.device(), matrix.scalar_type());
}

// ---- work ----------------------------------------------------------------------------------------------------------

// A bit for each number of a tile of rows: it is not zero.
struct Kept {
  Kept(int64_t pixels, int64_t channels) : row(parts(channels, 32) * 4), bits(pixels * row) {}

  int64_t row;  // bytes
  std::vector<uint8_t> bits;
  int64_t count = -1;  // how many, if it is known
};

// The product by passing over zeros of the left matrix, where it pays: as measured, with as few columns as a panel holds
// it does not.
inline bool sparse_product_if_worth(MatrixProduct& p) {
  if (p.a_term != 1 || p.columns < 64) return false;
  const Scratch kept(2 * FUSEKERN_PICK(sparse_product_words)(p));
  uint64_t* const words = reinterpret_cast<uint64_t*>(kept.data);
  if (static_cast<double>(FUSEKERN_PICK(find_not_zero)(p, words)) >= 0.7 * p.rows * p.terms) return false;
  p.kept = words;
  const Scratch memory(FUSEKERN_PICK(sparse_product_floats)(p));
  FUSEKERN_PICK(sparse_product)(p, memory.data);
  return true;
}

// Where it pays to compute alone what is kept. With AVX2 half the registers hold half as much.
inline bool worth_masking(const MatrixProduct& p, const Kept& kept) {
  if (p.a_term != 1 || p.terms < 96 || kept.count < 0) return false;
  return static_cast<double>(kept.count) < (cpu_isa() == Isa::avx512 ? 0.6 : 0.35) * p.rows * p.columns;
}

// What is known of a product beside its matrices.
struct Hints {
  Beside beside{};                 // to be fetched meanwhile
  bool activated = false;          // zeros are looked for in the left matrix
  const Kept* kept = nullptr;      // of what is not kept of the result anything may come out
  const Tensor* addend = nullptr;  // what is added to, if not what the result holds; in its layout
};

// to = a b, or to += a b. In fp32 the body's product, which torch's does not reach, where the CPU has FMA.
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& to, bool add, const Hints& hints = {}) {
  const bool own = to.scalar_type() == ScalarType::Float && cpu_isa() != Isa::baseline;
  const auto can = [](const Tensor& b, int columns) { return b.stride(columns) == 1 || b.stride(1 - columns) == 1; };
  MatrixProduct p{};
  p.c = static_cast<float*>(to.data_ptr()), p.terms = a.size(1), p.add = add, p.beside = hints.beside;
  const auto run = [&](const Tensor& a, const Tensor& b, int rows, int columns) {
    p.rows = to.size(rows), p.columns = to.size(columns);
    p.a = static_cast<const float*>(a.data_ptr()), p.b = static_cast<const float*>(b.data_ptr());
    p.a_row = a.stride(rows), p.a_term = a.stride(columns), p.b_term = b.stride(rows), p.b_column = b.stride(columns);
    p.c_row = to.stride(rows);
    if (add && hints.addend != nullptr)
      p.addend = static_cast<const float*>(hints.addend->data_ptr()), p.addend_row = hints.addend->stride(rows);
    if (rows == 0 && hints.activated && sparse_product_if_worth(p)) return;
    if (rows == 0 && hints.kept != nullptr && worth_masking(p, *hints.kept)) {
      p.wanted = hints.kept->bits.data(), p.wanted_row = hints.kept->row;
      const Scratch memory(FUSEKERN_PICK(masked_product_floats)());
      return FUSEKERN_PICK(masked_product)(p, memory.data);
    }
    const Scratch packed(FUSEKERN_PICK(matrix_product_floats)(p));
    FUSEKERN_PICK(matrix_product)(p, packed.data);
  };
  if (own && to.stride(1) == 1 && can(b, 1)) return run(a, b, 0, 1);
  if (own && to.stride(0) == 1 && can(a, 0)) return run(b, a, 1, 0);  // transposed
  const Tensor& before = hints.addend != nullptr ? *hints.addend : to;
  TORCH_ERROR_CODE_CHECK(add ? aoti_torch_cpu_addmm_out(to.get(), before.get(), a.get(), b.get(), 1., 1.)
                             : aoti_torch_cpu_mm_out(to.get(), a.get(), b.get()));
}

// f(item) for each; with more than one thread all within the pool, where torch's products use no further threads:
// their result must not depend on how many there are.
template <class F>
inline void for_each(int64_t items, const F& f) {
  torch::stable::parallel_for(0, std::max<int64_t>(items, 2), 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < std::min(end, items); ++item) f(item);
  });
}

// The E channels in blocks, at least two of them.
struct Channels {
  Channels(int64_t E, int64_t most) : E(E) {
    const int64_t count = std::max<int64_t>(E > 32 ? 2 : 1, parts(E, most));
    size = parts(parts(E, count), 16) * 16;
  }
  int64_t count() const { return parts(E, size); }
  int64_t first(int64_t item) const { return item * size; }
  int64_t channels(int64_t item) const { return std::min(size, E - item * size); }

  int64_t E, size;
};

// Blocks such that a tile with these pixels fits into the cache.
inline Channels tiles(int64_t E, int64_t pixels) {
  return {E, std::max<int64_t>(64, std::min<int64_t>(512, TILE_FLOATS / pixels))};
}

inline BottleneckPass pass_over(const Layout& layout, int64_t pixels, int64_t channels) {
  BottleneckPass pass{};
  pass.bf16 = layout.bf16, pass.rows = layout.rows, pass.pixels = pixels, pass.channels = channels;
  return pass;
}

// The vectors of an affine [2, c] or a coef [4, c] from channel c0 on.
inline void give(BottleneckPass& pass, const Tensor& vectors, int64_t c0) {
  for (int64_t i = 0; i < vectors.size(0); ++i)
    pass.vectors[i] = static_cast<const float*>(vectors.data_ptr()) + i * vectors.size(1) + c0;
}

// out = relu6(affine y)
inline void activate(const Dense& y, const Chunk& from, int64_t c0, const Tensor& affine, const Dense& out,
                     const Chunk& to) {
  BottleneckPass pass = pass_over(out.layout, from.count, out.C);
  pass.a = y.pixels(from, c0), pass.out = out.pixels(to, 0);
  give(pass, affine, c0);
  FUSEKERN_PICK(bottleneck_activate)(pass);
}

inline void clear(float* floats, int64_t count) { std::fill(floats, floats + count, 0.f); }

inline void check_vectors(const char* name, const Tensor& t, int64_t vectors, int64_t channels) {
  if (vectors == 1)
    check(name, t, {channels}, ScalarType::Float);
  else
    check(name, t, {vectors, channels}, ScalarType::Float);
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

inline void check_weight(const char* name, const Tensor& t, std::initializer_list<int64_t> shape, ScalarType dtype) {
  check(name, t, shape, dtype);
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

inline void check_map(const char* name, const Tensor& t, const Tensor& like, int64_t channels) {
  STD_TORCH_CHECK(like.dim() == 4, "maps must be [B, C, H, W]");
  check(name, t, {like.size(0), channels, like.size(2), like.size(3)}, like.scalar_type());
}

inline BottleneckDepthwise depthwise(const Tensor& y1, const Tensor& y2, const Tensor& wd, int64_t stride, bool rows) {
  const int64_t E = y1.size(1), k = wd.dim() == 3 ? wd.size(1) : 0;
  STD_TORCH_CHECK((k == 3 || k == 5) && (stride == 1 || stride == 2), "the kernel must be 3 or 5, the stride 1 or 2");
  check_weight("wd", wd, {E, k, k}, y1.scalar_type());
  STD_TORCH_CHECK(y1.dim() == 4 && y1.numel() > 0, "y1 must be [B, E, H, W] and not empty");
  const int64_t h = (y1.size(2) - 1) / stride + 1, w = (y1.size(3) - 1) / stride + 1;
  check("y2", y2, {y1.size(0), E, h, w}, y1.scalar_type());
  BottleneckDepthwise op{};
  op.bf16 = is_bf16(y1), op.rows = rows;
  op.B = y1.size(0), op.channels = E, op.H = y1.size(2), op.W = y1.size(3), op.h = h, op.w = w, op.k = k,
  op.stride = stride;
  op.wd = wd.data_ptr(), op.pitch = E;
  op.y1 = map_of(y1), op.y2 = map_of(y2);
  // Sizes of 1 may have any stride.
  if (rows) op.y1.channel = op.y2.channel = 1;
  // As many channels as rows for them fit into the cache; in images a vector's, whose rows are read whole.
  op.block =
      rows ? Channels(E, std::clamp<int64_t>(TILE_FLOATS / 2 / (k * (op.W + 2 * (k / 2))) / 16 * 16, 16, 512)).size
           : std::min<int64_t>(E, 16);
  return op;
}

template <class F>
inline void run(BottleneckDepthwise& op, const F& f) {
  FUSEKERN_PICK(bottleneck_depthwise_plan)(op);
  for_each(parts(op.channels, op.block), [&](int64_t item) {
    const Scratch scratch(op.scratch_floats + op.ring_floats);
    f(op, item, item + 1, scratch.data);
  });
}

// out = affine y (+ x), of some channels; of all, scale and shift lie `pitch` apart.
inline void finish(const Dense& y, const Chunk& from, int64_t c0, int64_t channels, const float* affine, int64_t pitch,
                   const Tensor* x, const Dense& out, const Chunk& to) {
  BottleneckPass pass = pass_over(y.layout, from.count, channels);
  pass.a = y.pixels(from, c0), pass.out = out.pixels(to, c0);
  if (x != nullptr) pass.b = pixels_of(*x, out.layout, to, c0);
  pass.vectors[0] = affine + c0, pass.vectors[1] = affine + pitch + c0;
  FUSEKERN_PICK(bottleneck_affine)(pass);
}

// Of a norm, if they are there.
using Vector = std::optional<Tensor>;

inline int64_t count_of(const Tensor& t) { return t.size(0) * t.size(2) * t.size(3); }  // pixels

}  // namespace fusekern::stages
