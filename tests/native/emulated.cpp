// Holds the kernels for another processor, whose instructions are emulated, against the portable ones: every function of
// the two tables, on numbers at random, bit for bit. TABLE names the table.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../../polyformer/native/src/kernels.h"
#include "../../polyformer/native/src/vectors.h"

namespace polyformer {
extern const Kernels TABLE;
}
using namespace polyformer;

namespace {

std::mt19937 chance(1);
const Kernels &found = polyformer::TABLE, &wanted = portable_kernels;
int checked = 0;

int64_t below(int64_t n) { return (int64_t)(chance() % (uint64_t)n); }
float number() { return (float)((int64_t)chance() - ((int64_t)1 << 31)) * 0x1p-29f; }

std::vector<float> numbers(int64_t n) {
    std::vector<float> some((size_t)n);
    for (float& one : some) one = number();
    return some;
}

template <class T>
void same(const char* what, const std::vector<T>& one, const std::vector<T>& other) {
    ++checked;
    if (!std::memcmp(one.data(), other.data(), one.size() * sizeof(T))) return;
    std::printf("%s: %s differs\n", found.name, what);
    std::exit(1);
}

void quantising() {
    const int64_t n = 1 + below(130), groups = (n + GROUP - 1) / GROUP;
    std::vector<float> x = numbers(n);
    if (!below(4)) x.assign(x.size(), 0.0f);
    std::vector<int8_t> codes[2];
    std::vector<float> scales[2], sums[2];
    for (int i = 0; i < 2; ++i) {
        codes[i].resize((size_t)(groups * GROUP)), scales[i].resize((size_t)groups), sums[i].resize((size_t)groups);
        (i ? wanted : found).quantise(x.data(), n, groups, codes[i].data(), scales[i].data(), sums[i].data());
    }
    same("quantise", codes[0], codes[1]), same("quantise", scales[0], scales[1]), same("quantise", sums[0], sums[1]);
}

void products(Kind kind) {
    const int64_t groups = 1 + below(5), rows = 1 + below(13), width = groups * GROUP, live = below(2) ? 16 : 1 + below(16);
    std::vector<uint8_t> block((size_t)(kind == F32 ? width * BLOCK * 4 : groups * group_bytes(kind)));
    for (uint8_t& one : block) one = (uint8_t)below(256);
    if (kind == F32) std::memcpy(block.data(), numbers(width * BLOCK).data(), block.size());
    for (int64_t g = 0; kind != F32 && g < groups; ++g)
        for (int64_t i = 0; i < (has_minima(kind) ? 32 : 16); ++i) {
            const uint16_t half = narrowed(number());
            std::memcpy(block.data() + g * group_bytes(kind) + 2 * i, &half, 2);
        }
    std::vector<int8_t> codes((size_t)(rows * width));
    for (int8_t& one : codes) one = (int8_t)(below(255) - 127);
    if (!below(3)) codes.assign(codes.size(), below(2) ? 127 : -127);
    const std::vector<float> x = numbers(rows * width), scales = numbers(rows * groups), sums = numbers(rows * groups), bias = numbers(16);
    const Operand operand{x.data(), width, codes.data(), scales.data(), sums.data(), groups};
    const int64_t first = below(rows);
    std::vector<float> outs[2];
    for (int i = 0; i < 2; ++i) {
        outs[i].assign((size_t)(rows * 20), 0.0f);
        const Target target{live == 16 ? bias.data() : nullptr, outs[i].data(), 20, live};
        (i ? wanted : found).product[kind](block.data(), operand, first, rows - first, target);
    }
    same("a product", outs[0], outs[1]);
}

void panels(Cell cell) {
    const int64_t rows = 1 + below(12), depth = 1 + below(40), count = 1 + below(6), row_bytes = 16 * bytes_of(cell);
    std::vector<uint8_t> b((size_t)(count * depth * row_bytes));
    for (uint8_t& one : b) one = (uint8_t)below(256);
    for (size_t i = 0; cell == CELL_F16 && i < b.size(); i += 2) b[i + 1] &= 0xbf;  // finite
    if (cell == CELL_F32) std::memcpy(b.data(), numbers((int64_t)b.size() / 4).data(), b.size());
    const std::vector<float> a = numbers(rows * depth);
    std::vector<float> outs[2];
    for (int i = 0; i < 2; ++i) {
        outs[i].resize((size_t)(rows * count * 16));
        (i ? wanted : found).panels[cell](Panels{a.data(), depth, rows, b.data(), 16, depth * 16, count, depth, outs[i].data(), count * 16});
    }
    same("a product with cells", outs[0], outs[1]);
}

void rows() {
    const int64_t n = 1 + below(70);
    const std::vector<float> x = numbers(n + 8), times = numbers(n), gain = numbers(n), bias = numbers(n);
    std::vector<float> outs[2];
    for (int i = 0; i < 2; ++i) (outs[i] = x, (i ? wanted : found).softmax(outs[i].data(), n));
    same("softmax", outs[0], outs[1]);
    const bool centred = below(2), gained = below(2), moved = below(2);
    for (int i = 0; i < 2; ++i)
        (i ? wanted : found).norm(x.data(), outs[i].data(), n, gained ? gain.data() : nullptr, moved ? bias.data() : nullptr, 1e-5f, 1, centred);
    same("norm", outs[0], outs[1]);
    for (int32_t function = 0; function < 8; ++function) {
        for (int i = 0; i < 2; ++i) (i ? wanted : found).apply(function, x.data(), nullptr, outs[i].data(), n);
        same("a function", outs[0], outs[1]);
        for (int i = 0; i < 2; ++i) (i ? wanted : found).apply(function, x.data(), times.data(), outs[i].data(), n);
        same("a gate", outs[0], outs[1]);
    }
}

}  // namespace

int main() {
    for (int round = 0; round < 300; ++round) {
        quantising();
        rows();
        for (int kind = 0; kind < KINDS; ++kind) products((Kind)kind);
        for (int cell = 0; cell < CELLS; ++cell) panels((Cell)cell);
    }
    std::printf("%s: %d results are the same\n", found.name, checked);
}
