// Every collective, atomic function and intrinsic of the emulator, for Python to compare with numpy. No faults.
#include "run.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

// Row k of `out` holds the k-th result of each thread.
template <class T>
struct Rows {
  T* out;
  int columns, column;

  __device__ void operator()(T value) {
    out[column] = value;
    out += columns;
  }
};

__global__ void collectives(int* out, int width) {
  const int thread = int(threadIdx.x + blockDim.x * threadIdx.y), threads = int(blockDim.x * blockDim.y);
  Rows<int> row{out + int(blockIdx.x) * threads, int(gridDim.x) * threads, thread};
  row(__shfl_sync(kAll, thread, 5, width));
  row(__shfl_sync(kAll, thread, thread + 3, width));
  row(__shfl_up_sync(kAll, thread, 3, width));
  row(__shfl_down_sync(kAll, thread, 3, width));
  row(__shfl_xor_sync(kAll, thread, 5, width));
  row(int(__shfl_xor_sync(kAll, 0.5 * thread, 1) * 2));
  row(int(__shfl_xor_sync(kAll, 3LL * thread, 1) / 3));
  row(int(__ballot_sync(kAll, thread % 3 == 0)));
  row(__any_sync(kAll, thread == 40));
  row(__all_sync(kAll, thread < 40));
  row(__reduce_add_sync(kAll, thread - 20));
  row(int(__reduce_add_sync(kAll, unsigned(thread) << 26)));
  row(__reduce_min_sync(kAll, thread - 20));
  row(__reduce_max_sync(kAll, thread - 40));
  row(int(__reduce_min_sync(kAll, unsigned(thread - 20))));
  row(int(__reduce_max_sync(kAll, unsigned(thread - 20))));
  row(int(__reduce_and_sync(kAll, unsigned(thread) | 8u)));
  row(int(__reduce_or_sync(kAll, unsigned(thread))));
  row(int(__reduce_xor_sync(kAll, 1u << thread % 31)));
  row(__syncthreads_and(thread < threads));
  row(__syncthreads_and(thread != 33));
  row(__syncthreads_or(thread < 0));
  row(__syncthreads_or(thread == 33));
  row(__syncthreads_count(thread % 5 == 0));
  // Half of each warp meets on its own.
  const unsigned half = thread % warpSize < 16 ? 0x0000ffffu : 0xffff0000u;
  row(__reduce_add_sync(half, thread));
  row(int(threadIdx.x * 100 + threadIdx.y * 10 + blockIdx.x));
}

// cells[k] is the target of the k-th function; old: what each atomicAdd returned.
template <class T>
__global__ void integer_atomics(T* cells, T* old) {
  const T i = T(blockIdx.x * blockDim.x + threadIdx.x + 1);
  old[i - 1] = atomicAdd(cells + 0, i);
  atomicMin(cells + 1, i);
  atomicMax(cells + 2, i);
  atomicAnd(cells + 3, T(~(T(1) << i % 31)));
  atomicOr(cells + 4, T(T(1) << i % 31));
  atomicXor(cells + 5, i);
  atomicExch(cells + 6, T(7));
  atomicCAS(cells + 7, T(0), i);
}

template <class T>
__global__ void floating_atomics(T* sum) {
  atomicAdd(sum, T(threadIdx.x) / 2);
}

__global__ void exchange(float* cell, float* old) { *old = atomicExch(cell, 2.0f); }

