// photometric on the CPU. One task per image, whose planes stay in a scratch of floats: every change of colour in one pass
// over the pixels, C vectors at a time in registers. Two passes only where contrast needs the mean of what came before.
//
// Floor: the image read and written once. Arithmetic per vector of pixels: 9 operations a blend, 40 the hue, and for the
// blur 3 · radius + 1 operations along each axis. Scratch per thread: C + 1 planes. Same bits for any number of threads.
#include "photometric.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

#include "../common/dtype.h"
#include "../common/float_rows.h"
#include "../common/large_output.h"
#include "../common/parallel.h"
#include "../common/vec.h"
#include "pixel.h"

namespace fastproto {
namespace FASTPROTO_ISA {
namespace {

constexpr int64_t WIDE = 4 * LANES;        // pixels that a step of colours and the blur take at once
constexpr int64_t BLOCK = 64 * LANES;      // pixels whose luma is summed in float32, the blocks' sums in float64

// Floats from one plane to the next: what takes WIDE pixels at once reads and writes past the end too.
int64_t plane_size(const Photometric& args) { return round_up(args.H * args.W, LANES) + WIDE; }

template <typename In> inline float widen(In x) { return to_float(x); }
template <> inline float widen<float>(float x) { return x; }

// Calls f(offset in the tensor, offset in the plane, pixels) for each row; the rows of a dense plane are one.
template <typename F> void for_rows(const Photometric& args, const int64_t* stride, int64_t n, int64_t c, F f) {
  const int64_t offset = n * stride[0] + c * stride[1];
  if (stride[3] == 1 && stride[2] == args.W) return f(offset, 0, args.H * args.W);
  for (int64_t y = 0; y < args.H; ++y) f(offset + y * stride[2], y * args.W, args.W);
}

template <typename In> void read_plane(const Photometric& args, int64_t n, int64_t c, float* plane) {
  const int64_t step = args.in_strides[3];
  for_rows(args, args.in_strides, n, c, [&](int64_t from, int64_t to, int64_t count) {
    const In* in = static_cast<const In*>(args.images) + from;
    float* row = plane + to;
    if (step == 1) {
      for (int64_t x = 0; x < count; ++x) row[x] = widen(in[x]);
    } else {
      for (int64_t x = 0; x < count; ++x) row[x] = widen(in[x * step]);
    }
  });
  std::fill(plane + args.H * args.W, plane + plane_size(args), 0.f);  // adds nothing to the mean
}

void solarise_and_normalise(const Photometric& args, int64_t n, int64_t c, float* plane) {
  const Vec threshold = splat(args.threshold ? args.threshold[n] : INFINITY);
  const float scale = args.scale[c], offset = args.offset[c];
  for (int64_t p = 0; p < args.H * args.W; p += LANES) {
    const Vec x = load(plane + p);
    store(plane + p, (x >= threshold ? 1.f - x : x) * scale + offset);
  }
}

template <typename Out> void write_plane(const Photometric& args, int64_t n, int64_t c, const float* plane) {
  const int64_t step = args.out_strides[3];
  for_rows(args, args.out_strides, n, c, [&](int64_t to, int64_t from, int64_t count) {
    const float* row = plane + from;
    Out* out = static_cast<Out*>(args.out) + to;
    if (step == 1) {
      for (int64_t x = 0; x < count; ++x) out[x] = from_float<Out>(row[x]);
    } else {
      for (int64_t x = 0; x < count; ++x) out[x * step] = from_float<Out>(row[x]);
    }
  });
}

// Takes all pixels through some steps of a program; returns the mean luma after them where it is asked for.
template <int C, bool MEAN>
float run(const Photometric& args, const Program& program, int first, int last, float mean, float* planes) {
  const int64_t pixels = args.H * args.W, plane = plane_size(args);
  double total = 0;
  for (int64_t begin = 0; begin < pixels; begin += BLOCK) {
    Vec block_sum{};
    for (int64_t p = begin; p < std::min(begin + BLOCK, pixels); p += WIDE) {
      constexpr int VECTORS = WIDE / LANES;
      Pixel<C, Vec> some[VECTORS];
      const auto at = [&](int v, int c) { return planes + c * plane + p + v * LANES; };
      for (int v = 0; v < VECTORS; ++v)
        for (int c = 0; c < C; ++c) some[v].channel[c] = load(at(v, c));
      for (int s = first; s < last; ++s)
        apply<C, Vec>(program.steps[s], mean, [&](auto change) {
          for (auto& x : some) change(x);
        });
      for (int v = 0; v < VECTORS; ++v) {
        if (MEAN) block_sum += luma<C, Vec>(some[v]);
        for (int c = 0; c < C; ++c) store(at(v, c), some[v].channel[c]);
      }
    }
    total += sum(block_sum);
  }
  return static_cast<float>(total / static_cast<double>(pixels));
}

// Half of the Gaussian, from its middle outwards; false where it leaves an image as it is.
bool gaussian(float sigma, int64_t radius, std::vector<float>& weights) {
  weights.resize(radius + 1);
  float total = 0;
  for (int64_t k = 0; k <= radius; ++k) {
    const float place = static_cast<float>(k) / std::max(sigma, 1e-3f);
    weights[k] = std::exp(-0.5f * place * place);
    total += k ? 2 * weights[k] : weights[k];
  }
  for (float& weight : weights) weight /= total;
  return radius > 0 && weights[1] != 0;
}

// to[x] = weight_0 · middle[x] + Σ_k weight_k · (before_k[x] + after_k[x]) for WIDE columns
template <typename Sides>
void weigh(const float* weights, int64_t radius, const float* middle, Sides sides, float* to) {
  Vec acc[4];
  for (int v = 0; v < 4; ++v) acc[v] = load(middle + v * LANES) * weights[0];
  for (int64_t k = 1; k <= radius; ++k) {
    const auto [before, after] = sides(k);
    const Vec weight = splat(weights[k]);
    for (int v = 0; v < 4; ++v) acc[v] += weight * (load(before + v * LANES) + load(after + v * LANES));
  }
  for (int v = 0; v < 4; ++v) store(to + v * LANES, acc[v]);
}

// Row by row: down the columns into a line, whose ends are then mirrored, and along it into the other plane. Whole vectors
// reach into the next row, which is written after, and past the last one.
void blur_plane(const Photometric& args, const float* weights, const float* plane, float* line, float* blurred) {
  thread_local std::vector<const float*> rows;
  const int64_t H = args.H, W = args.W, radius = args.radius;
  rows.resize(2 * radius + 1);
  float* middle = line + radius;
  for (int64_t y = 0; y < H; ++y) {
    for (int64_t k = -radius; k <= radius; ++k) rows[radius + k] = plane + mirrored(y + k, H) * W;
    const float* const* row = rows.data() + radius;
    for (int64_t x = 0; x < W; x += WIDE)
      weigh(weights, radius, row[0] + x, [&](int64_t k) { return std::pair(row[-k] + x, row[k] + x); }, middle + x);
    for (int64_t k = 1; k <= radius; ++k) {
      middle[-k] = middle[mirrored(-k, W)];
      middle[W - 1 + k] = middle[mirrored(W - 1 + k, W)];
    }
    for (int64_t x = 0; x < W; x += WIDE)
      weigh(weights, radius, middle + x, [&](int64_t k) { return std::pair(middle + x - k, middle + x + k); },
            blurred + y * W + x);
  }
}

template <int C, typename In, typename Out> void one_image(const Photometric& args, int64_t n) {
  thread_local Buffer planes_buffer, blurred_buffer, line_buffer;
  thread_local std::vector<float> weights;
  const int64_t plane = plane_size(args);
  float* planes = planes_buffer.take(C * plane);
  for (int64_t c = 0; c < C; ++c) read_plane<In>(args, n, c, planes + c * plane);
  const Program program = program_of<C>(args, n);
  float mean = 0;
  if (program.contrast < program.count) mean = run<C, true>(args, program, 0, program.contrast, 0, planes);
  const int rest = program.contrast < program.count ? program.contrast : 0;
  if (rest < program.count) run<C, false>(args, program, rest, program.count, mean, planes);
  const bool blurs = args.sigma && gaussian(args.sigma[n], args.radius, weights);
  for (int64_t c = 0; c < C; ++c) {
    float* changed = planes + c * plane;
    if (blurs) {
      float* blurred = blurred_buffer.take(plane);
      float* line = line_buffer.take(2 * args.radius + args.W + 2 * WIDE);
      blur_plane(args, weights.data(), changed, line, blurred);
      changed = blurred;
    }
    solarise_and_normalise(args, n, c, changed);
    write_plane<Out>(args, n, c, changed);
  }
}

}  // namespace

void photometric(const Photometric& args, int threads) {
  const auto with_half = [](int dtype, auto&& f) {
    with_dtype(dtype, [&](auto zero) {
      if constexpr (std::is_same_v<decltype(zero), double>) {
        throw std::invalid_argument("float64 is for the reference");
      } else {
        f(zero);
      }
    });
  };
  with_half(args.in_dtype, [&](auto in) {
    with_half(args.out_dtype, [&](auto out) {
      huge_pages(args.out, args.N * args.C * args.H * args.W * static_cast<int64_t>(sizeof(out)));
      const auto task = args.C == 1 ? one_image<1, decltype(in), decltype(out)> : one_image<3, decltype(in), decltype(out)>;
      parallel_for(args.N, threads, [&](int64_t n) { task(args, n); });
    });
  });
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
