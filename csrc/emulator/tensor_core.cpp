// What a warp's matrix instructions do, from the registers of all its lanes.
#include "tensor_core.h"

#include <cstring>

#include "block.h"
#include "report.h"

namespace quaver::emulator {

namespace {

// A block that is no multiple of 32 threads ends in a warp that cannot do this.
bool is_whole(uint32_t mask, Location location) {
  if (mask == kFullMask) return true;
  report(Fault::kWrongMask, location,
         format("a matrix instruction needs all 32 lanes, the block's last warp has %d", __builtin_popcount(mask)));
  return false;
}

template <class T>
float element(uint32_t pair, int which) {
  return widen(T{uint16_t(pair >> 16 * which)});
}

uint16_t at(const Lane* lanes, int matrix, int row, int column) {
  uint16_t bits;
  std::memcpy(&bits, static_cast<const char*>(lanes[8 * matrix + row].in) + 2 * column, sizeof bits);
  return bits;
}

void load(const Lane* lanes, uint32_t mask, Location location, bool transposed) {
  if (!is_whole(mask, location)) return;
  for (int lane = 0; lane < kWarp; lane++) {
    uint32_t out[4];
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
      const uint32_t low = transposed ? at(lanes, i, 2 * t, g) : at(lanes, i, g, 2 * t);
      const uint32_t high = transposed ? at(lanes, i, 2 * t + 1, g) : at(lanes, i, g, 2 * t + 1);
      out[i] = low | high << 16;
    }
    std::memcpy(lanes[lane].out, out, sizeof out);
  }
}

}  // namespace

void finish_load_matrices(const Lane* lanes, uint32_t mask, Location location) { load(lanes, mask, location, false); }
void finish_load_transposed(const Lane* lanes, uint32_t mask, Location location) { load(lanes, mask, location, true); }

// Products of 16-bit numbers are exact in float32; a GPU adds them to more bits than float32 has, here to float64.
template <class T>
void finish_multiply_add(const Lane* lanes, uint32_t mask, Location location) {
  if (!is_whole(mask, location)) return;
  float a[16][16], b[8][16], c[16][8];  // b by columns
  for (int lane = 0; lane < kWarp; lane++) {
    const auto& in = *static_cast<const Fragments*>(lanes[lane].in);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 2; i++) {
      for (int half = 0; half < 2; half++) {
        a[g + 8 * half][2 * t + i] = element<T>(in.a[half], i);
        a[g + 8 * half][2 * t + 8 + i] = element<T>(in.a[2 + half], i);
        b[g][2 * t + 8 * half + i] = element<T>(in.b[half], i);
        c[g + 8 * half][2 * t + i] = in.c[2 * half + i];
      }
    }
  }
  for (int row = 0; row < 16; row++) {
    for (int column = 0; column < 8; column++) {
      double sum = double(c[row][column]);
      for (int k = 0; k < 16; k++) sum += double(a[row][k]) * double(b[column][k]);
      c[row][column] = float(sum);
    }
  }
  for (int lane = 0; lane < kWarp; lane++) {
    const int g = lane / 4, t = lane % 4;
    const float out[4] = {c[g][2 * t], c[g][2 * t + 1], c[g + 8][2 * t], c[g + 8][2 * t + 1]};
    std::memcpy(lanes[lane].out, out, sizeof out);
  }
}
template void finish_multiply_add<bfloat16>(const Lane*, uint32_t, Location);
template void finish_multiply_add<float16>(const Lane*, uint32_t, Location);

}  // namespace quaver::emulator
