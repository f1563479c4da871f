// photometric on a GPU. Colours: one block per image, one thread per pixel at a time with all its channels; where contrast
// needs a mean, the pixels are read twice, the second time from a cache. Blur: a second kernel, one block per band of rows
// of a plane, down the columns into shared memory and along the rows out of it.
//
// Floor: the image read and written once; blurred images are written to `work` and read again, radius / band rows more
// than once, mostly from the L2. Sums in a fixed order: the same bits every run. Pixels of an image are counted in 32 bits,
// whose quotients are several times cheaper than those of 64.
#include "photometric.h"

#include <algorithm>

#include "../common/cuda.h"
#include "pixel.h"

namespace fastproto {
namespace {

constexpr int kThreads = 256;
constexpr int kBandRows = 8;
// Shared memory of a block that blurs: weights and at least one row, both below MAX_CUDA_BLUR_WIDTH in
// fastproto/ops/photometric.py.
constexpr int64_t kBandFloats = 48 * 1024 / sizeof(float);

// Of a sigma that leaves an image as it is even the nearest pixel weighs nothing.
__device__ float weight_of(const Photometric& args, int64_t n, int64_t k) {
  const float place = static_cast<float>(k) / fmaxf(args.sigma[n], 1e-3f);
  return expf(-0.5f * place * place);
}
__device__ bool blurs(const Photometric& args, int64_t n) {
  return args.sigma && args.radius > 0 && weight_of(args, n, 1) != 0;
}

template <int C, typename In> __device__ Pixel<C, float> read_pixel(const Photometric& args, int64_t n, uint32_t p) {
  const int64_t* stride = args.in_strides;
  const uint32_t W = static_cast<uint32_t>(args.W);
  const In* in = static_cast<const In*>(args.images) + n * stride[0] + p / W * stride[2] + p % W * stride[3];
  Pixel<C, float> x;
#pragma unroll
  for (int c = 0; c < C; ++c) x.channel[c] = widen(in[c * stride[1]]);
  return x;
}

template <typename Out> __device__ void write_value(const Photometric& args, int64_t n, int c, uint32_t p, float x) {
  const int64_t* stride = args.out_strides;
  const uint32_t W = static_cast<uint32_t>(args.W);
  if (args.threshold && x >= args.threshold[n]) x = 1 - x;
  Out* out = static_cast<Out*>(args.out) + n * stride[0] + c * stride[1];
  out[p / W * stride[2] + p % W * stride[3]] = narrow<Out>(x * args.scale[c] + args.offset[c]);
}

// The sum over the block, in every thread.
__device__ double block_sum(double value) {
  __shared__ double sums[kThreads];
  sums[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  __syncthreads();
  return sums[0];
}

template <int C, typename In, typename Out>
__global__ void __launch_bounds__(kThreads) colour_kernel(const Photometric args) {
  const int64_t n = blockIdx.x;
  const uint32_t pixels = static_cast<uint32_t>(args.H * args.W);
  const Program program = program_of<C>(args, n);
  float mean = 0;
  if (program.contrast < program.count) {
    double total = 0;
    for (uint32_t p = threadIdx.x; p < pixels; p += kThreads) {
      Pixel<C, float> x = read_pixel<C, In>(args, n, p);
      for (int s = 0; s < program.contrast; ++s) apply<C, float>(program.steps[s], 0, [&](auto change) { change(x); });
      total += luma<C, float>(x);
    }
    // No thread writes before all have read: out may be images.
    mean = static_cast<float>(block_sum(total) / static_cast<double>(pixels));
  }
  const bool waits = blurs(args, n);
  for (uint32_t p = threadIdx.x; p < pixels; p += kThreads) {
    Pixel<C, float> x = read_pixel<C, In>(args, n, p);
    for (int s = 0; s < program.count; ++s) apply<C, float>(program.steps[s], mean, [&](auto change) { change(x); });
#pragma unroll
    for (int c = 0; c < C; ++c) {
      if (waits) {
        args.work[(n * C + c) * pixels + p] = x.channel[c];
      } else {
        write_value<Out>(args, n, c, p, x.channel[c]);
      }
    }
  }
}

// Blocks: bands of a plane, channels, images, the bands fastest. Shared memory: the weights, not yet divided by their sum,
// and the band, blurred along its columns.
template <typename Out>
__global__ void __launch_bounds__(kThreads) blur_kernel(const Photometric args, int bands, int band_rows) {
  extern __shared__ float shared[];
  const int64_t image_plane = blockIdx.x / bands, n = image_plane / args.C;
  if (!blurs(args, n)) return;
  const int H = static_cast<int>(args.H), W = static_cast<int>(args.W), radius = static_cast<int>(args.radius);
  const int c = static_cast<int>(image_plane % args.C);
  const int first = static_cast<int>(blockIdx.x % bands) * band_rows;
  const int pixels = min(band_rows, H - first) * W;
  const float* plane = args.work + image_plane * H * W;
  float* weights = shared;
  float* band = shared + radius + 1;
  for (int k = threadIdx.x; k <= radius; k += kThreads) weights[k] = weight_of(args, n, k);
  __syncthreads();
  float total = 1;
  for (int k = 1; k <= radius; ++k) total += 2 * weights[k];

  for (int p = threadIdx.x; p < pixels; p += kThreads) {
    const int y = first + p / W, x = p % W;
    float sum = plane[y * W + x];
    for (int k = 1; k <= radius; ++k) {
      sum += weights[k] * (plane[mirrored(y - k, H) * W + x] + plane[mirrored(y + k, H) * W + x]);
    }
    band[p] = sum / total;
  }
  __syncthreads();
  for (int p = threadIdx.x; p < pixels; p += kThreads) {
    const float* row = band + p / W * W;
    const int x = p % W;
    float sum = row[x];
    for (int k = 1; k <= radius; ++k) sum += weights[k] * (row[mirrored(x - k, W)] + row[mirrored(x + k, W)]);
    write_value<Out>(args, n, c, static_cast<uint32_t>(first * W + p), sum / total);
  }
}

template <int C, typename In, typename Out> void launch(const Photometric& args, cudaStream_t stream) {
  colour_kernel<C, In, Out><<<static_cast<unsigned>(args.N), kThreads, 0, stream>>>(args);
  if (!args.sigma || !args.radius) return;
  const int band_rows = static_cast<int>(std::min<int64_t>(kBandRows, (kBandFloats - args.radius - 1) / args.W));
  const int bands = static_cast<int>((args.H + band_rows - 1) / band_rows);
  const size_t shared = (args.radius + 1 + band_rows * args.W) * sizeof(float);
  blur_kernel<Out><<<static_cast<unsigned>(args.N * C * bands), kThreads, shared, stream>>>(args, bands, band_rows);
}

}  // namespace

void photometric_cuda(const Photometric& args, uintptr_t stream_handle) {
  if (args.N * args.C * args.H * args.W == 0) return;
  const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_handle);
  with_cuda_dtype<false>(args.in_dtype, [&](auto in) {
    with_cuda_dtype<false>(args.out_dtype, [&](auto out) {
      if (args.C == 1) {
        launch<1, decltype(in), decltype(out)>(args, stream);
      } else {
        launch<3, decltype(in), decltype(out)>(args, stream);
      }
    });
  });
  check_launch("photometric");
}

}  // namespace fastproto
