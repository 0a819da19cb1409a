// former: what former and text_path hand to their bodies. Rows of matrices lie one after the other; what has no type is fp32 or bf16.
#pragma once

#include <cstdint>

#include "cpu.h"

namespace fusekern {

// Layer norm of some rows.
struct FormerNorm {
  int64_t rows, C;
  const void* x;
  const float *gain, *shift;
  float eps;
  float *mean, *rstd;  // [rows]
  bool known;          // the last two, else they are results
  void* out;           // [rows][C]
  bool bf16;
};

struct FormerNormBackward {
  int64_t rows, C;
  const void *grad, *x;
  const float *mean, *rstd, *gain;
  void* dx;               // [rows][C]
  float *dgain, *dshift;  // [C], added to
  bool bf16;
};

FUSEKERN_BODY(
    void former_norm(const FormerNorm& norm);
    void former_norm_bwd(const FormerNormBackward& norm);
    void former_gelu(const void* x, int64_t count, void* out, bool bf16);
    // d *= gelu'(x)
    void former_gelu_bwd(const void* x, int64_t count, void* d, bool bf16);
    // Rows of scores become softmax(scale scores); lse: the logarithms of their sums.
    void former_softmax(float* scores, int64_t rows, int64_t columns, float scale, float* lse);
    // d becomes the gradient of the scores, from that of their softmax p.
    void former_softmax_bwd(const float* p, int64_t rows, int64_t columns, float scale, float* d);
    // sums [columns] of x [rows][columns]
    void former_sum(const void* x, int64_t rows, int64_t columns, int64_t ld, float* sums, bool bf16);)

}  // namespace fusekern
