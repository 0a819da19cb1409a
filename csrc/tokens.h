// What former and text_path share on a CPU: the transformer block over the B K rows of the tokens. In bf16 sums, norms and
// softmax are in fp32, and but for attention the products of the backward are torch's.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "arguments.h"
#include "former.h"
#include "linear.h"

namespace fusekern::tokens {

template <class T>
MatrixOf<T> matrix_of(const Tensor& t, int64_t columns) {
  return {static_cast<T*>(t.data_ptr()), columns, 1};
}

template <class T>
constexpr bool IS_BF16 = sizeof(T) == 2;

// Uninitialised memory for a matrix [rows][columns].
template <class T>
struct Room {
  Room(int64_t rows, int64_t columns)
      : scratch((rows * columns * static_cast<int64_t>(sizeof(T)) + 3) / 4),
        matrix{reinterpret_cast<T*>(scratch.data), columns, 1} {}

  const Scratch scratch;
  const MatrixOf<T> matrix;
};

// The same of bf16, by torch.
inline void multiply_all(int64_t rows, int64_t columns, int64_t terms, const MatrixOf<uint16_t>& a,
                         const MatrixOf<uint16_t>& b, const MatrixOf<uint16_t>& c, bool add) {
  const auto tensor = [](const MatrixOf<uint16_t>& m, int64_t rows, int64_t columns) {
    const int64_t shape[] = {rows, columns}, strides[] = {m.row, m.column};
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    return torch::stable::from_blob(m.data, {shape, 2}, {strides, 2}, cpu, ScalarType::BFloat16);
  };
  const Tensor x = tensor(a, rows, terms), y = tensor(b, terms, columns), to = tensor(c, rows, columns);
  TORCH_ERROR_CODE_CHECK(add ? aoti_torch_cpu_addmm_out(to.get(), to.get(), x.get(), y.get(), 1., 1.)
                             : aoti_torch_cpu_mm_out(to.get(), x.get(), y.get()));
}

// A matrix [rows][columns] in fp32 becomes one in fp32 or bf16, whose rows are ld apart.
inline void give(const float* matrix, int64_t rows, int64_t columns, void* to, int64_t ld, bool bf16) {
  LinearFinish rounded{};
  rounded.rows = rows, rounded.columns = rounded.product_ld = columns, rounded.product = matrix;
  rounded.out = to, rounded.ld = ld, rounded.bf16 = bf16;
  FUSEKERN_PICK(linear_finish)(rounded);
}

inline void give(const float* vector, const Tensor& to) {
  give(vector, 1, to.numel(), to.data_ptr(), to.numel(), is_bf16(to));
}

inline void norm(int64_t R, int64_t C, const Tensor& x, const Tensor& gain, const Tensor& shift, double eps,
                 float* mean, float* rstd, bool known, void* out) {
  const bool bf16 = is_bf16(x);
  const int64_t size = bf16 ? 2 : 4;
  const Floats weight(gain), bias(shift);
  in_parallel(R, 16 * C, [&](int64_t begin, int64_t end) {
    FUSEKERN_PICK(former_norm)
    ({end - begin, C, static_cast<char*>(x.data_ptr()) + begin * C * size, weight.data, bias.data,
      static_cast<float>(eps), mean + begin, rstd + begin, known, static_cast<char*>(out) + begin * C * size, bf16});
  });
}

template <class T>
void norm_bwd(int64_t R, int64_t C, const T* grad, const Tensor& x, const float* mean, const float* rstd,
              const Tensor& gain, T* dx, const Tensor& dgain, const Tensor& dshift) {
  constexpr int64_t RUN = 64;  // rows whose sums are one part of the whole sums
  const int64_t runs = parts(R, RUN);
  const Floats weight(gain);
  const Scratch partial(runs * 2 * C), sums(2 * C);
  std::fill(partial.data, partial.data + runs * 2 * C, 0.f);
  in_parallel(runs, 32 * RUN * C, [&, x = matrix_of<T>(x, C)](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      const int64_t r = run * RUN;
      float* const of_run = partial.data + run * 2 * C;
      FUSEKERN_PICK(former_norm_bwd)
      ({std::min(RUN, R - r), C, grad + r * C, x.data + r * C, mean + r, rstd + r, weight.data, dx + r * C, of_run,
        of_run + C, IS_BF16<T>});
    }
  });
  FUSEKERN_PICK(former_sum)(partial.data, runs, 2 * C, 2 * C, sums.data, false);
  give(sums.data, dgain), give(sums.data + C, dshift);
}

