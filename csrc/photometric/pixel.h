// What happens to one pixel, or to a vector of pixels: V is float on a GPU and a Vec on a CPU. Comparisons select, so
// nothing branches on a pixel, and a NaN stays one: of two numbers the second is kept where they do not compare.
#pragma once

#include <cmath>
#include <type_traits>

#include "photometric.h"

#if !defined(__CUDACC__)
#include "../common/vec.h"
#endif

#if defined(__CUDACC__)
#define FASTPROTO_PIXEL __host__ __device__ inline
#else
#define FASTPROTO_PIXEL inline
#endif

namespace fastproto {
#if !defined(__CUDACC__)
// A Vec's width is its instruction set's, so each set keeps templates of its own.
namespace FASTPROTO_ISA {
#endif

// The first four as they are numbered in the order of an image's jitter.
enum StepKind : int { BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY };

struct Step {
  int kind;
  float factor;
};

// What an image goes through, pixel by pixel, up to its blur. The step at `contrast` needs the mean luma before it.
struct Program {
  Step steps[5];
  int count, contrast;  // contrast = count: there is none

  FASTPROTO_PIXEL void add(int kind, float factor) {
    steps[count].kind = kind;
    steps[count++].factor = factor;
  }
};

template <int C> FASTPROTO_PIXEL Program program_of(const Photometric& args, int64_t n) {
  Program program;
  program.count = 0;
  int contrast = -1;
  for (int place = 0; args.jitter && place < 4; ++place) {
    // An order that nobody has checked must not reach beyond the four.
    const int kind = static_cast<int>(args.order[4 * n + place] & 3);
    const float factor = args.jitter[4 * n + kind];
    if (kind == HUE) {
      // In sixths of the circle, from 0 to 6.
      if (C == 3 && factor != 0) program.add(HUE, 6 * (factor - floorf(factor)));
    } else if (factor == 1 || (C == 1 && kind == SATURATION)) {
      program.add(BRIGHTNESS, 1);  // what is left of a neutral blend: the clamp
    } else {
      if (kind == CONTRAST) contrast = program.count;
      program.add(kind, factor);
    }
  }
  if (C == 3 && args.gray && args.gray[n]) program.add(GRAY, 0);
  program.contrast = contrast < 0 ? program.count : contrast;
  return program;
}

template <typename V> FASTPROTO_PIXEL V lower(V a, V b) {
  if constexpr (std::is_same_v<V, float>) return a < b ? a : b;
  else return smaller(a, b);
}
template <typename V> FASTPROTO_PIXEL V higher(V a, V b) {
  if constexpr (std::is_same_v<V, float>) return a > b ? a : b;
  else return larger(a, b);
}
template <typename V> FASTPROTO_PIXEL V clamp(V x) { return lower(V{} + 1.f, higher(V{}, x)); }

template <int C, typename V> struct Pixel {
  V channel[C];
};

template <int C, typename V> FASTPROTO_PIXEL V luma(const Pixel<C, V>& x) {
  if constexpr (C == 1) {
    return x.channel[0];
  } else {
    return x.channel[0] * 0.2989f + x.channel[1] * 0.587f + x.channel[2] * 0.114f;
  }
}

template <int C, typename V> FASTPROTO_PIXEL void blend(Pixel<C, V>& x, float factor, V target) {
  const V rest = target * (1 - factor);
  for (int c = 0; c < C; ++c) x.channel[c] = clamp<V>(x.channel[c] * factor + rest);
}

// A gray pixel has chroma 0 and comes out as its lowest channel, whatever its hue. Of two highest the first counts.
template <typename V> FASTPROTO_PIXEL void turn_hue(Pixel<3, V>& x, float turn) {
  const V red = x.channel[0], green = x.channel[1], blue = x.channel[2];
  const V low = lower(lower(green, blue), red), high = higher(higher(green, blue), red);
  const V chroma = high - low;
  const V difference = red == high ? green - blue : green == high ? blue - red : red - green;
  const V start = red == high ? V{} : green == high ? V{} + 2.f : V{} + 4.f;
  V hue = difference / higher(V{} + 1.17549435e-38f, chroma) + start + turn;
  hue = hue < 0.f ? hue + 6.f : hue;
  hue = hue >= 6.f ? hue - 6.f : hue;
  const V from_red = hue - 3.f, from_green = hue - 2.f, from_blue = hue - 4.f;
  x.channel[0] = clamp<V>(higher(-from_red, from_red) - 1.f) * chroma + low;
  x.channel[1] = clamp<V>(2.f - higher(-from_green, from_green)) * chroma + low;
  x.channel[2] = clamp<V>(2.f - higher(-from_blue, from_blue)) * chroma + low;
}

// each(change) is to call change(pixel) for every Pixel<C, V> at hand: a step is looked up once for all of them.
template <int C, typename V, typename Each> FASTPROTO_PIXEL void apply(const Step& step, float mean, Each each) {
  using P = Pixel<C, V>&;
  const float factor = step.factor;
  switch (step.kind) {
    case BRIGHTNESS: return each([=](P x) { blend<C, V>(x, factor, V{}); });
    case CONTRAST: return each([=](P x) { blend<C, V>(x, factor, V{} + mean); });
    case SATURATION: return each([=](P x) { blend<C, V>(x, factor, luma(x)); });
  }
  if constexpr (C == 3) {
    if (step.kind == HUE) return each([=](P x) { turn_hue(x, factor); });
    each([](P x) { x.channel[0] = x.channel[1] = x.channel[2] = luma(x); });
  }
}

#if !defined(__CUDACC__)
}  // namespace FASTPROTO_ISA
#endif
}  // namespace fastproto
