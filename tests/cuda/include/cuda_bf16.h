#pragma once
#include "cuda_runtime.h"
/// The upper half of a float, rounded to the nearest, of two to the even one.
struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float x) {
        uint32_t word = std::bit_cast<uint32_t>(x);
        bits = std::isnan(x) ? 0x7fff : (word + 0x7fff + (word >> 16 & 1)) >> 16;
    }
    operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
};
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
