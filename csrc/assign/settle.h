// What the screen leaves open: the nearest of a few centres, from differences in float32, and in float64 where those
// cannot tell two centres apart.
// Included by *_cpu.cpp only.
#pragma once

#include <cstring>
#include <limits>

#include "../common/distance.h"
#include "../common/tile.h"
#include "../common/vec.h"
#include "assign.h"

namespace fastproto {
namespace FASTPROTO_ISA {

// Σ_d term(d), in several sums side by side: neither the latency of an addition nor the length of one sum counts.
template <typename Term, typename Rest>
inline float float_sum(int64_t D, Term term, Rest rest) {
  Vec a{}, b{}, c{}, e{};
  int64_t d = 0;
  for (; d + 4 * LANES <= D; d += 4 * LANES) {
    a += term(d), b += term(d + LANES), c += term(d + 2 * LANES), e += term(d + 3 * LANES);
  }
  for (; d + LANES <= D; d += LANES) a += term(d);
  float total = sum((a + b) + (c + e));
  for (; d < D; ++d) total += rest(d);
  return total;
}

inline float squared_distance(const float* x, const float* c, int64_t D) {
  return float_sum(
      D, [=](int64_t d) { const Vec gap = load(x + d) - load(c + d); return gap * gap; },
      [=](int64_t d) { const float gap = x[d] - c[d]; return gap * gap; });
}
inline float product(const float* x, const float* c, int64_t D) {
  return float_sum(
      D, [=](int64_t d) { return load(x + d) * load(c + d); }, [=](int64_t d) { return x[d] * c[d]; });
}

// The nearest of the centres that were shown to one row.
class Nearest {
 public:
  // `reach`: |x| · max_k |c_k|, which bounds every product and so the error of a float32 sum of products. What is smaller
  // than normal numbers has no relative error: 1e-36 stands for it.
  Nearest(const Assign& args, const float* x, float reach)
      : args_(args), x_(x), share_((args.D / (4 * LANES) + 16) * 0x1p-23f),
        tolerance_((args.inner ? share_ * reach : 0.f) + 1e-36f) {}

  // Up to MR centres at a time: which of them can be the nearest is one comparison each, without a branch on the best.
  void show(const int64_t* centers, int count) {
    float gaps[MR], least = std::numeric_limits<float>::infinity();
    for (int m = 0; m < count; ++m) {
      gaps[m] = gap(centers[m]);
      least = gaps[m] < least ? gaps[m] : least;
    }
    if (label_ >= 0 && least > gap_ + doubt(gap_)) return;
    for (int m = 0; m < count; ++m)
      if (!(gaps[m] > least + doubt(least))) show(centers[m], gaps[m]);
  }
  int64_t label() const { return label_; }
  // No less than the squared distance of the nearest.
  float at_most() const { return gap_ * (1 + share_) + tolerance_; }
  double gap() {
    settle();
    return exact_;
  }

 private:
  float gap(int64_t k) const {
    const float* c = args_.centers + k * args_.D;
    return args_.inner ? -product(x_, c, args_.D) : squared_distance(x_, c, args_.D);
  }
  float doubt(float gap) const { return args_.inner ? tolerance_ : share_ * gap + tolerance_; }

  void show(int64_t k, float gap) {
    if (label_ < 0 || gap < gap_ - doubt(gap_)) {
      label_ = k, gap_ = gap, settled_ = false;
    } else if (!(gap > gap_ + doubt(gap_))) {
      settle();
      const double exact = exact_gap(x_, args_.centers + k * args_.D, args_.D, args_.inner);
      if (exact < exact_ || (exact == exact_ && k < label_)) label_ = k, gap_ = gap, exact_ = exact;
    }
  }
  void settle() {
    if (!settled_) exact_ = exact_gap(x_, args_.centers + label_ * args_.D, args_.D, args_.inner);
    settled_ = true;
  }

  const Assign& args_;
  const float* x_;
  const float share_, tolerance_;
  int64_t label_ = -1;
  float gap_ = 0;
  double exact_ = 0;
  bool settled_ = false;
};

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
