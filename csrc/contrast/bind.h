// Contrast from what Python hands over: addresses as integers, 0 for what is not there.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "../common/index_range.h"
#include "contrast.h"

namespace fastproto {

// (N, K, D, stride_x, stride_y, grad_stride, x dtype, y dtype, normalize, symmetric, reduced, rows of more, stride_more),
// (a_all, divisor), then the addresses in the struct's order but for more, which is the last, then the threads.
template <typename Run> auto contrast_binding(Run run) {
  return [run](std::array<int64_t, 13> sizes, std::array<double, 2> numbers, std::array<uintptr_t, 18> at, int threads) {
    Contrast args{};
    args.N = sizes[0], args.K_first = sizes[1], args.D = sizes[2], args.K = args.K_first + sizes[11];
    args.stride_x = sizes[3], args.stride_y = sizes[4];
    args.grad_stride = sizes[5];
    args.x_dtype = static_cast<int>(sizes[6]), args.y_dtype = static_cast<int>(sizes[7]);
    args.normalize = sizes[8] != 0, args.symmetric = sizes[9] != 0, args.reduced = sizes[10] != 0;
    args.a_all = static_cast<float>(numbers[0]), args.divisor = numbers[1];
    args.x = reinterpret_cast<const void*>(at[0]);
    args.y = reinterpret_cast<const void*>(at[1]);
    args.more = reinterpret_cast<const void*>(at[17]);
    args.stride_more = sizes[12];
    args.target = reinterpret_cast<const int64_t*>(at[2]);
    args.a = reinterpret_cast<const float*>(at[3]);
    args.b = reinterpret_cast<const float*>(at[4]);
    args.group = reinterpret_cast<const int64_t*>(at[5]);
    args.key_group = reinterpret_cast<const int64_t*>(at[6]);
    args.loss = reinterpret_cast<float*>(at[7]);
    args.saved = reinterpret_cast<float*>(at[8]);
    args.dx = reinterpret_cast<float*>(at[9]);
    args.entropy = reinterpret_cast<float*>(at[10]);
    args.top1 = reinterpret_cast<int64_t*>(at[11]);
    args.positive = reinterpret_cast<float*>(at[12]);
    args.grad = reinterpret_cast<const float*>(at[13]);
    args.dy = reinterpret_cast<float*>(at[14]);
    args.da = reinterpret_cast<float*>(at[15]);
    args.db = reinterpret_cast<float*>(at[16]);
    expect_below(args.target, args.N, args.K, "contrast: targets");
    pybind11::gil_scoped_release release;
    run(args, threads);
  };
}

}  // namespace fastproto