__global__ void float_intrinsics(float* out, const float* a, const float* b, const float* c, int n) {
  const int i = int(threadIdx.x);
  Rows<float> row{out, n, i};
  const float x = a[i], y = __ldg(b + i), z = __ldcs(c + i);
  row(__fadd_rn(x, y));
  row(__fsub_rn(x, y));
  row(__fmul_rn(x, y));
  row(__fdiv_rn(x, y));
  row(__frcp_rn(x));
  row(__fsqrt_rn(x));
  row(__fmaf_rn(x, y, z));
  row(__fadd_rn(__fmul_rn(x, y), z));
  row(rsqrtf(x));
  row(__expf(y));
  row(__logf(x));
  row(__log2f(x));
  row(__sinf(x));
  row(__cosf(x));
  row(__powf(x, 1.5f));
  row(__fdividef(x, y));
  row(__saturatef(y));
  row(fmaxf(x, y));
  row(min(x, y));
  row(max(x, y));
  float sine, cosine;
  __sincosf(x, &sine, &cosine);
  row(sine);
  row(cosine);
  row(float(__float2int_rn(10 * y)));
  row(float(__float2int_rz(10 * y)));
  row(__int2float_rn(i));
  row(float(__dadd_rn(__dmul_rn(double(x), double(y)), double(z)) - __fma_rn(double(x), double(y), double(z))));
}

__global__ void integer_intrinsics(unsigned* out, const unsigned* a, const unsigned* b, int n) {
  const int i = int(threadIdx.x);
  Rows<unsigned> row{out, n, i};
  const unsigned x = a[i], y = b[i];
  const unsigned long long wide = static_cast<unsigned long long>(x) << 32 | y;
  row(__umulhi(x, y));
  row(unsigned(__mulhi(int(x), int(y))));
  row(unsigned(__umul64hi(wide, wide) >> 32));
  row(unsigned(__popc(x)));
  row(unsigned(__popcll(wide)));
  row(unsigned(__clz(int(x))));
  row(unsigned(__clzll(static_cast<long long>(wide))));
  row(unsigned(__ffs(int(x))));
  row(unsigned(__ffsll(static_cast<long long>(wide))));
  row(__brev(x));
  row(__byte_perm(x, y, 0x3715));
  row(__funnelshift_l(x, y, 9));
  row(__funnelshift_r(x, y, 9));
  row(__float_as_uint(__uint_as_float(x)));
  row(unsigned(__float_as_int(__int_as_float(int(x)))));
  row(unsigned(__double_as_longlong(__longlong_as_double(static_cast<long long>(wide)))));
}

}  // namespace

using quaver::gpu::launch;

QUAVER_TEST const char* values_collectives(int* out, int width) {
  return message_of([&] { launch(collectives, dim3(2), dim3(16, 4), 0, nullptr, out, width); });
}

QUAVER_TEST const char* values_integer_atomics(void* cells, void* old, int kind) {
  return message_of([&] {
    const dim3 grid(2), block(32);
    if (kind == 0)
      launch(integer_atomics<int>, grid, block, 0, nullptr, static_cast<int*>(cells), static_cast<int*>(old));
    if (kind == 1) {
      launch(integer_atomics<unsigned>, grid, block, 0, nullptr, static_cast<unsigned*>(cells),
             static_cast<unsigned*>(old));
    }
    if (kind == 2) {
      using T = unsigned long long;
      launch(integer_atomics<T>, grid, block, 0, nullptr, static_cast<T*>(cells), static_cast<T*>(old));
    }
  });
}

QUAVER_TEST const char* values_floating_atomics(float* single, double* twice, float* cell, float* old) {
  return message_of([&] {
    launch(floating_atomics<float>, dim3(3), dim3(64), 0, nullptr, single);
    launch(floating_atomics<double>, dim3(3), dim3(64), 0, nullptr, twice);
    launch(exchange, dim3(1), dim3(1), 0, nullptr, cell, old);
  });
}

QUAVER_TEST const char* values_float_intrinsics(float* out, const float* a, const float* b, const float* c, int n) {
  return message_of([&] { launch(float_intrinsics, dim3(1), dim3(unsigned(n)), 0, nullptr, out, a, b, c, n); });
}

QUAVER_TEST const char* values_integer_intrinsics(unsigned* out, const unsigned* a, const unsigned* b, int n) {
  return message_of([&] { launch(integer_intrinsics, dim3(1), dim3(unsigned(n)), 0, nullptr, out, a, b, n); });
}
