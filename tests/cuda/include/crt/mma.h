// Fragments: the first unit of a warp has the whole matrix and does the work of all of them.
#pragma once
#include "../cuda_runtime.h"
namespace nvcuda::wmma {
struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K> constexpr int rows = std::is_same_v<Use, matrix_b> ? K : M;
template <class Use, int M, int N, int K> constexpr int columns = std::is_same_v<Use, matrix_a> ? K : N;

template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment {
    static constexpr int num_elements = M * N;
    T x[rows<Use, M, N, K> * columns<Use, M, N, K>];
};

inline bool leads() { return emulation::number() % 32 == 0; }

template <class Use, int M, int N, int K, class T, class L, class V>
void fill_fragment(fragment<Use, M, N, K, T, L> &to, V value) {
    std::fill(std::begin(to.x), std::end(to.x), T(value));
}

/// The address must be a multiple of 32 bytes, and the stride one of 16.
template <class T> void aligned(const T *at, unsigned stride) {
    if (uintptr_t(at) % 32 || stride * sizeof(T) % 16) {
        std::fprintf(stderr, "a fragment is not aligned: %p, stride %u\n", (const void *)at, stride);
        std::abort();
    }
}

template <class Use, int M, int N, int K, class T, class L>
void load(fragment<Use, M, N, K, T, L> &to, const T *from, unsigned stride, bool by_rows) {
    aligned(from, stride);
    constexpr int width = columns<Use, M, N, K>;
    for (int i = 0; leads() && i < rows<Use, M, N, K>; i++)
        for (int j = 0; j < width; j++) to.x[i * width + j] = from[by_rows ? i * stride + j : j * stride + i];
}
template <class Use, int M, int N, int K, class T, class L>
void load_matrix_sync(fragment<Use, M, N, K, T, L> &to, const T *from, unsigned stride) {
    load(to, from, stride, std::is_same_v<L, row_major>);
}
template <int M, int N, int K, class T>
void load_matrix_sync(fragment<accumulator, M, N, K, T> &to, const T *from, unsigned stride, layout_t layout) {
    load(to, from, stride, layout == mem_row_major);
}

template <int M, int N, int K, class T>
void store_matrix_sync(T *to, const fragment<accumulator, M, N, K, T> &from, unsigned stride, layout_t layout) {
    aligned(to, stride);
    for (int i = 0; leads() && i < M; i++)
        for (int j = 0; j < N; j++) to[layout == mem_row_major ? i * stride + j : j * stride + i] = from.x[i * N + j];
}

template <int M, int N, int K, class T, class LA, class LB, class C>
void mma_sync(fragment<accumulator, M, N, K, C> &d, const fragment<matrix_a, M, N, K, T, LA> &a,
              const fragment<matrix_b, M, N, K, T, LB> &b, const fragment<accumulator, M, N, K, C> &c) {
    if (!leads()) return;
    float right[K][N];
    for (int k = 0; k < K; k++)
        for (int j = 0; j < N; j++) right[k][j] = b.x[k * N + j];
    for (int i = 0; i < M; i++) {
        float sums[N] = {};
        for (int k = 0; k < K; k++) {
            float left = a.x[i * K + k];
            for (int j = 0; j < N; j++) sums[j] += left * right[k][j];
        }
        for (int j = 0; j < N; j++) d.x[i * N + j] = c.x[i * N + j] + sums[j];
    }
}
} // namespace nvcuda::wmma
