// Update from what Python hands over: addresses as integers, 0 for what is not there.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "../common/index_range.h"
#include "update.h"

namespace fastproto {

// (N, K, D, stride_x, x dtype), then the addresses in the struct's order, then the threads.
template <typename Run> auto update_binding(Run run) {
  return [run](std::array<int64_t, 5> sizes, std::array<uintptr_t, 6> at, int threads) {
    Update args{};
    args.N = sizes[0], args.K = sizes[1], args.D = sizes[2], args.stride_x = sizes[3];
    args.x_dtype = static_cast<int>(sizes[4]);
    args.x = reinterpret_cast<const void*>(at[0]);
    args.label = reinterpret_cast<const int64_t*>(at[1]);
    args.weight = reinterpret_cast<const double*>(at[2]);
    args.rounder = reinterpret_cast<const double*>(at[3]);
    args.sums = reinterpret_cast<double*>(at[4]);
    args.counts = reinterpret_cast<double*>(at[5]);
    expect_below(args.label, args.N, args.K, "update: labels");
    pybind11::gil_scoped_release release;
    run(args, threads);
  };
}

}  // namespace fastproto
