// Random numbers by key: the same bits as fastproto/_random.py, which says what keys them.
//
// Philox4x32-10: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011, section 3.3.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace fastproto {

struct Words {
  uint32_t word[4];
};

FASTPROTO_HD inline Words philox(Words counter, uint64_t key) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{c0} * 0xD2511F53u, p1 = uint64_t{c2} * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// What a draw is for: the numbers of Stream in fastproto/_random.py.
enum class Stream : uint32_t { crop = 0, flip = 1, photometric = 2 };

// The samples that a batch draws for, `views` times each.
struct Samples {
  const int64_t* ids;  // (N,), stride elements from one to the next
  int64_t stride, N, views;
  uint64_t seed;
  uint32_t epoch;
};

// All draws of one view of sample n for one purpose. A word costs the Philox of its block: only what is read is computed.
struct Draws {
  uint64_t id, seed;
  uint32_t epoch, place;

  FASTPROTO_HD Draws(const Samples& samples, int64_t n, int64_t view, Stream stream)
      : id(static_cast<uint64_t>(samples.ids[n * samples.stride])),
        seed(samples.seed),
        epoch(samples.epoch),
        place(static_cast<uint32_t>(stream) << 24 | static_cast<uint32_t>(view) << 12) {}

  FASTPROTO_HD Words block(uint32_t index) const {
    return philox({{static_cast<uint32_t>(id), static_cast<uint32_t>(id >> 32), epoch, place | index}}, seed);
  }
  // By selection: an array with an index that only the GPU knows would lie in its memory.
  FASTPROTO_HD uint32_t operator[](uint32_t i) const {
    const Words words = block(i / 4);
    const uint32_t even = i & 2 ? words.word[2] : words.word[0], odd = i & 2 ? words.word[3] : words.word[1];
    return i & 1 ? odd : even;
  }
};

}  // namespace fastproto
