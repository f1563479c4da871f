// Calls row(args, view, n) for each view of each sample: on threads of the CPU, or with a thread of a GPU for each.
#pragma once

#include <algorithm>
#include <cstdint>

#include "philox.h"

#if defined(__CUDACC__)
#include "cuda.h"
#else
#include "parallel.h"
#endif

namespace fastproto {

#if defined(__CUDACC__)

constexpr int kSampleThreads = 128;

template <auto row, typename Args> __global__ void __launch_bounds__(kSampleThreads) samples_kernel(const Args args) {
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kSampleThreads + threadIdx.x;
  if (r < args.samples.N * args.samples.views) row(args, r / args.samples.N, r % args.samples.N);
}

template <auto row, typename Args> void for_samples_cuda(const Args& args, uintptr_t stream, const char* op) {
  const int64_t blocks = (args.samples.N * args.samples.views + kSampleThreads - 1) / kSampleThreads;
  if (!blocks) return;
  samples_kernel<row><<<static_cast<unsigned>(blocks), kSampleThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(args);
  check_launch(op);
}

#else

// Rows of a task, half a millisecond's work. Of less than two tasks nothing is given to another thread: on a busy machine it
// might wait for its turn there for milliseconds.
constexpr int64_t kTaskRows = 8192;

template <auto row, typename Args> void for_samples(const Args& args, int threads) {
  const int64_t N = args.samples.N, rows = N * args.samples.views;
  parallel_for((rows + kTaskRows - 1) / kTaskRows, threads, [&](int64_t task) {
    const int64_t begin = task * kTaskRows, end = std::min(begin + kTaskRows, rows);
    for (int64_t r = begin; r < end; ++r) row(args, r / N, r % N);
  });
}

#endif

}  // namespace fastproto
