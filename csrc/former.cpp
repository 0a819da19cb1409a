// former over the tokens.
#include "tokens.h"

namespace fusekern::tokens {

namespace {

void former_fwd(const Tensor& tokens,  // [B, K, C]
                const Tensor& qkv_weight, const Tensor& qkv_bias, const Tensor& out_weight, const Tensor& out_bias,
                const Tensor& gain1, const Tensor& shift1, const Tensor& up_weight, const Tensor& up_bias,
                const Tensor& down_weight, const Tensor& down_bias, const Tensor& gain2, const Tensor& shift2,
                int64_t heads, double eps,
                Tensor out,  // [B, K, C]
                Tensor qkv, Tensor mixed, Tensor lse, Tensor sums1, Tensor hidden, Tensor sums2,
                Tensor moments) {  // [4, B K]
  const Sizes s = sizes_of(tokens, hidden, heads);
  check("tokens", tokens, {s.B, s.K, s.C}, s.dtype()), check_dense("moments", moments, {4, s.R});
  forward(s, tokens,
          {qkv_weight, qkv_bias, out_weight, out_bias, gain1, shift1, up_weight, up_bias, down_weight, down_bias, gain2,
           shift2},
          eps, out, {qkv, mixed, lse, sums1, hidden, sums2}, data_of(moments));
}

void former_bwd(const Tensor& grad,    // [B, K, C]
                const Tensor& tokens,  // [B, K, C]
                const Tensor& qkv_weight, const Tensor& out_weight, const Tensor& gain1, const Tensor& shift1,
                const Tensor& up_weight, const Tensor& down_weight, const Tensor& gain2, const Tensor& qkv,
                const Tensor& mixed, const Tensor& lse, const Tensor& sums1, const Tensor& hidden, const Tensor& sums2,
                const Tensor& moments, int64_t heads, Tensor dtokens, Tensor dqkv_weight, Tensor dqkv_bias,
                Tensor dout_weight, Tensor dout_bias, Tensor dgain1, Tensor dshift1, Tensor dup_weight, Tensor dup_bias,
                Tensor ddown_weight, Tensor ddown_bias, Tensor dgain2, Tensor dshift2) {
  const Sizes s = sizes_of(tokens, hidden, heads);
  for (const auto& [name, of] : {std::pair{"tokens", &tokens}, {"grad", &grad}})
    check(name, *of, {s.B, s.K, s.C}, s.dtype());
  check_dense("dtokens", dtokens, {s.B, s.K, s.C}, s.dtype()), check_dense("moments", moments, {4, s.R});
  const Tensor dense = torch::stable::contiguous(grad);
  const Rows rows(tokens);
  of_dtype(s, [&](auto number) {
    typedef decltype(number) T;
    backward<T>(s, static_cast<T*>(dense.data_ptr()), rows.matrix<T>(),
                {qkv_weight, out_weight, gain1, shift1, up_weight, down_weight, gain2},
                {qkv, mixed, lse, sums1, hidden, sums2}, data_of(moments), matrix_of<T>(dtokens, s.C),
                {dqkv_weight, dqkv_bias, dout_weight, dout_bias, dgain1, dshift1, dup_weight, dup_bias, ddown_weight,
                 ddown_bias, dgain2, dshift2});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusekern_cpp, m) {
  m.def(
      "former_fwd(Tensor tokens, Tensor qkv_weight, Tensor qkv_bias, Tensor out_weight, Tensor out_bias, Tensor gain1, "
      "Tensor shift1, Tensor up_weight, Tensor up_bias, Tensor down_weight, Tensor down_bias, Tensor gain2, "
      "Tensor shift2, int heads, float eps, Tensor(a!) out, Tensor(b!) qkv, Tensor(c!) mixed, Tensor(d!) lse, "
      "Tensor(e!) sums1, Tensor(f!) hidden, Tensor(g!) sums2, Tensor(h!) moments) -> ()");
  m.def(
      "former_bwd(Tensor grad, Tensor tokens, Tensor qkv_weight, Tensor out_weight, Tensor gain1, Tensor shift1, "
      "Tensor up_weight, Tensor down_weight, Tensor gain2, Tensor qkv, Tensor mixed, Tensor lse, Tensor sums1, "
      "Tensor hidden, Tensor sums2, Tensor moments, int heads, Tensor(a!) dtokens, Tensor(b!) dqkv_weight, "
      "Tensor(c!) dqkv_bias, Tensor(d!) dout_weight, Tensor(e!) dout_bias, Tensor(f!) dgain1, Tensor(g!) dshift1, "
      "Tensor(h!) dup_weight, Tensor(i!) dup_bias, Tensor(j!) ddown_weight, Tensor(k!) ddown_bias, Tensor(l!) dgain2, "
      "Tensor(m!) dshift2) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusekern_cpp, CPU, m) {
  m.impl("former_fwd", TORCH_BOX(&former_fwd));
  m.impl("former_bwd", TORCH_BOX(&former_bwd));
}

}  // namespace fusekern::tokens
