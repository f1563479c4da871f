// Localize from what Python hands over: addresses as integers, sizes and strides as arrays.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "localize.h"

namespace fastproto {

// (N, C, h, w) and (H, W); `last` is the number of threads or the stream.
template <typename Last, typename Run> auto localize_binding(Run run) {
  return [run](uintptr_t map, int dtype, std::array<int64_t, 4> shape, std::array<int64_t, 4> strides, double threshold,
               std::array<int64_t, 2> image_size, uintptr_t boxes, Last last) {
    Localize args{};
    args.N = shape[0], args.C = shape[1], args.h = shape[2], args.w = shape[3];
    args.map = reinterpret_cast<const void*>(map);
    args.dtype = dtype;
    std::copy(strides.begin(), strides.end(), args.strides);
    args.threshold = threshold;
    args.H = image_size[0], args.W = image_size[1];
    args.boxes = reinterpret_cast<float*>(boxes);
    pybind11::gil_scoped_release release;
    run(args, last);
  };
}

}  // namespace fastproto
