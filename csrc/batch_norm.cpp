// The vectors of a batch norm between the stages of inverted_bottleneck; fusekern/ops/_batch_norm.py says what they are.
#include <cmath>
#include <optional>

#include "arguments.h"

namespace fusekern {

namespace {

using Vector = std::optional<Tensor>;

// [rows][channels], or [channels] of a parameter; null if there is none.
float* vectors(const char* name, const Vector& t, std::initializer_list<int64_t> shape) {
  if (!t) return nullptr;
  check(name, *t, shape, ScalarType::Float);
  STD_TORCH_CHECK(t->is_contiguous(), name, " must be contiguous");
  return static_cast<float*>(t->data_ptr());
}

float inverse_of(int64_t count) { return 1.f / static_cast<float>(std::max<int64_t>(count, 1)); }

void batch_norm_fwd(const Vector& stats,  // [2, c]
                    int64_t count,
                    const Vector& mean,  // [c]
                    const Vector& var,   // [c]
                    const Vector& weight, const Vector& bias, double eps,
                    Tensor moments,  // [3, c]
                    Tensor affine) {  // [2, c]
  STD_TORCH_CHECK(moments.dim() == 2, "moments must be [3, c]");
  const int64_t C = moments.size(1);
  const float *const seen = vectors("stats", stats, {2, C}), *const running = vectors("mean", mean, {C}),
              *const spread = vectors("var", var, {C}), *const w = vectors("weight", weight, {C}),
              *const b = vectors("bias", bias, {C});
  float *const m = vectors("moments", moments, {3, C}), *const to = vectors("affine", affine, {2, C});
  STD_TORCH_CHECK((running == nullptr) == (spread == nullptr), "mean and var belong together");
  if (seen != nullptr) {
    const float biased = inverse_of(count), unbiased = inverse_of(count - 1);
    for (int64_t c = 0; c < C; ++c)
      m[c] = seen[c], m[C + c] = seen[C + c] * biased, m[2 * C + c] = seen[C + c] * unbiased;
  } else if (running != nullptr) {
    for (int64_t c = 0; c < C; ++c) m[c] = running[c], m[C + c] = m[2 * C + c] = spread[c];
  }
  for (int64_t c = 0; c < C; ++c) {
    const float scale = (w ? w[c] : 1.f) / std::sqrt(m[C + c] + static_cast<float>(eps));
    to[c] = scale, to[C + c] = (b ? b[c] : 0.f) - m[c] * scale;
  }
}

void batch_norm_bwd(const Tensor& moments,  // [3, c]
                    const Tensor& sums,     // [2, c]
                    const Vector& means,    // [2, c]
                    int64_t count, const Vector& weight, double eps, bool batch,
                    Tensor coef,       // [4, c]
                    Tensor dweight) {  // [c]
  STD_TORCH_CHECK(moments.dim() == 2, "moments must be [3, c]");
  const int64_t C = moments.size(1);
  const float *const m = vectors("moments", moments, {3, C}), *const s = vectors("sums", sums, {2, C}),
              *const all = vectors("means", means, {2, C}), *const w = vectors("weight", weight, {C});
  float *const to = vectors("coef", coef, {4, C}), *const dw = vectors("dweight", dweight, {C});
  const float share = all != nullptr ? 1.f : inverse_of(count), *const of = all != nullptr ? all : s;
  for (int64_t c = 0; c < C; ++c) {
    const float rstd = 1.f / std::sqrt(m[C + c] + static_cast<float>(eps)), p = (w ? w[c] : 1.f) * rstd;
    to[c] = p, to[3 * C + c] = m[c];
    to[C + c] = batch ? -p * rstd * rstd * (of[C + c] * share) : 0.f;
    to[2 * C + c] = batch ? -p * (of[c] * share) : 0.f;
    dw[c] = s[C + c] * rstd;
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusekern_cpp, m) {
  m.def(
      "batch_norm_fwd(Tensor? stats, int count, Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias, float eps, "
      "Tensor(a!) moments, Tensor(b!) affine) -> ()");
  m.def(
      "batch_norm_bwd(Tensor moments, Tensor sums, Tensor? means, int count, Tensor? weight, float eps, bool batch, "
      "Tensor(a!) coef, Tensor(b!) dweight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusekern_cpp, CPU, m) {
  m.impl("batch_norm_fwd", TORCH_BOX(&batch_norm_fwd));
  m.impl("batch_norm_bwd", TORCH_BOX(&batch_norm_bwd));
}

}  // namespace fusekern
