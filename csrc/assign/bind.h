// Assign from what Python hands over: addresses as integers, 0 for what is not there.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "assign.h"

namespace fastproto {

// (N, K, D, stride_x, x dtype, inner, exact), then the addresses in the struct's order, then the threads.
template <typename Run> auto assign_binding(Run run) {
  return [run](std::array<int64_t, 7> sizes, std::array<uintptr_t, 9> at, int threads) {
    Assign args{};
    args.N = sizes[0], args.K = sizes[1], args.D = sizes[2], args.stride_x = sizes[3];
    args.x_dtype = static_cast<int>(sizes[4]);
    args.inner = sizes[5] != 0, args.exact = sizes[6] != 0;
    args.x = reinterpret_cast<const void*>(at[0]);
    args.centers = reinterpret_cast<const float*>(at[1]);
    args.label = reinterpret_cast<int64_t*>(at[2]);
    args.distance = reinterpret_cast<float*>(at[3]);
    args.row_order = reinterpret_cast<const int64_t*>(at[4]);
    args.center_order = reinterpret_cast<const int64_t*>(at[5]);
    args.drift = reinterpret_cast<const float*>(at[6]);
    args.slack = reinterpret_cast<float*>(at[7]);
    args.tried = reinterpret_cast<int64_t*>(at[8]);
    pybind11::gil_scoped_release release;
    run(args, threads);
  };
}

}  // namespace fastproto
