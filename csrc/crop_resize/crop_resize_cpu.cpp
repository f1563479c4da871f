// crop_resize on the CPU. One task per crop: tap tables once, then LANES output rows at a time. Their vertical sums run along
// the crop's width and are turned, so that a vector holds one column of the LANES rows; the horizontal sums then take whole
// vectors, and are turned back for the store. Turning costs a load, log2(LANES) shuffles and a store a vector.
//
// Work per crop and channel: h · taps_y · width + h · w · taps_x multiply-adds; output stores bound it from below.
// Scratch per thread: 2 · LANES lines of floats and the tap tables. Same bits for any number of threads.
#include "crop_resize.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../common/dtype.h"
#include "../common/float_rows.h"
#include "../common/large_output.h"
#include "../common/parallel.h"
#include "../common/vec.h"

namespace fastproto {
namespace FASTPROTO_ISA {
namespace {

// f(taps), of the usual numbers as a constant: a loop of known length has no counter, and no end to be foreseen.
template <typename F> inline void with_taps(int taps, F&& f) {
  switch (taps) {
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    default: return f(taps);
  }
}

// Where the window of every output position of one side begins, and its weights, which sum to 1. All windows are as wide as
// the widest, moved inwards at the edge, with weights of 0 for what is not theirs: loops of one length are foreseen by the CPU.
struct Taps {
  std::vector<Window<float>> windows;
  std::vector<int> first;      // (out_side,)
  std::vector<float> weights;  // (out_side, count)
  int count = 0;

