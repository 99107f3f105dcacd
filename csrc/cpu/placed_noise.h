// Noise of a block of weights, tile by tile beside the values it belongs to.
#pragma once
#include "common/perturb_shape.h"
#include "cpu/noise_source.h"

namespace quaver::cpu {

// Calls body(element, position, length) for tiles that cover positions [begin, end) of a block of weights.
template <class Body>
void for_placed_tiles(const Placement& place, int64_t begin, int64_t end, Body&& body) {
  if (place.is_one_run()) return cpu::for_tiles(place.first, begin, end, body);
  while (begin < end) {
    const int64_t row = begin / place.columns, row_end = std::min(end, (row + 1) * place.columns);
    cpu::for_tiles(place.first + uint64_t(row) * uint64_t(place.row_length - place.columns), begin, row_end, body);
    begin = row_end;
  }
}

// One member's sigma at positions at .. at + length - 1: a single value when it is a scalar. `buffer` holds a tile.
template <class C>
const C* sigma_at(const C* values, SigmaShape::Kind kind, int64_t columns, int64_t at, int64_t length, C* buffer) {
  if (kind == SigmaShape::kScalar) return values;
  if (kind == SigmaShape::kElement) return values + at;
  for (int64_t i = 0, row = at / columns, column = at % columns; i < length; row++, column = 0) {
    const int64_t stop = std::min(length, i + columns - column);
    for (; i < stop; i++) buffer[i] = values[row];
  }
  return buffer;
}

}  // namespace quaver::cpu
