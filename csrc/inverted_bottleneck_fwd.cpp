// inverted_bottleneck forward in stages, which turn their statistics into what the norm behind them applies. Products of
// matrices go tile by tile, so that what is read and written beside them is still in the cache; in bf16 they are torch's.
#include "inverted_bottleneck_stages.h"
#include "batch_norm.h"

namespace fusekern::stages {

namespace {

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

// Moments [3][channels] take in a chunk of y.
void add_moments(const Dense& y, const Chunk& chunk, int64_t c0, int64_t channels, float* moments, int64_t before) {
  BottleneckPass pass = pass_over(y.layout, chunk.count, channels);
  pass.a = y.pixels(chunk, c0);
  for (int i = 0; i < 3; ++i) pass.sums[i] = moments + i * channels;
  pass.before = before;
  FUSEKERN_PICK(bottleneck_moments)(pass);
}

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
    finish(dense(y3, layout), chunks[item], 0, O, data_of(affine3), O, x ? &*x : nullptr, dense(out, layout), chunks[item]);
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
}

STABLE_TORCH_LIBRARY_IMPL(fusekern_cpp, CPU, m) {
  m.impl("inverted_bottleneck_expand_fwd", TORCH_BOX(&expand_fwd));
  m.impl("inverted_bottleneck_depthwise_fwd", TORCH_BOX(&depthwise_fwd));
  m.impl("inverted_bottleneck_project_fwd", TORCH_BOX(&project_fwd));
  m.impl("inverted_bottleneck_residual_fwd", TORCH_BOX(&residual_fwd));
}

}  // namespace fusekern::stages
