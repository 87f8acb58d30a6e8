// What CUDA C++ has beyond C++, for kernels that run on the CPU: the units of a block are fibres of one thread, which
// `emulation.cpp` switches between at barriers.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <tuple>
#include <utility>

struct uint3 {
    unsigned x, y, z;
};
using dim3 = uint3;
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

namespace emulation {
/// What a kernel and `emulation.cpp` share.
struct Unit {
    dim3 thread, block, block_dim, grid_dim;
    /// Waits for the units of the block, or of the warp, at a place in the source.
    void (*wait)(bool warp, int place);
};
extern Unit *unit;
} // namespace emulation

#define threadIdx (emulation::unit->thread)
#define blockIdx (emulation::unit->block)
#define blockDim (emulation::unit->block_dim)
#define gridDim (emulation::unit->grid_dim)
#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(n)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __syncthreads() (emulation::unit->wait(false, __LINE__))
#define __syncwarp() (emulation::unit->wait(true, __LINE__))
#define __threadfence()

using std::abs, std::ceil, std::floor, std::fma, std::isinf, std::isnan, std::round, std::sqrt, std::trunc;
template <class T> T max(T a, T b) { return a > b ? a : b; }
template <class T> T min(T a, T b) { return a < b ? a : b; }
// CUDA's give the number where the other is NaN.
inline float max(float a, float b) { return std::fmax(a, b); }
inline float min(float a, float b) { return std::fmin(a, b); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }

namespace emulation {
/// The number of a unit in its block.
inline unsigned number() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }

/// Calls a kernel with arguments behind pointers, as the driver does.
template <class... A, size_t... I>
void call(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_const_t<A> *>(arguments[I])...);
}
template <class... A> void call(void (*kernel)(A...), void **arguments) {
    call(kernel, arguments, std::index_sequence_for<A...>());
}
} // namespace emulation
