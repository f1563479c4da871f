// crop_resize on a GPU: half a warp makes 32 columns of a band of output rows of one crop; a thread goes down two of them.
//
//   row[y, j] = Σ_x Wx[j, x] · image[top + y, left + x]      of an input row once, in registers
//   out[i, j] = Σ_y Wy[i, y] · row[y, j]                     of two rows when enlarging, of all that the filter covers else
//
// Floor: the output written once and the crops read once; the views of an image follow each other, so that the second
// finds it in the L2. Instructions are near: of two columns about 85 an output row when enlarging (0.7 input rows each, on
// the average of random resized crops). Two neighbouring columns share most of their pixels: three for both when enlarging.
// Where a pixel's channels are neighbours, 32 pixels are put in order in shared memory, and written in whole sectors.
#include "crop_resize.h"

#include <algorithm>
#include <stdexcept>

#include "../common/cuda.h"

namespace fastproto {
namespace {

constexpr int kHalf = 16, kPair = 2, kColumns = kHalf * kPair;
constexpr int kThreads = 128;
// Rows of a band. Its first input rows are read by the band above too: one or two of the twelve that 16 rows need.
constexpr int kBand = 16;

// What a thread stores at once: 16 bytes, or two neighbours.
template <typename Out> struct alignas(16) Pack {
  Out values[16 / sizeof(Out)];
};
template <typename Out> struct alignas(kPair * sizeof(Out)) Pair {
  Out values[kPair];
};

// Weight of a pixel so far from the centre of a window, not yet divided by the sum of the window's weights.
__device__ __forceinline__ float triangle(float distance, float inverse_support) {
  return fmaxf(1 - fabsf(distance) * inverse_support, 0.f);
}

// The pixels that a pair of output columns is made of: T neighbours, of which those outside a window have weight 0 in it.
template <int C, int T, bool planar> struct FixedTaps {
  const uint8_t* first;  // of the crop's first row
  int64_t stride_c, stride_w;
  int stride_h;
  float weight[kPair][T];

  __device__ __forceinline__ FixedTaps(const Image& image, const uint8_t* crop, int width, const Window<float> (&windows)[kPair])
      : stride_c(image.stride_c), stride_w(planar ? 1 : image.stride_w), stride_h(static_cast<int>(image.stride_h)) {
    const int left = min(min(windows[0].first, windows[1].first), width - T);
    const float inverse = windows[0].slope;
#pragma unroll
    for (int k = 0; k < kPair; ++k) {
      float sum = 0;
#pragma unroll
      for (int t = 0; t < T; ++t) sum += weight[k][t] = triangle(left + t + 0.5f - windows[k].centre, inverse);
      const float inverse_sum = __fdividef(1, sum);
#pragma unroll
      for (int t = 0; t < T; ++t) weight[k][t] *= inverse_sum;
    }
    first = crop + left * stride_w;
  }

  __device__ __forceinline__ void row(int y, float (&out)[kPair][C]) const {
    const uint8_t* pixels = first + static_cast<int64_t>(y) * stride_h;
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int t = 0; t < T; ++t) {
        const float x = __ldg(pixels + c * stride_c + t * stride_w);
#pragma unroll
        for (int k = 0; k < kPair; ++k) out[k][c] = t ? out[k][c] + weight[k][t] * x : weight[k][t] * x;
      }
    }
  }
};

// Any number of them, whose weights are found anew for every row.
template <int C> struct AnyTaps {
  const uint8_t* first[kPair];
  int64_t stride_c, stride_w;
  int stride_h, count[kPair];
  float place[kPair], inverse, inverse_sum[kPair];  // of the first pixel, from the window's centre; 1 / support

  __device__ __forceinline__ AnyTaps(const Image& image, const uint8_t* crop, int, const Window<float> (&windows)[kPair])
      : stride_c(image.stride_c), stride_w(image.stride_w), stride_h(static_cast<int>(image.stride_h)) {
    inverse = windows[0].slope;
    for (int k = 0; k < kPair; ++k) {
      first[k] = crop + windows[k].first * stride_w;
      place[k] = windows[k].first + 0.5f - windows[k].centre;
      count[k] = windows[k].count;
      float sum = 0;
      for (int t = 0; t < count[k]; ++t) sum += triangle(place[k] + t, inverse);
      inverse_sum[k] = __fdividef(1, sum);
    }
  }

  __device__ __forceinline__ void row(int y, float (&out)[kPair][C]) const {
    for (int k = 0; k < kPair; ++k) {
      const uint8_t* pixels = first[k] + static_cast<int64_t>(y) * stride_h;
      float sum[C] = {};
      for (int t = 0; t < count[k]; ++t, pixels += stride_w) {
        const float weight = triangle(place[k] + t, inverse);
#pragma unroll
        for (int c = 0; c < C; ++c) sum[c] += weight * __ldg(pixels + c * stride_c);
      }
#pragma unroll
      for (int c = 0; c < C; ++c) out[k][c] = sum[c] * inverse_sum[k];
    }
  }
};

