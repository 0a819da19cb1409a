// torch.ops.fusekern_cuda.bn_relu6_dw_fwd and _bwd: checks, working memory, device and stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>

#include "inverted_bottleneck_cuda.h"

namespace fusekern {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(const char* name, const Tensor& t, const Tensor& like, std::initializer_list<int64_t> shape,
           ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " has another dtype than it must have");
  const bool fits = t.dim() == static_cast<int64_t>(shape.size()) &&
                    std::equal(shape.begin(), shape.end(), t.sizes().begin());
  STD_TORCH_CHECK(fits, name, " has a shape that does not fit those of the other tensors");
  STD_TORCH_CHECK(t.get_device_index() == like.get_device_index() && t.is_cuda(), name, " is on another device");
}

void check_dense(const char* name, const Tensor& t, const Tensor& like, std::initializer_list<int64_t> shape,
                 ScalarType dtype) {
  check(name, t, like, shape, dtype);
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

// Strides of dimensions of size 1 do not matter.
bool lies(const Tensor& t, bool channels_last) {
  const int64_t C = t.size(1), H = t.size(2), W = t.size(3);
  const int64_t last[] = {H * W * C, 1, W * C, C}, first[] = {C * H * W, H * W, W, 1};
  for (int i = 0; i < 4; ++i)
    if (t.size(i) > 1 && t.stride(i) != (channels_last ? last : first)[i]) return false;
  return true;
}

dw::Type type_of(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  return dtype == ScalarType::Float      ? dw::Type::float32
         : dtype == ScalarType::BFloat16 ? dw::Type::bfloat16
                                         : dw::Type::float16;
}

// The problem, and whatever all tensors have to do with it: `wide` is y1 or d, `narrow` y2 or dz.
dw::Problem problem_of(const Tensor& y1, const Tensor& y2, const Tensor& weight, int64_t stride,
                       std::initializer_list<const Tensor*> wide, std::initializer_list<const Tensor*> narrow) {
  STD_TORCH_CHECK(y1.dim() == 4 && y2.dim() == 4 && weight.dim() == 3,
                  "y1 and y2 must be [B, E, H, W], weight [E, k, k]");
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride must be 1 or 2");
  const int64_t B = y1.size(0), E = y1.size(1), H = y1.size(2), W = y1.size(3), K = weight.size(1);
  STD_TORCH_CHECK(K == 3 || K == 5, "the kernel's size must be 3 or 5");
  STD_TORCH_CHECK(B * E * H * W > 0, "y1 is empty");
  STD_TORCH_CHECK(B <= std::numeric_limits<int32_t>::max(), "y1 is too large");
  // Within a tile offsets have 32 bits.
  STD_TORCH_CHECK(64 * W * std::max(E, H) <= std::numeric_limits<int32_t>::max(), "y1 is too large");
  const int64_t h = (H - 1) / stride + 1, w = (W - 1) / stride + 1;
  const ScalarType dtype = y1.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "the dtype must be float32, bfloat16 or float16");
  check_dense("weight", weight, y1, {E, K, K}, dtype);
  bool last = true, first = true;
  for (const Tensor* t : wide) check("a map as large as y1", *t, y1, {B, E, H, W}, dtype);
  for (const Tensor* t : narrow) check("a map as large as y2", *t, y1, {B, E, h, w}, dtype);
  for (const auto& maps : {wide, narrow})
    for (const Tensor* t : maps) last &= lies(*t, true), first &= lies(*t, false);
  STD_TORCH_CHECK(last || first, "the maps must be dense, and all of them channels_last or all of them NCHW");
  const auto size = [](int64_t n) { return static_cast<int>(n); };
  return {type_of(y1), last, size(K), size(stride), size(B), size(E), size(H), size(W), size(h), size(w)};
}

void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

