// The face that Python sees: plain functions of C. Each returns 0, or 1 with a sentence in `error` (256 bytes).

#include <algorithm>
#include <cstdio>
#include <exception>
#include <new>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "refused.h"
#include "run.h"

#define FACE extern "C" __attribute__((visibility("default")))

namespace polyformer {

const Kernels& kernels_here(bool plain) {
#if defined(__x86_64__) || defined(__i386__)
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (!plain && wide && __builtin_cpu_supports("avx512vnni")) return avx512_kernels;
    if (!plain && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return avx2_kernels;
#elif defined(__APPLE__) && defined(__aarch64__)
    if (!plain) return neon_dot_kernels;
#elif defined(__aarch64__) && defined(__linux__)
    if (!plain) return getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? neon_dot_kernels : neon_kernels;
#endif
    (void)plain;
    return portable_kernels;
}

}  // namespace polyformer

using namespace polyformer;

namespace {

template <class Work>
int32_t guarded(char* error, Work work) {
    try {
        work();
        return 0;
    } catch (const Refused& refused) {
        snprintf(error, 256, "%s", refused.what());
    } catch (const std::bad_alloc&) {
        snprintf(error, 256, "there is not enough memory");
    } catch (const std::exception& other) {
        snprintf(error, 256, "%s", other.what());
    }
    return 1;
}

}  // namespace

FACE int32_t pf_model_new(const int64_t* words, int64_t count, void** model, char* error) {
    return guarded(error, [&] { *model = new Model(decode(words, count)); });
}

FACE int32_t pf_model_give(void* model, int64_t number, int32_t kind, int32_t source, const uint8_t* data, int64_t bytes,
                           int64_t rows, int64_t columns, const int64_t* order, char* error) {
    return guarded(error, [&] {
        ((Model*)model)->give(number, (Kind)kind, Given{(Source)source, data, bytes, rows, columns, order});
    });
}

FACE void pf_model_free(void* model) { delete (Model*)model; }

FACE int32_t pf_state_new(void* model, int64_t slots, int64_t room, int32_t cell, int32_t threads, int32_t plain,
                          void** state, char* error) {
    return guarded(error, [&] {
        if (slots < 1 || slots > 4096) refuse("there can be 1 to 4096 slots, not %lld", (long long)slots);
        if (room < 1 || room > 1 << 22) refuse("there can be room for 1 to 2^22 tokens, not %lld", (long long)room);
        if (threads < 1 || threads > 256) refuse("there can be 1 to 256 threads, not %d", threads);
        if (cell < 0 || cell >= CELLS) refuse("there is no kind %d of cache", cell);
        *state = new State(*(const Model*)model, Settings{slots, (room + 15) / 16 * 16, (Cell)cell, threads, plain != 0});
    });
}

FACE void pf_state_free(void* state) { delete (State*)state; }

FACE const char* pf_state_kernels(void* state) { return ((State*)state)->kernels(); }

FACE int64_t pf_state_bytes(void* state) { return ((State*)state)->bytes(); }

FACE int64_t pf_state_bytes_for(void* state, int64_t tokens, int64_t source) {
    return ((State*)state)->bytes_for(std::max<int64_t>(tokens, 0), std::max<int64_t>(source, 0));
}

FACE int32_t pf_step(void* state, int64_t count, const int64_t* ids, const int64_t* slots, const int64_t* places,
                     int64_t wanted, const int64_t* rows, float* scores, char* error) {
    return guarded(error, [&] { ((State*)state)->step(Tokens{count, ids, slots, places, wanted, rows}, scores); });
}

FACE int32_t pf_best(void* state, int64_t count, const int64_t* ids, const int64_t* slots, const int64_t* places,
                     int64_t wanted, const int64_t* rows, int64_t top, int64_t barred, const int64_t* forbidden,
                     float* likely, int64_t* found, char* error) {
    return guarded(error, [&] {
        ((State*)state)->best(Tokens{count, ids, slots, places, wanted, rows}, Choice{top, barred, forbidden}, likely, found);
    });
}

FACE int32_t pf_read(void* state, int64_t count, const int64_t* ids, const int64_t* slots, char* error) {
    return guarded(error, [&] { ((State*)state)->read(count, ids, slots); });
}

FACE int32_t pf_truncate(void* state, int64_t slot, int64_t length, char* error) {
    return guarded(error, [&] { ((State*)state)->truncate(slot, length); });
}

FACE int32_t pf_clear(void* state, int64_t slot, char* error) {
    return guarded(error, [&] { ((State*)state)->clear(slot); });
}

FACE int32_t pf_copy(void* state, int64_t source, int64_t target, int64_t length, char* error) {
    return guarded(error, [&] { ((State*)state)->copy(source, target, length); });
}

FACE int32_t pf_earliest(void* state, int64_t slot, int64_t* length, char* error) {
    return guarded(error, [&] { *length = ((State*)state)->earliest(slot); });
}

FACE int32_t pf_length(void* state, int64_t slot, int64_t* length, char* error) {
    return guarded(error, [&] { *length = ((State*)state)->length(slot); });
}

// How quickly memory is read: the sum of some numbers, by several threads, so that it can't be left out.
FACE double pf_sum(const float* numbers, int64_t count, int32_t threads) {
    constexpr int64_t SOME = 1 << 18;
    Pool pool(std::max(threads, 1));
    std::vector<double> sums((size_t)pool.threads() * 8);
    Turns turns(pool.threads());
    const auto nothing = [] {};
    pool.run([&](int thread) {
        const auto add = [&](int64_t piece) {
            float total[64] = {0};
            for (int64_t i = piece * SOME; i < (piece + 1) * SOME; i += 64)
                for (int k = 0; k < 64; ++k) total[k] += numbers[i + k];
            for (float one : total) sums[(size_t)thread * 8] += one;
        };
        if (count >= SOME) turns.work(1, count / SOME, thread, add, nothing, nothing);
    });
    double total = 0;
    for (double one : sums) total += one;
    return total;
}
