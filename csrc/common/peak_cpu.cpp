// The float32 peak of this CPU: fused multiply-adds on as many registers as a register tile has, and nothing else. The
// benchmarks measure it in the run whose results they report as a share of it.
#include <chrono>

#include "parallel.h"
#include "tile.h"
#include "vec.h"

namespace fastproto {
namespace FASTPROTO_ISA {

// Operations a second of all threads together.
double peak_flops(int threads) {
  constexpr int64_t STEPS = 1 << 22;
  const auto begin = std::chrono::steady_clock::now();
  parallel_for(threads, threads, [](int64_t) {
    Vec acc[MR][NV];
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v) acc[m][v] = splat(1.f + m * NV + v);
    const Vec shrink = splat(0.999f), add = splat(1e-3f);
    for (int64_t step = 0; step < STEPS; ++step)
      for (int m = 0; m < MR; ++m)
        for (int v = 0; v < NV; ++v) acc[m][v] = acc[m][v] * shrink + add;
    float total = 0;
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v) total += sum(acc[m][v]);
    volatile float keep = total;  // else the compiler would see that nobody asks
    (void)keep;
  });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  return 2. * threads * STEPS * MR * NV * LANES / seconds.count();
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
