// Linear layers in fp32 by matrix_product.
#pragma once

#include "arguments.h"
#include "matrix_product.h"

namespace fusekern {

// Of a product at a time: an item of work, whose result stays in the cache.
constexpr int64_t PRODUCT_COLUMNS = 256, PRODUCT_ROWS = 512;

struct Matrix {
  float* data;
  int64_t row, column;  // strides
};

inline Matrix turned(const Matrix& m) { return {m.data, m.column, m.row}; }
inline Matrix at(const Matrix& m, int64_t row, int64_t column) {
  return {m.data + row * m.row + column * m.column, m.row, m.column};
}

// c [rows][columns] (+)= a [rows][terms] b [terms][columns], by one thread.
inline void multiply(int64_t rows, int64_t columns, int64_t terms, const Matrix& a, const Matrix& b, const Matrix& c,
                     bool add) {
  MatrixProduct p{};
  p.rows = rows, p.columns = columns, p.terms = terms, p.add = add;
  p.a = a.data, p.a_row = a.row, p.a_term = a.column;
  p.b = b.data, p.b_term = b.row, p.b_column = b.column;
  p.c = c.data, p.c_row = c.row;
  const Scratch packed(FUSEKERN_PICK(matrix_product_floats)());
  FUSEKERN_PICK(matrix_product)(p, packed.data);
}

// out [R][n] = x [R][d] weight^T + bias (+ residual); activated = gelu(out)
inline void linear(int64_t R, int64_t n, int64_t d, const Matrix& x, const float* weight, const float* bias,
                   const Matrix* residual, float* out, float* activated) {
  const int64_t blocks = (n + PRODUCT_COLUMNS - 1) / PRODUCT_COLUMNS, chunks = (R + PRODUCT_ROWS - 1) / PRODUCT_ROWS;
  // Either the weight is copied together, as much work as some 12 rows, or a vector holds up to 16 rows, and what is
  // copied is the input, and the result on its way to where it belongs: a tenth. As measured with AVX-512.
  const bool straight = 10 * (R + 12) < 11 * ((R + 15) / 16 * 16);
  in_parallel(blocks * chunks, 2 * R * n * d / (blocks * chunks), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item % blocks * PRODUCT_COLUMNS, r = item / blocks * PRODUCT_ROWS;
      const int64_t columns = std::min(PRODUCT_COLUMNS, n - i), rows = std::min(PRODUCT_ROWS, R - r);
      const Scratch product(straight ? 0 : columns * rows);
      const Matrix some{const_cast<float*>(weight) + i * d, d, 1};
      if (straight)
        multiply(rows, columns, d, at(x, r, 0), turned(some), {out + r * n + i, n, 1}, false);
      else
        multiply(columns, rows, d, some, turned(at(x, r, 0)), {product.data, rows, 1}, false);
      LinearFinish finish{};
      finish.product = straight ? nullptr : product.data;
      finish.rows = rows, finish.columns = columns, finish.ld = n;
      finish.bias = bias == nullptr ? nullptr : bias + i;
      if (residual != nullptr) finish.residual = at(*residual, r, i).data, finish.residual_ld = residual->row;
      finish.out = out + r * n + i;
      finish.activated = activated == nullptr ? nullptr : activated + r * n + i;
      FUSEKERN_PICK(linear_finish)(finish);
    }
  });
}

}  // namespace fusekern