  void build(int side, int out_side, bool antialias) {
    count = 0;
    windows.resize(out_side);
    Window<float>* all = windows.data();
    // Once: another rounding of the same expression could begin one pixel earlier.
    for (int i = 0; i < out_side; ++i) {
      all[i] = window<float>(i, side, out_side, antialias);
      count = std::max(count, all[i].count);
    }
    first.resize(out_side);
    weights.resize(static_cast<size_t>(out_side) * count);
    with_taps(count, [&](auto taps) {
      for (int i = 0; i < out_side; ++i) {
        Window<float> here = all[i];
        first[i] = here.first = std::min(here.first, side - taps);
        float *own = weights.data() + static_cast<size_t>(i) * taps, sum = 0;
        for (int k = 0; k < taps; ++k) sum += own[k] = window_weight(here, k);
        const float inverse = 1 / sum;
        for (int k = 0; k < taps; ++k) own[k] *= inverse;
      }
    });
  }
};

// By intrinsics: of __builtin_convertvector g++ 12 makes 40 instructions on single bytes.
inline Vec load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  const IntVec wide = (IntVec)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return __builtin_convertvector(wide, Vec);
#elif defined(__AVX2__)
  const IntVec wide = (IntVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return __builtin_convertvector(wide, Vec);
#else
  typedef uint8_t ByteVec __attribute__((vector_size(LANES)));
  ByteVec v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(__builtin_convertvector(v, IntVec), Vec);
#endif
}

// line[x] = Σ_k weights[k] · pixels[k, x], x < span
template <typename Count>
inline void vertical(const uint8_t* pixels, int64_t stride_h, int64_t stride_w, const float* weights, Count taps,
                     int64_t span, float* line) {
  int64_t x = 0;
  // The last vector ends where the line does: some of its pixels are computed twice.
  for (; stride_w == 1 && span >= LANES && x < span; x += LANES) {
    const int64_t at = std::min(x, span - LANES);
    Vec sum{};
    for (int k = 0; k < taps; ++k) sum += weights[k] * load_bytes(pixels + k * stride_h + at);
    store(line + at, sum);
  }
  for (; x < span; ++x) {
    float sum = 0;
    for (int k = 0; k < taps; ++k) sum += weights[k] * static_cast<float>(pixels[k * stride_h + x * stride_w]);
    line[x] = sum;
  }
}

struct Scratch {
  Taps rows, columns;
  Buffer lines, turned, out, out_rows;  // (LANES, span), (span, LANES), (w, LANES), (LANES, w), sides of whole vectors
  Buffer row;                           // (w,) of the output's dtype
};

template <typename Out> int64_t bytes(const CropResize& args) { return args.R * args.C * args.h * args.w * sizeof(Out); }

// One row of the output, of `args.w` values.
template <typename Out> void store_row(const CropResize& args, const float* values, Out* out, Scratch& scratch) {
  const auto convert = [&](Out* to, int64_t stride) {
    for (int64_t j = 0; j < args.w; ++j) to[j * stride] = from_float<Out>(values[j]);
  };
  if (args.stride_w != 1) return convert(out, args.stride_w);
  if (bytes<Out>(args) < kStreamed) return convert(out, 1);
  if constexpr (std::is_same_v<Out, float>) {
    stream(out, values, args.w * sizeof(Out));
  } else {
    Out* row = reinterpret_cast<Out*>(scratch.row.take(args.w));
    convert(row, 1);
    stream(out, row, args.w * sizeof(Out));
  }
}

// LANES output rows from i on, of `channels` channels that stand side by side in the image's lines.
template <typename Out>
void some_rows(const CropResize& args, const uint8_t* origin, const Image& image, int64_t r, int64_t c, int channels,
               int64_t i, int64_t span, bool mirrored, Scratch& scratch) {
  const int64_t w = round_up(args.w, LANES), line = round_up(span, LANES);
  float *lines = scratch.lines.take(LANES * line), *turned = scratch.turned.take(LANES * line);
  float *out = scratch.out.take(LANES * w), *out_rows = scratch.out_rows.take(LANES * w);
  with_taps(scratch.rows.count, [&](auto taps) {
    const int* first = scratch.rows.first.data();
    const float* weights = scratch.rows.weights.data();
    for (int l = 0; l < LANES; ++l) {
      const int64_t row = std::min(i + l, args.h - 1);
      vertical(origin + first[row] * image.stride_h, image.stride_h, channels > 1 ? 1 : image.stride_w,
               weights + row * taps, taps, span, lines + l * line);
    }
  });
  for (int64_t x = 0; x < span; x += LANES) transpose_square(lines + x, line, turned + x * LANES, LANES);
  for (int channel = 0; channel < channels; ++channel) {
    with_taps(scratch.columns.count, [&](auto taps) {
      // Values of their own: the compiler would have to look whether a store of a pixel has changed those in `scratch`.
      const int* first = scratch.columns.first.data();
      const float* weights = scratch.columns.weights.data();
      const Vec scale = splat(args.scale[c + channel]), offset = splat(args.offset[c + channel]);
      const int64_t step = channels * LANES, last = args.w - 1;
      for (int64_t j = 0; j <= last; ++j) {
        const int64_t source = mirrored ? last - j : j;
        const float *own = weights + source * taps, *pixels = turned + first[source] * step + channel * LANES;
        Vec sum{};
        for (int k = 0; k < taps; ++k) sum += own[k] * load(pixels + k * step);
        store(out + j * LANES, sum * scale + offset);
      }
    });
    for (int64_t j = 0; j < args.w; j += LANES) transpose_square(out + j * LANES, LANES, out_rows + j, w);
    for (int64_t l = 0; l < std::min<int64_t>(LANES, args.h - i); ++l) {
      Out* row = static_cast<Out*>(args.out) + r * args.stride_r + (c + channel) * args.stride_c + (i + l) * args.stride_h;
      store_row(args, out_rows + l * w, row, scratch);
    }
  }
}

template <typename Out> void one_crop(const CropResize& args, int64_t r) {
  // By a pointer: the address of a thread's own variable would be asked for again and again.
  thread_local const std::unique_ptr<Scratch> owned = std::make_unique<Scratch>();
  Scratch& scratch = *owned;
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
  stream_end();
}

// The check of Python does not run in compiled code, and what is outside of an image is somebody else's memory.
void expect_inside(const CropResize& args) {
  for (int64_t r = 0; r < args.R; ++r) {
    const int64_t n = args.image_of(r);
    const bool known = n >= 0 && n < args.images.count;
    const int32_t* crop = args.crops + 4 * r;
    const auto fits = [&](int side, int64_t length) {
      return crop[side] >= 0 && crop[side + 2] > 0 && int64_t{crop[side]} + crop[side + 2] <= length;
    };
    if (!known || !fits(0, args.images[n].height) || !fits(1, args.images[n].width))
      throw std::invalid_argument("crop_resize: crops[" + std::to_string(r) + "] is not inside its image");
  }
}

}  // namespace

void crop_resize(const CropResize& args, int threads) {
  if (args.R == 0) return;
  expect_inside(args);
  with_dtype(args.out_dtype, [&](auto zero) {
    using Out = decltype(zero);
    if constexpr (std::is_same_v<Out, double>) {
      throw std::invalid_argument("float64 is for the reference");
    } else {
      huge_pages(args.out, bytes<Out>(args));
      const int64_t views = args.views();
      parallel_for(args.R, threads, [&](int64_t order) {
        one_crop<Out>(args, order % views * (args.R / views) + order / views);
      });
    }
  });
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
