// fusekern._C_cuda: what this build is, and what its kernels take of a GPU. The ops register themselves, as
// torch.ops.fusekern_cuda, when the module is loaded.
constexpr unsigned long long OLDEST = TORCH_TARGET_VERSION;
#undef TORCH_TARGET_VERSION  // torch 2.11's copy of pybind11 refuses it, though nothing here is of the stable ABI

#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "inverted_bottleneck_cuda.h"

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
  info["torch_at_least"] = std::to_string(OLDEST >> 56) + "." + std::to_string(OLDEST >> 48 & 255);
  info["python"] = PY_VERSION;
  info["nvcc"] = FUSEKERN_NVCC;
  pybind11::list archs;
  const std::string all = FUSEKERN_ARCHS;
  for (std::size_t begin = 0; begin < all.size();) {
    const std::size_t end = std::min(all.find(' ', begin), all.size());
    archs.append(all.substr(begin, end - begin));
    begin = end + 1;
  }
  info["archs"] = archs;
  return info;
}

pybind11::list kernel_attributes() {
  std::vector<fusekern::dw::Attributes> kernels;
  for (const auto get : {fusekern::dw::forward_attributes, fusekern::dw::backward_attributes})
    if (const char* error = get(kernels)) throw std::runtime_error(std::string("kernel_attributes: ") + error);
  pybind11::list found;
  for (const auto& kernel : kernels) {
    pybind11::dict row;
    row["name"] = kernel.name;
    row["threads"] = kernel.threads;
    row["registers"] = kernel.registers;
    row["local_bytes"] = kernel.local_bytes;
    row["shared_bytes"] = kernel.shared_bytes;
    found.append(row);
  }
  return found;
}

}  // namespace

PYBIND11_MODULE(_C_cuda, module) {
  module.doc() = "The CUDA kernels of fusekern, registered as torch.ops.fusekern_cuda.";
  module.def("build_info", &build_info,
             "What the module was built with: torch, the oldest torch that it loads under, python, nvcc, archs.");
  module.def("kernel_attributes", &kernel_attributes,
             "What each kernel takes on the current device: threads of a block, registers and bytes of local memory "
             "(spilled registers lie there) of a thread, bytes of shared memory of a block. Needs a GPU.");
}