// Where a thread's two columns of one crop go, row by row.
template <int C, typename Out> struct Columns {
  const CropResize& args;
  Out* place;         // of the first column's next row; where the half warp stores together, of its first column's
  Pack<Out>* packed;  // the half warp's place in shared memory; null where every thread stores its own
  int lane, count;    // in the half warp; columns inside the output
  bool paired;        // whether the two columns of a channel are neighbours, at an address to store both at

  __device__ __forceinline__ void store(const float (&sum)[kPair][C]) {
    Out values[kPair * C];
#pragma unroll
    for (int k = 0; k < kPair; ++k) {
#pragma unroll
      for (int c = 0; c < C; ++c) values[k * C + c] = narrow<Out>(sum[k][c] * args.scale[c] + args.offset[c]);
    }
    if (packed) {
      Out* mine = packed->values + lane * kPair * C;
      __syncwarp(half_mask());  // the row above has been read
#pragma unroll
      for (int v = 0; v < kPair * C; ++v) mine[v] = values[v];
      __syncwarp(half_mask());
      constexpr int kPacks = kColumns * C * sizeof(Out) / sizeof(Pack<Out>);
#pragma unroll
      for (int p = 0; p < kPacks; p += kHalf) {
        if (p + lane < kPacks) reinterpret_cast<Pack<Out>*>(place)[p + lane] = packed[p + lane];
      }
    } else if (paired && count >= kPair) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        *reinterpret_cast<Pair<Out>*>(place + c * args.stride_c) = {values[c], values[C + c]};
      }
    } else {
#pragma unroll
      for (int k = 0; k < kPair; ++k) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
          if (k < count) place[k * args.stride_w + c * args.stride_c] = values[k * C + c];
        }
      }
    }
    place += args.stride_h;
  }

  __device__ __forceinline__ unsigned half_mask() const { return 0xffffu << (threadIdx.x & kHalf); }
};

// Output rows first … last − 1, each between two input rows: the lower one of those is often the next one's upper.
template <int C, typename Taps, typename Out>
__device__ __forceinline__ void enlarge(const Taps& taps, Columns<C, Out>& columns, int first, int last, int height,
                                        float ratio) {
  float upper[kPair][C], lower[kPair][C];
  int above = -2;  // the input row in `upper`
  for (int i = first; i < last; ++i) {
    const float centre = (i + 0.5f) * ratio - 0.5f;
    const int y = centre > 0 ? static_cast<int>(centre) : 0;
    if (y != above) {
      if (y == above + 1) {
#pragma unroll
        for (int v = 0; v < kPair * C; ++v) upper[v / C][v % C] = lower[v / C][v % C];
      } else {
        taps.row(y, upper);
      }
      taps.row(min(y + 1, height - 1), lower);
      above = y;
    }
    const float share = fmaxf(centre - y, 0.f);
    float sum[kPair][C];
#pragma unroll
    for (int v = 0; v < kPair * C; ++v) {
      const int k = v / C, c = v % C;
      sum[k][c] = upper[k][c] + share * (lower[k][c] - upper[k][c]);
    }
    columns.store(sum);
  }
}

// Output rows first … last − 1 where each covers more than a row: an input row then counts for two output rows at most.
template <int C, typename Taps, typename Out>
__device__ __forceinline__ void shrink(const Taps& taps, Columns<C, Out>& columns, int first, int last, int height,
                                       float ratio) {
  const float inverse = __fdividef(1, ratio);
  float here[kPair][C] = {}, next[kPair][C] = {}, weight_here = 0, weight_next = 0;
  float centre = (first + 0.5f) * ratio;
  int i = first;
  for (int y = max(static_cast<int>(centre - ratio + 0.5f), 0); i < last; ++y) {
    float row[kPair][C];
    taps.row(y, row);
    const float distance = y + 0.5f - centre;
    const float for_here = triangle(distance, inverse), for_next = triangle(distance - ratio, inverse);
    weight_here += for_here, weight_next += for_next;
#pragma unroll
    for (int v = 0; v < kPair * C; ++v) {
      const int k = v / C, c = v % C;
      here[k][c] += for_here * row[k][c], next[k][c] += for_next * row[k][c];
    }
    while (i < last && y + 1 >= min(static_cast<int>(centre + ratio + 0.5f), height)) {
      const float inverse_sum = __fdividef(1, weight_here);
#pragma unroll
      for (int v = 0; v < kPair * C; ++v) here[v / C][v % C] *= inverse_sum;
      columns.store(here);
#pragma unroll
      for (int v = 0; v < kPair * C; ++v) here[v / C][v % C] = next[v / C][v % C], next[v / C][v % C] = 0;
      weight_here = weight_next, weight_next = 0;
      centre = (++i + 0.5f) * ratio;
    }
  }
}

