// inverted_bottleneck in stages, which turn their statistics into what the norm behind them applies. Matrix products go
// tile by tile, so that what is read and written beside them is still in the cache; those in bf16 are torch's.
//
// A tile holds some pixels and some of the E channels. Sums over E or over pixels go through one tile after the other
// in a fixed order, whoever computes them; in bf16, which would be rounded each time, one product takes them all.
#include "inverted_bottleneck.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <optional>
#include <vector>

#include "arguments.h"
#include "batch_norm.h"
#include "matrix_product.h"

namespace fusekern {

namespace {

constexpr int64_t TILE_PIXELS = 512, TILE_FLOATS = 128 * 1024;  // half of an L2 cache

int64_t parts(int64_t count, int64_t most) { return (count + most - 1) / most; }

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

bool is_dense(const Tensor& t, bool rows) {
  const int64_t C = t.size(1), H = t.size(2), W = t.size(3);
  const int64_t strides[] = {C * H * W, rows ? 1 : H * W, rows ? W * C : W, rows ? C : 1};
  for (int i = 0; i < 4; ++i)
    if (t.size(i) > 1 && t.stride(i) != strides[i]) return false;
  return true;
}

// The layout that all of `tensors`, of the same batch and pixels or not, have in common.
bool lie_in_rows(std::initializer_list<const Tensor*> tensors) {
  for (const bool rows : {true, false})
    if (std::all_of(tensors.begin(), tensors.end(), [&](const Tensor* t) { return is_dense(*t, rows); })) return rows;
  STD_TORCH_CHECK(false, "all but x and g must be dense, either channels_last or contiguous");
}

Layout layout_of(const Tensor& t, bool rows) {
  return {rows, is_bf16(t), t.size(0), t.size(2) * t.size(3), t.scalar_type(), t.device()};
}

// Some pixels, which in images lie within one of them.
struct Chunk {
  int64_t b, first, count;  // of an image; in rows b is 0 and pixels are those of all images
  int64_t before;           // pixels of all images ahead of these
};

std::vector<Chunk> chunks_of(const Layout& layout, int64_t most) {
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

Dense dense(const Tensor& t, const Layout& layout) { return {t.data_ptr(), t.size(1), layout}; }

int64_t floats(const Layout& layout, int64_t numbers) { return (numbers * layout.bytes() + 3) / 4; }

// A tile of all pixels of a chunk in memory of its own: one image, however many there are. Lines a power of two apart
// would share their places in the cache.
constexpr int64_t GAP = 16;

Dense tile_of(float* memory, const Layout& layout, int64_t pixels, int64_t channels) {
  Layout own = layout;
  own.B = 1, own.HW = pixels;
  return {memory, channels, own, GAP};
}

int64_t tile_floats(const Layout& layout, int64_t pixels, int64_t channels) {
  return floats(layout, (pixels + GAP) * (channels + GAP));
}

Chunk all_of(int64_t pixels) { return {0, 0, pixels, 0}; }

// The pixels of a chunk of a map with any strides.
Pixels pixels_of(const Tensor& t, const Layout& layout, const Chunk& chunk, int64_t c0) {
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
Tensor block(const Tensor& weight, int64_t row, int64_t rows, int64_t column, int64_t columns, bool turned = false) {
  const int64_t ld = weight.size(1), size = weight.scalar_type() == ScalarType::Float ? 4 : 2;
  const int64_t shape[] = {turned ? columns : rows, turned ? rows : columns},
                strides[] = {turned ? 1 : ld, turned ? ld : 1};
  char* const at = static_cast<char*>(weight.data_ptr()) + (row * ld + column) * size;
  return torch::stable::from_blob(at, {shape, 2}, {strides, 2}, weight.device(), weight.scalar_type());
}

Tensor turned(const Tensor& matrix) {
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

// Where it pays to pass over zeros of a left matrix: as measured, with as few columns as a panel holds it does not.
bool worth_sparse(const MatrixProduct& p) {
  if (p.a_term != 1 || p.columns < 64) return false;
  return static_cast<double>(FUSEKERN_PICK(matrix_product_not_zero)(p)) < 0.7 * p.rows * p.terms;
}

// Where it pays to compute alone what is kept. With AVX2 half the registers hold half as much.
bool worth_masking(const MatrixProduct& p, const Kept& kept) {
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
void multiply(const Tensor& a, const Tensor& b, const Tensor& to, bool add, const Hints& hints = {}) {
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
    if (rows == 0 && hints.activated && worth_sparse(p)) {
      const Scratch memory(FUSEKERN_PICK(sparse_product_floats)(p));
      return FUSEKERN_PICK(sparse_product)(p, memory.data);
    }
    if (rows == 0 && hints.kept != nullptr && worth_masking(p, *hints.kept)) {
      p.wanted = hints.kept->bits.data(), p.wanted_row = hints.kept->row;
      const Scratch memory(FUSEKERN_PICK(masked_product_floats)());
      return FUSEKERN_PICK(masked_product)(p, memory.data);
    }
    const Scratch packed(FUSEKERN_PICK(matrix_product_floats)());
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
void for_each(int64_t items, const F& f) {
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
Channels tiles(int64_t E, int64_t pixels) {
  return {E, std::max<int64_t>(64, std::min<int64_t>(512, TILE_FLOATS / pixels))};
}

BottleneckPass pass_over(const Layout& layout, int64_t pixels, int64_t channels) {
  BottleneckPass pass{};
  pass.bf16 = layout.bf16, pass.rows = layout.rows, pass.pixels = pixels, pass.channels = channels;
  return pass;
}

// The vectors of an affine [2, c] or a coef [4, c] from channel c0 on.
void give(BottleneckPass& pass, const Tensor& vectors, int64_t c0) {
  for (int64_t i = 0; i < vectors.size(0); ++i)
    pass.vectors[i] = static_cast<const float*>(vectors.data_ptr()) + i * vectors.size(1) + c0;
}

float* data_of(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

// out = relu6(affine y)
void activate(const Dense& y, const Chunk& from, int64_t c0, const Tensor& affine, const Dense& out, const Chunk& to) {
  BottleneckPass pass = pass_over(out.layout, from.count, out.C);
  pass.a = y.pixels(from, c0), pass.out = out.pixels(to, 0);
  give(pass, affine, c0);
  FUSEKERN_PICK(bottleneck_activate)(pass);
}

// relu6(affine y) in fp32 of some channels as an image, in `memory`; and, of rows, what is kept of it.
Dense activate_turned(const Dense& y, const Chunk& from, int64_t c0, int64_t channels, const Tensor& affine,
                      float* memory, Kept& kept) {
  Layout image = y.layout;
  image.rows = false;
  const Dense out = tile_of(memory, image, from.count, channels);
  if (!y.layout.rows) {
    activate(y, from, c0, affine, out, all_of(from.count));
    return out;
  }
  BottleneckPass pass = pass_over(y.layout, from.count, channels);
  pass.a = y.pixels(from, c0), pass.out = out.pixels(all_of(from.count), 0);
  give(pass, affine, c0);
  kept.count = FUSEKERN_PICK(bottleneck_activate_turned)(pass, kept.bits.data(), kept.row);
  return out;
}

// out = coef(dv, y)
void through_norm(const Pixels& dv, const Pixels& y, int64_t pixels, int64_t c0, const Tensor& coef, const Dense& out,
                  const Chunk& to) {
  BottleneckPass pass = pass_over(out.layout, pixels, out.C);
  pass.a = dv, pass.b = y, pass.out = out.pixels(to, 0);
  give(pass, coef, c0);
  FUSEKERN_PICK(bottleneck_coef)(pass);
}

// Moments [3][channels] take in a chunk of y.
void add_moments(const Dense& y, const Chunk& chunk, int64_t c0, int64_t channels, float* moments, int64_t before) {
  BottleneckPass pass = pass_over(y.layout, chunk.count, channels);
  pass.a = y.pixels(chunk, c0);
  for (int i = 0; i < 3; ++i) pass.sums[i] = moments + i * channels;
  pass.before = before;
  FUSEKERN_PICK(bottleneck_moments)(pass);
}

void clear(float* floats, int64_t count) { std::fill(floats, floats + count, 0.f); }

void check_vectors(const char* name, const Tensor& t, int64_t vectors, int64_t channels) {
  if (vectors == 1)
    check(name, t, {channels}, ScalarType::Float);
  else
    check(name, t, {vectors, channels}, ScalarType::Float);
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

void check_weight(const char* name, const Tensor& t, std::initializer_list<int64_t> shape, ScalarType dtype) {
  check(name, t, shape, dtype);
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

void check_map(const char* name, const Tensor& t, const Tensor& like, int64_t channels) {
  STD_TORCH_CHECK(like.dim() == 4, "maps must be [B, C, H, W]");
  check(name, t, {like.size(0), channels, like.size(2), like.size(3)}, like.scalar_type());
}

// ---- batch norms ---------------------------------------------------------------------------------------------------

using Vector = std::optional<Tensor>;

// Mean and M2 of what a stage writes, [2][C], if they are wanted: in stats, or to make the next norm's vectors of.
struct Statistics {
  Statistics(const Vector& stats, const Vector& vectors, const Vector& weight, const Vector& bias, double eps,
             int64_t C)
      : C(C), eps(static_cast<float>(eps)), data(vectors_of("stats", stats, {2, C})),
        vectors(vectors_of("vectors", vectors, {5, C})), weight(vectors_of("weight", weight, {C})),
        bias(vectors_of("bias", bias, {C})) {
    if (data != nullptr || this->vectors == nullptr) return;
    own.emplace(2 * C);
    data = own->data;
  }
  // When all of them are there.
  void finish(int64_t count) const {
    if (vectors == nullptr) return;
    const float biased = inverse_of(static_cast<float>(count)), unbiased = inverse_of(static_cast<float>(count - 1));
    for (int64_t c = 0; c < C; ++c)
      norm_forward(data[c], data[C + c] * biased, data[C + c] * unbiased, weight ? weight[c] : 1.f,
                   bias ? bias[c] : 0.f, eps, vectors + c, C);
  }

  int64_t C;
  float eps;
  float *data, *vectors;
  const float *weight, *bias;
  std::optional<Scratch> own;
};

// The sums of a gradient, [2][C], and what the norm that it has come to makes of them, if that is wanted.
struct Sums {
  Sums(const Vector& sums, const Vector& coef, const Vector& dweight, const Vector& vectors, const Vector& weight,
       double eps, bool batch, int64_t C)
      : C(C), eps(static_cast<float>(eps)), batch(batch), data(vectors_of("sums", sums, {2, C})),
        coef(vectors_of("coef", coef, {4, C})), dweight(vectors_of("dweight", dweight, {C})),
        vectors(vectors_of("vectors", vectors, {5, C})), weight(vectors_of("weight", weight, {C})) {
    STD_TORCH_CHECK(coef.has_value() == dweight.has_value(), "coef and dweight belong together");
    STD_TORCH_CHECK(!coef || (sums && vectors), "coef needs sums and vectors");
  }
  void finish(int64_t count) const {
    if (coef == nullptr) return;
    const float share = inverse_of(static_cast<float>(count));
    for (int64_t c = 0; c < C; ++c)
      norm_backward(vectors + c, data[C + c], data[c] * share, data[C + c] * share, weight ? weight[c] : 1.f, eps,
                    batch, coef + c, dweight + c, C);
  }

  int64_t C;
  float eps;
  bool batch;
  float *data, *coef, *dweight;
  const float *vectors, *weight;
};

int64_t count_of(const Tensor& t) { return t.size(0) * t.size(2) * t.size(3); }  // pixels

// ---- forward -------------------------------------------------------------------------------------------------------

void expand_fwd(const Tensor& x,   // [B, C, H, W]
                const Tensor& w1,  // [E, C]
                Tensor y1,         // [B, E, H, W]
                Vector stats1,     // [2, E]
                Vector vectors1,   // [5, E]
                const Vector& weight1, const Vector& bias1, double eps1) {
  const int64_t C = x.size(1), E = w1.size(0);
  check_map("x", x, y1, C), check_map("y1", y1, x, E), check_weight("w1", w1, {E, C}, x.scalar_type());
  const Statistics stats(stats1, vectors1, weight1, bias1, eps1, E);
  const Layout layout = layout_of(y1, lie_in_rows({&y1}));
  const Image image(x, layout, false);
  const Dense to = dense(y1, layout);
  const auto chunks = chunks_of(layout, TILE_PIXELS);
  const Channels blocks = tiles(E, chunks[0].count);
  for_each(blocks.count(), [&](int64_t item) {
    const int64_t c0 = blocks.first(item), channels = blocks.channels(item);
    const Tensor weight = block(w1, c0, channels, 0, C, true);
    const Scratch moments(3 * channels);
    clear(moments.data, 3 * channels);
    for (const Chunk& chunk : chunks) {
      multiply(image.matrix(chunk), weight, to.matrix(chunk, c0, channels), false);
      if (stats.data) add_moments(to, chunk, c0, channels, moments.data, chunk.before);
    }
    for (int64_t c = 0; stats.data && c < channels; ++c) {
      stats.data[c0 + c] = moments.data[2 * channels + c] + moments.data[c];
      stats.data[E + c0 + c] = moments.data[channels + c];
    }
  });
  stats.finish(layout.N());
}

BottleneckDepthwise depthwise(const Tensor& y1, const Tensor& y2, const Tensor& wd, int64_t stride, bool rows) {
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
void run(BottleneckDepthwise& op, const F& f) {
  FUSEKERN_PICK(bottleneck_depthwise_plan)(op);
  for_each(parts(op.channels, op.block), [&](int64_t item) {
    const Scratch scratch(op.scratch_floats + op.ring_floats);
    f(op, item, item + 1, scratch.data);
  });
}

void depthwise_fwd(const Tensor& y1,       // [B, E, H, W]
                   const Tensor& affine1,  // [2, E]
                   const Tensor& wd,       // [E, k, k]
                   int64_t stride,
                   Tensor y2,        // [B, E, h, w]
                   Vector stats2,    // [2, E]
                   Vector vectors2,  // [5, E]
                   const Vector& weight2, const Vector& bias2, double eps2) {
  BottleneckDepthwise op = depthwise(y1, y2, wd, stride, lie_in_rows({&y1, &y2}));
  check_vectors("affine1", affine1, 2, op.channels);
  const Statistics stats(stats2, vectors2, weight2, bias2, eps2, op.channels);
  op.affine1 = data_of(affine1);
  op.stats2 = stats.data;
  run(op, FUSEKERN_PICK(bottleneck_depthwise_fwd));
  stats.finish(count_of(y2));
}

// Joins the moments of chunks [chunks][3][C] into stats.
void join(const std::vector<Chunk>& chunks, const float* partial, int64_t C, float* stats) {
  for (int64_t c = 0; c < C; ++c) {
    double mean = 0, squares = 0, count = 0;
    for (size_t i = 0; i < chunks.size(); ++i) {
      const float* const moments = partial + 3 * i * C + c;
      const double more = static_cast<double>(chunks[i].count),
                   other = static_cast<double>(moments[0]) + moments[2 * C];
      squares += moments[C] + (count > 0 ? (other - mean) * (other - mean) * count * more / (count + more) : 0);
      mean = count > 0 ? mean + (other - mean) * more / (count + more) : other;
      count += more;
    }
    stats[c] = static_cast<float>(mean), stats[C + c] = static_cast<float>(squares);
  }
}

void project_fwd(const Tensor& y2,       // [B, E, h, w]
                 const Tensor& affine2,  // [2, E]
                 const Tensor& w3,       // [O, E]
                 Tensor y3,              // [B, O, h, w]
                 Vector stats3,          // [2, O]
                 Vector vectors3,        // [5, O]
                 const Vector& weight3, const Vector& bias3, double eps3) {
  const int64_t E = y2.size(1), O = w3.size(0);
  check_map("y2", y2, y3, E), check_map("y3", y3, y2, O), check_weight("w3", w3, {O, E}, y2.scalar_type());
  check_vectors("affine2", affine2, 2, E);
  const Statistics stats(stats3, vectors3, weight3, bias3, eps3, O);
  const Layout layout = layout_of(y2, lie_in_rows({&y2, &y3}));
  const Dense from = dense(y2, layout), to = dense(y3, layout);
  const auto chunks = chunks_of(layout, layout.bf16 ? TILE_PIXELS / 2 : TILE_PIXELS);
  const int64_t count = static_cast<int64_t>(chunks.size());
  Channels blocks = tiles(E, chunks[0].count);
  if (layout.bf16) blocks.size = E;
  const Scratch partial(3 * O * count);
  clear(partial.data, 3 * O * count);
  // What comes after block i of a chunk.
  const auto next = [&](int64_t item, int64_t i) -> Beside {
    if (layout.bf16) return {};
    if (i + 1 < blocks.count()) return from.lines(chunks[item], blocks.first(i + 1), blocks.channels(i + 1));
    return item + 1 < count ? from.lines(chunks[item + 1], 0, blocks.channels(0)) : Beside{};
  };
  for_each(count, [&](int64_t item) {
    const Chunk& chunk = chunks[item];
    const Scratch memory(tile_floats(layout, chunk.count, blocks.size));
    for (int64_t i = 0; i < blocks.count(); ++i) {
      const int64_t c0 = blocks.first(i), channels = blocks.channels(i);
      const Dense tile = tile_of(memory.data, layout, chunk.count, channels);
      activate(from, chunk, c0, affine2, tile, all_of(chunk.count));
      multiply(tile.matrix(all_of(chunk.count), 0, channels), block(w3, 0, O, c0, channels, true),
               to.matrix(chunk, 0, O), i > 0, {next(item, i), true});
    }
    if (stats.data) add_moments(to, chunk, 0, O, partial.data + 3 * O * item, 0);
  });
  if (stats.data) join(chunks, partial.data, O, stats.data);
  stats.finish(layout.N());
}

// out = affine y (+ x), of some channels
void finish(const Dense& y, const Chunk& from, int64_t c0, int64_t channels, const Tensor& affine, const Tensor* x,
            const Dense& out, const Chunk& to) {
  BottleneckPass pass = pass_over(y.layout, from.count, channels);
  pass.a = y.pixels(from, c0), pass.out = out.pixels(to, c0);
  if (x != nullptr) pass.b = pixels_of(*x, out.layout, to, c0);
  give(pass, affine, c0);
  FUSEKERN_PICK(bottleneck_affine)(pass);
}

void residual_fwd(const Tensor& y3,       // [B, O, h, w]
                  const Tensor& affine3,  // [2, O]
                  const std::optional<Tensor>& x,
                  Tensor out) {  // [B, O, h, w]
  const int64_t O = y3.size(1);
  check_map("y3", y3, out, O), check_map("out", out, y3, O), check_vectors("affine3", affine3, 2, O);
  if (x) check_map("x", *x, y3, O);
  const Layout layout = layout_of(y3, lie_in_rows({&y3, &out}));
  const auto chunks = chunks_of(layout, TILE_PIXELS);
  for_each(static_cast<int64_t>(chunks.size()), [&](int64_t item) {
    finish(dense(y3, layout), chunks[item], 0, O, affine3, x ? &*x : nullptr, dense(out, layout), chunks[item]);
  });
}

// ---- inference -----------------------------------------------------------------------------------------------------

// Strip by strip of an image: its rows of the expanded map a block of channels at a time, filtered into a tile of all
// channels, and that projected. What the filter still needs of the rows above stays in rings.
void infer(const Tensor& x,        // [B, C, H, W]
           const Tensor& w1,       // [E, C]
           const Tensor& affine1,  // [2, E]
           const Tensor& wd,       // [E, k, k]
           const Tensor& affine2,  // [2, E]
           const Tensor& w3,       // [O, E]
           const Tensor& affine3,  // [2, O]
           int64_t stride, bool residual,
           Tensor out) {  // [B, O, h, w]
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), E = w1.size(0), O = w3.size(0);
  const int64_t k = wd.dim() == 3 ? wd.size(1) : 0, pad = k / 2;
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK((k == 3 || k == 5) && (stride == 1 || stride == 2), "the kernel must be 3 or 5, the stride 1 or 2");
  const int64_t h = (H - 1) / stride + 1, w = (W - 1) / stride + 1;
  check("x", x, {B, C, H, W}, dtype), check("out", out, {B, O, h, w}, dtype);
  STD_TORCH_CHECK(!residual || (stride == 1 && C == O), "a residual needs stride 1 and as many channels as x has");
  check_weight("w1", w1, {E, C}, dtype), check_weight("wd", wd, {E, k, k}, dtype),
      check_weight("w3", w3, {O, E}, dtype);
  check_vectors("affine1", affine1, 2, E), check_vectors("affine2", affine2, 2, E),
      check_vectors("affine3", affine3, 2, O);

  const bool rows = lie_in_rows({&out});
  const Layout layout = layout_of(out, rows);
  Layout before = layout;
  before.HW = H * W;
  const Image image(x, before, false);
  const Dense to = dense(out, layout);
  const int64_t strips = parts(h * w, TILE_PIXELS), height = parts(h, std::min(h, strips));
  const int64_t in_rows = std::min(H, height * stride + k), in_pixels = in_rows * W, pixels = height * w;
  const Channels blocks = tiles(E, std::max(in_pixels, pixels)), shares(O, 256);

  BottleneckDepthwise op{};
  op.bf16 = layout.bf16, op.rows = rows, op.B = 1, op.channels = E, op.H = H, op.W = W, op.h = h, op.w = w, op.k = k;
  op.stride = stride, op.block = blocks.size, op.wd = wd.data_ptr(), op.pitch = E;
  op.affine1 = data_of(affine1), op.affine2 = data_of(affine2);
  FUSEKERN_PICK(bottleneck_depthwise_plan)(op);

  // As many images at a time as keep all threads busy; one thread projects each block while it is in the cache.
  const int64_t threads = torch::stable::get_num_threads(), wave = std::min<int64_t>(B, parts(threads, blocks.count()));
  const int64_t together = threads == 1 && !layout.bf16 ? 1 : blocks.count();
  const int64_t block_floats = tile_floats(layout, pixels, blocks.size);
  const int64_t own_floats = layout.bf16 ? tile_floats(layout, pixels, E) : together * block_floats;
  const int64_t slot_floats = own_floats + tile_floats(layout, pixels, O);
  const Scratch rings(wave * blocks.count() * op.ring_floats), memory(wave * slot_floats);
  const auto tile = [&](int64_t slot) { return memory.data + slot * slot_floats; };
  // The filtered rows of a block of channels; in bf16, where one product takes all of them, within those of all.
  const auto filtered = [&](int64_t slot, int64_t i, int64_t count) {
    if (layout.bf16) return tile_of(tile(slot), layout, count, E);
    return tile_of(tile(slot) + i % together * block_floats, layout, count, blocks.channels(i));
  };
  for (int64_t b0 = 0; b0 < B; b0 += wave)
    for (int64_t y0 = 0, staged = 0; y0 < h; y0 += height) {
      const int64_t y1 = std::min(h, y0 + height), need = std::min(H, (y1 - 1) * stride + k - pad);
      const int64_t images = std::min(wave, B - b0), fresh = (need - staged) * W, count = (y1 - y0) * w;
      const Chunk all = all_of(count);
      const auto expand_and_filter = [&](int64_t slot, int64_t i) {
        const int64_t b = b0 + slot, c0 = blocks.first(i), channels = blocks.channels(i);
        const Scratch expanded(tile_floats(layout, fresh, channels)), scratch(op.scratch_floats);
        const Dense from = tile_of(expanded.data, layout, fresh, channels), into = filtered(slot, i, count);
        if (fresh > 0) {
          const Chunk chunk = rows ? Chunk{0, b * H * W + staged * W, fresh, 0} : Chunk{b, staged * W, fresh, 0};
          multiply(image.matrix(chunk), block(w1, c0, channels, 0, C, true), from.matrix(all_of(fresh), 0, channels),
                   false);
        }
        // The body counts rows from the top of the image, and channels from the first of all.
        BottleneckDepthwise part = op;
        const auto shifted = [&](const Dense& dense, int64_t width, int64_t row, int64_t channel) {
          const Map map{nullptr, 0, dense.channel(), width * dense.pixel(), dense.pixel()};
          char* const data = static_cast<char*>(dense.data) - (row * map.row + channel * map.channel) * layout.bytes();
          return Map{data, 0, map.channel, map.row, map.column};
        };
        part.y1 = shifted(from, W, staged, c0), part.y2 = shifted(into, w, y0, layout.bf16 ? 0 : c0);
        FUSEKERN_PICK(bottleneck_depthwise_rows)(part, i, staged, y0, y1,
                                                 rings.data + (slot * blocks.count() + i) * op.ring_floats,
                                                 scratch.data);
      };
      const auto project = [&](int64_t slot, int64_t share, int64_t first) {
        const int64_t b = b0 + slot, o0 = shares.first(share), channels = shares.channels(share);
        const Dense y3 = tile_of(tile(slot) + own_floats, layout, count, O);
        const Tensor to_share = y3.matrix(all, o0, channels);
        if (layout.bf16)
          multiply(filtered(slot, 0, count).matrix(all, 0, E), block(w3, o0, channels, 0, E, true), to_share, false);
        for (int64_t i = first; !layout.bf16 && i < std::min(first + together, blocks.count()); ++i)
          multiply(filtered(slot, i, count).matrix(all, 0, blocks.channels(i)),
                   block(w3, o0, channels, blocks.first(i), blocks.channels(i), true), to_share, i > 0, {{}, true});
        if (first + together < blocks.count()) return;
        const int64_t n = y0 * w;
        const Chunk there = rows ? Chunk{0, b * h * w + n, count, 0} : Chunk{b, n, count, 0};
        finish(y3, all, o0, channels, affine3, residual ? &x : nullptr, to, there);
      };
      for (int64_t first = 0; first < blocks.count(); first += together) {
        const int64_t some = std::min(together, blocks.count() - first);
        for_each(images * some, [&](int64_t item) { expand_and_filter(item / some, first + item % some); });
        for_each(images * shares.count(), [&](int64_t item) { project(item / shares.count(), item % shares.count(), first); });
      }
      staged = std::max(staged, need);
    }
}

// ---- backward ------------------------------------------------------------------------------------------------------

void output_bwd(const Tensor& g,      // [B, O, h, w]
                const Tensor& y3,     // [B, O, h, w]
                const Tensor& mean3,  // [O]
                Tensor sums3,         // [2, O]
                Vector coef3,         // [4, O]
                Vector dweight3,      // [O]
                const Vector& vectors3, const Vector& weight3, double eps3, bool batch3) {
  const int64_t O = y3.size(1);
  check_map("y3", y3, g, O), check_map("g", g, y3, O), check_vectors("mean3", mean3, 1, O);
  const Sums sums(sums3, coef3, dweight3, vectors3, weight3, eps3, batch3, O);
  const Layout layout = layout_of(y3, lie_in_rows({&y3}));
  const auto chunks = chunks_of(layout, TILE_PIXELS);
  const int64_t count = static_cast<int64_t>(chunks.size());
  const Scratch partial(2 * O * count);
  clear(partial.data, 2 * O * count);
  for_each(count, [&](int64_t item) {
    BottleneckPass pass = pass_over(layout, chunks[item].count, O);
    pass.a = pixels_of(g, layout, chunks[item], 0), pass.b = dense(y3, layout).pixels(chunks[item], 0);
    pass.vectors[0] = data_of(mean3);
    pass.sums[0] = partial.data + 2 * O * item, pass.sums[1] = pass.sums[0] + O;
    FUSEKERN_PICK(bottleneck_sums)(pass);
  });
  for (int64_t c = 0; c < 2 * O; ++c) {
    double total = 0;
    for (int64_t item = 0; item < count; ++item) total += partial.data[2 * O * item + c];
    sums.data[c] = static_cast<float>(total);
  }
  sums.finish(layout.N());
}

void project_bwd(const Tensor& g,        // [B, O, h, w]
                 const Tensor& y3,       // [B, O, h, w]
                 const Tensor& coef3,    // [4, O]
                 const Tensor& y2,       // [B, E, h, w]
                 const Tensor& affine2,  // [2, E]
                 const Tensor& mean2,    // [E]
                 const Tensor& w3,       // [O, E]
                 Tensor dz,              // [B, E, h, w]
                 Tensor dw3,             // [O, E]
                 Vector sums2,           // [2, E]
                 Vector coef2,           // [4, E]
                 Vector dweight2,        // [E]
                 const Vector& vectors2, const Vector& weight2, double eps2, bool batch2) {
  const int64_t E = y2.size(1), O = y3.size(1);
  check_map("y2", y2, y3, E), check_map("g", g, y2, O), check_map("y3", y3, y2, O), check_map("dz", dz, y2, E);
  check_weight("w3", w3, {O, E}, y2.scalar_type()), check_weight("dw3", dw3, {O, E}, y2.scalar_type());
  check_vectors("coef3", coef3, 4, O), check_vectors("affine2", affine2, 2, E), check_vectors("mean2", mean2, 1, E);
  const Sums all_sums(sums2, coef2, dweight2, vectors2, weight2, eps2, batch2, E);
  const Layout layout = layout_of(y2, lie_in_rows({&y3, &y2, &dz}));
  const auto chunks = chunks_of(layout, TILE_PIXELS);
  const int64_t N = layout.N(), most = chunks[0].count;
  const Dense from = dense(y2, layout), to = dense(dz, layout);
  const Scratch memory(tile_floats(layout, N, O));
  const Dense dy3 = tile_of(memory.data, layout, N, O);
  for_each(static_cast<int64_t>(chunks.size()), [&](int64_t item) {
    const Chunk &chunk = chunks[item], there{0, chunk.before, chunk.count, 0};
    through_norm(pixels_of(g, layout, chunk, 0), dense(y3, layout).pixels(chunk, 0), chunk.count, 0, coef3, dy3, there);
  });
  const Channels blocks = tiles(E, layout.bf16 ? std::max<int64_t>(N / 4, 1) : most);
  // Of a block of channels and a chunk: dz = mask back, with its sums.
  const auto mask = [&](const Dense& back, const Chunk& chunk, int64_t c0, float* sums) {
    BottleneckPass pass = pass_over(layout, chunk.count, back.C);
    pass.a = back.pixels(all_of(chunk.count), 0), pass.b = from.pixels(chunk, c0), pass.out = to.pixels(chunk, c0);
    give(pass, affine2, c0);
    pass.vectors[2] = data_of(mean2) + c0;
    pass.sums[0] = sums, pass.sums[1] = sums + back.C;
    FUSEKERN_PICK(bottleneck_mask)(pass);
  };
  for_each(blocks.count(), [&](int64_t item) {
    const int64_t c0 = blocks.first(item), channels = blocks.channels(item);
    const Scratch activated(tile_floats(layout, layout.bf16 ? N : most, channels)),
        product(tile_floats(layout, most, channels)), sums(2 * channels);
    clear(sums.data, 2 * channels);
    const Tensor weight = block(w3, 0, O, c0, channels);
    if (layout.bf16) {
      const Dense all = tile_of(activated.data, layout, N, channels);
      for (const Chunk& chunk : chunks) {
        const Chunk there{0, chunk.before, chunk.count, 0}, own = all_of(chunk.count);
        activate(from, chunk, c0, affine2, all, there);
        const Dense back = tile_of(product.data, layout, chunk.count, channels);
        multiply(dy3.matrix(there, 0, O), weight, back.matrix(own, 0, channels), false);
        mask(back, chunk, c0, sums.data);
      }
      multiply(turned(dy3.matrix(all_of(N), 0, O)), all.matrix(all_of(N), 0, channels),
               block(dw3, 0, O, c0, channels), false);
    } else {
      // The weight's gradient lies transposed until the end, for its zeros are those of the activated pixels.
      const Scratch across(channels * O);
      const int64_t shape[] = {channels, O}, strides[] = {O, 1};
      const Tensor dweight =
          torch::stable::from_blob(across.data, {shape, 2}, {strides, 2}, layout.device, layout.dtype);
      Kept kept(most, channels);
      for (size_t i = 0; i < chunks.size(); ++i) {
        const Chunk &chunk = chunks[i], there{0, chunk.before, chunk.count, 0}, own = all_of(chunk.count);
        const Tensor dy = dy3.matrix(there, 0, O);
        const Dense tile = activate_turned(from, chunk, c0, channels, affine2, activated.data, kept);
        multiply(turned(tile.matrix(own, 0, channels)), dy, dweight, i > 0, {to.lines(chunk, c0, channels), true});
        const Dense back = tile_of(product.data, layout, chunk.count, channels);
        const Beside next = i + 1 < chunks.size() ? from.lines(chunks[i + 1], c0, channels)
                                                  : Beside{data_of(dw3) + c0, O, E, parts(channels, 16)};
        multiply(dy, weight, back.matrix(own, 0, channels), false, {next, false, &kept});
        mask(back, chunk, c0, sums.data);
      }
      FUSEKERN_PICK(turn_matrix)(across.data, channels, O, data_of(dw3) + c0, E);
    }
    if (all_sums.data)
      for (int64_t i = 0; i < 2; ++i) std::copy_n(sums.data + i * channels, channels, all_sums.data + i * E + c0);
  });
  all_sums.finish(N);
}

void depthwise_bwd(const Tensor& dz,       // [B, E, h, w]
                   const Tensor& y2,       // [B, E, h, w]
                   const Tensor& coef2,    // [4, E]
                   const Tensor& y1,       // [B, E, H, W]
                   const Tensor& affine1,  // [2, E]
                   const Tensor& mean1,    // [E]
                   const Tensor& wd,       // [E, k, k]
                   int64_t stride,
                   Tensor d,         // [B, E, H, W]
                   Tensor dwd,       // [E, k, k]
                   Vector sums1,     // [2, E]
                   Vector coef1,     // [4, E]
                   Vector dweight1,  // [E]
                   const Vector& vectors1, const Vector& weight1, double eps1, bool batch1) {
  BottleneckDepthwise op = depthwise(y1, y2, wd, stride, lie_in_rows({&dz, &y2, &y1, &d}));
  check_map("dz", dz, y2, op.channels), check_map("d", d, y1, op.channels);
  check_weight("dwd", dwd, {op.channels, op.k, op.k}, y1.scalar_type());
  check_vectors("coef2", coef2, 4, op.channels), check_vectors("affine1", affine1, 2, op.channels);
  check_vectors("mean1", mean1, 1, op.channels);
  const Sums sums(sums1, coef1, dweight1, vectors1, weight1, eps1, batch1, op.channels);
  op.dz = op.y2, op.d = op.y1;
  op.dz.data = dz.data_ptr(), op.d.data = d.data_ptr();
  op.dwd = dwd.data_ptr();
  op.coef2 = data_of(coef2), op.affine1 = data_of(affine1), op.mean1 = data_of(mean1);
  op.sums1 = sums.data;
  run(op, FUSEKERN_PICK(bottleneck_depthwise_bwd));
  sums.finish(count_of(y1));
}

void expand_bwd(const Tensor& d,                 // [B, E, H, W]
                const Tensor& y1,                // [B, E, H, W]
                const Tensor& coef1,             // [4, E]
                const Tensor& x,                 // [B, C, H, W]
                const Tensor& w1,                // [E, C]
                const std::optional<Tensor>& g,  // [B, C, H, W]
                Tensor dx,                       // [B, C, H, W]
                Tensor dw1) {                    // [E, C]
  const int64_t C = x.size(1), E = w1.size(0);
  check_map("x", x, y1, C), check_map("y1", y1, x, E), check_map("d", d, x, E), check_map("dx", dx, x, C);
  if (g) check_map("g", *g, x, C);
  check_weight("w1", w1, {E, C}, x.scalar_type()), check_weight("dw1", dw1, {E, C}, x.scalar_type());
  check_vectors("coef1", coef1, 4, E);
  const Layout layout = layout_of(y1, lie_in_rows({&d, &y1, &dx}));
  const int64_t N = layout.N();
  const auto chunks = chunks_of(layout, layout.bf16 ? TILE_PIXELS / 2 : TILE_PIXELS);
  const int64_t count = static_cast<int64_t>(chunks.size()), most = chunks[0].count;
  const Dense from_d = dense(d, layout), from_y = dense(y1, layout), to = dense(dx, layout);
  const Image image(x, layout, layout.bf16);
  const bool as_it_is = g && !layout.bf16 && is_dense(*g, layout.rows);
  if (g && !as_it_is) torch::stable::copy_(dx, *g);
  const auto fill = [&](const Chunk& chunk, int64_t c0, const Dense& tile, const Chunk& there) {
    through_norm(from_d.pixels(chunk, c0), from_y.pixels(chunk, c0), chunk.count, c0, coef1, tile, there);
  };

  if (layout.bf16) {
    for_each(count, [&](int64_t item) {
      const Chunk &chunk = chunks[item], own = all_of(chunk.count);
      const Scratch memory(tile_floats(layout, chunk.count, E));
      const Dense tile = tile_of(memory.data, layout, chunk.count, E);
      fill(chunk, 0, tile, own);
      multiply(tile.matrix(own, 0, E), w1, to.matrix(chunk, 0, C), g.has_value());
    });
    const Channels blocks = tiles(E, std::max<int64_t>(N / 4, 1));
    for_each(blocks.count(), [&](int64_t item) {
      const int64_t c0 = blocks.first(item), channels = blocks.channels(item);
      const Scratch memory(tile_floats(layout, N, channels));
      const Dense tile = tile_of(memory.data, layout, N, channels);
      for (const Chunk& chunk : chunks) fill(chunk, c0, tile, {0, chunk.before, chunk.count, 0});
      multiply(turned(tile.matrix(all_of(N), 0, channels)), image.matrix(all_of(N)), block(dw1, c0, channels, 0, C),
               false);
    });
    return;
  }

  const Channels blocks = tiles(E, most);
  const auto work = [&](int64_t i, int64_t j, float* memory, bool image_too, bool weight_too) {
    const Chunk &chunk = chunks[i], own = all_of(chunk.count);
    const int64_t c0 = blocks.first(j), channels = blocks.channels(j);
    const Dense tile = tile_of(memory, layout, chunk.count, channels);
    fill(chunk, c0, tile, own);
    const Tensor dy1 = tile.matrix(own, 0, channels);
    const auto next = [&](const Dense& map) -> Beside {
      if (image_too && j + 1 < blocks.count()) return map.lines(chunk, blocks.first(j + 1), blocks.channels(j + 1));
      return i + 1 < count ? map.lines(chunks[i + 1], image_too ? 0 : c0, channels) : Beside{};
    };
    if (image_too) {
      const Tensor residual = (as_it_is ? dense(*g, layout) : to).matrix(chunk, 0, C);
      multiply(dy1, block(w1, c0, channels, 0, C), to.matrix(chunk, 0, C), j > 0 || g.has_value(),
               {next(from_d), false, nullptr, j == 0 ? &residual : nullptr});
    }
    if (weight_too)
      multiply(turned(dy1), image.matrix(chunk), block(dw1, c0, channels, 0, C), i > 0, {next(from_y)});
  };
  // One thread fills each tile once; several do it once for either result, each of which is one thread's alone.
  const bool alone = torch::stable::get_num_threads() == 1;
  for_each(count, [&](int64_t i) {
    const Scratch memory(tile_floats(layout, most, blocks.size));
    for (int64_t j = 0; j < blocks.count(); ++j) work(i, j, memory.data, true, alone);
  });
  if (alone) return;
  for_each(blocks.count(), [&](int64_t j) {
    const Scratch memory(tile_floats(layout, most, blocks.size));
    for (int64_t i = 0; i < count; ++i) work(i, j, memory.data, false, true);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusekern_cpp, m) {
  m.def(
      "inverted_bottleneck_expand_fwd(Tensor x, Tensor w1, Tensor(a!) y1, Tensor(b!)? stats1, "
      "Tensor(c!)? vectors1=None, Tensor? weight1=None, Tensor? bias1=None, float eps1=0.) -> ()");
  m.def(
      "inverted_bottleneck_depthwise_fwd(Tensor y1, Tensor affine1, Tensor wd, int stride, Tensor(a!) y2, "
      "Tensor(b!)? stats2, Tensor(c!)? vectors2=None, Tensor? weight2=None, Tensor? bias2=None, float eps2=0.) -> ()");
  m.def(
      "inverted_bottleneck_project_fwd(Tensor y2, Tensor affine2, Tensor w3, Tensor(a!) y3, Tensor(b!)? stats3, "
      "Tensor(c!)? vectors3=None, Tensor? weight3=None, Tensor? bias3=None, float eps3=0.) -> ()");
  m.def("inverted_bottleneck_residual_fwd(Tensor y3, Tensor affine3, Tensor? x, Tensor(a!) out) -> ()");
  m.def(
      "inverted_bottleneck_infer(Tensor x, Tensor w1, Tensor affine1, Tensor wd, Tensor affine2, Tensor w3, "
      "Tensor affine3, int stride, bool residual, Tensor(a!) out) -> ()");
  m.def(
      "inverted_bottleneck_output_bwd(Tensor g, Tensor y3, Tensor mean3, Tensor(a!) sums3, Tensor(b!)? coef3=None, "
      "Tensor(c!)? dweight3=None, Tensor? vectors3=None, Tensor? weight3=None, float eps3=0., bool batch3=True) -> ()");
  m.def(
      "inverted_bottleneck_project_bwd(Tensor g, Tensor y3, Tensor coef3, Tensor y2, Tensor affine2, Tensor mean2, "
      "Tensor w3, Tensor(a!) dz, Tensor(b!) dw3, Tensor(c!)? sums2, Tensor(d!)? coef2=None, "
      "Tensor(e!)? dweight2=None, Tensor? vectors2=None, Tensor? weight2=None, float eps2=0., bool batch2=True) -> ()");
  m.def(
      "inverted_bottleneck_depthwise_bwd(Tensor dz, Tensor y2, Tensor coef2, Tensor y1, Tensor affine1, Tensor mean1, "
      "Tensor wd, int stride, Tensor(a!) d, Tensor(b!) dwd, Tensor(c!)? sums1, Tensor(d!)? coef1=None, "
      "Tensor(e!)? dweight1=None, Tensor? vectors1=None, Tensor? weight1=None, float eps1=0., bool batch1=True) -> ()");
  m.def(
      "inverted_bottleneck_expand_bwd(Tensor d, Tensor y1, Tensor coef1, Tensor x, Tensor w1, Tensor? g, "
      "Tensor(a!) dx, Tensor(b!) dw1) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusekern_cpp, CPU, m) {
  m.impl("inverted_bottleneck_expand_fwd", TORCH_BOX(&expand_fwd));
  m.impl("inverted_bottleneck_depthwise_fwd", TORCH_BOX(&depthwise_fwd));
  m.impl("inverted_bottleneck_project_fwd", TORCH_BOX(&project_fwd));
  m.impl("inverted_bottleneck_residual_fwd", TORCH_BOX(&residual_fwd));
  m.impl("inverted_bottleneck_infer", TORCH_BOX(&infer));
  m.impl("inverted_bottleneck_output_bwd", TORCH_BOX(&output_bwd));
  m.impl("inverted_bottleneck_project_bwd", TORCH_BOX(&project_bwd));
  m.impl("inverted_bottleneck_depthwise_bwd", TORCH_BOX(&depthwise_bwd));
  m.impl("inverted_bottleneck_expand_bwd", TORCH_BOX(&expand_bwd));
}

}  // namespace fusekern