template <class T>
void sum(const MatrixOf<T>& x, int64_t R, int64_t columns, const Tensor& to) {
  const Scratch sums(columns);
  in_parallel(parts(columns, PRODUCT_COLUMNS), R * PRODUCT_COLUMNS, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * PRODUCT_COLUMNS, last = std::min(end * PRODUCT_COLUMNS, columns);
    FUSEKERN_PICK(former_sum)(x.data + first, R, last - first, x.row, sums.data + first, IS_BF16<T>);
  });
  give(sums.data, to);
}

struct Sizes {
  int64_t B, K, C, F, heads, d, R;
  bool bf16;

  ScalarType dtype() const { return bf16 ? ScalarType::BFloat16 : ScalarType::Float; }

  float scale() const { return 1.f / std::sqrt(static_cast<float>(d)); }
};

inline Sizes sizes_of(const Tensor& tokens, const Tensor& hidden, int64_t heads) {
  STD_TORCH_CHECK(tokens.dim() == 3 && hidden.dim() == 3, "tokens and hidden must be [B, K, .]");
  const int64_t B = tokens.size(0), K = tokens.size(1), C = tokens.size(2);
  STD_TORCH_CHECK(heads > 0 && C % heads == 0, "heads must divide C");
  return {B, K, C, hidden.size(2), heads, C / heads, B * K, is_bf16(tokens)};
}

