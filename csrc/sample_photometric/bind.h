// SamplePhotometric from what Python hands over: addresses as integers; sizes and numbers as arrays.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "../common/bind_samples.h"
#include "sample_photometric.h"

namespace fastproto {

// (probabilities of jitter, gray, blur and solarisation), (sigma low, high), threshold; the addresses in the struct's order;
// `last` is the number of threads or the stream.
template <typename Last, typename Run> auto sample_photometric_binding(Run run) {
  return [run](std::array<int64_t, 6> samples, std::array<double, 4> probabilities, std::array<double, 4> low,
               std::array<double, 4> high, std::array<double, 2> sigma, float threshold, std::array<uintptr_t, 5> at,
               Last last) {
    SamplePhotometric args{};
    args.samples = bound_samples(samples);
    args.jitter_p = probabilities[0], args.gray_p = probabilities[1];
    args.blur_p = probabilities[2], args.solarize_p = probabilities[3];
    std::copy(low.begin(), low.end(), args.low);
    std::copy(high.begin(), high.end(), args.high);
    std::copy(sigma.begin(), sigma.end(), args.sigma);
    args.solarize_at = threshold;
    args.jitter = reinterpret_cast<float*>(at[0]);
    args.order = reinterpret_cast<int64_t*>(at[1]);
    args.gray = reinterpret_cast<bool*>(at[2]);
    args.sigmas = reinterpret_cast<float*>(at[3]);
    args.thresholds = reinterpret_cast<float*>(at[4]);
    pybind11::gil_scoped_release release;
    run(args, last);
  };
}

}  // namespace fastproto
