// Products of fp32 matrices on a CPU, and what follows that of a linear layer.
#pragma once

#include <cstdint>

#include "cpu.h"

namespace fusekern {

// c [rows][columns] (+)= a [rows][terms] b [terms][columns], in fp32. The columns of c lie side by side, and either the
// columns or the terms of b.
struct MatrixProduct {
  int64_t rows, columns, terms;
  const float *a, *b;
  float* c;
  int64_t a_row, a_term, b_term, b_column, c_row;  // strides
  bool add;
};

// Some rows and columns of a product, which lies transposed, on their way to where they belong, or which are there.
struct LinearFinish {
  const float* product;  // [columns][rows], or null: out holds it
  int64_t rows, columns, ld;
  const float* bias;      // [columns], or null
  const float* residual;  // [rows][columns] at its own ld, or null
  int64_t residual_ld;
  float* out;        // [rows][columns] at ld
  float* activated;  // the same, or null
};

FUSEKERN_BODY(
    int64_t matrix_product_floats();  // of working memory
    void matrix_product(const MatrixProduct& product, float* packed);
    // out = product^T + bias (+ residual); activated = gelu(out)
    void linear_finish(const LinearFinish& finish);)

}  // namespace fusekern