inline void check_dense(const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
                        ScalarType dtype = ScalarType::Float) {
  check(name, t, shape, dtype);
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

// Of the dtype of the tokens or in fp32.
inline void check_vector(const Sizes& s, const char* name, const Tensor& t, int64_t length) {
  check_dense(name, t, {length}, t.scalar_type() == s.dtype() ? s.dtype() : ScalarType::Float);
}

// The tokens as one matrix, copied if they are none.
struct Rows {
  Rows(const Tensor& tokens) : tokens(tokens) {
    const int64_t B = tokens.size(0), K = tokens.size(1), C = tokens.size(2);
    row = K > 1 ? tokens.stride(1) : B > 1 ? tokens.stride(0) : C;
    const bool one = (C == 1 || tokens.stride(2) == 1) && (B == 1 || K == 1 || tokens.stride(0) == K * row);
    if (!one) this->tokens = torch::stable::contiguous(tokens), row = C;
  }
  void* data() const { return tokens.data_ptr(); }
  template <class T>
  MatrixOf<T> matrix() const {
    return {static_cast<T*>(data()), row, 1};
  }

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

// What former has in the forward, and in the backward; C++ names of its schema's arguments.
struct Parameters {
  const Tensor &qkv_weight, &qkv_bias, &out_weight, &out_bias, &gain1, &shift1;
  const Tensor &up_weight, &up_bias, &down_weight, &down_bias, &gain2, &shift2;
};

struct Weights {
  const Tensor &qkv_weight, &out_weight, &gain1, &shift1, &up_weight, &down_weight, &gain2;
};

struct Saved {
  const Tensor& qkv;     // [B, K, 3 C]
  const Tensor& mixed;   // [B, K, C]
  const Tensor& lse;     // [B, heads, K]
  const Tensor& sums1;   // [B, K, C]
  const Tensor& hidden;  // [B, K, F]
  const Tensor& sums2;   // [B, K, C]
};

inline void check_weights(const Sizes& s, const Weights& w) {
  check_dense("qkv_weight", w.qkv_weight, {3 * s.C, s.C}, s.dtype());
  check_dense("out_weight", w.out_weight, {s.C, s.C}, s.dtype());
  check_dense("up_weight", w.up_weight, {s.F, s.C}, s.dtype());
  check_dense("down_weight", w.down_weight, {s.C, s.F}, s.dtype());
  for (const auto& [name, vector] : {std::pair{"gain1", &w.gain1}, {"shift1", &w.shift1}, {"gain2", &w.gain2}})
    check_vector(s, name, *vector, s.C);
}

inline void check_saved(const Sizes& s, const Saved& saved) {
  const auto& [qkv, mixed, lse, sums1, hidden, sums2] = saved;
  for (const auto& [name, of] : {std::pair{"mixed", &mixed}, {"sums1", &sums1}, {"sums2", &sums2}})
    check_dense(name, *of, {s.B, s.K, s.C}, s.dtype());
  check_dense("qkv", qkv, {s.B, s.K, 3 * s.C}, s.dtype()), check_dense("hidden", hidden, {s.B, s.K, s.F}, s.dtype());
  check_dense("lse", lse, {s.B, s.heads, s.K});
}

// out [R][.] = x weight^T + bias
inline void linear(const Sizes& s, const Rows& x, const Tensor& weight, const Tensor& bias, void* out,
                   const Rows* residual = nullptr, void* activated = nullptr) {
  const Floats vector(bias);
  Linear l{};
  l.rows = s.R, l.columns = weight.size(0), l.terms = weight.size(1), l.together = s.K, l.bf16 = s.bf16;
  l.x = x.data(), l.x_row = x.row;
  l.weight = weight.data_ptr(), l.bias = vector.data;
  l.out = out, l.activated = activated;
  if (residual != nullptr) l.residual = residual->data(), l.residual_row = residual->row;
  linear(l);
}

// A head's part of some rows, [K][d]. In fp32 it is worked with where it lies; in bf16 by pairs, or in memory of its own,
// which is read and written for it.
template <class T>
struct Head {
  Head(const Sizes& s, const MatrixOf<T>& rows, int64_t row, int64_t column)
      : K(s.K), d(s.d), place(at(rows, row, column)), memory(IS_BF16<T> ? K * d : 0) {
    if constexpr (IS_BF16<T>)
      matrix = {memory.data, d, 1};
    else
      matrix = place;
  }
  const Matrix& read() const {
    if constexpr (IS_BF16<T>) FUSEKERN_PICK(widen_matrix)(place.data, K, d, place.row, memory.data, d);
    return matrix;
  }
  void write() const {
    if constexpr (IS_BF16<T>) give(memory.data, K, d, place.data, place.row, true);
  }
  bool pairs() const { return IS_BF16<T> && d % 2 == 0 && cpu_has_bf16(); }
  Matrix pairs_of_columns() const { return {reinterpret_cast<float*>(place.data), place.row / 2, 1}; }

  const int64_t K, d;
  const MatrixOf<T> place;
  const Scratch memory;
  Matrix matrix;
};

// c [K][K] = a b^T
template <class T>
void compare(const Head<T>& a, const Head<T>& b, const Matrix& c) {
  if (a.pairs())
    multiply(a.K, a.K, a.d / 2, a.pairs_of_columns(), turned(b.pairs_of_columns()), c, false, true);
  else
    multiply(a.K, a.K, a.d, a.read(), turned(b.read()), c, false);
}

// to = p b, or p^T b, of p [K][K]; in pairs it is rounded, as PyTorch rounds it.
template <class T>
void gather(const Matrix& p, bool transposed, const Head<T>& b, const Head<T>& to) {
  const int64_t K = b.K, d = b.d, terms = b.pairs() ? (K + 1) / 2 : K;
  if (b.pairs()) {
    const Scratch left(terms * K), right(terms * d);
    if (transposed)
      FUSEKERN_PICK(pair_rows)(p.data, false, K, K, p.row, left.data);
    else
      FUSEKERN_PICK(pair_columns)(p.data, K, K, p.row, left.data);
    FUSEKERN_PICK(pair_rows)(b.place.data, true, K, d, b.place.row, right.data);
    const Matrix a = transposed ? Matrix{left.data, 1, K} : Matrix{left.data, terms, 1};
    multiply(K, d, terms, a, {right.data, d, 1}, to.matrix, false, true);
  } else {
    multiply(K, d, terms, transposed ? turned(p) : p, b.read(), to.matrix, false);
  }
  to.write();
}

// What a head's tokens gather from one another.
template <class T>
void attend(const Sizes& s, const Tensor& qkv, const Tensor& mixed, const Tensor& lse) {
  for_each_head(s, [&, lse = data_of(lse)](int64_t item, int64_t r, int64_t c, const Matrix& scores, const Matrix&) {
    const MatrixOf<T> rows = matrix_of<T>(qkv, 3 * s.C);
    const Head<T> q(s, rows, r, c), k(s, rows, r, s.C + c), v(s, rows, r, 2 * s.C + c);
    compare(q, k, scores);
    FUSEKERN_PICK(former_softmax)(scores.data, s.K, s.K, s.scale(), lse + item * s.K);
    gather(scores, false, v, Head<T>(s, matrix_of<T>(mixed, s.C), r, c));
  });
}

template <class T>
void attend_bwd(const Sizes& s, const Tensor& qkv, const MatrixOf<T>& dmixed, const MatrixOf<T>& dqkv) {
  const Scratch sums(s.B * s.heads * s.K);
  for_each_head(s, [&](int64_t item, int64_t r, int64_t c, const Matrix& p, const Matrix& dp) {
    const MatrixOf<T> rows = matrix_of<T>(qkv, 3 * s.C);
    const Head<T> q(s, rows, r, c), k(s, rows, r, s.C + c), v(s, rows, r, 2 * s.C + c), g(s, dmixed, r, c);
    compare(q, k, p);
    // Once more as a whole: probabilities by lse would not add up to 1, by which all that V have in common would count.
    FUSEKERN_PICK(former_softmax)(p.data, s.K, s.K, s.scale(), sums.data + item * s.K);
    gather(p, true, g, Head<T>(s, dqkv, r, 2 * s.C + c));
    compare(g, v, dp);
    FUSEKERN_PICK(former_softmax_bwd)(p.data, s.K, s.K, s.scale(), dp.data);
    gather(dp, false, k, Head<T>(s, dqkv, r, c));
    gather(dp, true, q, Head<T>(s, dqkv, r, s.C + c));
  });
}

// moments [4][R]: mean and 1 / standard deviation of either norm
inline void forward(const Sizes& s, const Rows& image, const Parameters& p, double eps, const Tensor& out,
                    const Saved& saved, float* moments) {
  const auto& [qkv, mixed, lse, sums1, hidden, sums2] = saved;
  const int64_t C = s.C, F = s.F, R = s.R;
  check_weights(s, {p.qkv_weight, p.out_weight, p.gain1, p.shift1, p.up_weight, p.down_weight, p.gain2});
  for (const auto& [name, vector] : {std::pair{"out_bias", &p.out_bias}, {"down_bias", &p.down_bias}, {"shift2", &p.shift2}})
    check_vector(s, name, *vector, C);
  check_vector(s, "qkv_bias", p.qkv_bias, 3 * C), check_vector(s, "up_bias", p.up_bias, F);
  check_saved(s, saved), check_dense("out", out, {s.B, s.K, C}, s.dtype());

  linear(s, image, p.qkv_weight, p.qkv_bias, qkv.data_ptr());
  (s.bf16 ? attend<uint16_t> : attend<float>)(s, qkv, mixed, lse);
  linear(s, mixed, p.out_weight, p.out_bias, sums1.data_ptr(), &image);
  const Tensor u = torch::stable::empty_like(sums1), activated = torch::stable::empty_like(hidden);
  const Rows normal(u);
  norm(R, C, sums1, p.gain1, p.shift1, eps, moments, moments + R, false, u.data_ptr());
  linear(s, normal, p.up_weight, p.up_bias, hidden.data_ptr(), nullptr, activated.data_ptr());
  linear(s, activated, p.down_weight, p.down_bias, sums2.data_ptr(), &normal);
  norm(R, C, sums2, p.gain2, p.shift2, eps, moments + 2 * R, moments + 3 * R, false, out.data_ptr());
}

struct Gradients {
  const Tensor &qkv_weight, &qkv_bias, &out_weight, &out_bias, &gain1, &shift1;
  const Tensor &up_weight, &up_bias, &down_weight, &down_bias, &gain2, &shift2;
};

// dimage [R][C]: the gradient of the image.
template <class T>
void backward(const Sizes& s, const T* grad, const MatrixOf<T>& image, const Weights& w, const Saved& saved,
              float* moments, const MatrixOf<T>& dimage, const Gradients& to) {
  const auto& [qkv, mixed, lse, sums1, hidden, sums2] = saved;
  const int64_t C = s.C, F = s.F, R = s.R;
  const ScalarType dtype = s.dtype();
  check_weights(s, w), check_saved(s, saved);
  check_dense("dqkv_weight", to.qkv_weight, {3 * C, C}, dtype), check_dense("dout_weight", to.out_weight, {C, C}, dtype);
  check_dense("dup_weight", to.up_weight, {F, C}, dtype), check_dense("ddown_weight", to.down_weight, {C, F}, dtype);
  for (const auto& [name, vector] :
       {std::pair{"dout_bias", &to.out_bias}, {"dgain1", &to.gain1}, {"dshift1", &to.shift1},
        {"ddown_bias", &to.down_bias}, {"dgain2", &to.gain2}, {"dshift2", &to.shift2}})
    check_vector(s, name, *vector, C);
  check_vector(s, "dqkv_bias", to.qkv_bias, 3 * C), check_vector(s, "dup_bias", to.up_bias, F);

  // d: the gradient of sums2, then of the first norm's result, then of mixed; in dimage that of sums1.
  const Room<T> memory(R, C), other(R, C), wide(R, F), wider(R, F), attended(R, 3 * C);
  const MatrixOf<T>&d = memory.matrix, &u = other.matrix, &dhidden = wide.matrix, &act = wider.matrix;
  const MatrixOf<T>& dqkv = attended.matrix;
  const T* const x = static_cast<const T*>(hidden.data_ptr());

  norm_bwd(R, C, grad, sums2, moments + 2 * R, moments + 3 * R, w.gain2, d.data, to.gain2, to.shift2);
  sum(d, R, C, to.down_bias);
  in_parallel(R, 40 * F, [&](int64_t begin, int64_t end) {
    FUSEKERN_PICK(former_gelu)(x + begin * F, (end - begin) * F, act.data + begin * F, s.bf16);
  });
  multiply_all(C, F, R, turned(d), act, matrix_of<T>(to.down_weight, F), false);
  multiply_all(R, F, C, d, matrix_of<T>(w.down_weight, F), dhidden, false);
  in_parallel(R, 40 * F, [&](int64_t begin, int64_t end) {
    FUSEKERN_PICK(former_gelu_bwd)(x + begin * F, (end - begin) * F, dhidden.data + begin * F, s.bf16);
  });
  sum(dhidden, R, F, to.up_bias);
  norm(R, C, sums1, w.gain1, w.shift1, 0, moments, moments + R, true, u.data);
  multiply_all(F, C, R, turned(dhidden), u, matrix_of<T>(to.up_weight, C), false);
  multiply_all(R, C, F, dhidden, matrix_of<T>(w.up_weight, C), d, true);

  norm_bwd(R, C, d.data, sums1, moments, moments + R, w.gain1, dimage.data, to.gain1, to.shift1);
  sum(dimage, R, C, to.out_bias);
  multiply_all(C, C, R, turned(dimage), matrix_of<T>(mixed, C), matrix_of<T>(to.out_weight, C), false);
  multiply_all(R, C, C, dimage, matrix_of<T>(w.out_weight, C), d, false);
  attend_bwd(s, qkv, d, dqkv);
  sum(dqkv, R, 3 * C, to.qkv_bias);
  multiply_all(3 * C, C, R, turned(dqkv), image, matrix_of<T>(to.qkv_weight, C), false);
  multiply_all(R, C, 3 * C, dqkv, matrix_of<T>(w.qkv_weight, C), dimage, true);
}

// run(a number of the dtype)
template <class F>
void of_dtype(const Sizes& s, const F& run) {
  s.bf16 ? run(uint16_t()) : run(0.f);
}

}  // namespace fusekern::tokens
