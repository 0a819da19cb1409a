// Checks of the tensors of a call, and its split over threads; for <op>.cpp, not for bodies.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>

#include "tensors.h"

namespace fusekern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Refuses what would be read or written out of bounds; the messages for users are those of fusekern.ops.
inline void check(const char* name, const Tensor& t, std::initializer_list<int64_t> shape, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " has another dtype than the other tensors");
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(shape.size()) && std::equal(shape.begin(), shape.end(), t.sizes().begin()),
                  name, " has a shape that does not fit those of the other tensors");
  STD_TORCH_CHECK(t.numel() > 0, name, " is empty");
}

// [rows, channels] or [channels], contiguous and in fp32; null if there is none.
inline float* vectors_of(const char* name, const std::optional<Tensor>& t, std::initializer_list<int64_t> shape) {
  if (!t) return nullptr;
  check(name, *t, shape, ScalarType::Float);
  STD_TORCH_CHECK(t->is_contiguous(), name, " must be contiguous");
  return static_cast<float*>(t->data_ptr());
}

inline bool is_bf16(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "the dtype must be float32 or bfloat16");
  return dtype == ScalarType::BFloat16;
}

inline float* data_of(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

// How many of at most `most` make up `count`.
inline int64_t parts(int64_t count, int64_t most) { return (count + most - 1) / most; }

// Calls f(begin, end) for all of `items` items, threads taking no less than what is worth waking them for.
template <class F>
void in_parallel(int64_t items, int64_t flops_per_item, const F& f) {
  torch::stable::parallel_for(0, items, std::max<int64_t>(1, 2000000 / std::max<int64_t>(1, flops_per_item)), f);
}

}  // namespace fusekern
