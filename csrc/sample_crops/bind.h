// SampleCrops from what Python hands over: addresses as integers, 0 for what is not there; sizes and numbers as arrays.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "../common/bind_samples.h"
#include "sample_crops.h"

namespace fastproto {

// `samples` as bound_samples takes it, the addresses in the struct's order; `last` is the number of threads or the stream.
template <typename Last, typename Run> auto sample_crops_binding(Run run) {
  return [run](std::array<int64_t, 6> samples, std::array<int64_t, 2> size, std::array<double, 4> box, bool boxes_are_double,
               std::array<double, 2> ratio, std::array<uintptr_t, 7> at, Last last) {
    SampleCrops args{};
    args.samples = bound_samples(samples);
    args.height = size[0], args.width = size[1];
    std::copy(box.begin(), box.end(), args.box);
    args.boxes_are_double = boxes_are_double;
    std::copy(ratio.begin(), ratio.end(), args.ratio);
    args.sizes = reinterpret_cast<const int64_t*>(at[0]);
    args.boxes = reinterpret_cast<const void*>(at[1]);
    args.shares = reinterpret_cast<const int64_t*>(at[2]);
    args.aspects = reinterpret_cast<const int64_t*>(at[3]);
    args.places = reinterpret_cast<const int64_t*>(at[4]);
    args.crops = reinterpret_cast<int32_t*>(at[5]);
    args.flip = reinterpret_cast<bool*>(at[6]);
    pybind11::gil_scoped_release release;
    run(args, last);
  };
}

}  // namespace fastproto
