#pragma once
#include "cuda_runtime.h"
struct __half {
    _Float16 value;
    __half() = default;
    __half(float x) : value(x) {}
    operator float() const { return value; }
};
struct __half2 {
    __half x, y;
};
