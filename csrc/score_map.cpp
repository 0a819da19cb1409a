#include "score_map.h"

#include "arguments.h"

namespace fusekern {

namespace {

// Chunks of an image's pixels over which the gradient of its text is summed apart, when there is but one image.
constexpr int64_t CHUNKS = 16;

ScoreMap arguments(const Tensor& image, const Tensor& text, bool normalize, bool concat, const Tensor& to) {
  STD_TORCH_CHECK(image.dim() == 4 && text.dim() == 3, "image must be [B, C, H, W] and text [B, K, C]");
  STD_TORCH_CHECK(to.stride(1) == 1 || (to.stride(3) == 1 && to.stride(2) == to.size(3)),
                  "results must be contiguous or channels_last");
  ScoreMap op{};
  op.B = image.size(0), op.C = image.size(1), op.H = image.size(2), op.W = image.size(3), op.K = text.size(1);
  op.bf16 = is_bf16(image), op.normalize = normalize, op.concat = concat;
  check("image", image, {op.B, op.C, op.H, op.W}, image.scalar_type());
  check("text", text, {op.B, op.K, op.C}, image.scalar_type());
  op.image = map_of(image), op.text = tokens_of(text);
  FUSEKERN_PICK(score_map_plan)(op);
  return op;
}

void pack(const ScoreMap& op, bool backward) {
  in_parallel(op.B, op.K * op.C, [&](int64_t begin, int64_t end) {
    Scratch scratch(op.scratch_floats);
    FUSEKERN_PICK(score_map_pack)(op, backward, begin, end, scratch.data);
  });
}

void score_map_fwd(const Tensor& image,  // [B, C, H, W]
                       const Tensor& text,   // [B, K, C]
                       bool normalize, bool concat,
                       Tensor out) {  // [B, K, H, W], or [B, C + K, H, W] with concat
  ScoreMap op = arguments(image, text, normalize, concat, out);
  check("out", out, {op.B, op.K + (concat ? op.C : 0), op.H, op.W}, image.scalar_type());
  op.out = map_of(out);
  const Scratch packed(op.B * op.text_floats);
  op.packed = packed.data;
  pack(op, false);
  in_parallel(op.B * op.tiles, op.H * op.W / op.tiles * op.K * op.C, [&](int64_t begin, int64_t end) {
    Scratch scratch(op.scratch_floats);
    FUSEKERN_PICK(score_map_fwd)(op, begin, end, scratch.data);
  });
}

void score_map_bwd(const Tensor& grad,   // as out
                       const Tensor& image,  // [B, C, H, W]
                       const Tensor& text,   // [B, K, C]
                       bool normalize, bool concat,
                       Tensor dimage,    // [B, C, H, W]
                       Tensor dtext) {  // [B, K, C]
  ScoreMap op = arguments(image, text, normalize, concat, dimage);
  check("grad", grad, {op.B, op.K + (concat ? op.C : 0), op.H, op.W}, image.scalar_type());
  check("dimage", dimage, {op.B, op.C, op.H, op.W}, image.scalar_type());
  check("dtext", dtext, {op.B, op.K, op.C}, image.scalar_type());
  op.grad = map_of(grad), op.dimage = map_of(dimage), op.dtext = tokens_of(dtext);
  const int64_t per_image = std::max<int64_t>(1, CHUNKS / op.B);
  op.chunk_tiles = (op.tiles + per_image - 1) / per_image;
  op.chunks = (op.tiles + op.chunk_tiles - 1) / op.chunk_tiles;
  const Scratch packed(op.B * op.text_floats), partial(op.B * op.chunks * op.text_floats);
  op.packed = packed.data, op.partial = partial.data;
  pack(op, true);
  in_parallel(op.B * op.chunks, op.H * op.W / op.chunks * op.K * op.C, [&](int64_t begin, int64_t end) {
    Scratch scratch(op.scratch_floats);
    FUSEKERN_PICK(score_map_bwd)(op, begin, end, scratch.data);
  });
  in_parallel(op.B, op.K * op.C * op.chunks, [&](int64_t begin, int64_t end) {
    Scratch scratch(op.scratch_floats);
    FUSEKERN_PICK(score_map_sum)(op, begin, end, scratch.data);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusekern_cpp, m) {
  m.def("score_map_fwd(Tensor image, Tensor text, bool normalize, bool concat, Tensor(a!) out) -> ()");
  m.def(
      "score_map_bwd(Tensor grad, Tensor image, Tensor text, bool normalize, bool concat, "
      "Tensor(a!) dimage, Tensor(b!) dtext) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusekern_cpp, CPU, m) {
  m.impl("score_map_fwd", TORCH_BOX(&score_map_fwd));
  m.impl("score_map_bwd", TORCH_BOX(&score_map_bwd));
}

}  // namespace fusekern
