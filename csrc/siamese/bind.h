// The siamese ops from what Python hands over: addresses as integers, 0 for what is not there.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "siamese.h"

namespace fastproto {

// (N, C, stride_a, stride_b, a dtype, b dtype), then the addresses in the struct's order, then the threads.
template <typename Run> auto siamese_pairs_binding(Run run) {
  return [run](std::array<int64_t, 6> sizes, std::array<uintptr_t, 10> at, int threads) {
    SiamesePairs args{};
    args.N = sizes[0], args.C = sizes[1];
    args.stride_a = sizes[2], args.stride_b = sizes[3];
    args.a_dtype = static_cast<int>(sizes[4]), args.b_dtype = static_cast<int>(sizes[5]);
    args.a = reinterpret_cast<const void*>(at[0]);
    args.b = reinterpret_cast<const void*>(at[1]);
    args.same = reinterpret_cast<const int64_t*>(at[2]);
    args.w = reinterpret_cast<const float*>(at[3]);
    args.beta = reinterpret_cast<const float*>(at[4]);
    args.loss = reinterpret_cast<float*>(at[5]);
    args.slope = reinterpret_cast<float*>(at[6]);
    args.coefficient = reinterpret_cast<const float*>(at[7]);
    args.da = reinterpret_cast<float*>(at[8]);
    args.dw = reinterpret_cast<float*>(at[9]);
    pybind11::gil_scoped_release release;
    run(args, threads);
  };
}

// (N, C, split, stride_x, stride_second, x dtype), then the addresses in the struct's order, then the threads.
template <typename Run> auto siamese_all_pairs_binding(Run run) {
  return [run](std::array<int64_t, 6> sizes, std::array<uintptr_t, 12> at, int threads) {
    SiameseAllPairs args{};
    args.N = sizes[0], args.C = sizes[1];
    args.split = sizes[2], args.stride_x = sizes[3], args.stride_second = sizes[4];
    args.x_dtype = static_cast<int>(sizes[5]);
    args.x = reinterpret_cast<const void*>(at[0]);
    args.second = reinterpret_cast<const void*>(at[1]);
    args.image = reinterpret_cast<const int64_t*>(at[2]);
    args.prototype = reinterpret_cast<const int64_t*>(at[3]);
    args.w = reinterpret_cast<const float*>(at[4]);
    args.beta = reinterpret_cast<const float*>(at[5]);
    args.mean = reinterpret_cast<float*>(at[6]);
    args.slope = reinterpret_cast<float*>(at[7]);
    args.share = reinterpret_cast<float*>(at[8]);
    args.coefficient = reinterpret_cast<const float*>(at[9]);
    args.dx = reinterpret_cast<float*>(at[10]);
    args.dw = reinterpret_cast<float*>(at[11]);
    pybind11::gil_scoped_release release;
    run(args, threads);
  };
}

}  // namespace fastproto