// From torch's allocator, on the current stream: may be captured in a graph, and freed before the kernels have run.
Tensor working_memory(const Tensor& like, int64_t parts, int64_t rows, int64_t E) {
  const int64_t shape[] = {parts, rows, E};
  return torch::stable::new_empty(like, {shape, 3});
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

using Vector = std::optional<Tensor>;

float* vectors_of(const char* name, const Vector& t, const Tensor& like, std::initializer_list<int64_t> shape) {
  if (!t) return nullptr;
  check_dense(name, *t, like, shape, ScalarType::Float);
  return data<float>(*t);
}

// Of fp32 or of the maps' dtype.
template <class Of>
Of parameter_of(const char* name, const Vector& t, const Tensor& y1) {
  if (!t) return {nullptr, dw::Type::float32};
  const bool wide = t->scalar_type() == ScalarType::Float;
  check_dense(name, *t, y1, {y1.size(1)}, wide ? ScalarType::Float : y1.scalar_type());
  return {t->data_ptr(), wide ? dw::Type::float32 : type_of(y1)};
}

// As many as there may be blocks of channels.
int* counters_of(const Vector& t, const Tensor& y1) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Int && t->is_contiguous() && t->numel() >= (y1.size(1) + 7) / 8,
                  "arrived must be int32 and contiguous, an element for 8 channels");
  STD_TORCH_CHECK(t->get_device_index() == y1.get_device_index() && t->is_cuda(), "arrived is on another device");
  return data<int>(*t);
}

void bn_relu6_dw_fwd(const Tensor& y1,      // [B, E, H, W]
                     const Vector& affine,  // [2, E], or none: then there is partial1, or y1 is relu6(v1) already
                     const Tensor& weight,  // [E, k, k]
                     int64_t stride,
                     Tensor y2,       // [B, E, h, w]
                     Vector stats,    // [2, E]
                     Vector vectors,  // [5, E], of the norm behind y2
                     const Vector& norm_weight, const Vector& norm_bias, double eps,
                     Vector arrived,          // zeros
                     const Vector& partial1,  // [parts, 2, E], of y1, with the size and the pixels of a tile
                     int64_t size1, int64_t pixels1,
                     Vector vectors1,  // [5, E], of the norm behind y1
                     const Vector& weight1, const Vector& bias1, double eps1) {
  const dw::Problem problem = problem_of(y1, y2, weight, stride, {&y1}, {&y2});
  const int64_t E = problem.E;
  const float* const scale_and_shift = vectors_of("affine", affine, y1, {2, E});
  float* const moments = vectors_of("stats", stats, y1, {2, E});
  const auto parameter = parameter_of<dw::Parameter>;
  const dw::NormForward norm{parameter("norm_weight", norm_weight, y1), parameter("norm_bias", norm_bias, y1),
                             static_cast<float>(eps), vectors_of("vectors", vectors, y1, {5, E})};
  dw::Before before{};
  if (partial1) {
    const int64_t parts = partial1->size(0), tiles = pixels1 > 0 ? (size1 + pixels1 - 1) / pixels1 : 0;
    STD_TORCH_CHECK(!affine && vectors1, "partial1 stands in the place of affine, and needs vectors1");
    STD_TORCH_CHECK(tiles > 0 && parts % tiles == 0 && parts / tiles * size1 == y1.numel() / E,
                    "partial1 is not of the pixels of y1");
    before = {vectors_of("partial1", partial1, y1, {parts, 2, E}),
              static_cast<int>(parts),
              static_cast<int>(size1),
              static_cast<int>(pixels1),
              {parameter("weight1", weight1, y1), parameter("bias1", bias1, y1), static_cast<float>(eps1),
               vectors_of("vectors1", vectors1, y1, {5, E})}};
  }
  const torch::stable::accelerator::DeviceGuard device(y1.get_device_index());
  Vector partial;
  if (stats || vectors) partial = working_memory(stats ? *stats : *vectors, dw::forward_parts(problem), 3, E);
  const dw::Forward tensors{y1.data_ptr(), scale_and_shift, weight.data_ptr(), y2.data_ptr(),
                            partial ? data<float>(*partial) : nullptr, moments, norm, counters_of(arrived, y1), before};
  const char* error = dw::launch(problem, tensors, current_stream(y1));
  STD_TORCH_CHECK(!error, "bn_relu6_dw_fwd: ", error ? error : "");
}

