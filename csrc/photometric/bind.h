// Photometric from what Python hands over: addresses as integers, 0 for what is not there; sizes and strides as arrays.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <vector>

#include "photometric.h"

namespace fastproto {

// (N, C, H, W, radius, images' dtype, out's dtype), then the addresses in the struct's order; `last` is the number of
// threads or the stream.
template <typename Last, typename Run> auto photometric_binding(Run run) {
  return [run](std::array<int64_t, 7> sizes, std::array<uintptr_t, 8> at, std::array<int64_t, 4> in_strides,
               std::array<int64_t, 4> out_strides, const std::vector<float>& scale, const std::vector<float>& offset,
               Last last) {
    Photometric args{};
    args.N = sizes[0], args.C = sizes[1], args.H = sizes[2], args.W = sizes[3];
    args.radius = sizes[4];
    args.in_dtype = static_cast<int>(sizes[5]), args.out_dtype = static_cast<int>(sizes[6]);
    args.images = reinterpret_cast<const void*>(at[0]);
    args.jitter = reinterpret_cast<const float*>(at[1]);
    args.order = reinterpret_cast<const int64_t*>(at[2]);
    args.gray = reinterpret_cast<const bool*>(at[3]);
    args.sigma = reinterpret_cast<const float*>(at[4]);
    args.threshold = reinterpret_cast<const float*>(at[5]);
    args.out = reinterpret_cast<void*>(at[6]);
    args.work = reinterpret_cast<float*>(at[7]);
    std::copy(in_strides.begin(), in_strides.end(), args.in_strides);
    std::copy(out_strides.begin(), out_strides.end(), args.out_strides);
    for (int64_t c = 0; c < args.C; ++c) args.scale[c] = scale.at(c), args.offset[c] = offset.at(c);
    pybind11::gil_scoped_release release;
    run(args, last);
  };
}

}  // namespace fastproto
