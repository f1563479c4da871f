// CropResize from what Python hands over: pointers as integers, sizes and strides as tuples.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "crop_resize.h"

namespace fastproto {

template <typename T> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

// Defines m.crop_resize(…, last); run(args, last) gets the struct and the number of threads or the stream.
template <typename Last, typename Run> void bind_crop_resize(pybind11::module_& m, Run run) {
  m.def("crop_resize",
        [run](std::array<int64_t, 6> first, int64_t stride_n, uintptr_t table, int64_t count, uintptr_t crops,
              uintptr_t index, uintptr_t flip, std::array<int64_t, 4> shape, const std::vector<float>& scale,
              const std::vector<float>& offset, bool antialias, uintptr_t out, int out_dtype,
              std::array<int64_t, 4> out_strides, Last last) {
          CropResize args{};
          args.images = {{pointer<const uint8_t>(first[0]), first[1], first[2], first[3], first[4], first[5]},
                         stride_n, pointer<const int64_t>(table), count};
          args.crops = pointer<const int32_t>(crops);
          args.index = pointer<const int64_t>(index);
          args.flip = pointer<const bool>(flip);
          args.R = shape[0], args.C = shape[1], args.h = shape[2], args.w = shape[3];
          for (int64_t c = 0; c < args.C; ++c) args.scale[c] = scale.at(c), args.offset[c] = offset.at(c);
          args.antialias = antialias;
          args.out = pointer<void>(out);
          args.out_dtype = out_dtype;
          args.stride_r = out_strides[0], args.stride_c = out_strides[1];
          args.stride_h = out_strides[2], args.stride_w = out_strides[3];
          pybind11::gil_scoped_release release;
          run(args, last);
        });
}

}  // namespace fastproto