void bn_relu6_dw_bwd(const Tensor& dz,      // [B, E, h, w]
                     const Tensor& y2,      // [B, E, h, w]
                     const Tensor& coef,    // [4, E]
                     const Tensor& y1,      // [B, E, H, W]
                     const Tensor& affine,  // [2, E]
                     const Tensor& mean,    // [E]
                     const Tensor& weight,  // [E, k, k]
                     int64_t stride,
                     Tensor d,             // [B, E, H, W]
                     Tensor dweight,       // [E, k, k]
                     Tensor sums,          // [2, E]
                     Vector coef1,         // [4, E], of the norm behind y1
                     Vector norm_dweight,  // [E]
                     const Vector& vectors,  // [5, E]
                     const Vector& norm_weight, double eps, bool batch,
                     Vector norm_dbias,  // [E]
                     Vector arrived) {   // zeros
  const dw::Problem problem = problem_of(y1, y2, weight, stride, {&y1, &d}, {&y2, &dz});
  const int E = problem.E, K = problem.K;
  check_dense("coef", coef, y1, {4, E}, ScalarType::Float);
  check_dense("affine", affine, y1, {2, E}, ScalarType::Float);
  check_dense("mean", mean, y1, {E}, ScalarType::Float);
  check_dense("dweight", dweight, y1, {E, K, K}, y1.scalar_type());
  check_dense("sums", sums, y1, {2, E}, ScalarType::Float);
  STD_TORCH_CHECK(coef1.has_value() == norm_dweight.has_value() && (!coef1 || vectors),
                  "coef1 and norm_dweight belong together, and need vectors");
  const dw::NormBackward norm{vectors_of("vectors", vectors, y1, {5, E}),
                              parameter_of<dw::Parameter>("norm_weight", norm_weight, y1),
                              static_cast<float>(eps),
                              batch,
                              vectors_of("coef1", coef1, y1, {4, E}),
                              parameter_of<dw::Gradient>("norm_dweight", norm_dweight, y1),
                              parameter_of<dw::Gradient>("norm_dbias", norm_dbias, y1)};
  const torch::stable::accelerator::DeviceGuard device(y1.get_device_index());
  const Tensor partial = working_memory(affine, dw::backward_parts(problem), K * K + 2, E);
  const dw::Backward tensors{dz.data_ptr(),       y2.data_ptr(),           data<const float>(coef), y1.data_ptr(),
                             data<const float>(affine), data<const float>(mean), weight.data_ptr(), d.data_ptr(),
                             dweight.data_ptr(),  data<float>(partial),    data<float>(sums),       norm,
                             counters_of(arrived, y1)};
  const char* error = dw::launch(problem, tensors, current_stream(y1));
  STD_TORCH_CHECK(!error, "bn_relu6_dw_bwd: ", error ? error : "");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusekern_cuda, m) {
  m.def(
      "bn_relu6_dw_fwd(Tensor y1, Tensor? affine, Tensor weight, int stride, Tensor(a!) y2, Tensor(b!)? stats, "
      "Tensor(c!)? vectors=None, Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=0., "
      "Tensor(d!)? arrived=None, Tensor? partial1=None, int size1=0, int pixels1=0, Tensor(e!)? vectors1=None, "
      "Tensor? weight1=None, Tensor? bias1=None, float eps1=0.) -> ()");
  m.def(
      "bn_relu6_dw_bwd(Tensor dz, Tensor y2, Tensor coef, Tensor y1, Tensor affine, Tensor mean, Tensor weight, "
      "int stride, Tensor(a!) d, Tensor(b!) dweight, Tensor(c!) sums, Tensor(d!)? coef1=None, "
      "Tensor(e!)? norm_dweight=None, Tensor? vectors=None, Tensor? norm_weight=None, float eps=0., bool batch=True, "
      "Tensor(f!)? norm_dbias=None, Tensor(g!)? arrived=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusekern_cuda, CUDA, m) {
  m.impl("bn_relu6_dw_fwd", TORCH_BOX(&bn_relu6_dw_fwd));
  m.impl("bn_relu6_dw_bwd", TORCH_BOX(&bn_relu6_dw_bwd));
}

}  // namespace fusekern
