// fusekern._C: what this build is. The ops register themselves, as torch.ops.fusekern_cpp, when the module is loaded.
constexpr unsigned long long OLDEST = TORCH_TARGET_VERSION;
#undef TORCH_TARGET_VERSION  // torch 2.11's copy of pybind11 refuses it, though nothing here is of the stable ABI

#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <string>

#include "cpu.h"

namespace {

pybind11::dict build_info() {
  pybind11::list isas;
#if defined(__x86_64__)
  for (const auto isa : {fusekern::Isa::baseline, fusekern::Isa::avx2, fusekern::Isa::avx512})
    isas.append(fusekern::name(isa));
#else
  isas.append(fusekern::name(fusekern::Isa::baseline));
#endif
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
  info["torch_at_least"] = std::to_string(OLDEST >> 56) + "." + std::to_string(OLDEST >> 48 & 255);
  info["python"] = PY_VERSION;
#if defined(__clang__)
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
  info["isas"] = isas;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The C++ kernels of fusekern, registered as torch.ops.fusekern_cpp.";
  module.def("build_info", &build_info,
             "What the module was built with: torch, the oldest torch that it loads under, python, compiler, isas.");
  module.def("cpu_capability", [] { return fusekern::name(fusekern::cpu_isa()); },
             "The instruction set that the kernels use here: one of isas.");
  module.def("cpu_has_bf16", &fusekern::cpu_has_bf16, "Does the CPU multiply bf16?");
}