template <int C, typename Taps, typename Out>
__device__ __forceinline__ void go_down(const Taps& taps, Columns<C, Out>& columns, int first, int height) {
  const CropResize& args = columns.args;
  const int last = min(first + kBand, static_cast<int>(args.h));
  const float ratio = static_cast<float>(height) / static_cast<float>(args.h);
  if (args.antialias && ratio > 1) {
    shrink<C>(taps, columns, first, last, height, ratio);
  } else {
    enlarge<C>(taps, columns, first, last, height, ratio);
  }
}

// Units, a half warp each: columns fastest, then the bands of a crop, the views of an image, images.
template <int C, bool planar, typename Out>
__global__ void __launch_bounds__(kThreads)
    crop_resize_kernel(const CropResize args, unsigned units, unsigned views, unsigned segments, unsigned bands) {
  __shared__ Pack<Out> packed[kThreads / kHalf][kColumns * C * sizeof(Out) / sizeof(Pack<Out>)];
  const unsigned half = threadIdx.x / kHalf, unit = blockIdx.x * (kThreads / kHalf) + half;
  if (unit >= units) return;
  const unsigned order = unit / (segments * bands), band = unit / segments % bands;
  const int64_t r = order % views * (args.R / views) + order / views;
  const int lane = static_cast<int>(threadIdx.x % kHalf), left = static_cast<int>(unit % segments) * kColumns;
  const int first = static_cast<int>(band) * kBand, w = static_cast<int>(args.w), j = left + kPair * lane;

  Out* start = static_cast<Out*>(args.out) + r * args.stride_r + first * args.stride_h + left * args.stride_w;
  const bool aligned = reinterpret_cast<uintptr_t>(start) % 16 == 0 && args.stride_h * sizeof(Out) % 16 == 0;
  const bool together = args.stride_c == 1 && args.stride_w == C && left + kColumns <= w && aligned;
  const bool paired = args.stride_w == 1 && reinterpret_cast<uintptr_t>(start) % sizeof(Pair<Out>) == 0 &&
                      args.stride_h % kPair == 0 && args.stride_c % kPair == 0;
  Columns<C, Out> columns{args, together ? start : start + kPair * lane * args.stride_w, together ? packed[half] : nullptr,
                          lane, w - j, paired};

  const int32_t* crop = args.crops + 4 * r;
  const int height = crop[2], width = crop[3];
  if (height < 1 || width < 1) return;  // nothing to read; on a GPU only debug mode refuses it
  const Image image = args.images[args.image_of(r)];
  const uint8_t* corner = image.data + crop[0] * image.stride_h + crop[1] * image.stride_w;
  const bool flip = args.flip && args.flip[r];
  Window<float> windows[kPair];
#pragma unroll
  for (int k = 0; k < kPair; ++k) {
    const int column = min(j + k, w - 1);
    windows[k] = window<float>(flip ? w - 1 - column : column, width, w, args.antialias);
  }
  // A window of support s covers 2 s pixels, and its neighbour's begins width / w pixels away.
  if (width <= w && width >= 3) {
    go_down<C>(FixedTaps<C, 3, planar>(image, corner, width, windows), columns, first, height);
  } else if (args.antialias && width > w && width <= 2 * w && width >= 6) {
    go_down<C>(FixedTaps<C, 6, planar>(image, corner, width, windows), columns, first, height);
  } else {
    go_down<C>(AnyTaps<C>(image, corner, width, windows), columns, first, height);
  }
}

template <int C, typename Out> void launch(const CropResize& args, cudaStream_t stream) {
  const int64_t segments = (args.w + kColumns - 1) / kColumns, bands = (args.h + kBand - 1) / kBand;
  const int64_t units = args.R * segments * bands, blocks = (units + kThreads / kHalf - 1) / (kThreads / kHalf);
  if (units > UINT32_MAX - kThreads) throw std::invalid_argument("crop_resize: too many crops for one call");
  const auto kernel = args.images.first.stride_w == 1 && !args.images.table ? crop_resize_kernel<C, true, Out>
                                                                            : crop_resize_kernel<C, false, Out>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      args, static_cast<unsigned>(units), static_cast<unsigned>(args.views()), static_cast<unsigned>(segments),
      static_cast<unsigned>(bands));
}

template <typename Out> void launch(const CropResize& args, cudaStream_t stream) {
  switch (args.C) {
    case 1: launch<1, Out>(args, stream); break;
    case 2: launch<2, Out>(args, stream); break;
    case 3: launch<3, Out>(args, stream); break;
    case 4: launch<4, Out>(args, stream); break;
  }
}

}  // namespace

void crop_resize_cuda(const CropResize& args, uintptr_t stream_handle) {
  if (args.R * args.C * args.h * args.w == 0) return;
  const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_handle);
  with_cuda_dtype(args.out_dtype, [&](auto out) { launch<decltype(out)>(args, stream); });
  check_launch("crop_resize");
}

}  // namespace fastproto
