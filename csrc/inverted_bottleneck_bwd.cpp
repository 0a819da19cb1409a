// inverted_bottleneck backward in stages, tile by tile as its forward: from the gradient of what is behind a norm to that
// of what is behind the one before.
#include "inverted_bottleneck_stages.h"
#include "batch_norm.h"

namespace fusekern::stages {

namespace {

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

// out = coef(dv, y)
void through_norm(const Pixels& dv, const Pixels& y, int64_t pixels, int64_t c0, const Tensor& coef, const Dense& out,
                  const Chunk& to) {
  BottleneckPass pass = pass_over(out.layout, pixels, out.C);
  pass.a = dv, pass.b = y, pass.out = out.pixels(to, 0);
  give(pass, coef, c0);
  FUSEKERN_PICK(bottleneck_coef)(pass);
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
  m.impl("inverted_bottleneck_output_bwd", TORCH_BOX(&output_bwd));
  m.impl("inverted_bottleneck_project_bwd", TORCH_BOX(&project_bwd));
  m.impl("inverted_bottleneck_depthwise_bwd", TORCH_BOX(&depthwise_bwd));
  m.impl("inverted_bottleneck_expand_bwd", TORCH_BOX(&expand_bwd));
}

}  // namespace fusekern::stages
