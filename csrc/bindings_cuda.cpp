// _fastproto_cuda: the CUDA kernels. Imports without a driver.
#include <pybind11/pybind11.h>

#include "crop_resize/bind.h"
#include "localize/bind.h"
#include "photometric/bind.h"
#include "sample_crops/bind.h"
#include "sample_photometric/bind.h"

PYBIND11_MODULE(_fastproto_cuda, m) {
  using namespace fastproto;
  m.doc() = "CUDA kernels of fastproto: device pointers, sizes, strides and a stream in, nothing owned.";
  m.attr("arches") = FASTPROTO_ARCHES;
  bind_crop_resize<uintptr_t>(m, [](const CropResize& args, uintptr_t stream) { crop_resize_cuda(args, stream); });
  m.def("photometric", photometric_binding<uintptr_t>([](const Photometric& args, uintptr_t stream) {
          photometric_cuda(args, stream);
        }));
  m.def("sample_crops", sample_crops_binding<uintptr_t>([](const SampleCrops& args, uintptr_t stream) {
          sample_crops_cuda(args, stream);
        }));
  m.def("sample_photometric", sample_photometric_binding<uintptr_t>([](const SamplePhotometric& args, uintptr_t stream) {
          sample_photometric_cuda(args, stream);
        }));
  m.def("localize", localize_binding<uintptr_t>([](const Localize& args, uintptr_t stream) { localize_cuda(args, stream); }));
}
