// Samples from what Python hands over.
#pragma once

#include <array>

#include "philox.h"

namespace fastproto {

// (address of the ids, their stride, N, views, seed, epoch)
inline Samples bound_samples(const std::array<int64_t, 6>& from) {
  return {reinterpret_cast<const int64_t*>(from[0]), from[1], from[2], from[3],
          static_cast<uint64_t>(from[4]), static_cast<uint32_t>(from[5])};
}

}  // namespace fastproto
