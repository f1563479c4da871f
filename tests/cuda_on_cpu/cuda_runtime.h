// CUDA kernels on a CPU, for tests: the blocks of a grid one after the other, the threads of a block as coroutines that
// take turns at barriers. build.py turns launches into calls of launch(), and dynamic shared memory into a pointer to it.
// Blocks run in a drawn order, and the threads of a block from one barrier to the next in another: results that depend on
// them, as where a barrier is missing, are mostly wrong.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y = 1, z = 1;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx{0}, blockIdx{0}, blockDim{1}, gridDim{1};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

using std::isfinite;
inline float __fdividef(float a, float b) { return a / b; }
template <typename T> T __ldg(const T* place) { return *place; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int atomicMin(int* place, int value) { const int old = *place; *place = min(old, value); return old; }
inline int atomicMax(int* place, int value) { const int old = *place; *place = max(old, value); return old; }

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 64 * 1024, kShared = 48 * 1024;

// What a thread waits for: nothing, these threads of its warp, all threads of the block; or it has ended.
enum class Waits { for_nothing, for_warp, for_block, has_ended };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Waits waits = Waits::for_nothing;
  unsigned mask = 0;  // of the threads of its warp that it waits for
};

inline std::minstd_rand draw;
inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline std::function<void()> body;
alignas(16) inline char shared[kShared];

inline void* dynamic_shared() { return shared; }

inline void wait(Waits what, unsigned mask = 0) {
  Thread& thread = threads[threadIdx.x];
  thread.waits = what, thread.mask = mask;
  swapcontext(&thread.context, &scheduler);
}

inline void run_thread() {
  body();
  threads[threadIdx.x].waits = Waits::has_ended;
}

// Lets the threads of the block go on if all that have not ended wait for that; whether there are any.
inline bool release_block() {
  bool any = false;
  for (unsigned t = 0; t < blockDim.x; ++t) {
    if (threads[t].waits != Waits::for_block && threads[t].waits != Waits::has_ended) return false;
    any |= threads[t].waits == Waits::for_block;
  }
  for (unsigned t = 0; t < blockDim.x; ++t) {
    if (threads[t].waits == Waits::for_block) threads[t].waits = Waits::for_nothing;
  }
  return any;
}

// Lets the threads of a mask go on if they all wait for each other, of which none may have ended.
inline bool release_warp(unsigned thread) {
  if (threads[thread].waits != Waits::for_warp) return false;
  const unsigned mask = threads[thread].mask, first = thread - thread % kWarp;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const Thread& other = threads[first + lane];
    if ((mask >> lane & 1) && (other.waits != Waits::for_warp || other.mask != mask)) return false;
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) threads[first + lane].waits = Waits::for_nothing;
  }
  return true;
}

inline std::vector<unsigned> any_order(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), draw);
  return order;
}

inline void run_block() {
  const unsigned count = blockDim.x;
  for (unsigned t = 0; t < count; ++t) {
    Thread& thread = threads[t];
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = &scheduler;
    thread.waits = Waits::for_nothing;
    makecontext(&thread.context, run_thread, 0);
  }
  for (bool running = true; running;) {
    for (const unsigned t : any_order(count)) {
      threadIdx.x = t;
      if (threads[t].waits == Waits::for_nothing) swapcontext(&scheduler, &threads[t].context);
    }
    running = release_block();
    for (unsigned t = 0; t < count; ++t) running |= release_warp(t);
  }
  for (unsigned t = 0; t < count; ++t) {
    if (threads[t].waits != Waits::has_ended) throw std::runtime_error("a barrier that not all threads come to");
  }
}

// Shared memory holds garbage when a block begins, as on a GPU.
inline void launch(dim3 grid, dim3 block, size_t dynamic_shared_bytes, cudaStream_t, std::function<void()> kernel) {
  if (!grid.x || !block.x || block.x > 1024 || block.x % kWarp) throw std::runtime_error("a launch that a GPU refuses");
  if (dynamic_shared_bytes > kShared) throw std::runtime_error("more shared memory than a block has");
  gridDim = grid, blockDim = block, body = std::move(kernel);
  if (threads.size() < block.x) threads = std::vector<Thread>(block.x);
  for (const unsigned b : any_order(grid.x)) {
    blockIdx.x = b;
    std::memset(shared, 0xff, kShared);
    run_block();
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::Waits::for_block); }
inline void __syncwarp(unsigned mask = 0xffffffff) { cuda_on_cpu::wait(cuda_on_cpu::Waits::for_warp, mask); }
