#include "conv2former.h"

#include "arguments.h"

namespace fusekern {

namespace {

Conv2former arguments(const Tensor& query, const Tensor& tokens, const Tensor& out, const Tensor& lse, int64_t heads,
                      double scale) {
  STD_TORCH_CHECK(query.dim() == 3 && tokens.dim() == 4, "query must be [B, K, C] and tokens [B, C, h, w]");
  const int64_t B = query.size(0), K = query.size(1), C = query.size(2);
  STD_TORCH_CHECK(heads > 0 && C % heads == 0, "heads must divide C");
  check("query", query, {B, K, C}, query.scalar_type());
  check("tokens", tokens, {B, C, tokens.size(2), tokens.size(3)}, query.scalar_type());
  check("out", out, {B, K, C}, query.scalar_type());
  check("lse", lse, {B, heads, K}, ScalarType::Float);
  STD_TORCH_CHECK(lse.is_contiguous(), "lse must be contiguous");
  Conv2former op{};
  op.size = {B, C, tokens.size(2), tokens.size(3), K, heads, C / heads, static_cast<float>(scale)};
  op.bf16 = is_bf16(query);
  op.pairs = op.bf16 && op.size.d % 2 == 0 && cpu_has_bf16();
  op.query = tokens_of(query);
  op.tokens = map_of(tokens);
  op.out = tokens_of(out);
  op.lse = static_cast<float*>(lse.data_ptr());
  return op;
}

void forward(const Tensor& query,   // [B, K, C]
             const Tensor& tokens,  // [B, C, h, w]
             int64_t heads, double scale,
             Tensor out,    // [B, K, C]
             Tensor lse) {  // [B, heads, K], fp32
  Conv2former op = arguments(query, tokens, out, lse, heads, scale);
  const Attention& size = op.size;

  FUSEKERN_PICK(conv2former_plan)(op, false);
  const auto run = FUSEKERN_PICK(conv2former_fwd);
  const int64_t items = size.B * heads * op.parts;
  in_parallel(items, 4 * size.B * size.H * size.W * size.K * size.C / items, [&](int64_t begin, int64_t end) {
    const Scratch scratch(op.scratch_floats);
    run(op, scratch.data, begin, end);
  });
}

void backward(const Tensor& grad,    // [B, K, C]
              const Tensor& query,   // [B, K, C]
              const Tensor& tokens,  // [B, C, h, w]
              const Tensor& out,     // [B, K, C]
              const Tensor& lse,     // [B, heads, K], fp32
              int64_t heads, double scale,
              Tensor dquery,     // [B, K, C]
              Tensor dtokens) {  // [B, C, h, w]
  Conv2former op = arguments(query, tokens, out, lse, heads, scale);
  const Attention& size = op.size;
  check("grad", grad, {size.B, size.K, size.C}, query.scalar_type());
  check("dquery", dquery, {size.B, size.K, size.C}, query.scalar_type());
  check("dtokens", dtokens, {size.B, size.C, size.H, size.W}, query.scalar_type());
  op.grad = tokens_of(grad);
  op.dquery = tokens_of(dquery);
  op.dtokens = map_of(dtokens);

  FUSEKERN_PICK(conv2former_plan)(op, true);
  const auto pack = FUSEKERN_PICK(conv2former_pack);
  const auto run = FUSEKERN_PICK(conv2former_bwd);
  const auto add = FUSEKERN_PICK(conv2former_add);
  const int64_t all = size.B * heads, items = all * op.parts;
  const Scratch packed(all * op.packed_floats), partial(items * op.partial_floats);
  op.packed = packed.data;
  op.partial = partial.data;
  in_parallel(all, size.K * size.d, [&](int64_t begin, int64_t end) { pack(op, begin, end); });
  in_parallel(items, 10 * size.B * size.H * size.W * size.K * size.C / items, [&](int64_t begin, int64_t end) {
    const Scratch scratch(op.scratch_floats);
    run(op, scratch.data, begin, end);
  });
  in_parallel(all, op.parts * size.K * size.d, [&](int64_t begin, int64_t end) { add(op, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusekern_cpp, m) {
  m.def(
      "conv2former_fwd(Tensor query, Tensor tokens, int heads, float scale, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "conv2former_bwd(Tensor grad, Tensor query, Tensor tokens, Tensor out, Tensor lse, int heads, float scale, "
      "Tensor(a!) dquery, Tensor(b!) dtokens) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusekern_cpp, CPU, m) {
  m.impl("conv2former_fwd", TORCH_BOX(&forward));
  m.impl("conv2former_bwd", TORCH_BOX(&backward));
}

}  // namespace fusekern
