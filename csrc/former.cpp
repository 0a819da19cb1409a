// former over the B K rows of the tokens, in fp32.
#include "former.h"

#include <cmath>
#include <utility>

#include "arguments.h"
#include "linear.h"

namespace fusekern {

namespace {

float* data_of(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }
Matrix matrix_of(const Tensor& t, int64_t columns) { return {data_of(t), columns, 1}; }

int64_t parts(int64_t count, int64_t most) { return (count + most - 1) / most; }

// The same in blocks of rows and columns.
void multiply_in_parallel(int64_t rows, int64_t columns, int64_t terms, const Matrix& a, const Matrix& b,
                          const Matrix& c, bool add) {
  const int64_t across = parts(columns, PRODUCT_COLUMNS), down = parts(rows, PRODUCT_ROWS);
  in_parallel(across * down, 2 * rows * columns * terms / (across * down), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t r = item / across * PRODUCT_ROWS, i = item % across * PRODUCT_COLUMNS;
      multiply(std::min(PRODUCT_ROWS, rows - r), std::min(PRODUCT_COLUMNS, columns - i), terms, at(a, r, 0), at(b, 0, i), at(c, r, i),
               add);
    }
  });
}

void norm(int64_t R, int64_t C, const Tensor& x, const Tensor& gain, const Tensor& shift, double eps, float* mean,
          float* rstd, bool known, float* out) {
  in_parallel(R, 16 * C, [&](int64_t begin, int64_t end) {
    FUSEKERN_PICK(former_norm)
    ({end - begin, C, data_of(x) + begin * C, data_of(gain), data_of(shift), static_cast<float>(eps), mean + begin,
      rstd + begin, known, out + begin * C});
  });
}

void norm_bwd(int64_t R, int64_t C, const float* grad, const Tensor& x, const float* mean, const float* rstd,
              const Tensor& gain, float* dx, const Tensor& dgain, const Tensor& dshift) {
  constexpr int64_t RUN = 64;  // rows whose sums are one part of the whole sums
  const int64_t runs = parts(R, RUN);
  const Scratch partial(runs * 2 * C);
  std::fill(partial.data, partial.data + runs * 2 * C, 0.f);
  in_parallel(runs, 32 * RUN * C, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      const int64_t r = run * RUN;
      float* const sums = partial.data + run * 2 * C;
      FUSEKERN_PICK(former_norm_bwd)
      ({std::min(RUN, R - r), C, grad + r * C, data_of(x) + r * C, mean + r, rstd + r, data_of(gain), dx + r * C, sums,
        sums + C});
    }
  });
  FUSEKERN_PICK(former_sum)(partial.data, runs, C, 2 * C, data_of(dgain));
  FUSEKERN_PICK(former_sum)(partial.data + C, runs, C, 2 * C, data_of(dshift));
}

void sum(const float* x, int64_t R, int64_t columns, const Tensor& sums) {
  in_parallel(parts(columns, PRODUCT_COLUMNS), R * PRODUCT_COLUMNS, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * PRODUCT_COLUMNS, last = std::min(end * PRODUCT_COLUMNS, columns);
    FUSEKERN_PICK(former_sum)(x + first, R, last - first, columns, data_of(sums) + first);
  });
}

struct Sizes {
  int64_t B, K, C, F, heads, d, R;

  float scale() const { return 1.f / std::sqrt(static_cast<float>(d)); }
};

Sizes sizes_of(const Tensor& tokens, const Tensor& hidden, int64_t heads) {
  STD_TORCH_CHECK(tokens.dim() == 3 && hidden.dim() == 3, "tokens and hidden must be [B, K, .]");
  const int64_t B = tokens.size(0), K = tokens.size(1), C = tokens.size(2);
  STD_TORCH_CHECK(heads > 0 && C % heads == 0, "heads must divide C");
  return {B, K, C, hidden.size(2), heads, C / heads, B * K};
}

