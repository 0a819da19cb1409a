// Linear layers and other products in fp32.
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

// out [R][n] = x [R][d] weight^T + bias (+ residual); activated = gelu(out). The columns of x and weight lie side by side.
inline void linear(int64_t R, int64_t n, int64_t d, const Matrix& x, const float* weight, const float* bias,
                   const Matrix* residual, float* out, float* activated) {
  const int64_t blocks = (n + PRODUCT_COLUMNS - 1) / PRODUCT_COLUMNS, chunks = (R + PRODUCT_ROWS - 1) / PRODUCT_ROWS;
  in_parallel(blocks * chunks, 2 * R * n * d / (blocks * chunks), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item % blocks * PRODUCT_COLUMNS, r = item / blocks * PRODUCT_ROWS;
      MatrixProduct p{};
      p.rows = std::min(PRODUCT_ROWS, R - r), p.columns = std::min(PRODUCT_COLUMNS, n - i), p.terms = d;
      p.a = x.data + r * x.row, p.a_row = x.row, p.a_term = 1;
      p.b = weight + i * d, p.b_term = 1, p.b_column = d;
      p.c = out + r * n + i, p.c_row = n;
      FUSEKERN_PICK(dot_product)(p);
      LinearFinish finish{};
      finish.rows = p.rows, finish.columns = p.columns, finish.ld = n;
      finish.bias = bias == nullptr ? nullptr : bias + i;
      if (residual != nullptr) finish.residual = at(*residual, r, i).data, finish.residual_ld = residual->row;
      finish.out = p.c;
      finish.activated = activated == nullptr ? nullptr : activated + r * n + i;
      FUSEKERN_PICK(linear_finish)(finish);
    }
  });
}

}  // namespace fusekern
