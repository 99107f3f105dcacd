// Philox-4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011), one counter at a
// time, and quaver's use of its counter. The vector form for the CPU is csrc/cpu/noise.h.
#pragma once
#include <cstdint>

#include "common/host_device.h"

namespace quaver {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// The fourth word of the counter. Its low byte names the distribution; 256 is added for a bias.
enum Domain : uint32_t { kNormal = 0, kRademacher = 1, kUniform = 2, kPermutation = 3 };

struct Words {
  uint32_t w[4];
};

QUAVER_HD Words philox(uint64_t block, uint32_t stream, uint32_t domain, uint64_t seed) {
  uint32_t c0 = uint32_t(block), c1 = uint32_t(block >> 32), c2 = stream, c3 = domain;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; round++) {
    const uint64_t p0 = multiply_wide(c0, kPhiloxM0), p1 = multiply_wide(c2, kPhiloxM1);
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// One noise source: everything epsilon depends on besides the element.
struct Source {
  uint64_t seed;
  uint32_t stream, domain;
};

}  // namespace quaver
