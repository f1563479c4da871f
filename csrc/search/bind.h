// Search from what Python hands over: addresses as integers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "search.h"

namespace fastproto {

// (N, K, D, count, stride_x, inner), the addresses of x, vectors, label and distance, then the threads.
template <typename Run> auto search_binding(Run run) {
  return [run](std::array<int64_t, 6> sizes, std::array<uintptr_t, 4> at, int threads) {
    Search args{};
    args.N = sizes[0], args.K = sizes[1], args.D = sizes[2], args.count = sizes[3], args.stride_x = sizes[4];
    args.inner = sizes[5] != 0;
    args.x = reinterpret_cast<const float*>(at[0]);
    args.vectors = reinterpret_cast<const float*>(at[1]);
    args.label = reinterpret_cast<int64_t*>(at[2]);
    args.distance = reinterpret_cast<float*>(at[3]);
    pybind11::gil_scoped_release release;
    run(args, threads);
  };
}

}  // namespace fastproto
