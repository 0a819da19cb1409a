// Linear layers, and products of fp32 matrices.
#pragma once

#include "arguments.h"
#include "matrix_product.h"

namespace fusekern {

// Of a product at a time: an item of work, whose result stays in the cache.
constexpr int64_t PRODUCT_COLUMNS = 256, PRODUCT_ROWS = 512;

template <class T>  // float, or uint16_t for bf16
struct MatrixOf {
  T* data;
  int64_t row, column;  // strides
};

typedef MatrixOf<float> Matrix;

template <class T>
MatrixOf<T> turned(const MatrixOf<T>& m) {
  return {m.data, m.column, m.row};
}

template <class T>
MatrixOf<T> at(const MatrixOf<T>& m, int64_t row, int64_t column) {
  return {m.data + row * m.row + column * m.column, m.row, m.column};
}

// c [rows][columns] (+)= a [rows][terms] b [terms][columns], by one thread; of pairs of bf16 for terms, if it is said.
inline void multiply(int64_t rows, int64_t columns, int64_t terms, const Matrix& a, const Matrix& b, const Matrix& c,
                     bool add, bool pairs = false) {
  MatrixProduct p{};
  p.rows = rows, p.columns = columns, p.terms = terms, p.add = add, p.pairs = pairs;
  p.a = a.data, p.a_row = a.row, p.a_term = a.column;
  p.b = b.data, p.b_term = b.row, p.b_column = b.column;
  p.c = c.data, p.c_row = c.row;
  const Scratch packed(FUSEKERN_PICK(matrix_product_floats)(p));
  FUSEKERN_PICK(matrix_product)(p, packed.data);
}

// c [rows][columns] (+)= a [rows][terms] b [terms][columns], in blocks of rows and columns.
inline void multiply_all(int64_t rows, int64_t columns, int64_t terms, const Matrix& a, const Matrix& b,
                         const Matrix& c, bool add) {
  const int64_t across = parts(columns, PRODUCT_COLUMNS), down = parts(rows, PRODUCT_ROWS);
  in_parallel(across * down, 2 * rows * columns * terms / (across * down), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t r = item / across * PRODUCT_ROWS, i = item % across * PRODUCT_COLUMNS;
      multiply(std::min(PRODUCT_ROWS, rows - r), std::min(PRODUCT_COLUMNS, columns - i), terms, at(a, r, 0),
               at(b, 0, i), at(c, r, i), add);
    }
  });
}

// A contiguous vector in fp32.
struct Floats {
  explicit Floats(const Tensor& vector)
      : memory(is_bf16(vector) ? vector.numel() : 0),
        data(is_bf16(vector) ? memory.data : static_cast<float*>(vector.data_ptr())) {
    if (is_bf16(vector))
      FUSEKERN_PICK(widen_matrix)
      (static_cast<uint16_t*>(vector.data_ptr()), 1, vector.numel(), 0, memory.data, 0);
  }

  const Scratch memory;
  const float* const data;
};

// out [rows][columns] = x [rows][terms] weight^T + bias (+ residual); activated = gelu(out). The numbers of a row lie side
// by side; all but the bias are fp32 or bf16.
struct Linear {
  int64_t rows, columns, terms;
  int64_t together;  // rows of one text or image: these alone decide how to multiply, and so the bits
  bool bf16;
  const void* x;
  int64_t x_row;
  const void* weight;    // [columns][terms]
  const float* bias;     // or null
  void* out;             // [rows][columns]
  const void* residual;  // or null
  int64_t residual_row;
  void* activated;  // as out, or null
};

inline void linear(const Linear& l) {
  // With AVX2 half the registers hold few sums, and adding up their lanes costs more than copies that many rows share.
  const bool by_columns = cpu_isa() == Isa::avx2 && !l.bf16 && l.together >= 24;
  const int64_t across = parts(l.columns, PRODUCT_COLUMNS), down = parts(l.rows, PRODUCT_ROWS), size = l.bf16 ? 2 : 4;
  const auto moved = [size](const void* p, int64_t numbers) {
    return p == nullptr ? nullptr : static_cast<char*>(const_cast<void*>(p)) + numbers * size;
  };
  in_parallel(across * down, 2 * l.rows * l.columns * l.terms / (across * down), [&](int64_t begin, int64_t end) {
    const Scratch sums(l.bf16 ? PRODUCT_COLUMNS * std::min(PRODUCT_ROWS, l.rows) : 0);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item % across * PRODUCT_COLUMNS, r = item / across * PRODUCT_ROWS;
      LinearFinish finish{};
      finish.rows = std::min(PRODUCT_ROWS, l.rows - r), finish.columns = std::min(PRODUCT_COLUMNS, l.columns - i);
      finish.out = moved(l.out, r * l.columns + i), finish.ld = l.columns, finish.bf16 = l.bf16;
      float* const product = l.bf16 ? sums.data : static_cast<float*>(finish.out);
      finish.product = product, finish.product_ld = l.bf16 ? PRODUCT_COLUMNS : l.columns;
      finish.bias = l.bias == nullptr ? nullptr : l.bias + i;
      finish.residual = moved(l.residual, r * l.residual_row + i), finish.residual_ld = l.residual_row;
      finish.activated = moved(l.activated, r * l.columns + i);
      void *const x = moved(l.x, r * l.x_row), *const weight = moved(l.weight, i * l.terms);
      if (by_columns)
        multiply(finish.rows, finish.columns, l.terms, {static_cast<float*>(x), l.x_row, 1},
                 {static_cast<float*>(weight), 1, l.terms}, {product, finish.product_ld, 1}, false);
      else
        FUSEKERN_PICK(dot_product)
        ({finish.rows, finish.columns, l.terms, x, weight, product, l.x_row, l.terms, finish.product_ld, l.bf16,
          cpu_has_bf16()});
      FUSEKERN_PICK(linear_finish)(finish);
    }
  });
}

}  // namespace fusekern