void check_dense(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
  check(name, t, shape, ScalarType::Float);
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

// The tokens as one matrix, copied if they are none.
struct Rows {
  explicit Rows(const Tensor& tokens) : tokens(tokens) {
    const int64_t B = tokens.size(0), K = tokens.size(1), C = tokens.size(2);
    row = K > 1 ? tokens.stride(1) : B > 1 ? tokens.stride(0) : C;
    const bool one = (C == 1 || tokens.stride(2) == 1) && (B == 1 || K == 1 || tokens.stride(0) == K * row);
    if (!one) this->tokens = torch::stable::contiguous(tokens), row = C;
  }
  Matrix matrix() const { return {data_of(tokens), row, 1}; }

  Tensor tokens;
  int64_t row;
};

// f(item, its first row, its first channel, two matrices [K][K]) for each head of each text.
template <class F>
void for_each_head(const Sizes& s, const F& f) {
  in_parallel(s.B * s.heads, 4 * s.K * s.K * s.d, [&](int64_t begin, int64_t end) {
    const Scratch scores(2 * s.K * s.K);
    for (int64_t item = begin; item < end; ++item)
      f(item, item / s.heads * s.K, item % s.heads * s.d, Matrix{scores.data, s.K, 1},
        Matrix{scores.data + s.K * s.K, s.K, 1});
  });
}

void former_fwd(const Tensor& tokens,  // [B, K, C]
                const Tensor& qkv_weight, const Tensor& qkv_bias, const Tensor& out_weight, const Tensor& out_bias,
                const Tensor& gain1, const Tensor& shift1, const Tensor& up_weight, const Tensor& up_bias,
                const Tensor& down_weight, const Tensor& down_bias, const Tensor& gain2, const Tensor& shift2,
                int64_t heads, double eps,
                Tensor out,      // [B, K, C]
                Tensor qkv,      // [B, K, 3 C]
                Tensor mixed,    // [B, K, C]
                Tensor lse,      // [B, heads, K]
                Tensor sums1,    // [B, K, C]
                Tensor hidden,   // [B, K, F]
                Tensor sums2,    // [B, K, C]
                Tensor moments) {  // [4, B K]: mean and 1 / standard deviation of either norm
  const Sizes s = sizes_of(tokens, hidden, heads);
  const int64_t B = s.B, K = s.K, C = s.C, F = s.F, R = s.R;
  check("tokens", tokens, {B, K, C}, ScalarType::Float);
  check_dense("qkv_weight", qkv_weight, {3 * C, C}), check_dense("qkv_bias", qkv_bias, {3 * C});
  check_dense("out_weight", out_weight, {C, C}), check_dense("out_bias", out_bias, {C});
  check_dense("up_weight", up_weight, {F, C}), check_dense("up_bias", up_bias, {F});
  check_dense("down_weight", down_weight, {C, F}), check_dense("down_bias", down_bias, {C});
  for (const auto& [name, vector] : {std::pair{"gain1", &gain1}, {"shift1", &shift1}, {"gain2", &gain2}, {"shift2", &shift2}})
    check_dense(name, *vector, {C});
  for (const auto& [name, of] : {std::pair{"out", &out}, {"mixed", &mixed}, {"sums1", &sums1}, {"sums2", &sums2}})
    check_dense(name, *of, {B, K, C});
  check_dense("qkv", qkv, {B, K, 3 * C}), check_dense("hidden", hidden, {B, K, F});
  check_dense("lse", lse, {B, heads, K}), check_dense("moments", moments, {4, R});

  const Rows rows(tokens);
  const Matrix image = rows.matrix();
  linear(R, 3 * C, C, image, data_of(qkv_weight), data_of(qkv_bias), nullptr, data_of(qkv), nullptr);
  for_each_head(s, [&](int64_t item, int64_t r, int64_t c, const Matrix& scores, const Matrix&) {
    const Matrix q = at(matrix_of(qkv, 3 * C), r, c), k = at(q, 0, C), v = at(q, 0, 2 * C);
    multiply(K, K, s.d, q, turned(k), scores, false);
    FUSEKERN_PICK(former_softmax)(scores.data, K, K, s.scale(), data_of(lse) + item * K);
    multiply(K, s.d, K, scores, v, at(matrix_of(mixed, C), r, c), false);
  });
  linear(R, C, C, matrix_of(mixed, C), data_of(out_weight), data_of(out_bias), &image, data_of(sums1), nullptr);
  const Scratch normal(R * C), activated(R * F);
  const Matrix u{normal.data, C, 1}, act{activated.data, F, 1};
  float* const m = data_of(moments);
  norm(R, C, sums1, gain1, shift1, eps, m, m + R, false, u.data);
  linear(R, F, C, u, data_of(up_weight), data_of(up_bias), nullptr, data_of(hidden), act.data);
  linear(R, C, F, act, data_of(down_weight), data_of(down_bias), &u, data_of(sums2), nullptr);
  norm(R, C, sums2, gain2, shift2, eps, m + 2 * R, m + 3 * R, false, data_of(out));
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
  const int64_t B = s.B, K = s.K, C = s.C, F = s.F, R = s.R;
  check("tokens", tokens, {B, K, C}, ScalarType::Float), check("grad", grad, {B, K, C}, ScalarType::Float);
  for (const auto& [name, of] : {std::pair{"qkv_weight", &qkv_weight}, {"dqkv_weight", &dqkv_weight}})
    check_dense(name, *of, {3 * C, C});
  for (const auto& [name, of] : {std::pair{"out_weight", &out_weight}, {"dout_weight", &dout_weight}})
    check_dense(name, *of, {C, C});
  for (const auto& [name, of] : {std::pair{"up_weight", &up_weight}, {"dup_weight", &dup_weight}})
    check_dense(name, *of, {F, C});
  for (const auto& [name, of] : {std::pair{"down_weight", &down_weight}, {"ddown_weight", &ddown_weight}})
    check_dense(name, *of, {C, F});
  for (const auto& [name, of] :
       {std::pair{"gain1", &gain1}, {"shift1", &shift1}, {"gain2", &gain2}, {"dout_bias", &dout_bias},
        {"dgain1", &dgain1}, {"dshift1", &dshift1}, {"ddown_bias", &ddown_bias}, {"dgain2", &dgain2},
        {"dshift2", &dshift2}})
    check_dense(name, *of, {C});
  check_dense("dqkv_bias", dqkv_bias, {3 * C}), check_dense("dup_bias", dup_bias, {F});
  for (const auto& [name, of] : {std::pair{"mixed", &mixed}, {"sums1", &sums1}, {"sums2", &sums2}, {"dtokens", &dtokens}})
    check_dense(name, *of, {B, K, C});
  check_dense("qkv", qkv, {B, K, 3 * C}), check_dense("hidden", hidden, {B, K, F});
  check_dense("lse", lse, {B, heads, K}), check_dense("moments", moments, {4, R});

  const Rows rows(tokens);
  const Tensor dense = torch::stable::contiguous(grad);
  float* const m = data_of(moments);
  const Scratch sums(B * heads * K);
  // d: the gradient of sums2, then of the first norm's result, then of mixed; in dtokens that of sums1.
  const Scratch memory(R * C), other(R * C), wide(R * F), wider(R * F), attended(R * 3 * C);
  const Matrix d{memory.data, C, 1}, u{other.data, C, 1}, dhidden{wide.data, F, 1}, act{wider.data, F, 1};
  const Matrix dsums1 = matrix_of(dtokens, C), dqkv{attended.data, 3 * C, 1};

  norm_bwd(R, C, data_of(dense), sums2, m + 2 * R, m + 3 * R, gain2, d.data, dgain2, dshift2);
  sum(d.data, R, C, ddown_bias);
  in_parallel(R, 40 * F, [&](int64_t begin, int64_t end) {
    FUSEKERN_PICK(former_gelu)(data_of(hidden) + begin * F, (end - begin) * F, act.data + begin * F);
  });
  multiply_in_parallel(C, F, R, turned(d), act, matrix_of(ddown_weight, F), false);
  multiply_in_parallel(R, F, C, d, matrix_of(down_weight, F), dhidden, false);
  in_parallel(R, 40 * F, [&](int64_t begin, int64_t end) {
    FUSEKERN_PICK(former_gelu_bwd)(data_of(hidden) + begin * F, (end - begin) * F, dhidden.data + begin * F);
  });
  sum(dhidden.data, R, F, dup_bias);
  norm(R, C, sums1, gain1, shift1, 0, m, m + R, true, u.data);
  multiply_in_parallel(F, C, R, turned(dhidden), u, matrix_of(dup_weight, C), false);
  multiply_in_parallel(R, C, F, dhidden, matrix_of(up_weight, C), d, true);

  norm_bwd(R, C, d.data, sums1, m, m + R, gain1, dsums1.data, dgain1, dshift1);
  sum(dsums1.data, R, C, dout_bias);
  multiply_in_parallel(C, C, R, turned(dsums1), matrix_of(mixed, C), matrix_of(dout_weight, C), false);
  multiply_in_parallel(R, C, C, dsums1, matrix_of(out_weight, C), d, false);
  for_each_head(s, [&](int64_t item, int64_t r, int64_t c, const Matrix& p, const Matrix& dp) {
    const Matrix q = at(matrix_of(qkv, 3 * C), r, c), k = at(q, 0, C), v = at(q, 0, 2 * C);
    const Matrix dq = at(dqkv, r, c), dk = at(dq, 0, C), dv = at(dq, 0, 2 * C), dmixed = at(d, r, c);
    multiply(K, K, s.d, q, turned(k), p, false);
    // Once more as a whole: probabilities by lse would not add up to 1, by which all that V have in common would count.
    FUSEKERN_PICK(former_softmax)(p.data, K, K, s.scale(), sums.data + item * K);
    multiply(K, s.d, K, turned(p), dmixed, dv, false);
    multiply(K, K, s.d, dmixed, turned(v), dp, false);
    FUSEKERN_PICK(former_softmax_bwd)(p.data, K, K, s.scale(), dp.data);
    multiply(K, s.d, K, dp, k, dq, false);
    multiply(K, s.d, K, turned(dp), q, dk, false);
  });
  sum(dqkv.data, R, 3 * C, dqkv_bias);
  multiply_in_parallel(3 * C, C, R, turned(dqkv), rows.matrix(), matrix_of(dqkv_weight, C), false);
  multiply_in_parallel(R, C, 3 * C, dqkv, matrix_of(qkv_weight, C), dsums1, true);
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

}  // namespace fusekern
