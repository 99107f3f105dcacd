// QUAVER_AT_LEVEL(name): name_base, name_v3 or name_v4, by the instruction set that this file is compiled for.
#pragma once
#define QUAVER_JOIN_(a, b) a##_##b
#define QUAVER_JOIN(a, b) QUAVER_JOIN_(a, b)
#define QUAVER_AT_LEVEL(name) QUAVER_JOIN(name, QUAVER_LEVEL)
