// text_path: former with the linear layers around it.
#include "tokens.h"

namespace fusekern::tokens {

namespace {

// A linear layer of the result, [B, K, C]; in the backward `image` is its gradient.
struct Exit {
  const char* name;
  const Tensor &weight, &bias, &image;
};

std::vector<Exit> exits_of(const Sizes& s, std::initializer_list<Exit> some) {
  for (const Exit& exit : some) {
    check_dense(exit.name, exit.weight, {s.C, s.C}, s.dtype()), check_vector(s, exit.name, exit.bias, s.C);
    check_dense(exit.name, exit.image, {s.B, s.K, s.C}, s.dtype());
  }
  return some;
}

void text_path_fwd(const Tensor& tokens, const Tensor& gathered,  // [B, K, C]
                   const Tensor& entry_weight, const Tensor& entry_bias, const Tensor& gain0, const Tensor& shift0,
                   const Tensor& qkv_weight, const Tensor& qkv_bias, const Tensor& out_weight, const Tensor& out_bias,
                   const Tensor& gain1, const Tensor& shift1, const Tensor& up_weight, const Tensor& up_bias,
                   const Tensor& down_weight, const Tensor& down_bias, const Tensor& gain2, const Tensor& shift2,
                   const Tensor& key_weight, const Tensor& key_bias, const Tensor& value_weight,
                   const Tensor& value_bias, const std::optional<Tensor>& query_weight,
                   const std::optional<Tensor>& query_bias, int64_t heads, double eps,
                   Tensor out, Tensor key, Tensor value, Tensor query,  // [B, K, C]
                   Tensor sums0,                                        // [B, K, C]
                   Tensor qkv, Tensor mixed, Tensor lse, Tensor sums1, Tensor hidden, Tensor sums2,
                   Tensor moments) {  // [6, B K]
  const Sizes s = sizes_of(tokens, hidden, heads);
  const int64_t C = s.C, R = s.R;
  for (const auto& [name, of] : {std::pair{"tokens", &tokens}, {"gathered", &gathered}})
    check(name, *of, {s.B, s.K, C}, s.dtype());
  check_dense("entry_weight", entry_weight, {C, C}, s.dtype()), check_dense("sums0", sums0, {s.B, s.K, C}, s.dtype());
  for (const auto& [name, vector] : {std::pair{"entry_bias", &entry_bias}, {"gain0", &gain0}, {"shift0", &shift0}})
    check_vector(s, name, *vector, C);
  check_dense("moments", moments, {6, R});
  auto exits = exits_of(s, {{"key", key_weight, key_bias, key}, {"value", value_weight, value_bias, value}});
  if (query_weight) exits.push_back(exits_of(s, {{"query", *query_weight, *query_bias, query}})[0]);

  const Rows rows(tokens);
  const Tensor first = torch::stable::empty_like(sums0);
  float* const m = data_of(moments);
  linear(s, gathered, entry_weight, entry_bias, sums0.data_ptr(), &rows);
  norm(R, C, sums0, gain0, shift0, eps, m, m + R, false, first.data_ptr());
  forward(s, first,
          {qkv_weight, qkv_bias, out_weight, out_bias, gain1, shift1, up_weight, up_bias, down_weight, down_bias, gain2,
           shift2},
          eps, out, {qkv, mixed, lse, sums1, hidden, sums2}, m + 2 * R);
  for (const Exit& exit : exits) linear(s, out, exit.weight, exit.bias, exit.image.data_ptr());
}

void text_path_bwd(const Tensor& grad, const Tensor& dkey, const Tensor& dvalue, const std::optional<Tensor>& dquery,
                   const Tensor& gathered, const Tensor& entry_weight, const Tensor& gain0, const Tensor& shift0,
                   const Tensor& qkv_weight, const Tensor& out_weight, const Tensor& gain1, const Tensor& shift1,
                   const Tensor& up_weight, const Tensor& down_weight, const Tensor& gain2, const Tensor& key_weight,
                   const Tensor& value_weight, const std::optional<Tensor>& query_weight, const Tensor& out,
                   const Tensor& sums0, const Tensor& qkv, const Tensor& mixed, const Tensor& lse, const Tensor& sums1,
                   const Tensor& hidden, const Tensor& sums2, const Tensor& moments, int64_t heads, Tensor dtokens,
                   Tensor dgathered, Tensor dentry_weight, Tensor dentry_bias, Tensor dgain0, Tensor dshift0,
                   Tensor dqkv_weight, Tensor dqkv_bias, Tensor dout_weight, Tensor dout_bias, Tensor dgain1,
                   Tensor dshift1, Tensor dup_weight, Tensor dup_bias, Tensor ddown_weight, Tensor ddown_bias,
                   Tensor dgain2, Tensor dshift2, Tensor dkey_weight, Tensor dkey_bias, Tensor dvalue_weight,
                   Tensor dvalue_bias, std::optional<Tensor> dquery_weight, std::optional<Tensor> dquery_bias) {
  const Sizes s = sizes_of(grad, hidden, heads);
  const int64_t C = s.C, R = s.R;
  const ScalarType dtype = s.dtype();
  for (const auto& [name, of] : {std::pair{"grad", &grad}, {"gathered", &gathered}})
    check(name, *of, {s.B, s.K, C}, dtype);
  for (const auto& [name, of] :
       {std::pair{"out", &out}, {"sums0", &sums0}, {"dtokens", &dtokens}, {"dgathered", &dgathered}})
    check_dense(name, *of, {s.B, s.K, C}, dtype);
  for (const auto& [name, of] : {std::pair{"entry_weight", &entry_weight}, {"dentry_weight", &dentry_weight}})
    check_dense(name, *of, {C, C}, dtype);
  for (const auto& [name, vector] : {std::pair{"gain0", &gain0}, {"shift0", &shift0}, {"dentry_bias", &dentry_bias},
                                     {"dgain0", &dgain0}, {"dshift0", &dshift0}})
    check_vector(s, name, *vector, C);
  check_dense("moments", moments, {6, R});
  const bool query = query_weight.has_value();
  STD_TORCH_CHECK(dquery.has_value() == query && dquery_weight.has_value() == query && dquery_bias.has_value() == query,
                  "query_weight, dquery, dquery_weight and dquery_bias come together");
  const Tensor dk = torch::stable::contiguous(dkey), dv = torch::stable::contiguous(dvalue);
  const Tensor dq = query ? torch::stable::contiguous(*dquery) : dk;
  auto exits = exits_of(s, {{"key", dkey_weight, dkey_bias, dk}, {"value", dvalue_weight, dvalue_bias, dv}});
  if (query) exits.push_back(exits_of(s, {{"query", *dquery_weight, *dquery_bias, dq}})[0]);

  const Tensor dense = torch::stable::contiguous(grad);
  const Rows from(gathered);
  float* const m = data_of(moments);
  of_dtype(s, [&](auto number) {
    typedef decltype(number) T;
    // g: the gradient of the result, then of the first norm's.
    const Room<T> memory(R, C), other(R, C), normal(R, C);
    const MatrixOf<T>&g = memory.matrix, &dimage = other.matrix, &first = normal.matrix;
    const MatrixOf<T> dsums0 = matrix_of<T>(dtokens, C);
    std::copy_n(static_cast<const T*>(dense.data_ptr()), R * C, g.data);
    for (size_t i = 0; i < exits.size(); ++i) {
      const Exit& to = exits[i];
      const Tensor& weight = i == 0 ? key_weight : i == 1 ? value_weight : *query_weight;
      check_dense(to.name, weight, {C, C}, dtype);
      const MatrixOf<T> d = matrix_of<T>(to.image, C);
      multiply_all(R, C, C, d, matrix_of<T>(weight, C), g, true);
      multiply_all(C, C, R, turned(d), matrix_of<T>(out, C), matrix_of<T>(to.weight, C), false);
      sum(d, R, C, to.bias);
    }
    norm(R, C, sums0, gain0, shift0, 0, m, m + R, true, first.data);
    backward<T>(s, g.data, first, {qkv_weight, out_weight, gain1, shift1, up_weight, down_weight, gain2},
                {qkv, mixed, lse, sums1, hidden, sums2}, m + 2 * R, dimage,
                {dqkv_weight, dqkv_bias, dout_weight, dout_bias, dgain1, dshift1, dup_weight, dup_bias, ddown_weight,
                 ddown_bias, dgain2, dshift2});
    norm_bwd(R, C, dimage.data, sums0, m, m + R, gain0, dsums0.data, dgain0, dshift0);
    sum(dsums0, R, C, dentry_bias);
    multiply_all(C, C, R, turned(dsums0), from.matrix<T>(), matrix_of<T>(dentry_weight, C), false);
    multiply_all(R, C, C, dsums0, matrix_of<T>(entry_weight, C), matrix_of<T>(dgathered, C), false);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusekern_cpp, m) {
  m.def(
      "text_path_fwd(Tensor tokens, Tensor gathered, Tensor entry_weight, Tensor entry_bias, Tensor gain0, "
      "Tensor shift0, Tensor qkv_weight, Tensor qkv_bias, Tensor out_weight, Tensor out_bias, Tensor gain1, "
      "Tensor shift1, Tensor up_weight, Tensor up_bias, Tensor down_weight, Tensor down_bias, Tensor gain2, "
      "Tensor shift2, Tensor key_weight, Tensor key_bias, Tensor value_weight, Tensor value_bias, "
      "Tensor? query_weight, Tensor? query_bias, int heads, float eps, Tensor(a!) out, Tensor(b!) key, "
      "Tensor(c!) value, Tensor(d!) query, Tensor(e!) sums0, Tensor(f!) qkv, Tensor(g!) mixed, Tensor(h!) lse, "
      "Tensor(i!) sums1, Tensor(j!) hidden, Tensor(k!) sums2, Tensor(l!) moments) -> ()");
  m.def(
      "text_path_bwd(Tensor grad, Tensor dkey, Tensor dvalue, Tensor? dquery, Tensor gathered, Tensor entry_weight, "
      "Tensor gain0, Tensor shift0, Tensor qkv_weight, Tensor out_weight, Tensor gain1, Tensor shift1, "
      "Tensor up_weight, Tensor down_weight, Tensor gain2, Tensor key_weight, Tensor value_weight, "
      "Tensor? query_weight, Tensor out, Tensor sums0, Tensor qkv, Tensor mixed, Tensor lse, Tensor sums1, "
      "Tensor hidden, Tensor sums2, Tensor moments, int heads, Tensor(a!) dtokens, Tensor(b!) dgathered, "
      "Tensor(c!) dentry_weight, Tensor(d!) dentry_bias, Tensor(e!) dgain0, Tensor(f!) dshift0, "
      "Tensor(g!) dqkv_weight, Tensor(h!) dqkv_bias, Tensor(i!) dout_weight, Tensor(j!) dout_bias, Tensor(k!) dgain1, "
      "Tensor(l!) dshift1, Tensor(m!) dup_weight, Tensor(n!) dup_bias, Tensor(o!) ddown_weight, Tensor(p!) ddown_bias, "
      "Tensor(q!) dgain2, Tensor(r!) dshift2, Tensor(s!) dkey_weight, Tensor(t!) dkey_bias, Tensor(u!) dvalue_weight, "
      "Tensor(v!) dvalue_bias, Tensor(w!)? dquery_weight, Tensor(x!)? dquery_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusekern_cpp, CPU, m) {
  m.impl("text_path_fwd", TORCH_BOX(&text_path_fwd));
  m.impl("text_path_bwd", TORCH_BOX(&text_path_bwd));
}

}  // namespace fusekern::tokens
