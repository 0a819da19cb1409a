// What former does between its matrix products: layer norms, softmax, and gradients.
#pragma once

#include "former.h"
#include "linear_body.h"

namespace fusekern::FUSEKERN_ISA {

namespace text {

template <class T>
static void norm(const FormerNorm& n) {
  for (int64_t r = 0; r < n.rows; ++r) {
    const T* const x = static_cast<const T*>(n.x) + r * n.C;
    if (!n.known) {
      V total = zero(), apart = zero();
      each(n.C, [&](int64_t c, Lanes lanes) { total = total + load(x + c, lanes); });
      n.mean[r] = sum(total) / static_cast<float>(n.C);
      each(n.C, [&](int64_t c, Lanes lanes) {
        const V distance = only(load(x + c, lanes) - set1(n.mean[r]), lanes);
        apart = fma(distance, distance, apart);
      });
      n.rstd[r] = 1.f / __builtin_sqrtf(sum(apart) / static_cast<float>(n.C) + n.eps);
    }
    const V mean = set1(n.mean[r]), rstd = set1(n.rstd[r]);
    each(n.C, [&](int64_t c, Lanes lanes) {
      const V normal = (load(x + c, lanes) - mean) * rstd;
      const V out = fma(normal, load(n.gain + c, lanes), load(n.shift + c, lanes));
      store(static_cast<T*>(n.out) + r * n.C + c, out, lanes);
    });
  }
}

template <class T>
static void norm_bwd(const FormerNormBackward& n) {
  const float share = 1.f / static_cast<float>(n.C);
  for (int64_t r = 0; r < n.rows; ++r) {
    const T *const grad = static_cast<const T*>(n.grad) + r * n.C, *const x = static_cast<const T*>(n.x) + r * n.C;
    const V mean = set1(n.mean[r]), rstd = set1(n.rstd[r]);
    V total = zero(), product = zero();
    each(n.C, [&](int64_t c, Lanes lanes) {
      const V g = load(grad + c, lanes), normal = (load(x + c, lanes) - mean) * rstd;
      const V scaled = g * load(n.gain + c, lanes);
      total = total + scaled, product = fma(scaled, normal, product);
      store(n.dgain + c, fma(g, normal, load(n.dgain + c, lanes)), lanes);
      store(n.dshift + c, load(n.dshift + c, lanes) + g, lanes);
    });
    const V first_part = set1(sum(total) * share), second = set1(sum(product) * share);
    each(n.C, [&](int64_t c, Lanes lanes) {
      const V normal = (load(x + c, lanes) - mean) * rstd;
      const V scaled = load(grad + c, lanes) * load(n.gain + c, lanes);
      store(static_cast<T*>(n.dx) + r * n.C + c, rstd * (scaled - first_part - normal * second), lanes);
    });
  }
}

template <class T>
static void sum_rows(const T* x, int64_t rows, int64_t columns, int64_t ld, float* sums) {
  each(columns, [&](int64_t c, Lanes lanes) {
    // Runs, then their sums: one run of all rows would round a sum of hundreds as often.
    V total = zero();
    for (int64_t r = 0; r < rows;) {
      V run = zero();
      for (const int64_t end = r + 32 < rows ? r + 32 : rows; r < end; ++r) run = run + load(x + r * ld + c, lanes);
      total = total + run;
    }
    store(sums + c, total, lanes);
  });
}

}  // namespace text

void former_norm(const FormerNorm& n) {
  with_type(n.bf16, [&]<class T>(T) { text::norm<T>(n); });
}

void former_norm_bwd(const FormerNormBackward& n) {
  with_type(n.bf16, [&]<class T>(T) { text::norm_bwd<T>(n); });
}

void former_gelu(const void* x, int64_t count, void* out, bool is_bf16) {
  using namespace text;
  with_type(is_bf16, [&]<class T>(T) {
    each(count, [&](int64_t i, Lanes lanes) {
      store(static_cast<T*>(out) + i, gelu(load(static_cast<const T*>(x) + i, lanes)), lanes);
    });
  });
}

void former_gelu_bwd(const void* x, int64_t count, void* d, bool is_bf16) {
  using namespace text;
  with_type(is_bf16, [&]<class T>(T) {
    each(count, [&](int64_t i, Lanes lanes) {
      T* const to = static_cast<T*>(d) + i;
      store(to, load(to, lanes) * gelu_slope(load(static_cast<const T*>(x) + i, lanes)), lanes);
    });
  });
}

void former_softmax(float* scores, int64_t rows, int64_t columns, float scale, float* lse) {
  using namespace text;
  for (int64_t r = 0; r < rows; ++r) {
    float* const row = scores + r * columns;
    V most = set1(row[0]);
    each(columns, [&](int64_t c, Lanes lanes) {
      const V x = load(row + c, lanes);
      most = max(most, pick((Bits)(only(set1(1.f), lanes) == zero()), most, x));
    });
    const V largest = set1(max(most));
    V total = zero();
    each(columns, [&](int64_t c, Lanes lanes) {
      const V x = only(exponential((load(row + c, lanes) - largest) * set1(scale)), lanes);
      total = total + x;
      store(row + c, x, lanes);
    });
    const float all = sum(total);
    const V share = set1(1.f / all);
    each(columns, [&](int64_t c, Lanes lanes) { store(row + c, load(row + c, lanes) * share, lanes); });
    lse[r] = max(most) * scale + __builtin_logf(all);
  }
}

void former_softmax_bwd(const float* p, int64_t rows, int64_t columns, float scale, float* d) {
  using namespace text;
  for (int64_t r = 0; r < rows; ++r) {
    const float* const weight = p + r * columns;
    float* const row = d + r * columns;
    V total = zero();
    each(columns, [&](int64_t c, Lanes lanes) { total = fma(load(weight + c, lanes), load(row + c, lanes), total); });
    const V middle = set1(sum(total));
    each(columns, [&](int64_t c, Lanes lanes) {
      store(row + c, load(weight + c, lanes) * (load(row + c, lanes) - middle) * set1(scale), lanes);
    });
  }
}

void former_sum(const void* x, int64_t rows, int64_t columns, int64_t ld, float* sums, bool is_bf16) {
  using namespace text;
  is_bf16 ? sum_rows(static_cast<const bf16*>(x), rows, columns, ld, sums)
          : sum_rows(static_cast<const float*>(x), rows, columns, ld, sums);
}

}  // namespace fusekern::FUSEKERN_ISA
