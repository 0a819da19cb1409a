#include "former2conv.h"

#include "arguments.h"

namespace fusekern {

namespace {

Former2conv arguments(const Tensor& image, const Tensor& key, const Tensor& value, int64_t heads, double scale) {
  STD_TORCH_CHECK(image.dim() == 4 && key.dim() == 3, "image must be [B, C, H, W] and key [B, K, C]");
  const int64_t B = image.size(0), C = image.size(1), K = key.size(1);
  STD_TORCH_CHECK(heads > 0 && C % heads == 0, "heads must divide C");
  check("image", image, {B, C, image.size(2), image.size(3)}, image.scalar_type());
  check("key", key, {B, K, C}, image.scalar_type());
  check("value", value, {B, K, C}, image.scalar_type());
  Former2conv op{};
  op.size = {B, C, image.size(2), image.size(3), K, heads, C / heads, static_cast<float>(scale)};
  op.bf16 = is_bf16(image);
  op.pairs = op.bf16 && op.size.d % 2 == 0 && cpu_has_bf16();
  op.image = map_of(image);
  op.key = tokens_of(key);
  op.value = tokens_of(value);
  return op;
}

void forward(const Tensor& image,  // [B, C, H, W]
             const Tensor& key,    // [B, K, C]
             const Tensor& value,  // [B, K, C]
             int64_t heads, double scale,
             Tensor out) {  // [B, C, H, W]
  Former2conv op = arguments(image, key, value, heads, scale);
  const Attention& size = op.size;
  check("out", out, {size.B, size.C, size.H, size.W}, image.scalar_type());
  op.out = map_of(out);

  FUSEKERN_PICK(former2conv_plan)(op, false);
  const auto pack = FUSEKERN_PICK(former2conv_pack);
  const auto run = FUSEKERN_PICK(former2conv_fwd);
  const Scratch packed(size.B * heads * op.packed_floats);
  op.packed = packed.data;
  in_parallel(size.B * heads, size.K * size.d, [&](int64_t begin, int64_t end) { pack(op, false, begin, end); });
  const int64_t items = size.B * op.parts * heads;
  in_parallel(items, 4 * size.B * size.H * size.W * size.K * size.C / items, [&](int64_t begin, int64_t end) {
    const Scratch scratch(op.scratch_floats);
    run(op, scratch.data, begin, end);
  });
}

void backward(const Tensor& grad,   // [B, C, H, W]
              const Tensor& image,  // [B, C, H, W]
              const Tensor& key,    // [B, K, C]
              const Tensor& value,  // [B, K, C]
              int64_t heads, double scale,
              Tensor dimage,    // [B, C, H, W]
              Tensor dkey,      // [B, K, C]
              Tensor dvalue) {  // [B, K, C]
  Former2conv op = arguments(image, key, value, heads, scale);
  const Attention& size = op.size;
  check("grad", grad, {size.B, size.C, size.H, size.W}, image.scalar_type());
  check("dimage", dimage, {size.B, size.C, size.H, size.W}, image.scalar_type());
  check("dkey", dkey, {size.B, size.K, size.C}, image.scalar_type());
  check("dvalue", dvalue, {size.B, size.K, size.C}, image.scalar_type());
  op.grad = map_of(grad);
  op.dimage = map_of(dimage);
  op.dkey = tokens_of(dkey);
  op.dvalue = tokens_of(dvalue);

  FUSEKERN_PICK(former2conv_plan)(op, true);
  const auto pack = FUSEKERN_PICK(former2conv_pack);
  const auto run = FUSEKERN_PICK(former2conv_bwd);
  const auto add = FUSEKERN_PICK(former2conv_add);
  const int64_t all = size.B * heads, items = all * op.parts;
  const Scratch packed(all * op.packed_floats), partial(items * op.partial_floats);
  op.packed = packed.data;
  op.partial = partial.data;
  in_parallel(all, size.K * size.d, [&](int64_t begin, int64_t end) { pack(op, true, begin, end); });
  in_parallel(items, 10 * size.B * size.H * size.W * size.K * size.C / items, [&](int64_t begin, int64_t end) {
    const Scratch scratch(op.scratch_floats);
    run(op, scratch.data, begin, end);
  });
  in_parallel(all, op.parts * size.K * size.d, [&](int64_t begin, int64_t end) { add(op, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusekern_cpp, m) {
  m.def("former2conv_fwd(Tensor image, Tensor key, Tensor value, int heads, float scale, Tensor(a!) out) -> ()");
  m.def(
      "former2conv_bwd(Tensor grad, Tensor image, Tensor key, Tensor value, int heads, float scale, "
      "Tensor(a!) dimage, Tensor(b!) dkey, Tensor(c!) dvalue) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusekern_cpp, CPU, m) {
  m.impl("former2conv_fwd", TORCH_BOX(&forward));
  m.impl("former2conv_bwd", TORCH_BOX(&backward));
}

}  // namespace fusekern
