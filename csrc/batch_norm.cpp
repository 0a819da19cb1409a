// A batch norm where no stage of inverted_bottleneck makes its vectors; fusekern/ops/_batch_norm.py says what they are.
#include "batch_norm.h"

#include <optional>

#include "arguments.h"

namespace fusekern {

namespace {

using Vector = std::optional<Tensor>;

// From running statistics, or from the moments that vectors hold already.
void forward_of(const Vector& mean, const Vector& var, const Vector& weight, const Vector& bias, double eps,
                const Vector& vectors) {  // [c] each, but for vectors [5, c]
  if (!vectors) return;
  STD_TORCH_CHECK(vectors->dim() == 2, "vectors must be [5, c]");
  const int64_t C = vectors->size(1);
  const float *const running = vectors_of("mean", mean, {C}), *const spread = vectors_of("var", var, {C}),
              *const w = vectors_of("weight", weight, {C}), *const b = vectors_of("bias", bias, {C});
  float* const to = vectors_of("vectors", vectors, {5, C});
  STD_TORCH_CHECK((running == nullptr) == (spread == nullptr), "mean and var belong together");
  for (int64_t c = 0; c < C; ++c) {
    const float middle = running ? running[c] : to[2 * C + c], biased = spread ? spread[c] : to[3 * C + c],
                unbiased = spread ? spread[c] : to[4 * C + c];
    norm_forward(middle, biased, unbiased, w ? w[c] : 1.f, b ? b[c] : 0.f, static_cast<float>(eps), to + c, C);
  }
}

void batch_norm_fwd(const Vector& mean1, const Vector& var1, const Vector& weight1, const Vector& bias1, double eps1,
                    Vector vectors1, const Vector& mean2, const Vector& var2, const Vector& weight2,
                    const Vector& bias2, double eps2, Vector vectors2, const Vector& mean3, const Vector& var3,
                    const Vector& weight3, const Vector& bias3, double eps3, Vector vectors3) {
  forward_of(mean1, var1, weight1, bias1, eps1, vectors1);
  forward_of(mean2, var2, weight2, bias2, eps2, vectors2);
  forward_of(mean3, var3, weight3, bias3, eps3, vectors3);
}

void batch_norm_bwd(const Tensor& sums,     // [2, c]
                    const Vector& means,    // [2, c]
                    int64_t count,
                    const Tensor& vectors,  // [5, c]
                    const Vector& weight, double eps, bool batch,
                    Tensor coef,       // [4, c]
                    Tensor dweight) {  // [c]
  STD_TORCH_CHECK(vectors.dim() == 2, "vectors must be [5, c]");
  const int64_t C = vectors.size(1);
  const float *const found = vectors_of("vectors", vectors, {5, C}), *const s = vectors_of("sums", sums, {2, C}),
              *const all = vectors_of("means", means, {2, C}), *const w = vectors_of("weight", weight, {C});
  float *const to = vectors_of("coef", coef, {4, C}), *const dw = vectors_of("dweight", dweight, {C});
  const float share = all ? 1.f : inverse_of(static_cast<float>(count)), *const of = all ? all : s;
  for (int64_t c = 0; c < C; ++c)
    norm_backward(found + c, s[C + c], of[c] * share, of[C + c] * share, w ? w[c] : 1.f, static_cast<float>(eps), batch,
                  to + c, dw + c, C);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusekern_cpp, m) {
  m.def(
      "batch_norm_fwd(Tensor? mean1, Tensor? var1, Tensor? weight1, Tensor? bias1, float eps1, Tensor(a!)? vectors1, "
      "Tensor? mean2, Tensor? var2, Tensor? weight2, Tensor? bias2, float eps2, Tensor(b!)? vectors2, "
      "Tensor? mean3, Tensor? var3, Tensor? weight3, Tensor? bias3, float eps3, Tensor(c!)? vectors3) -> ()");
  m.def(
      "batch_norm_bwd(Tensor sums, Tensor? means, int count, Tensor vectors, Tensor? weight, float eps, bool batch, "
      "Tensor(a!) coef, Tensor(b!) dweight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusekern_cpp, CPU, m) {
  m.impl("batch_norm_fwd", TORCH_BOX(&batch_norm_fwd));
  m.impl("batch_norm_bwd", TORCH_BOX(&batch_norm_bwd));
}

}  // namespace fusekern
