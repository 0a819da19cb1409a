// Products of matrices on a CPU, and what follows that of a linear layer.
#pragma once

#include <cstdint>

#include "cpu.h"

namespace fusekern {

// Rows of lines of memory that will be read or written soon, to be fetched into the cache beside other work.
struct Beside {
  const float* at;
  int64_t rows, row, lines;  // from one row to the next, in floats; lines of 16 floats in each
};

// c [rows][columns] (+)= a [rows][terms] b [terms][columns], in fp32. The columns of c lie side by side, and either the
// columns or the terms of b.
struct MatrixProduct {
  int64_t rows, columns, terms;
  const float *a, *b;
  float* c;
  int64_t a_row, a_term, b_term, b_column, c_row;  // strides
  bool add;
  bool pairs;           // of matrix_product, where cpu_has_bf16(): two bf16 stand for each number of a and b
  const float* addend;  // of matrix_product: what is added to lies here, null for in c itself
  int64_t addend_row;
  const uint64_t* kept;   // of a, for sparse_product: see find_not_zero
  const uint8_t* wanted;  // [rows][columns] bits, for masked_product
  int64_t wanted_row;     // bytes, of a multiple of 32 columns
  Beside beside;
};

// c [rows][columns] in fp32 = a [rows][terms] b [columns][terms]^T, both in fp32 or bf16. The terms lie side by side in
// both, and the columns of c.
struct DotProduct {
  int64_t rows, columns, terms;
  const void *a, *b;
  float* c;
  int64_t a_row, b_column, c_row;  // strides
  bool bf16, pairs;                // pairs: bf16 on a CPU that multiplies two at a time
};

// What becomes of some rows and columns of a product, which may be `out` itself. What has no type is fp32 or bf16.
struct LinearFinish {
  int64_t rows, columns;
  const float* product;  // [rows][columns] at ld
  int64_t product_ld;
  const float* bias;     // [columns], or null
  const void* residual;  // [rows][columns] at its own ld, or null
  int64_t residual_ld;
  void* out;        // [rows][columns] at ld
  void* activated;  // the same, or null
  int64_t ld;
  bool bf16;
};

FUSEKERN_BODY(
    int64_t matrix_product_floats(const MatrixProduct& product);  // of working memory
    void matrix_product(const MatrixProduct& product, float* packed);
    void dot_product(const DotProduct& product);
    // Of an a whose terms lie side by side: which of its numbers are not zero, and how many; and the product, to the
    // same bits, by passing over those that are.
    int64_t sparse_product_words(const MatrixProduct& product);
    int64_t find_not_zero(const MatrixProduct& product, uint64_t* kept);
    int64_t sparse_product_floats(const MatrixProduct& product);  // of working memory
    void sparse_product(const MatrixProduct& product, float* memory);
    // Of such an a, with zero for what is not wanted of c.
    int64_t masked_product_floats();  // of working memory
    void masked_product(const MatrixProduct& product, float* memory);
    // to [columns][rows], whose rows are ld apart, from a matrix [rows][columns]
    void turn_matrix(const float* matrix, int64_t rows, int64_t columns, float* to, int64_t ld);
    // Two rows, of bf16 or fp32, become one of pairs; or two columns, of fp32. Behind the last there are zeros.
    void pair_rows(const void* matrix, bool bf16, int64_t rows, int64_t columns, int64_t ld, float* to);
    void pair_columns(const float* matrix, int64_t rows, int64_t columns, int64_t ld, float* to);
    // Of bf16 in matrices whose rows are `from` and `to` numbers apart.
    void widen_matrix(const uint16_t* matrix, int64_t rows, int64_t columns, int64_t from, float* out, int64_t to);
    // out = product + bias (+ residual); activated = gelu(out)
    void linear_finish(const LinearFinish& finish);)

}  // namespace fusekern
