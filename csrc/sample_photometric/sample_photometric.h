// The parameters of photometric for each view of each sample: what the CPU and the CUDA kernel take, and one row of it.
//
//   chosen with probability p: low + (high - low) u, else the value that changes nothing
//
// The same bits as fastproto/reference/sample_photometric.py everywhere: product and sum are rounded one after the other.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/host_device.h"
#include "../common/philox.h"

namespace fastproto {

struct SamplePhotometric {
  Samples samples;
  double jitter_p, gray_p, blur_p, solarize_p;
  double low[4], high[4];  // of brightness, contrast, saturation, hue
  double sigma[2];
  float solarize_at;
  float* jitter;           // (V·N, 4)
  int64_t* order;          // (V·N, 4)
  bool* gray;              // (V·N,)
  float* sigmas;           // (V·N,)
  float* thresholds;       // (V·N,)
};

FASTPROTO_HD inline double uniform(uint32_t bits) { return bits * 0x1p-32; }

// low + (high - low) u. A fused multiply-add, which compilers choose unless they are kept from it, gives other bits.
FASTPROTO_HD inline float between(double low, double high, uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return static_cast<float>(__dadd_rn(low, __dmul_rn(high - low, uniform(bits))));
#else
  const volatile double product = (high - low) * uniform(bits);
  return static_cast<float>(low + product);
#endif
}

FASTPROTO_HD inline void sample_colours(const SamplePhotometric& args, int64_t view, int64_t n) {
  const int64_t row = view * args.samples.N + n;
  const Draws draws(args.samples, n, view, Stream::photometric);
  // Every draw has its place: 0 jittered or not, 1 to 4 factors, 5 to 8 order, 9 gray, 10 and 11 blur, 12 solarisation.
  const Words first = draws.block(0), second = draws.block(1), third = draws.block(2);
  const uint32_t factors[4] = {first.word[1], first.word[2], first.word[3], second.word[0]};
  const uint32_t keys[4] = {second.word[1], second.word[2], second.word[3], third.word[0]};
  const bool jittered = uniform(first.word[0]) < args.jitter_p;
  for (int i = 0; i < 4; ++i) {
    args.jitter[4 * row + i] = jittered ? between(args.low[i], args.high[i], factors[i]) : i < 3 ? 1.f : 0.f;
    int rank = 0;
    for (int j = 0; j < 4; ++j) rank += keys[j] < keys[i] || (keys[j] == keys[i] && j < i);
    args.order[4 * row + rank] = i;
  }
  args.gray[row] = uniform(third.word[1]) < args.gray_p;
  args.sigmas[row] = uniform(third.word[2]) < args.blur_p ? between(args.sigma[0], args.sigma[1], third.word[3]) : 0.f;
  const bool solarized = args.solarize_p > 0 && uniform(draws[12]) < args.solarize_p;
  args.thresholds[row] = solarized ? args.solarize_at : INFINITY;
}

void sample_photometric(const SamplePhotometric& args, int threads);

// Launches on a CUDA stream; throws std::runtime_error where the launch fails.
void sample_photometric_cuda(const SamplePhotometric& args, uintptr_t stream);

}  // namespace fastproto
