// localize on a GPU: one block per image. The channels' sum lies in shared memory; then a thread looks along a row, and along
// a column, up to the first value above the threshold. The edges are minima and maxima of integers: the same bits every run.
//
// Floor: the map read once.
#include "localize.h"

#include "../common/cuda.h"

namespace fastproto {
namespace {

constexpr int kThreads = 256;

template <typename T> __device__ double channel_sum(const Localize& args, int64_t n, int y, int x) {
  const int64_t* stride = args.strides;
  const T* place = static_cast<const T*>(args.map) + n * stride[0] + y * stride[2] + x * stride[3];
  double sum = 0;
  for (int64_t c = 0; c < args.C; ++c) sum += widen(place[c * stride[1]]);
  return sum;
}

// Shared memory: the heat, of MAX_CUDA_PLACES in fastproto/ops/localize.py at most. Four blocks a processor: for more of them
// the compiler would keep registers in memory.
template <typename T> __global__ void __launch_bounds__(kThreads, 4) localize_kernel(const Localize args) {
  extern __shared__ double heat[];
  __shared__ int top, left, bottom, right;
  const int64_t n = blockIdx.x;
  const int h = static_cast<int>(args.h), w = static_cast<int>(args.w);
  const int H = static_cast<int>(args.H), W = static_cast<int>(args.W);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) top = H, left = W, bottom = right = -1;
  for (int p = thread; p < h * w; p += kThreads) heat[p] = channel_sum<T>(args, n, p / w, p % w);
  __syncthreads();
  double least = heat[0], most = heat[0];
  bool finite = true;
  for (int p = 0; p < h * w; ++p) {
    least = fmin(least, heat[p]), most = fmax(most, heat[p]);
    finite = finite && isfinite(heat[p]);
  }
  __syncthreads();
  const double range = most - least;
  for (int p = thread; p < h * w; p += kThreads) heat[p] = (heat[p] - least) / range;
  __syncthreads();

  const double ratio_h = static_cast<double>(h) / H, ratio_w = static_cast<double>(w) / W;
  const auto hot = [&](const Neighbours& y, const Neighbours& x) {
    const double *upper = heat + y.first * w, *lower = heat + y.second * w;
    return mixed(mixed(upper[x.first], upper[x.second], x.weight), mixed(lower[x.first], lower[x.second], x.weight),
                 y.weight) > args.threshold;
  };
  for (int y = thread; y < H; y += kThreads) {
    const Neighbours row = neighbours(y, h, ratio_h);
    int x = 0;
    while (x < W && !hot(row, neighbours(x, w, ratio_w))) ++x;
    if (x < W) atomicMin(&top, y), atomicMax(&bottom, y);
  }
  for (int x = thread; x < W; x += kThreads) {
    const Neighbours column = neighbours(x, w, ratio_w);
    int y = 0;
    while (y < H && !hot(neighbours(y, h, ratio_h), column)) ++y;
    if (y < H) atomicMin(&left, x), atomicMax(&right, x);
  }
  __syncthreads();
  const bool whole = !finite || !(range > 0) || bottom < 0 || right < 0;
  if (thread == 0) args.write(n, whole, top, left, bottom, right);
}

template <typename T> void launch(const Localize& args, cudaStream_t stream) {
  const size_t shared = args.h * args.w * sizeof(double);
  localize_kernel<T><<<static_cast<unsigned>(args.N), kThreads, shared, stream>>>(args);
}

}  // namespace

void localize_cuda(const Localize& args, uintptr_t stream_handle) {
  if (!args.N) return;
  const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_handle);
  with_cuda_dtype(args.dtype, [&](auto element) { launch<decltype(element)>(args, stream); });
  check_launch("localize");
}

}  // namespace fastproto
