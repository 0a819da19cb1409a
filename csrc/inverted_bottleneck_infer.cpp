// inverted_bottleneck in inference, with norms that are known: one stage.
#include "batch_norm.h"
#include "inverted_bottleneck_stages.h"
#include "linear.h"

namespace fusekern::stages {

namespace {

constexpr int64_t FILTER_CHANNELS = 128;  // channels at a time: their rows stay near

// A norm by running statistics.
struct Known {
  const Vector& weight;  // [c] each, fp32 or bf16
  const Vector& bias;
  const Tensor& mean;
  const Tensor& var;
  double eps;
};

const Tensor& checked(const char* name, const Tensor& t, int64_t channels) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == channels && t.is_contiguous(), name, " must be [c] and contiguous");
  return t;
}

// [5, c] as fusekern/ops/_batch_norm.py has it.
void fill_vectors(const Known& norm, int64_t channels, float* vectors) {
  const Floats mean(checked("mean", norm.mean, channels)), var(checked("var", norm.var, channels));
  std::optional<Floats> weight, bias;
  if (norm.weight) weight.emplace(checked("weight", *norm.weight, channels));
  if (norm.bias) bias.emplace(checked("bias", *norm.bias, channels));
  for (int64_t c = 0; c < channels; ++c)
    norm_forward(mean.data[c], var.data[c], var.data[c], weight ? weight->data[c] : 1.f, bias ? bias->data[c] : 0.f,
                 static_cast<float>(norm.eps), vectors + c, channels);
}

// Strip by strip of an image: its rows of the expanded map a block of channels at a time, filtered into a tile of all
// channels, and that projected. What the filter still needs of the rows above stays in rings.
void infer(const Tensor& x,   // [B, C, H, W]
           const Tensor& w1,  // [E, C]
           const Tensor& wd,  // [E, k, k]
           const Tensor& w3,  // [O, E]
           const Vector& weight1, const Vector& bias1, const Tensor& mean1, const Tensor& var1, double eps1,
           const Vector& weight2, const Vector& bias2, const Tensor& mean2, const Tensor& var2, double eps2,
           const Vector& weight3, const Vector& bias3, const Tensor& mean3, const Tensor& var3, double eps3,
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
  const Scratch affine1(5 * E), affine2(5 * E), affine3(5 * O);
  fill_vectors({weight1, bias1, mean1, var1, eps1}, E, affine1.data);
  fill_vectors({weight2, bias2, mean2, var2, eps2}, E, affine2.data);
  fill_vectors({weight3, bias3, mean3, var3, eps3}, O, affine3.data);

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
  op.stride = stride, op.block = std::min(blocks.size, FILTER_CHANNELS), op.pitch = E;
  FUSEKERN_PICK(bottleneck_depthwise_plan)(op);
  const int64_t ring_floats = parts(blocks.size, op.block) * op.ring_floats;

  // As many images at a time as keep all threads busy; one thread projects each block while it is in the cache.
  const int64_t threads = torch::stable::get_num_threads(), wave = std::min<int64_t>(B, parts(threads, blocks.count()));
  const int64_t together = threads == 1 && !layout.bf16 ? 1 : blocks.count();
  const int64_t block_floats = tile_floats(layout, pixels, blocks.size);
  const int64_t own_floats = layout.bf16 ? tile_floats(layout, pixels, E) : together * block_floats;
  const int64_t slot_floats = own_floats + tile_floats(layout, pixels, O);
  const Scratch rings(wave * blocks.count() * ring_floats), memory(wave * slot_floats);
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
        // The body counts rows from the top of the image.
        BottleneckDepthwise part = op;
        part.channels = channels, part.affine1 = affine1.data + c0, part.affine2 = affine2.data + c0;
        part.wd = static_cast<const char*>(wd.data_ptr()) + c0 * k * k * layout.bytes();
        const auto shifted = [&](const Dense& dense, int64_t width, int64_t row, int64_t channel) {
          const Map map{nullptr, 0, dense.channel(), width * dense.pixel(), dense.pixel()};
          char* const data = static_cast<char*>(dense.data) + (channel * map.channel - row * map.row) * layout.bytes();
          return Map{data, 0, map.channel, map.row, map.column};
        };
        part.y1 = shifted(from, W, staged, 0), part.y2 = shifted(into, w, y0, layout.bf16 ? c0 : 0);
        FUSEKERN_PICK(bottleneck_depthwise_rows)(
            part, staged, y0, y1, rings.data + (slot * blocks.count() + i) * ring_floats, scratch.data);
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
        finish(y3, all, o0, channels, affine3.data, O, residual ? &x : nullptr, to, there);
      };
      for (int64_t first = 0; first < blocks.count(); first += together) {
        const int64_t some = std::min(together, blocks.count() - first);
        for_each(images * some, [&](int64_t item) { expand_and_filter(item / some, first + item % some); });
        for_each(images * shares.count(),
                 [&](int64_t item) { project(item / shares.count(), item % shares.count(), first); });
      }
      staged = std::max(staged, need);
    }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusekern_cpp, m) {
  m.def(
      "inverted_bottleneck_infer(Tensor x, Tensor w1, Tensor wd, Tensor w3, "
      "Tensor? weight1, Tensor? bias1, Tensor mean1, Tensor var1, float eps1, "
      "Tensor? weight2, Tensor? bias2, Tensor mean2, Tensor var2, float eps2, "
      "Tensor? weight3, Tensor? bias3, Tensor mean3, Tensor var3, float eps3, "
      "int stride, bool residual, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusekern_cpp, CPU, m) {
  m.impl("inverted_bottleneck_infer", TORCH_BOX(&infer));
}

}  // namespace fusekern::stages
