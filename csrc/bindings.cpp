// The module emd_fast._C. Importing it registers the compiled kernels for the schemas of
// emd_fast/ops. Its Python attributes are the facts of its build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cpu/kernels.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of emd_fast and the facts of their build.";
  m.attr("torch_version") = EMD_TORCH_VERSION;
  m.attr("compiler") = EMD_COMPILER;
  m.attr("build_type") = EMD_BUILD_TYPE;
#if defined(EMD_CUDA)
  m.attr("cuda_version") = EMD_CUDA_VERSION;
#else
  m.attr("cuda_version") = pybind11::none();
#endif
  m.attr("isas_built") = emd::cpu::isas_built();
  m.def("isa", [] { return emd::cpu::kernels().isa; }, "The instruction set that the kernels use here.");
}
