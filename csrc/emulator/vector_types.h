// CUDA's built-in vector types, with CUDA's alignments: a misaligned 128-bit access is a fault here as it is on a GPU.
#pragma once

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define QUAVER_VECTOR2(name, scalar)                           \
  struct alignas(2 * sizeof(scalar)) name##2 { scalar x, y; }; \
  constexpr name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }
#define QUAVER_VECTOR3(name, scalar)  \
  struct name##3 { scalar x, y, z; }; \
  constexpr name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; }
#define QUAVER_VECTOR4(name, scalar)                                 \
  struct alignas(4 * sizeof(scalar)) name##4 { scalar x, y, z, w; }; \
  constexpr name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
#define QUAVER_VECTORS(name, scalar) \
  QUAVER_VECTOR2(name, scalar)       \
  QUAVER_VECTOR3(name, scalar)       \
  QUAVER_VECTOR4(name, scalar)

QUAVER_VECTORS(float, float)
QUAVER_VECTORS(int, int)
QUAVER_VECTORS(uint, unsigned)
QUAVER_VECTORS(short, short)
QUAVER_VECTORS(ushort, unsigned short)
QUAVER_VECTORS(char, signed char)
QUAVER_VECTORS(uchar, unsigned char)
QUAVER_VECTOR2(double, double)
QUAVER_VECTOR2(longlong, long long)
QUAVER_VECTOR2(ulonglong, unsigned long long)

#undef QUAVER_VECTOR2
#undef QUAVER_VECTOR3
#undef QUAVER_VECTOR4
#undef QUAVER_VECTORS
