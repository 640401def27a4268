// Eight floats at a time, written once for every processor: the compiler makes of these types what its target has.
#pragma once

#include <stdint.h>
#include <string.h>

typedef float f8 __attribute__((vector_size(32)));
typedef int32_t i8x __attribute__((vector_size(32)));
typedef float f8_anywhere __attribute__((vector_size(32), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE f8 load8(const float* from) { return *(const f8_anywhere*)from; }
INLINE void store8(float* to, f8 x) { *(f8_anywhere*)to = x; }
INLINE f8 all8(float x) { return f8{x, x, x, x, x, x, x, x}; }
INLINE f8 max8(f8 a, f8 b) { return a > b ? a : b; }
INLINE f8 min8(f8 a, f8 b) { return a < b ? a : b; }
INLINE f8 abs8(f8 x) { return (f8)((i8x)x & 0x7fffffff); }

INLINE float sum_of(f8 x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }
INLINE float max_of(f8 x) {
    float most = x[0];
    for (int i = 1; i < 8; ++i) most = x[i] > most ? x[i] : most;
    return most;
}

// e^x to about one unit in the last place, for x within ±87; beyond, the value at the border.
INLINE f8 exp8(f8 x) {
    x = min8(max8(x, all8(-87.0f)), all8(88.0f));
    const f8 shift = all8(12582912.0f);  // adding and taking it away rounds to a whole number
    const f8 whole = (x * 1.44269504f + shift) - shift;
    const f8 rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    f8 found = all8(1.9875691500e-4f);
    found = found * rest + 1.3981999507e-3f;
    found = found * rest + 8.3334519073e-3f;
    found = found * rest + 4.1665795894e-2f;
    found = found * rest + 1.6666665459e-1f;
    found = found * rest + 5.0000001201e-1f;
    found = found * rest * rest + rest + 1.0f;
    const i8x power = (__builtin_convertvector(whole, i8x) + 127) << 23;
    return found * (f8)power;
}

INLINE f8 tanh8(f8 x) { return 1.0f - 2.0f / (exp8(2.0f * x) + 1.0f); }

// A 16-bit float to a 32-bit one, without help of the processor.
INLINE float widened(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    uint32_t bits;
    if (rest >= 0x7c00) {
        bits = 0x7f800000 | (rest & 0x3ff) << 13;
    } else if (rest >= 0x400) {
        bits = (rest + 0x1c000) << 13;
    } else {  // subnormal: a whole number of 2^-24
        const float value = (float)rest * 5.9604644775390625e-8f;
        memcpy(&bits, &value, 4);
    }
    bits |= sign;
    float found;
    memcpy(&found, &bits, 4);
    return found;
}

// A 32-bit float to the nearest 16-bit one.
INLINE uint16_t narrowed(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (bits >= 0x47800000) return (uint16_t)(sign | 0x7c00);
    if (bits < 0x38800000) {  // subnormal, or nothing
        float value;
        memcpy(&value, &bits, 4);
        value += 0.5f;  // whose last place is 2^-24
        memcpy(&bits, &value, 4);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    bits += 0xfff + (bits >> 13 & 1);
    return (uint16_t)(sign | ((bits - 0x38000000) >> 13));
}
