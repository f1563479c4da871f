// crop_resize on the CPU. One task per crop: tap tables once, then LANES output rows at a time. Their vertical sums run along
// the crop's width and are turned, so that a vector holds one column of the LANES rows; the horizontal sums then take whole
// vectors, and are turned back for the store. Turning costs 3 instructions a vector, sums over single pixels would cost 8.
//
// Work per crop and channel: h · taps_y · width + h · w · taps_x multiply-adds; output stores bound it from below.
// Scratch per thread: 2 · LANES lines of floats and the tap tables. Same bits for any number of threads.
#include "crop_resize.h"

#include <vector>

#include "../common/dtype.h"
#include "../common/parallel.h"
#include "../common/tile.h"

namespace fastproto {
namespace FASTPROTO_ISA {
namespace {

// The window of every output position of one side, and its weights, which sum to 1.
struct Taps {
  std::vector<Window<float>> windows;
  std::vector<float> weights;  // (out_side, stride)
  int stride = 0;

  // A window is computed once and kept: another rounding of the same expression could begin one pixel earlier.
  void build(int side, int out_side, bool antialias) {
    windows.clear();
    stride = 0;
    for (int i = 0; i < out_side; ++i) {
      windows.push_back(window<float>(i, side, out_side, antialias));
      stride = std::max(stride, windows[i].count);
    }
    weights.resize(static_cast<size_t>(out_side) * stride);
    for (int i = 0; i < out_side; ++i) {
      float* row = weights.data() + static_cast<size_t>(i) * stride;
      float sum = 0;
      for (int k = 0; k < windows[i].count; ++k) sum += row[k] = window_weight(windows[i], k);
      for (int k = 0; k < windows[i].count; ++k) row[k] /= sum;
    }
  }
};

typedef uint8_t ByteVec __attribute__((vector_size(LANES)));

inline Vec load_bytes(const uint8_t* p) {
  ByteVec v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(__builtin_convertvector(v, IntVec), Vec);
}

// line[x] = Σ_k weights[k] · pixels[k, x], x < span
inline void vertical(const uint8_t* pixels, int64_t stride_h, int64_t stride_w, const float* weights, int taps,
                     int64_t span, float* line) {
  int64_t x = 0;
  for (; stride_w == 1 && x + LANES <= span; x += LANES) {
    Vec sum{};
    for (int k = 0; k < taps; ++k) sum += weights[k] * load_bytes(pixels + k * stride_h + x);
    store(line + x, sum);
  }
  for (; x < span; ++x) {
    float sum = 0;
    for (int k = 0; k < taps; ++k) sum += weights[k] * static_cast<float>(pixels[k * stride_h + x * stride_w]);
    line[x] = sum;
  }
}

struct Scratch {
  Taps rows, columns;
  Buffer lines, turned, out, out_rows;  // (LANES, span), (span, LANES), (w, LANES), (LANES, w)
};

// LANES output rows from i on, of `channels` channels that stand side by side in the image's lines.
template <typename Out>
void some_rows(const CropResize& args, const uint8_t* origin, const Image& image, int64_t r, int64_t c, int channels,
               int64_t i, int64_t span, bool mirrored, Scratch& scratch) {
  const int64_t w = round_up(args.w, 4);
  float *lines = scratch.lines.take(LANES * span), *turned = scratch.turned.take(LANES * span);
  float *out = scratch.out.take(LANES * w), *out_rows = scratch.out_rows.take(LANES * w);
  for (int l = 0; l < LANES; ++l) {
    const int64_t row = std::min(i + l, args.h - 1);
    const Window<float>& rows = scratch.rows.windows[row];
    vertical(origin + rows.first * image.stride_h, image.stride_h, channels > 1 ? 1 : image.stride_w,
             scratch.rows.weights.data() + row * scratch.rows.stride, rows.count, span, lines + l * span);
  }
  for (int l = 0; l < LANES; l += 4) transpose_four(lines + l * span, span, turned + l, LANES);
  for (int channel = 0; channel < channels; ++channel) {
    const Vec offset = splat(args.offset[c + channel]);
    for (int64_t j = 0; j < args.w; ++j) {
      const int64_t source = mirrored ? args.w - 1 - j : j;
      const Window<float>& columns = scratch.columns.windows[source];
      const float* weights = scratch.columns.weights.data() + source * scratch.columns.stride;
      const float* pixels = turned + (int64_t(columns.first) * channels + channel) * LANES;
      Vec sum{};
      for (int k = 0; k < columns.count; ++k) sum += weights[k] * load(pixels + k * channels * LANES);
      store(out + j * LANES, sum * args.scale[c + channel] + offset);
    }
    for (int64_t j = 0; j < args.w; j += 4) transpose_four(out + j * LANES, LANES, out_rows + j, w);
    for (int64_t l = 0; l < std::min<int64_t>(LANES, args.h - i); ++l) {
      Out* row = static_cast<Out*>(args.out) + r * args.stride_r + (c + channel) * args.stride_c + (i + l) * args.stride_h;
      if (args.stride_w == 1) {
        for (int64_t j = 0; j < args.w; ++j) row[j] = from_float<Out>(out_rows[l * w + j]);
      } else {
        for (int64_t j = 0; j < args.w; ++j) row[j * args.stride_w] = from_float<Out>(out_rows[l * w + j]);
      }
    }
  }
}

template <typename Out> void one_crop(const CropResize& args, int64_t r) {
  thread_local Scratch scratch;
  const int32_t* crop = args.crops + 4 * r;
  const int height = crop[2], width = crop[3];
  const Image image = args.images[args.image_of(r)];
  const bool mirrored = args.flip && args.flip[r];
  // Channels last: one line holds them all.
  const int channels = image.stride_c == 1 && image.stride_w == args.C ? static_cast<int>(args.C) : 1;
  scratch.rows.build(height, static_cast<int>(args.h), args.antialias);
  scratch.columns.build(width, static_cast<int>(args.w), args.antialias);
  for (int64_t c = 0; c < args.C; c += channels) {
    const uint8_t* origin = image.data + c * image.stride_c + crop[0] * image.stride_h + crop[1] * image.stride_w;
    for (int64_t i = 0; i < args.h; i += LANES)
      some_rows<Out>(args, origin, image, r, c, channels, i, int64_t(width) * channels, mirrored, scratch);
  }
}

}  // namespace

void crop_resize(const CropResize& args, int threads) {
  with_dtype(args.out_dtype, [&](auto zero) {
    using Out = decltype(zero);
    if constexpr (std::is_same_v<Out, double>) {
      throw std::invalid_argument("float64 is for the reference");
    } else {
      parallel_for(args.R, threads, [&](int64_t r) { one_crop<Out>(args, r); });
    }
  });
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
