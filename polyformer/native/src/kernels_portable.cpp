// The functions for any processor.

#include "kernels.h"
#include "vectors.h"

#include <math.h>

#define INLINE_MEMBER inline __attribute__((always_inline))

namespace {

// Products of 16 rows × 32 columns of codes with whole numbers of T rows of x.
template <int BITS, int T>
INLINE void dots(const uint8_t* codes, const int8_t* x, int64_t width, i8x (&sum)[T][2]) {
    for (int t = 0; t < T; ++t) sum[t][0] = sum[t][1] = i8x{};
    for (int chunk = 0; chunk < BITS; ++chunk) {  // 4-bit codes come as four pairs of chunks, others as eight
        const uint8_t* from = codes + chunk * 64;
        for (int t = 0; t < T; ++t) {
            const int8_t* one = x + t * width + chunk * 4;
            for (int row = 0; row < 16; ++row) {
                int32_t found = 0;
                for (int column = 0; column < 4; ++column) {
                    const uint8_t code = from[row * 4 + column];
                    if (BITS == 4) {
                        found += (code & 15) * one[column] + (code >> 4) * one[16 + column];
                    } else {
                        found += (int8_t)code * one[column];
                    }
                }
                sum[t][row / 8][row % 8] += found;
            }
        }
    }
}

INLINE f8 halves8(const uint8_t* from) {
    uint16_t some[8];
    memcpy(some, from, 16);
    f8 found;
    for (int i = 0; i < 8; ++i) found[i] = widened(some[i]);
    return found;
}

INLINE f8 codes8(const int8_t* from) {
    f8 found;
    for (int i = 0; i < 8; ++i) found[i] = from[i];
    return found;
}

// 32 numbers, times `by`, to the nearest whole ones; returns their sum.
INLINE int32_t whole_numbers(const float* x, float by, int8_t* codes) {
    int32_t sum = 0;
    for (int i = 0; i < 32; ++i) {
        float one = nearbyintf(x[i] * by);
        one = one > 127.0f ? 127.0f : one > -127.0f ? one : -127.0f;
        codes[i] = (int8_t)one;
        sum += codes[i];
    }
    return sum;
}

}  // namespace

#include "kernels.inl"

const polyformer::Kernels polyformer::portable_kernels = KERNELS("portable");
