// What processors with AVX2 and those with AVX-512 do alike.

namespace {

INLINE f8 halves8(const uint8_t* from) { return (f8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }

INLINE f8 codes8(const int8_t* from) {
    return (f8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
}

// 32 numbers, times `by`, to the nearest whole ones; returns their sum.
INLINE int32_t whole_numbers(const float* x, float by, int8_t* codes) {
    const __m256 factor = _mm256_set1_ps(by);
    __m256i part[4];
    for (int i = 0; i < 4; ++i) part[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), factor));
    const __m256i total = _mm256_add_epi32(_mm256_add_epi32(part[0], part[1]), _mm256_add_epi32(part[2], part[3]));
    const __m256i mixed = _mm256_packs_epi16(_mm256_packs_epi32(part[0], part[1]), _mm256_packs_epi32(part[2], part[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i*)codes, _mm256_permutevar8x32_epi32(mixed, order));
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

}  // namespace
