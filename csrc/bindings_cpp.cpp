// _fastproto_C: the CPU kernels and their instruction set.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "assign/bind.h"
#include "common/index_range.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "contrast/bind.h"
#include "crop_resize/bind.h"
#include "localize/bind.h"
#include "photometric/bind.h"
#include "sample_crops/bind.h"
#include "sample_photometric/bind.h"
#include "search/bind.h"
#include "siamese/bind.h"
#include "update/bind.h"

namespace fastproto {
FASTPROTO_PER_ISA(double peak_flops(int threads);)
}  // namespace fastproto

PYBIND11_MODULE(_fastproto_C, m) {
  using namespace fastproto;
  m.doc() = "CPU kernels of fastproto: pointers, sizes and strides in, nothing owned.";
  m.def("isa", [] { return isa_name(current_isa()); });
  m.def("set_isa", &set_isa);
  m.def("supported_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : supported_isas()) names.emplace_back(isa_name(isa));
    return names;
  });
  m.def("set_openmp_parallel", &set_openmp_parallel);
  m.def("peak_flops", [](int threads) {
    double result = 0;
    FASTPROTO_DISPATCH_TO(result =, peak_flops, threads);
    return result;
  });
  bind_crop_resize<int>(m, [](const CropResize& args, int threads) { FASTPROTO_DISPATCH(crop_resize, args, threads); });
  m.def("photometric", photometric_binding<int>([](const Photometric& args, int threads) {
          FASTPROTO_DISPATCH(photometric, args, threads);
        }));
  m.def("philox", [](std::array<uint32_t, 4> counter, uint64_t key) {
    const Words words = philox({{counter[0], counter[1], counter[2], counter[3]}}, key);
    return std::vector<uint32_t>(words.word, words.word + 4);
  });
  m.def("sample_crops", sample_crops_binding<int>([](const SampleCrops& args, int threads) {
          sample_crops(args, threads);
        }));
  m.def("sample_photometric", sample_photometric_binding<int>([](const SamplePhotometric& args, int threads) {
          sample_photometric(args, threads);
        }));
  m.def("localize", localize_binding<int>([](const Localize& args, int threads) {
          FASTPROTO_DISPATCH(localize, args, threads);
        }));
  m.def("assign", assign_binding([](const Assign& args, int threads) { FASTPROTO_DISPATCH(assign, args, threads); }));
  m.def("assign_panel_rows", [] {
    int64_t result = 0;
    FASTPROTO_DISPATCH_TO(result =, assign_panel_rows);
    return result;
  });
  m.def("assign_group_centers", [] {
    int64_t result = 0;
    FASTPROTO_DISPATCH_TO(result =, assign_group_centers);
    return result;
  });
  m.def("search", search_binding([](const Search& args, int threads) { FASTPROTO_DISPATCH(search, args, threads); }));
  m.def("update", update_binding([](const Update& args, int threads) { FASTPROTO_DISPATCH(update, args, threads); }));
  m.def("index_range", [](uintptr_t at, int64_t count, int64_t stride, bool is_int64, int64_t ignored) {
    if (is_int64) return index_range(reinterpret_cast<const int64_t*>(at), count, stride, ignored);
    return index_range(reinterpret_cast<const int32_t*>(at), count, stride, ignored);
  });
  m.def("contrast_fwd", contrast_binding([](const Contrast& args, int threads) {
          FASTPROTO_DISPATCH(contrast_fwd, args, threads);
        }));
  m.def("contrast_bwd_keys", contrast_binding([](const Contrast& args, int threads) {
          FASTPROTO_DISPATCH(contrast_bwd_keys, args, threads);
        }));
  m.def("siamese_pairs_fwd", siamese_pairs_binding([](const SiamesePairs& args, int threads) {
          FASTPROTO_DISPATCH(siamese_pairs_fwd, args, threads);
        }));
  m.def("siamese_pairs_bwd", siamese_pairs_binding([](const SiamesePairs& args, int threads) {
          FASTPROTO_DISPATCH(siamese_pairs_bwd, args, threads);
        }));
  m.def("siamese_all_pairs_fwd", siamese_all_pairs_binding([](const SiameseAllPairs& args, int threads) {
          FASTPROTO_DISPATCH(siamese_all_pairs_fwd, args, threads);
        }));
  m.def("siamese_all_pairs_bwd", siamese_all_pairs_binding([](const SiameseAllPairs& args, int threads) {
          FASTPROTO_DISPATCH(siamese_all_pairs_bwd, args, threads);
        }));
}
