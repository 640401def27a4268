// What 64-bit ARM processors do in their own way; with DOT_PRODUCTS, by the instruction that adds up four products.

#include <arm_neon.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"
#include "vectors.h"

#define INLINE_MEMBER inline __attribute__((always_inline))

namespace {

INLINE int8x16_t four_everywhere(const int8_t* from) {
    int32_t four;
    memcpy(&four, from, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

// To each of four sums, the products of four neighbours.
INLINE int32x4_t add_products(int32x4_t total, int8x16_t codes, int8x16_t x) {
#ifdef DOT_PRODUCTS
    return vdotq_s32(total, codes, x);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(codes), vget_low_s8(x)), high = vmull_s8(vget_high_s8(codes), vget_high_s8(x));
    return vaddq_s32(total, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}

// Products of 16 rows × 32 columns of codes with whole numbers of T rows of x. Four rows' chunks fill a register.
template <int BITS, int T>
INLINE void dots(const uint8_t* codes, const int8_t* x, int64_t width, i8x (&sum)[T][2]) {
    int32x4_t total[T][4];
    for (int t = 0; t < T; ++t)
        for (int four = 0; four < 4; ++four) total[t][four] = vdupq_n_s32(0);
    for (int chunk = 0; chunk < BITS; ++chunk) {
        const int8_t* from = x + chunk * 4;
        for (int four = 0; four < 4; ++four) {
            const uint8x16_t found = vld1q_u8(codes + chunk * 64 + four * 16);
            if (BITS == 4) {
                const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(found, vdupq_n_u8(15)));
                const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(found, 4));
                for (int t = 0; t < T; ++t) {
                    total[t][four] = add_products(total[t][four], low, four_everywhere(from + t * width));
                    total[t][four] = add_products(total[t][four], high, four_everywhere(from + t * width + 16));
                }
            } else {
                for (int t = 0; t < T; ++t)
                    total[t][four] = add_products(total[t][four], vreinterpretq_s8_u8(found), four_everywhere(from + t * width));
            }
        }
    }
    for (int t = 0; t < T; ++t)
        for (int half = 0; half < 2; ++half) {
            vst1q_s32((int32_t*)&sum[t][half], total[t][2 * half]);
            vst1q_s32((int32_t*)&sum[t][half] + 4, total[t][2 * half + 1]);
        }
}

INLINE f8 halves8(const uint8_t* from) {
    uint16_t some[8];
    memcpy(some, from, 16);
    float found[8];
    vst1q_f32(found, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(some))));
    vst1q_f32(found + 4, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(some + 4))));
    return load8(found);
}

INLINE f8 codes8(const int8_t* from) {
    const int16x8_t wide = vmovl_s8(vld1_s8(from));
    float found[8];
    vst1q_f32(found, vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))));
    vst1q_f32(found + 4, vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide))));
    return load8(found);
}

// 32 numbers, times `by`, to the nearest whole ones; returns their sum.
INLINE int32_t whole_numbers(const float* x, float by, int8_t* codes) {
    int32x4_t sum = vdupq_n_s32(0);
    for (int i = 0; i < 32; i += 8) {
        const int32x4_t first = vcvtq_s32_f32(vrndnq_f32(vmulq_n_f32(vld1q_f32(x + i), by)));
        const int32x4_t second = vcvtq_s32_f32(vrndnq_f32(vmulq_n_f32(vld1q_f32(x + i + 4), by)));
        sum = vaddq_s32(sum, vaddq_s32(first, second));
        vst1_s8(codes + i, vqmovn_s16(vcombine_s16(vqmovn_s32(first), vqmovn_s32(second))));
    }
    return vaddvq_s32(sum);
}

}  // namespace

#include "kernels.inl"
