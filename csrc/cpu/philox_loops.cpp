#include "cpu/philox_loops.h"

#include "cpu/level.h"
#include "cpu/noise.h"

namespace {

template <class Distribution>
void fill_groups(float* out, int64_t count, const Source& source, uint64_t first) {
  while (count > 0) {
    // One schedule serves the 2^32 blocks that share the high word of the counter.
    const uint64_t block = first / 4, end_of_schedule = ((block >> 32) + 1) << 34;
    const Schedule key(source, uint32_t(block >> 32));
    while (count > 0 && first != end_of_schedule) {
      const uint64_t group = first / kGroup, skip = first % kGroup;
      if (skip == 0 && count >= kGroup) {
        make_group<Distribution>(key, group, out);
        out += kGroup;
        first += kGroup;
        count -= kGroup;
        continue;
      }
      alignas(64) float whole[kGroup];
      make_group<Distribution>(key, group, whole);
      const int64_t part = count < int64_t(kGroup - skip) ? count : int64_t(kGroup - skip);
      std::memcpy(out, whole + skip, size_t(part) * sizeof(float));
      out += part;
      first += uint64_t(part);
      count -= part;
    }
  }
}

// 32 signs from the 32 bits of one word, least significant first.
QUAVER_INLINE void write_signs(uint32_t word, float* out) {
  for (int i = 0; i < 32; i++) out[i] = word >> i & 1u ? 1.0f : -1.0f;
}

void fill_signs(float* out, int64_t count, const Source& source, uint64_t first) {
  while (count > 0) {
    const quaver::Words x = quaver::philox(first / 128, source.stream, source.domain, source.seed);
    for (uint64_t in_block = first % 128; in_block < 128 && count > 0;) {
      const uint32_t word = x.w[in_block / 32];
      if (in_block % 32 == 0 && count >= 32) {
        write_signs(word, out);
        out += 32;
        in_block += 32;
        first += 32;
        count -= 32;
        continue;
      }
      *out++ = word >> in_block % 32 & 1u ? 1.0f : -1.0f;
      in_block++;
      first++;
      count--;
    }
  }
}

void fill(float* out, int64_t count, const Source& source, uint64_t first) {
  switch (source.domain & 0xffu) {
    case quaver::kNormal:
      return fill_groups<Normals>(out, count, source, first);
    case quaver::kRademacher:
      return fill_signs(out, count, source, first);
    default:
      return fill_groups<Uniforms>(out, count, source, first);
  }
}

void words(int64_t* out, int64_t count, const Source& source, uint64_t block, int word) {
  for (int64_t i = 0; i < count; block++, word = 0) {
    const quaver::Words x = quaver::philox(block, source.stream, source.domain, source.seed);
    for (; word < 4 && i < count; word++) out[i++] = int64_t(x.w[word]);
  }
}

void keys(int64_t* out, int64_t count, const Source& source, uint64_t first) {
  for (int64_t i = 0; i < count; i++) {
    const quaver::Words x = quaver::philox((first + uint64_t(i)) / 2, source.stream, source.domain, source.seed);
    const uint32_t* pair = x.w + (first + uint64_t(i)) % 2 * 2;
    out[i] = int64_t((uint64_t(pair[0]) << 32 | pair[1]) >> 1);
  }
}

}  // namespace

namespace quaver::cpu {
extern const PhiloxLoops QUAVER_AT_LEVEL(philox_loops);
const PhiloxLoops QUAVER_AT_LEVEL(philox_loops) = {fill, words, keys};
}  // namespace quaver::cpu
